"""The record of a run that is interrupted and goes on: first and latest values are the run's, not the process's."""

from importlib.metadata import version

import pytest

from dpo_ref.cli import run_folder
from dpo_ref.tracking.run_record import RunRecord, read
from dpo_ref.tracking.tracker import NoTracker


def record(folder):
    return RunRecord(folder / "metrics.jsonl", NoTracker())


@pytest.fixture
def sealed(tmp_path):
    """A run's record that goes on beyond a seal, and the seal, of five lines."""
    written = record(tmp_path)
    written.add({"eval/loss": 0.71}, 0)
    for step, loss in ((1, 0.7), (2, float("nan"))):
        written.add({"train/loss": loss, "train/lr": 0.1 + 0.2}, step)
        written.add({"eval/loss": loss}, step)
    seal = written.seal
    written.add({"train/loss": 0.6}, 3)
    return written.path, seal


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_going_on_keeps_what_came_before_the_checkpoint(sealed, tmp_path, torn):
    """What came after it goes, whole lines and torn ones."""
    path, seal = sealed
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - torn])
    after = record(tmp_path)
    after.go_on_from(seal)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:5])
    assert after.seal == seal
    assert after.last == {"train/loss": 0.7, "train/lr": 0.1 + 0.2, "eval/loss": 0.7}  # no nan
    after.add({"train/loss": 0.5}, 3)
    assert (after.first["train/loss"], after.last["train/loss"]) == (0.7, 0.5)
    assert [row["step"] for row in read(path)] == [0, 1, 1, 2, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_was_measured_at_its_last_step_is_known_whoever_measured_it(sealed, tmp_path):
    after = record(tmp_path)
    assert not after.holds("eval", 2)
    after.go_on_from(sealed[1])
    assert after.holds("eval", 2)
    assert not after.holds("eval", 1)
    assert not after.holds("evaluation", 2)
    assert not after.holds("train", 3)


CHANGES = {
    "a line removed": (lambda rows: rows[1:], "1 of its first 5 lines are missing|lines of it were changed"),
    "lines lost": (lambda rows: rows[:3], "2 of its first 5 lines are missing"),
    "emptied": (lambda rows: [], "5 of its first 5 lines are missing"),
    "torn in the middle": (lambda rows: [rows[0][:9] + b"\n", *rows[1:]], "lines of it were changed"),
    "torn inside a character": (lambda rows: [*rows[:4], "é".encode()[:1]], "lines of it were changed"),
    "another number": (lambda rows: [row.replace(b"0.7", b"0.1") for row in rows], "lines of it were changed"),
    "in another order": (lambda rows: rows[::-1], "lines of it were changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_that_is_not_as_it_was_is_told(sealed, tmp_path, change):
    (path, seal), (changed, message) = sealed, CHANGES[change]
    path.write_bytes(b"".join(changed(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        record(tmp_path).go_on_from(seal)
    assert path.read_bytes() == before


def test_lost_numbers_can_be_given_up(sealed, tmp_path, capsys):
    path, seal = sealed
    path.unlink()
    with pytest.raises(ValueError, match=f"touch {tmp_path}/metrics.given_up.jsonl"):
        record(tmp_path).go_on_from(seal)
    (tmp_path / "metrics.given_up.jsonl").touch()
    after = record(tmp_path)
    after.go_on_from(seal)
    assert "given up" in capsys.readouterr().out
    after.add({"train/loss": 0.5}, 3)
    assert after.seal.lines == len(read(path)) == 1


def test_an_evaluation_forgets_what_it_did_not_measure_once_more(tmp_path):
    run_record = record(tmp_path)
    run_record.add({"evaluation/gold": 0.1, "evaluation/kl": 2.0}, 1)
    run_record.add({"train/loss": 0.6}, 1)
    run_record.add({"evaluation/gold": 0.2}, 2)
    again = record(tmp_path)
    again.go_on_from(run_record.seal)
    for either in (run_record, again):
        assert either.last == {"evaluation/gold": 0.2, "train/loss": 0.6}
        assert either.first["evaluation/kl"] == 2.0


def test_versions_of_what_is_not_installed_are_null(monkeypatch):
    monkeypatch.setattr(run_folder, "LIBRARIES", ("torch", "no-such-library"))
    assert run_folder.provenance()["versions"]["no-such-library"] is None
    assert run_folder.provenance()["versions"]["torch"] == version("torch")
