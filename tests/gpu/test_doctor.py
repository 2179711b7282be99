from taskgroup import doctor


def test_every_op_runs_on_the_gpu(capsys):
    assert doctor.main() == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "GPU 0 " in said
    for op in ("affinity_update_", "combine", "gram_affinity_update_", "task_gram"):
        assert f"{op} cpp on cpu, cuda on cuda:0" in said
