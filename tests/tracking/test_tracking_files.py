"""metrics.jsonl through crashes, what the terminal shows, and that credentials are hidden."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_ref.tracking import terminal
from dpo_ref.tracking.redaction import Redactor, names_secret
from dpo_ref.tracking.run_record import MetricsFile, read
from dpo_ref.tracking.tracker import NoTracker, Tracker

ROOT = Path(__file__).parents[2]


@pytest.fixture
def metrics(tmp_path):
    """Three lines: a first evaluation at step 0 and the training steps 1 and 2."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"eval/loss": 0.7}, step=0)
    file.append({"train/loss": 0.1 + 0.2, "train/lr": 1e-7}, step=1)
    file.append({"train/loss": float("nan"), "train/grad_norm": float("inf")}, step=2)
    return file


def test_lines_are_strict_json_with_the_step_first_and_exact_floats(metrics):
    lines = metrics.path.read_text().splitlines()
    assert lines[1] == '{"step": 1, "train/loss": 0.30000000000000004, "train/lr": 1e-07}'
    assert lines[2] == '{"step": 2, "train/loss": null, "train/grad_norm": null}'
    assert [row["step"] for row in read(metrics.path)] == [0, 1, 2]
    assert read(metrics.path)[1]["train/loss"] == 0.1 + 0.2


def test_a_line_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    code = "import os; from dpo_ref.tracking.run_record import MetricsFile; from pathlib import Path; "
    code += f"MetricsFile(Path({str(tmp_path / 'm.jsonl')!r})).append({{'a': 1.5}}, step=3); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert read(tmp_path / "m.jsonl") == [{"step": 3, "a": 1.5}]


@pytest.mark.parametrize("keep", [1, 9, 40])
def test_a_torn_last_line_was_never_written(metrics, keep):
    whole = metrics.path.read_bytes()
    before = whole[: whole.rindex(b'{"step": 2')]
    metrics.path.write_bytes(whole[: len(before) + keep])
    assert [row["step"] for row in read(metrics.path)] == [0, 1]


def test_a_last_line_torn_inside_a_character(metrics):
    metrics.path.write_bytes(metrics.path.read_bytes() + '{"step": 3, "é'.encode()[:-1])
    assert [row["step"] for row in read(metrics.path)] == [0, 1, 2]


def test_a_line_damaged_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(path)


def test_no_tracker_is_a_tracker():
    assert isinstance(NoTracker(), Tracker)


def test_a_log_gets_a_line_now_and_then_and_not_one_per_step(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.2)
    monkeypatch.setattr(terminal, "SECONDS_WORTH_A_LINE", 0.5)
    show = terminal.TrainingProgress()
    with show.shown(1_060, 1_000):
        show.advance(0)
        for step in range(60):
            time.sleep(0.02)
            show.update({"loss": 0.5, "rewards/accuracies": 0.75, "throughput/pairs_per_second": 12.34})
            assert list(terminal.progress([step, step], "inner")) == [step, step]
            show.advance()
        show.complete()
    lines = capsys.readouterr().out.splitlines()
    assert 4 <= len(lines) <= 8
    assert lines[0].startswith("training 1,0")
    assert "/1,060  loss 0.5000  accuracy 0.75  12.3 pairs/s  0:0" in lines[0]
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("training 1,060/1,060")
    assert "took 0:01" in lines[-1]


@pytest.mark.parametrize(
    ("per_second", "accuracy", "words"),
    [(12.34, {"rewards/accuracies": 0.5}, "12.3 pairs/s"), (0.1, {}, "0.1 rows/s"), (0.04, {}, "25 s/row")],
)
def test_what_takes_long_is_said_in_seconds(per_second, accuracy, words):
    numbers = {"loss": 0.5, "throughput/pairs_per_second": per_second} | accuracy
    assert terminal.numbers_of(numbers).endswith(f"  {words}")


def test_time_left_counts_only_the_steps_of_this_process(capsys, monkeypatch):
    """Resumed at 90 of 100; two steps took 4 s, so the eight that are left take 16 s."""
    now = iter([100.0, 104.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 3.0)
    terminal.PlainLine("training", 100, 90).show(92, "loss 1.0000")
    assert capsys.readouterr().out == "training 92/100  loss 1.0000  0:16 left\n"


def test_short_work_is_silent_in_a_log_and_failures_pass_through(capsys):
    assert list(terminal.progress(range(3), "reference log-probs", 3)) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        [1 / 0 for _ in terminal.progress(range(3), "work")]
    assert capsys.readouterr().out == ""


def test_each_sentence_is_said_in_a_line_and_none_is_no_line(capsys):
    terminal.say("one", "  two")
    terminal.say()
    assert capsys.readouterr().out == "one\n  two\n"


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (3_725.0, "1:02:05"), (-3.0, "0:00")])
def test_clock(seconds, shown):
    assert terminal.clock(seconds) == shown


