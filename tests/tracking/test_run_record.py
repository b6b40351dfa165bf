"""The record of a run that is interrupted and goes on: first and latest values are the run's, not the process's."""

from importlib.metadata import version

from dpo_ref.cli import train
from dpo_ref.tracking.run_record import RunRecord, read
from dpo_ref.tracking.tracker import NoTracker


def record(folder):
    return RunRecord(folder / "metrics.jsonl", NoTracker())


def test_going_on_keeps_what_came_before_the_checkpoint(tmp_path):
    before = record(tmp_path)
    for step, loss in ((1, 0.7), (2, 0.6), (3, float("nan"))):
        before.add({"train/loss": loss}, step)
    after = record(tmp_path)
    after.go_on_after(2)
    assert after.last == {"train/loss": 0.6}
    after.add({"train/loss": 0.5}, 3)
    assert after.first == {"train/loss": 0.7}
    assert after.last == {"train/loss": 0.5}
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_value_that_is_not_finite_is_not_the_latest_after_a_resume(tmp_path):
    before = record(tmp_path)
    before.add({"train/loss": 0.7}, 1)
    before.add({"train/loss": float("nan")}, 2)
    after = record(tmp_path)
    after.go_on_after(2)
    assert after.last == {"train/loss": 0.7}


def test_a_group_that_is_measured_anew_forgets_what_is_missing(tmp_path):
    run_record = record(tmp_path)
    run_record.replace_under("evaluation", {"gold": 0.1, "kl": 2.0}, 1)
    run_record.add({"train/loss": 0.6}, 1)
    run_record.replace_under("evaluation", {"gold": 0.2}, 2)
    assert run_record.last == {"evaluation/gold": 0.2, "train/loss": 0.6}
    assert run_record.first["evaluation/kl"] == 2.0


def test_versions_of_what_is_not_installed_are_null(monkeypatch):
    monkeypatch.setattr(train, "LIBRARIES", ("torch", "no-such-library"))
    assert train.provenance()["versions"]["no-such-library"] is None
    assert train.provenance()["versions"]["torch"] == version("torch")
