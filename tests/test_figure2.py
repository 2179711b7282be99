"""The benchmark behind Figure 2: its methods, its time limit, its rows, and its pictures."""

import csv
import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import taskgroup as tg
from benchmarks import figure2, record

benchmark = importlib.import_module("benchmarks.test_figure2")

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = benchmark.Scale(("tiny",), n_images=1, warmup=1, batches=1, size=(16, 16))
CASES = [benchmark.Case(data, "tiny", "float32") for data in benchmark.DATA]


@pytest.fixture(params=CASES, ids=lambda case: case.data)
def training(request):
    return benchmark.Training(request.param, TINY, CPU)


def setting(name, n_groups=None):
    (found,) = [s for s in benchmark.settings() if (s.name, s.n_groups) == (name, n_groups)]
    return found


def groups_of(training, setting, n_batches):
    """The groups with which the model is called in each batch."""
    asked = []
    losses = training.losses
    training.losses = lambda group=None: (asked.append(group.tasks), losses(group))[1]
    batch, _ = setting.make(training)
    found = []
    for _ in range(n_batches):
        asked.clear()
        batch()
        found.append(list(asked))
    return found


def test_every_method_of_the_package_is_measured(monkeypatch):
    names = [setting.name for setting in benchmark.settings()]
    assert names[0] == benchmark.JOINT
    assert set(tg.methods.METHODS) <= set(names)
    monkeypatch.setitem(tg.methods.METHODS, "newest", tg.methods.GD)
    assert [s.name for s in benchmark.settings()] == [*names, "newest"]


def test_every_method_moves_the_encoder_and_all_heads(training):
    for setting in benchmark.settings():
        training.restart()
        before = [p.detach().clone() for p in training.model.parameters()]
        batch, _ = setting.make(training)
        for _ in range(setting.cycle):
            batch()
        after = training.model.parameters()
        moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        assert all(moved), setting.name


@pytest.mark.parametrize("n_groups", benchmark.GROUPS)
def test_selective_updates_step_on_every_task_once_a_batch(training, n_groups):
    for groups in groups_of(training, setting("selective", n_groups), 3):
        assert len(groups) == n_groups
        assert sorted(sum(groups, ())) == sorted(training.tasks)


@pytest.mark.parametrize("n_groups", benchmark.GROUPS)
def test_one_group_a_batch_and_a_second_one_where_it_is_observed(training, n_groups):
    one_group = setting("one group per batch", n_groups)
    found = groups_of(training, one_group, one_group.cycle)
    assert sorted(map(len, found)) == [1] * (one_group.cycle - 1) + [2]
    assert len({group for groups in found for group in groups}) == n_groups


def test_memory_holds_parameters_moments_and_gradients_and_more_for_each_task(training):
    peaks = {}
    for name in (benchmark.JOINT, "gd", "K gradients, no solver"):
        training.restart()
        peaks[name] = benchmark.measure(setting(name), training, TINY, lambda: 1.0).peak
    parameters = sum(p.nbytes for p in training.model.parameters())
    encoder = sum(p.nbytes for p in training.model.encoder.parameters())
    assert peaks[benchmark.JOINT] > 4 * parameters
    assert peaks["gd"] == pytest.approx(peaks[benchmark.JOINT], rel=0.01)
    assert peaks["K gradients, no solver"] > 3 * parameters + len(training.tasks) * encoder


def test_methods_start_from_the_same_weights(training):
    def losses():
        return torch.stack([*training.losses().values()]).tolist()

    first = losses()
    batch, _ = setting(benchmark.JOINT).make(training)
    batch()
    assert losses() != first
    training.restart()
    assert losses() == first