def test_summary_in_a_log_is_plain_and_commands_are_whole(capsys):
    command = "python train.py resume='outputs/a[1,2]/" + "x" * 150 + "'"
    terminal.run_summary("dpo on [lab]", {"loss": "0.69 -> 0.41", "folder": "outputs/a[b=1]"}, [command])
    out = capsys.readouterr().out
    assert out.splitlines()[1:] == [
        "dpo on [lab]",
        "  loss    0.69 -> 0.41",
        "  folder  outputs/a[b=1]",
        "next:",
        f"  {command}",
    ]
    assert "\x1b" not in out


SCREEN = """
from dpo_ref.tracking import terminal
show = terminal.TrainingProgress()
with show.shown(5, 2):
    show.advance(0)
    for step in range(3):
        show.update({"loss": 0.25, "throughput/pairs_per_second": 3.0})
        for item in terminal.progress("ab", "inner [x]"):
            print("between [bold]", flush=True)
        show.advance()
    show.complete()
try:
    with show.shown(3):
        show.advance(0)
        raise RuntimeError("stopped")
except RuntimeError as error:
    terminal.run_summary("title", {"folder": "f[1]"}, ["c" * 200])
"""


def on_a_terminal(code: str) -> str:
    """What a program writes to a pseudo-terminal of 90 columns."""
    ours, theirs = pty.openpty()
    variables = os.environ | {"TERM": "xterm", "COLUMNS": "90"}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=theirs, env=variables) as done:
        os.close(theirs)
        screen = io.BytesIO()
        while chunk := _read(ours):
            screen.write(chunk)
    os.close(ours)
    assert done.returncode == 0, screen.getvalue().decode()
    return screen.getvalue().decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65_536)
    except OSError:  # Linux answers so when the other side is closed
        return b""


def test_on_a_terminal_bars_nest_and_the_summary_follows_them():
    screen = on_a_terminal(SCREEN)
    assert "5/5" in screen
    assert "loss 0.2500  3.0 rows/s" in screen
    assert "inner [x]" in screen
    assert screen.count("between [bold]") == 6
    end = screen.index("title")
    assert screen.rindex("\x1b[?25h") < end  # the cursor is back: nothing is drawn over the summary
    assert "f[1]" in screen[end:]
    assert "c" * 200 in screen[end:]


@pytest.mark.parametrize(
    ("key", "secret"),
    [("api_key", True), ("apiKey", True), ("token", True), ("hub_token", True), ("PASSWORD", True), ("a.secret", True),
     ("aws_secret_access_key", True), ("api_key_env", False), ("eos_token", False), ("tokens_per_batch", False),
     ("max_new_tokens", False), ("tokenizer", False), ("key", False), ("primary_key", False)],
)  # fmt: skip
def test_which_keys_name_credentials(key, secret):
    assert names_secret(key) is secret


def test_credentials_are_hidden_wherever_they_return():
    config = {
        "judge": {"api_key": "very-private-1", "model": "m", "password": 7_654_321, "token": None},
        "data": {"path": "https://me:word@host/x", "eos_token": "</s>", "files": ["a", "hf_abcdefghijklmnopqrst"]},
        "credentials": {"user": "someone"},
        "overrides": ["judge.api_key=very-private-1", "beta=0.1"],
        "seed": 3,
    }
    redactor = Redactor(config)
    hidden = redactor.tree(config)
    assert redactor.found
    assert hidden == {
        "judge": {"api_key": "***", "model": "m", "password": "***", "token": None},
        "data": {"path": "https://***@host/x", "eos_token": "</s>", "files": ["a", "***"]},
        "credentials": {"user": "***"},
        "overrides": ["judge.api_key=***", "beta=0.1"],
        "seed": 3,
    }
    assert redactor.text("2026_judge.api_key=very-private-1") == "2026_judge.api_key=***"
    assert json.dumps(hidden)


def test_a_configuration_without_credentials_is_itself():
    config = {"beta": 0.02, "data": {"path": "a/b.jsonl", "tokens_per_batch": 4_096}, "tags": ["x"], "resume": None}
    redactor = Redactor(config)
    assert not redactor.found
    assert redactor.tree(config) == config
