from taskgroup import __main__ as doctor
from tests.gpu.device import GPU, needs_cuda

OPS = ("affinity_update_", "combine", "gram_affinity_update_", "task_gram")


def test_nothing_is_broken(capsys):
    status = doctor.main()
    said = " ".join(capsys.readouterr().out.split())
    assert status == 0, said
    assert all(f"{op} " in said for op in OPS)


@needs_cuda
def test_every_op_runs_on_the_gpu(capsys):
    doctor.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "GPU 0 " in said
    for op in OPS:
        assert f"on {GPU}:0" in said.partition(f"{op} ")[2].partition(" (of ")[0]
