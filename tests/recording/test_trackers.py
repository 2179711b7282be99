import csv
import importlib
import itertools
import json
import struct
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from taskgroup.recording import trackers
from taskgroup.recording.trackers import tracker

PIXELS = np.zeros((6, 6, 3), np.uint8)
PIXELS[:3] = (255, 0, 0)

# Names of tasks may hold anything; these are hard for one tracker or another.
TASKS = [
    *("a.b", "a>b", "a<b", "a:b", "a*b", "b*", "a b", " a ", "a//b", "../a", ".", "", "a->b"),
    *(
        "a\nb",
        "'a'",
        '"',
        "\\",
        "100%",
        "[0]",
        "{a}",
        "$a",
        "#1",
        "a+b",
        "a=b,c",
        "ö",
        "深度",
        "🙂",
    ),
    *("a_b", "a-b", "t" * 400, "t" * 399 + "u", "_a", "/a", "a/", "loss/a"),
]


def read_events(folder):
    """The scalars ``{name: [(step, value), ...]}`` and the images of a folder of TensorBoard."""
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    events.Reload()
    scalars = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    images = {name: events.Images(name) for name in events.Tags()["images"]}
    return scalars, images


def read_wandb(folder):
    """The rows of the history of an offline run, and ``{metric: its x axis}``."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process may still be writing the file after run.finish()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    rows, axes = [], {}
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a block of LevelDB's log format ends
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                row = {}
                for item in record.history.item:
                    row["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
                rows.append(row)
            elif record.WhichOneof("record_type") == "metric":
                axes[record.metric.name] = record.metric.step_metric
    return rows, axes


def read_csv(folder):
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def history(mlflow, run_id, name):
    return [(m.step, m.value) for m in mlflow.MlflowClient().get_metric_history(run_id, name)]


def quiet_lightning():
    """Lightning, without the warnings of its own making when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("lightning.pytorch.loggers")


# --- TensorBoard ---------------------------------------------------------------------------------