class Day:
    """A clock that the test sets by hand."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def run(monkeypatch):
    """A run without networks, whose methods take the given seconds."""
    day = Day()
    rows = []

    def start(seconds, methods, models=("tiny",)):
        def make_setting(name, act):
            def make(training):
                def batch():
                    day.now += act(training.model)

                return batch, None

            return benchmark.Setting(name, None, make)

        class Pretended:
            def __init__(self, case, scale, device):
                self.model, self.device = case.model, device

            def restart(self):
                pass

        def measure(setting, training, scale, left):
            batch, _ = setting.make(training)
            seconds = []
            for _ in range(2):
                began = day.now
                batch()
                if left() < 0:
                    return None
                seconds.append(day.now - began)
            return benchmark.Figures(seconds, 1000)

        scale = dataclasses.replace(TINY, models=models, dtypes=("float32",))
        monkeypatch.setitem(benchmark.SCALES, "cpu", scale)
        monkeypatch.setattr(benchmark, "Training", Pretended)
        monkeypatch.setattr(benchmark, "measure", measure)
        settings = [make_setting(name, act) for name, act in methods.items()]
        monkeypatch.setattr(benchmark, "settings", lambda: settings)
        started = benchmark.Run(CPU, seconds, rows.append, lambda line: None, clock=day)
        started.everything()
        return started, rows

    return start


def fails(error):
    def act(model):
        raise error

    return act


def test_what_does_not_fit_or_is_not_there_is_a_row_and_the_others_go_on(run):
    methods = {
        benchmark.JOINT: lambda model: 0.5,
        "large": fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")),
        "large, on a host": fails(RuntimeError("DefaultCPUAllocator: not enough memory: you ...")),
        "absent": fails(benchmark.NotInstalledError("pip install it")),
        "unsolved": fails(tg.methods.NoWeightsError("none")),
        "wrong": fails(ZeroDivisionError("division by zero")),
        "slow": lambda model: 1.5,
    }
    done, rows = run(1000.0, methods)
    assert [(row.method, row.reason, row.relative) for row in rows[: len(methods)]] == [
        (benchmark.JOINT, "", 1.0),
        ("large", "out of memory", None),
        ("large, on a host", "out of memory", None),
        ("absent", "not installed", None),
        ("unsolved", "no weights found", None),
        ("wrong", "ZeroDivisionError: division by zero", None),
        ("slow", "", 3.0),
    ]
    assert len(rows) == len(methods) * len(benchmark.DATA)
    assert not done.left_out
    assert [text.split(": ")[0] for text in done.failed] == [
        f"{data} tiny float32, wrong" for data in benchmark.DATA
    ]


def test_a_missing_package_is_noticed_when_the_method_is_made(training):
    class Absent(tg.methods.GD):
        _requires = ("no_such_package",)

    with pytest.raises(benchmark.NotInstalledError, match="no_such_package"):
        benchmark.method(Absent)(training)


def test_the_run_ends_in_time_and_keeps_its_rows(run):
    methods = {benchmark.JOINT: lambda model: 1.0, "b": lambda model: 2.0, "c": lambda model: 4.0}
    done, rows = run(7.0, methods)
    assert [row.method for row in rows] == [benchmark.JOINT, "b"]
    assert done.measured == 2
    first, second = benchmark.DATA
    assert done.left_out == [f"{first} tiny float32 (c)", f"{second} tiny float32"]
    assert not done.failed


def test_the_largest_backbone_that_fits_goes_next(run):
    work = benchmark.WORK
    methods = {benchmark.JOINT: lambda model: 1.0 * work[model]}
    models = ("vit-t", "vit-s", "vit-b", "vit-l")
    # Three batches of a ViT-B are predicted to take 42 s, of a ViT-L 150 s: too much for half of
    # the 246 s that are left at first, not for the 190 s after both ViT-B.
    done, rows = run(250.0, methods, models)
    first, second = benchmark.DATA
    assert [(row.data, row.model) for row in rows] == [
        (first, "vit-t"),
        (second, "vit-t"),
        (first, "vit-b"),
        (second, "vit-b"),
        (first, "vit-l"),
        (second, "vit-s"),
        (first, "vit-s"),
    ]
    assert done.left_out == [f"{second} vit-l float32"]


def test_the_budget_stops_between_batches(training):
    """The real measurement; the other tests of the time limit replace it."""
    times = iter([1.0, -1.0, -1.0])
    scale = dataclasses.replace(TINY, batches=5)
    found = benchmark.measure(setting(benchmark.JOINT), training, scale, lambda: next(times))
    assert len(found.seconds) == 1
    assert benchmark.measure(setting(benchmark.JOINT), training, scale, lambda: -1.0) is None


def made_up(**values):
    """An invented row."""
    kinds = {"int": 0, "str": "made up", "float | None": None, "int | None": None}
    empty = {field.name: kinds[field.type] for field in dataclasses.fields(benchmark.Row)}
    return benchmark.Row(**{**empty, "reason": "", "images": "8x512x512", **values})


def made_up_rows(device="cuda", machine="Made-up GPU"):
    for data, dtype in [("PASCAL-Context", "float32"), ("Taskonomy", "bfloat16")]:
        for model in ("vit-t", "vit-l"):
            common = {"data": data, "dtype": dtype, "model": model, "K": 5}
            common |= {"device": device, "machine": machine}
            for name, m, relative in [
                (benchmark.JOINT, None, 1.0),
                ("selective", 3, 2.75),
                ("mgda", None, 5.5),
            ]:
                yield made_up(
                    **common, method=name, M=m, ms=123.4 * relative, peak_gb=7.5 * relative,
                    relative=relative, relative_peak=1.25 if m else relative,
                )  # fmt: skip
            yield made_up(**common, method="graddrop", reason="out of memory")
            yield made_up(**common, method="nash-mtl", reason="not installed")


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / figure2.PAGE
    page.write_text(f"Before.\n\n{figure2.BEGIN}\nold\n{figure2.END}\n\nAfter.\n")
    return tmp_path


def test_each_row_is_kept_when_it_is_made(tmp_path):
    path = tmp_path / "new" / "figure2.csv"
    for n, row in enumerate(made_up_rows(), start=1):
        record.append(path, row)
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
        assert len(kept) == n
        assert kept[-1]["method"] == row.method
        assert kept[-1]["reason"] == row.reason


def test_rows_of_a_gpu_become_pictures_and_tables(repository):
    path = repository / "benchmarks/results/made-up/figure2.csv"
    for row in made_up_rows():
        record.append(path, row)
    figure2.write(repository)
    text = (repository / figure2.PAGE).read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    assert "Made-up GPU" in text
    for data, dtype in [("pascal-context", "float32"), ("taskonomy", "bfloat16")]:
        picture = f"images/figure2-made-up-{data}.png"
        assert f"]({picture})" in text
        with Image.open(repository / "docs" / picture) as image:
            image.load()
            assert image.width > 700  # as wide as a page
            assert image.getpixel((0, 0)) == (255, 255, 255, 255)  # read on dark pages, too
        assert f"| | ViT-T {dtype} | ViT-L {dtype} |" in text
    assert "| joint training | 123 ms, 7.5 GB | 123 ms, 7.5 GB |" in text
    assert "| selective, M = 3 | 2.75, 1.25 | 2.75, 1.25 |" in text
    assert "| graddrop | out of memory | out of memory |" in text
    assert "Not installed there: nash-mtl." in text
    figure2.write(repository)
    assert (repository / figure2.PAGE).read_text() == text


def test_a_later_row_takes_the_place_of_an_earlier_one(repository):
    path = repository / "benchmarks/results/made-up/figure2.csv"
    first, *_ = rows = list(made_up_rows())
    for row in [*rows, dataclasses.replace(first, ms=999.0)]:
        record.append(path, row)
    found = figure2.latest(path)
    assert len(found) == len(rows)
    assert {row["ms"] for row in found if row["method"] == benchmark.JOINT} == {"123.4", "999.0"}


def test_what_a_host_measured_is_no_figure(repository):
    for row in made_up_rows(device="cpu"):
        record.append(repository / "benchmarks/results/made-up/figure2.csv", row)
    figure2.write(repository)
    assert figure2.NOTHING in (repository / figure2.PAGE).read_text()
    assert not (repository / "docs/images").exists()


def test_a_page_without_the_marks_is_left_as_it_is(repository):
    page = repository / figure2.PAGE
    page.write_text("No marks.\n")
    with pytest.raises(SystemExit, match="lacks the marks"):
        figure2.write(repository)
    assert page.read_text() == "No marks.\n"


def test_the_page_shows_what_was_measured():
    """If this fails, there are new rows: run ``python -m benchmarks.figure2``."""
    text = (ROOT / figure2.PAGE).read_text("utf-8")
    _, _, rest = text.partition(f"{figure2.BEGIN}\n")
    shown, mark, _ = rest.partition(f"\n{figure2.END}")
    assert mark
    assert shown == figure2.section(ROOT, draws=False)
