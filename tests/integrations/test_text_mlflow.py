"""The example of the Hugging Face Trainer on two text data sets, with MLflow."""

from pathlib import Path

import pytest

import taskgroup as tg

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.usefixtures("accelerate")
def test_one_run_in_mlflow_and_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.syspath_prepend(EXAMPLES)
    import mlflow
    import text_mlflow

    before = mlflow.get_tracking_uri()
    try:
        groups, recorder = text_mlflow.train(tmp_path, epochs=1)
        (run,) = mlflow.MlflowClient().search_runs(["0"])
        images = mlflow.MlflowClient().list_artifacts(run.info.run_id, "images")
    finally:
        mlflow.set_tracking_uri(before)
    assert run.info.status == "FINISHED"
    found = run.data.metrics
    assert images
    for task in text_mlflow.TASKS:
        assert found[f"taskgroup/metric/{task}"] == found[f"eval_{task}_accuracy"]
        assert found[f"taskgroup/loss/{task}"] > 0  # by the Recorder
        assert found[f"eval_{task}_loss"] > 0  # by the Trainer
    (line,) = tg.recording.read_lines(recorder.folder / "evaluations.jsonl")
    assert line["batch"] == 30
    assert line["better"] == dict.fromkeys(text_mlflow.TASKS, "higher")
    batches = list(tg.recording.read_lines(recorder.folder / "metrics.jsonl"))
    assert len(batches) == 30
    assert batches[0]["steps"] == 4
    assert groups.affinity.observed.all()  # pairs of both data sets as well
    page = recorder.report().read_text("utf-8")
    assert all(task in page for task in text_mlflow.TASKS)