def test_summary_writer(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        log = tracker(writer)
        log.scalars({"loss/depth": 0.5, "affinity/depth->edges": float("nan")}, 3)
        log.scalars({"loss/depth": float("inf")}, 4)
        log.image("affinity", PIXELS, 4)
    scalars, images = read_events(tmp_path)
    assert scalars["taskgroup/loss/depth"] == [(3, 0.5), (4, float("inf"))]
    assert [step for step, _ in scalars["taskgroup/affinity/depth->edges"]] == [3]
    (image,) = images["taskgroup/affinity"]
    assert (image.step, image.width, image.height) == (4, 6, 6)


# --- W&B -----------------------------------------------------------------------------------------


def ours(rows, name):
    return [(row["taskgroup/batch"], row[name]) for row in rows if name in row]


def test_wandb_run(wandb, tmp_path):
    run = wandb.init()
    log = tracker(run)
    for batch in range(3):
        log.scalars({"loss/depth": batch / 2}, batch)
    log.image("affinity", PIXELS, 2)
    run.finish()
    rows, axes = read_wandb(tmp_path)
    assert ours(rows, "taskgroup/loss/depth") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert ours(rows, "taskgroup/affinity/_type") == [(2, "image-file")]
    assert axes["taskgroup/loss/depth"] == axes["taskgroup/affinity"] == "taskgroup/batch"
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/taskgroup/affinity_*.png"))


def without_a_step(run, batch):
    run.log({"mine": batch})


def several_without_a_step(run, batch):
    run.log({"mine": batch})
    run.log({"other": batch})
    run.log({"third": batch})


def seldom_without_a_step(run, batch):
    if batch % 5 == 0:
        run.log({"mine": batch})


def in_an_evaluation_first(run, batch):
    if batch == 0:
        for _ in range(50):
            run.log({"other": batch})
    if batch > 10:
        run.log({"mine": batch})


def with_the_batch(run, batch):
    run.log({"mine": batch}, step=batch)


def with_the_batch_from_one(run, batch):
    run.log({"mine": batch}, step=batch + 1)


def with_the_samples(run, batch):
    run.log({"mine": batch}, step=32 * batch)


def with_the_batch_now_and_then(run, batch):
    if batch % 5 == 0:
        run.log({"mine": batch}, step=batch)


def with_every_fourth_batch(run, batch):
    if batch % 4 == 0:
        run.log({"mine": batch}, step=batch // 4)


USERS = [
    without_a_step,
    several_without_a_step,
    seldom_without_a_step,
    in_an_evaluation_first,
    with_the_batch,
    with_the_batch_from_one,
    with_the_samples,
    with_the_batch_now_and_then,
]


class Spy:
    """A run that notes what the user logs."""

    def __init__(self, run):
        self.run = run
        self.logged = set()

    def log(self, values, **kwargs):
        self.logged.update(values.items())
        self.run.log(values, **kwargs)


@pytest.mark.parametrize(("we_come_first", "every"), [(False, 1), (True, 1), (True, 5)])
def test_wandb_loses_neither_the_users_values_nor_ours(wandb, tmp_path, we_come_first, every):
    # Steps that count more slowly than we log leave no rows for our values.
    users = [*USERS, with_every_fourth_batch] if every == 5 else USERS
    spies = []
    for user in users:
        folder = tmp_path / user.__name__
        folder.mkdir()
        run = wandb.init(dir=folder)
        log, spy = tracker(run), Spy(run)
        spies.append(spy)
        for batch in range(20):
            if not we_come_first:
                user(spy, batch)
            if batch % every == 0:
                log.scalars({"loss/depth": batch / 2, "groups": 3.0}, batch)
            if batch % 10 == 0:
                log.image("affinity", PIXELS, batch)
            if we_come_first:
                user(spy, batch)
            if batch % 10 == 0:
                log.scalars({"metric/depth": float(batch)}, batch)
        run.finish()
    for user, spy in zip(users, spies, strict=True):
        rows, _ = read_wandb(tmp_path / user.__name__)
        found = {item for row in rows for item in row.items() if "/" not in item[0]}
        assert spy.logged <= found, user.__name__
        expected = [(batch, batch / 2) for batch in range(0, 20, every)]
        assert ours(rows, "taskgroup/loss/depth") == expected, user.__name__
        assert ours(rows, "taskgroup/metric/depth") == [(0, 0), (10, 10)], user.__name__
        assert [batch for batch, _ in ours(rows, "taskgroup/affinity/_type")] == [0, 10]


def test_wandb_keeps_what_is_logged_again_after_going_back(wandb, tmp_path):
    """An older checkpoint is loaded, and the same run goes on from its batch."""
    run = wandb.init()
    log = tracker(run)
    batches = [0, 1, 2, 3, 1, 2, 3, 4]
    for n, batch in enumerate(batches):
        log.scalars({"loss/depth": float(n)}, batch)
    run.finish()
    rows, _ = read_wandb(tmp_path)
    assert ours(rows, "taskgroup/loss/depth") == list(zip(batches, range(8), strict=True))


@pytest.mark.parametrize("what", ["module", "run.log"])
def test_wandb_module_and_method(wandb, tmp_path, what):
    log = tracker(wandb) if what == "module" else None  # a trainer may start the run later
    run = wandb.init()
    log = log or tracker(run.log)
    for batch in (0, 1):
        run.log({"mine": batch})
        run.log({"other": batch})
        log.scalars({"groups": 2.0}, batch)
    run.finish()
    assert ours(read_wandb(tmp_path)[0], "taskgroup/groups") == [(0, 2), (1, 2)]


def test_wandb_module_without_a_run(wandb):
    log = tracker(wandb)
    with pytest.warns(RuntimeWarning, match=r"W&B .* call wandb\.init\(\)"):
        log.scalars({"groups": 2.0}, 0)


def test_wandb_shared_by_several_processes(wandb):
    """Such a run takes no steps, and has none (it needs a server, so this one is made up)."""

    class Run:
        settings = SimpleNamespace(mode="shared")

        def __init__(self):
            self.logged = []

        def define_metric(self, name, step_metric):
            pass

        @property
        def step(self):
            raise NotImplementedError

        def log(self, values):
            self.logged.append(values)

    run = Run()
    tracker(run).scalars({"groups": 2.0}, 0)
    assert run.logged == [{"taskgroup/groups": 2.0, "taskgroup/batch": 0}]


def test_wandb_disabled(wandb):
    log = tracker(wandb.init(mode="disabled"))
    log.scalars({"groups": 2.0}, 0)
    log.image("affinity", PIXELS, 0)


# --- MLflow --------------------------------------------------------------------------------------


def test_mlflow_module(mlflow):
    log = tracker(mlflow)  # before the run is started, as a trainer does
    with mlflow.start_run() as run:
        log.scalars({"loss/depth": 0.5, "affinity/depth->edges": float("nan")}, 3)
        log.scalars({"loss/depth": float("inf")}, 4)
        log.image("affinity", PIXELS, 4)
        with mlflow.start_run(nested=True):
            log.scalars({"loss/depth": 0.25}, 5)
    log.scalars({"loss/depth": 0.125}, 6)  # no new run is started for what comes after the end
    assert not mlflow.active_run()
    found = history(mlflow, run.info.run_id, "taskgroup/loss/depth")
    assert found == [(3, 0.5), (4, float("inf")), (5, 0.25), (6, 0.125)]
    assert history(mlflow, run.info.run_id, "taskgroup/affinity/depth to edges")[0][0] == 3
    files = mlflow.MlflowClient().list_artifacts(run.info.run_id, "images")
    assert any("affinity" in file.path and file.path.endswith(".png") for file in files)


def test_mlflow_starts_a_run_as_its_own_functions_do(mlflow):
    tracker(mlflow).scalars({"groups": 2.0}, 0)
    assert history(mlflow, mlflow.active_run().info.run_id, "taskgroup/groups") == [(0, 2)]


def test_mlflow_active_run(mlflow):
    with mlflow.start_run() as run:
        log = tracker(run)
    log.scalars({"groups": 2.0}, 0)
    assert history(mlflow, run.info.run_id, "taskgroup/groups") == [(0, 2)]


def test_mlflow_takes_more_values_than_fit_into_one_request(mlflow):
    with mlflow.start_run() as run:
        tracker(mlflow).scalars({f"loss/task{k}": float(k) for k in range(1001)}, 0)
    assert len(mlflow.get_run(run.info.run_id).data.metrics) == 1001


# --- Lightning -----------------------------------------------------------------------------------


def test_csv_logger(tmp_path):
    logger = quiet_lightning().CSVLogger(tmp_path)
    log = tracker(logger)
    assert not list(tmp_path.iterdir())  # opened at the first value
    for batch in range(2):
        log.scalars({"loss/depth": batch / 2}, batch)
    log.image("affinity", PIXELS, 1)
    logger.save()
    assert read_csv(tmp_path) == [
        {"step": "0", "taskgroup/loss/depth": "0.0"},
        {"step": "1", "taskgroup/loss/depth": "0.5"},
    ]


def test_tensorboard_logger(tmp_path):
    logger = quiet_lightning().TensorBoardLogger(tmp_path, name=None, version="")
    log = tracker(logger)
    log.scalars({"loss/depth": 0.5}, 3)
    log.image("affinity", PIXELS, 3)
    logger.finalize("success")
    scalars, images = read_events(tmp_path)
    assert scalars["taskgroup/loss/depth"] == [(3, 0.5)]
    assert [image.step for image in images["taskgroup/affinity"]] == [3]


def test_wandb_logger(wandb, tmp_path):
    """Our x axis is the batch, not the number of Lightning's steps, which has a pattern "*"."""
    logger = quiet_lightning().WandbLogger(save_dir=tmp_path)
    log = tracker(logger)
    for batch in range(3):
        log.scalars({"loss/depth": batch / 2}, batch)
        logger.log_metrics({"mine": batch}, step=4 * batch)
    log.image("affinity", PIXELS, 2)
    wandb.finish()
    rows, axes = read_wandb(tmp_path)
    assert ours(rows, "taskgroup/loss/depth") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert ours(rows, "taskgroup/affinity/_type") == [(2, "image-file")]
    assert axes["taskgroup/loss/depth"] == "taskgroup/batch"
    mine = [(row["trainer/global_step"], row["mine"]) for row in rows if "mine" in row]
    assert mine == [(0, 0), (4, 1), (8, 2)]


def test_mlflow_logger(mlflow):
    logger = quiet_lightning().MLFlowLogger(tracking_uri=mlflow.get_tracking_uri())
    log = tracker(logger)
    log.scalars({"loss/depth": 0.5, "affinity/depth->edges": 0.25}, 3)
    log.image("affinity", PIXELS, 3)
    assert history(mlflow, logger.run_id, "taskgroup/loss/depth") == [(3, 0.5)]
    assert history(mlflow, logger.run_id, "taskgroup/affinity/depth to edges") == [(3, 0.25)]
    assert mlflow.MlflowClient().list_artifacts(logger.run_id, "images")


def test_lightning_on_another_rank(tmp_path, monkeypatch):
    """Where the experiment of a logger is a dummy, nothing is written and nothing warns."""
    loggers = quiet_lightning()
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    for logger in (loggers.TensorBoardLogger(tmp_path), loggers.logger.DummyLogger()):
        log = tracker(logger)
        log.scalars({"groups": 2.0}, 0)
        log.image("affinity", PIXELS, 0)
    assert not list(tmp_path.iterdir())


# --- functions, lists, own trackers --------------------------------------------------------------


class Own:
    def __init__(self):
        self.seen = []

    def scalars(self, values, step):
        self.seen.append((values, step))

    def image(self, name, pixels, step):
        self.seen.append((name, pixels.shape, step))


def test_functions_and_lists(tmp_path):
    seen, own = [], Own()

    def record(values, step, more=None):
        seen.append((values, step))

    with SummaryWriter(str(tmp_path)) as writer:
        log = tracker([record, (writer, own), None])
        log.scalars({"groups": 2.0}, 5)
        log.image("affinity", PIXELS, 5)
    assert seen == [({"taskgroup/groups": 2.0}, 5)]
    assert own.seen == [({"taskgroup/groups": 2.0}, 5), ("taskgroup/affinity", (6, 6, 3), 5)]
    assert read_events(tmp_path)[0]["taskgroup/groups"] == [(5, 2.0)]


def test_a_function_may_keep_and_change_what_it_gets():
    kept = []
    values = {"groups": 2.0}
    log = tracker([lambda values, step: values.clear(), lambda values, step: kept.append(values)])
    log.scalars(values, 0)
    assert kept == [{"taskgroup/groups": 2.0}]
    assert values == {"groups": 2.0}


@pytest.mark.parametrize(
    ("log", "got"),
    [
        ("tensorboard", "got str"),
        (3, "got int"),
        ({"a": 1}, "got dict"),
        (json, "got the module json"),
        (SummaryWriter, "got the class SummaryWriter: pass an instance"),
        (lambda values: None, "does not take a dict of values and a step"),
        (lambda values, *, step: None, "does not take a dict of values and a step"),
        ([lambda values, step: None, "wandb"], "got str"),
    ],
)
def test_wrong_objects(log, got):
    with pytest.raises(TypeError, match=r"log must be a SummaryWriter, a W&B run, .*") as error:
        tracker(log)
    assert got in str(error.value)


def test_a_trainer_is_no_logger():
    class Trainer:  # of Transformers
        def log_metrics(self, split, metrics):
            pass

    with pytest.raises(TypeError, match=r"Trainer\.log_metrics\(split, metrics\)"):
        tracker(Trainer())


# --- what every tracker must bear ----------------------------------------------------------------


@pytest.fixture(params=["SummaryWriter", "W&B", "MLflow", "CSVLogger", "MLFlowLogger"])
def counted(request, tmp_path):
    """A log, and a function that gives the numbers of the values that came through."""
    if request.param == "SummaryWriter":
        writer = SummaryWriter(str(tmp_path))

        def read():
            writer.close()
            return [value for ((_, value),) in read_events(tmp_path)[0].values()]

        return writer, read
    if request.param == "W&B":
        run = request.getfixturevalue("wandb").init()

        def read():
            run.finish()
            ((row,), _) = read_wandb(tmp_path)
            return [v for k, v in row.items() if k.startswith("taskgroup/") and k[10:] != "batch"]

        return run, read
    loggers = quiet_lightning()
    if request.param == "CSVLogger":
        logger = loggers.CSVLogger(tmp_path)

        def read():
            logger.save()
            (row,) = read_csv(tmp_path)
            return [float(value) for name, value in row.items() if name != "step"]

        return logger, read
    mlflow = request.getfixturevalue("mlflow")
    if request.param == "MLflow":
        return mlflow, lambda: list(mlflow.active_run() and values_of(mlflow, mlflow.active_run()))
    logger = loggers.MLFlowLogger(tracking_uri=mlflow.get_tracking_uri())
    return logger, lambda: list(values_of(mlflow, mlflow.get_run(logger.run_id)))


def values_of(mlflow, run):
    return mlflow.get_run(run.info.run_id).data.metrics.values()


def test_names_of_tasks_may_hold_any_character(counted):
    log, read = counted
    names = [f"loss/{task}" for task in TASKS]
    names += [f"affinity/{a}->{b}" for a, b in itertools.pairwise(TASKS[:27])]
    tracker(log).scalars({name: float(n) for n, name in enumerate(names)}, 0)
    assert sorted(read()) == list(range(len(names)))


def test_values_that_are_not_finite_are_passed_on(counted):
    log, read = counted
    values = [float("-inf"), 1.0, float("inf"), float("nan")]
    tracker(log).scalars({f"loss/{n}": value for n, value in enumerate(values)}, 0)
    np.testing.assert_array_equal(np.sort(read()), values)


# --- errors --------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(trackers.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_tracker_that_fails_warns_once_and_is_tried_again(clock):
    calls, failing = [], True

    def record(values, step):
        calls.append(step)
        clock.now += 3
        if failing:
            raise OSError("no space left on device")

    log = tracker(record)
    with pytest.warns(RuntimeWarning, match="function record failed .*OSError: no space left"):
        log.scalars({"groups": 1.0}, 0)
    log.scalars({"groups": 1.0}, 1)
    assert calls == [0]  # it rests for 60 seconds
    clock.now += 59.9
    log.scalars({"groups": 1.0}, 2)
    assert calls == [0]
    clock.now += 0.1
    log.scalars({"groups": 1.0}, 3)  # fails again, without a second warning
    assert calls == [0, 3]
    failing = False
    clock.now += 60
    log.scalars({"groups": 1.0}, 4)
    log.scalars({"groups": 1.0}, 5)
    assert calls == [0, 3, 4, 5]


def test_a_tracker_that_fails_to_show_images_still_gets_values(clock):
    class Blind(Own):
        def image(self, name, pixels, step):
            clock.now += 5
            raise ModuleNotFoundError("No module named 'PIL'")

    blind, other = Blind(), Own()
    log = tracker([blind, other])
    with pytest.warns(RuntimeWarning, match="Blind failed to take images .*PIL") as caught:
        log.image("affinity", PIXELS, 0)
    assert len(caught) == 1
    log.scalars({"groups": 1.0}, 0)
    assert blind.seen == [({"taskgroup/groups": 1.0}, 0)]
    assert len(other.seen) == 2  # those that follow in a list are not concerned


def test_keyboard_interrupt_passes():
    def record(values, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracker(record).scalars({"groups": 1.0}, 0)


def test_a_finished_run_of_wandb(wandb):
    run = wandb.init()
    log = tracker(run)
    log.scalars({"groups": 1.0}, 0)
    run.finish()
    with pytest.warns(RuntimeWarning, match=r"W&B failed to take values .*finished"):
        log.scalars({"groups": 1.0}, 1)


def test_a_server_of_mlflow_that_cannot_be_reached(mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:1")
    with pytest.warns(RuntimeWarning, match="MLflow failed to take values"):
        tracker(mlflow).scalars({"groups": 1.0}, 0)
