"""What reaches a terminal, and terminals that are narrow, know ASCII alone, are full, or go."""

import json
import os
import subprocess
import sys
import unicodedata

import pytest

from tests.support.command import ROOT, forked, started, train, typed_afresh, typed_here
from tests.support.evaluate_command import DATA
from tests.support.pseudo_terminal import at_terminal, typed_at_terminal

pytestmark = pytest.mark.slow  # `make faults` runs it

COMMANDS = {
    "ESC [2J, which clears the screen": "\x1b[2J",
    "OSC 0, which names the window": "\x1b]0;mine\x07",
    "OSC 52, which fills the clipboard": "\x1b]52;c;cm0=\x1b\\",
    "C1 controls, which are ESC sequences in one character": "\x9b31m\x9d0;mine\x9c",
    "a carriage return, a backspace and a bell": "well\rdone\x08\x07",
    "a turn of the direction of writing": "\u202egpj.exe\u202c \u2066x\u2069",
    "characters of no width": "pass\u200bword\u2060\ufeff\U000e0041",
}
EVIL = " ".join(COMMANDS.values())
SMALL = ["model=lab_tiny", "tracking=none", "trainer.batch_size=16"]
LAB = [*DATA[1:], "data.num_pairs=16"]


def unseen(text: str) -> list[str]:
    """Characters that command a terminal or cannot be seen."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t"]


@pytest.fixture(scope="module", autouse=True)
def ordinary(tmp_path_factory):
    """The weights of a run that was watched to its end; what it imports need not be imported by the others."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    assert train(*SMALL, *LAB, f"output_dir={folder}").returncode == 0
    return (folder / "policy" / "model.safetensors").read_bytes()


@pytest.fixture
def rows(tmp_path):
    """A file of rows by a stranger, who has chosen its name too."""
    path = tmp_path / "ro\x1b[5mws.jsonl"
    pair = {"chosen": f"yes {EVIL}", "rejected": f"no {EVIL} {'w' * 1_000_000}"}
    short = {"chosen": f"yes {EVIL}", "rejected": f"no {EVIL}"}
    lines = [{"prompt": f"{i} {EVIL}"} | (pair if i == 3 else short) for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("columns", [80, 40])
def test_texts_and_names_of_strangers_are_shown_and_never_sent(rows, columns, tmp_path, tell):
    folder = tmp_path / "r\x1b]0;mine\x07un"
    data = ["data=jsonl", f'data.path="{rows}"', "data.max_length=512", "trainer.max_steps=1"]
    screen = typed_at_terminal("train.py", *data, *SMALL, f'output_dir="{folder}"', columns=columns)
    assert screen.returncode == 0, screen.shown
    assert unseen(screen.shown) == []
    whole = screen.shown.replace("\n", "")
    for part in (
        r"\x1b[2J",
        r"\x1b]0;mine\x07",
        r"\x9b31m",
        r"well\rdone\x08\x07",
        r"\u202egpj",
        r"\u200b",
    ):
        assert part in whole
    assert len(screen.sent) < 20_000
    framed = [line for line in screen.shown.split("\n") if line.startswith(("│", "╭", "╰"))]
    assert framed
    assert max(map(len, framed)) <= columns
    seen = next(line for line in screen.shown.split("\n") if r"\x1b[2J" in line)
    fault = f"control characters in rows, in the file's name and in the folder's, on a terminal of {columns} columns"
    tell("let in", fault, seen=seen, survived="no byte of them was sent; the run was trained to its end")


ERRORS = {
    "a template that raises": ["data=lab", *LAB, "model.template='{{ raise_exception(\"\x1b[2J\x07\u202egpj\") }}'"],
    "a model that is not there": ["data=lab", *LAB, "model.path='no\x1b]0;mine\x07\u202ewhere'"],
    "an option that is none": ["da\x1b[2J\x07\u202eta=lab"],
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_shown_and_never_sent(name, tmp_path, tell):
    screen = typed_at_terminal("train.py", *SMALL, *ERRORS[name], f"output_dir={tmp_path / 'run'}")
    assert screen.returncode not in (0, None)
    assert unseen(screen.shown) == []
    assert r"\x1b" in screen.shown
    assert r"\u202e" in screen.shown
    assert "Traceback" not in screen.shown
    reports = [path.read_text() for path in tmp_path.rglob("error.txt")]
    assert len(reports) == (name == "a template that raises")  # the others are refused before there is a run
    assert not any(map(unseen, reports))
    seen = next(line for line in screen.shown.split("\n") if "error" in line)
    tell("let in", f"control characters in {name}", seen=seen, survived="none was sent")


def test_evaluations_show_and_never_send(tmp_path):
    words = ["policy='no\x1b]0;mine\x07\u202ewhere'", "tracking=none", f"output_dir={tmp_path}"]
    screen = typed_at_terminal("evaluate.py", *words)
    assert screen.returncode == 1
    assert unseen(screen.shown) == []
    assert r"no\x1b]0;mine\x07\u202ewhere" in screen.shown


GUARDED = "from dpo_ref.tracking.terminal import guard_streams, show, words; guard_streams(); "
BY_OTHERS = {
    "a traceback": "raise RuntimeError('\\x1b[2J\\u202e')",
    "a warning": "import warnings; warnings.warn('\\x1b[2J\\u202e')",
    "a log line": "import logging; logging.error('\\x1b[2J\\u202e')",
    "a table": "import rich.table; t = rich.table.Table.grid(); t.add_row(words('\\x1b[2J\\u202e')); show(t)",
    "what rich draws": "show('\\x1b[2J\\u202e')",
    "half a surrogate": "print('\\x1b[2J\\u202e \\udc80')",
}


@pytest.mark.parametrize("name", BY_OTHERS)
def test_what_libraries_and_the_interpreter_print_passes_the_same_door(name):
    done = typed_afresh("-c", GUARDED + BY_OTHERS[name])
    assert unseen(done.stdout + done.stderr) == []
    assert r"\x1b[2J" in done.stdout + done.stderr
    assert r"\u202e" in done.stdout + done.stderr


def test_lines_printed_below_a_bar_pass_it_too():
    program = GUARDED + "from dpo_ref.tracking.terminal import progress\n"
    program += (
        r"for item in progress(range(2), 'ba\x1b[5mr'): print('[red]\x1b[31m\x1b]8;;http://evil\x1b\\x\r' + 'y')"
    )
    screen = at_terminal(lambda: exec(program, {}))
    assert unseen(screen.shown) == []
    assert r"[red]\x1b[31m\x1b]8;;http://evil\x1b\x\ry" in screen.shown
    assert r"ba\x1b[5mr" in screen.shown


def test_a_bar_of_a_download_still_redraws_its_line():
    from tqdm import tqdm

    def download():
        exec(GUARDED, {})
        list(tqdm(range(3), desc="mo\x1b[5mdel", file=sys.stderr))

    sent = at_terminal(download).sent
    assert sent.count(b"\r") > 1
    assert b"\x1b[5m" not in sent


def _closed(stream: int):
    os.close(stream)
    setattr(sys, {1: "stdout", 2: "stderr"}[stream], None)


before = []


def _into(path: int | str, *streams: int):
    """The streams lead to a descriptor or a file."""
    end = path if isinstance(path, int) else os.open(path, os.O_WRONLY)
    before.extend((sys.stdout, sys.stderr))  # which would close what they lead to
    for stream in streams:
        os.dup2(end, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))


def _left():
    """As `| head` leaves it."""
    reading, writing = os.pipe()
    os.close(reading)
    _into(writing, 1)


GONE = {
    "standard output goes to a command that ends, as `| head`": _left,
    "standard output is closed before the start, `>&-`": lambda: _closed(1),
    "standard error is closed before the start, `2>&-`": lambda: _closed(2),
    "standard output is a full disk": lambda: _into("/dev/full", 1),
    "both streams are a full disk": lambda: _into("/dev/full", 1, 2),
}


def _with(terminal, arguments):
    terminal()
    typed_here(*arguments)


@pytest.mark.parametrize("name", GONE)
def test_a_run_goes_on_without_a_terminal(name, ordinary, tmp_path, tell):
    run = tmp_path / "run"
    process = forked(tmp_path, _with, GONE[name], ("train.py", *SMALL, *LAB, f"output_dir={run}"))
    process.join(timeout=120)
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    assert (run / "policy" / "model.safetensors").read_bytes() == ordinary
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    complaint = (tmp_path / "err").read_text()
    assert complaint in ("", "standard output is gone (No space left on device); the run goes on without it\n")
    tell("untidy", name, seen=complaint or "nothing", survived="the run, its exit status 0; equal final weights")


@pytest.mark.parametrize("name", [*GONE][1::3])
def test_an_error_has_its_status_without_a_terminal(name, tmp_path):
    words = (*SMALL, *LAB, "beta=-1", f"output_dir={tmp_path / 'run'}")
    process = forked(tmp_path, _with, GONE[name], ("train.py", *words))
    process.join(timeout=120)
    assert process.exitcode == 1


LOCALE = ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONIOENCODING", "PYTHONUTF8")


def test_an_ascii_terminal_gets_ascii(monkeypatch, tmp_path, tell):
    for variable in LOCALE:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LC_ALL", "C")
    words = ["bandit.num_seeds=2", "bandit.rounds=2", "bandit.beside=[]", "bandit.peaks=[20]"]
    process = started(tmp_path, "train.py", "bandit=arms", "tracking=none", *words, f"output_dir={tmp_path / 'run'}")
    process.join(timeout=120)
    out = (tmp_path / "out").read_text()
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    assert out.isascii()
    seen = next(line for line in out.split("\n") if "beta = " in line)
    assert "+-" in out
    tell("untidy", "a terminal of ASCII alone, LC_ALL=C", seen=seen, survived="every number of the table")


PRINTED = {
    "LC_ALL=C": b"beta +- \\xe9",
    "LANG=C": b"beta +- \\xe9",
    "LANG=POSIX": b"beta +- \\xe9",
    "PYTHONIOENCODING=ascii": b"beta +- \\xe9",
    "PYTHONIOENCODING=latin-1": b"beta \xb1 \xe9",
    "LANG=C.UTF-8": "β ± é".encode(),
    "LC_ALL=C PYTHONIOENCODING=utf-8": "β ± é".encode(),
}


@pytest.mark.parametrize("settings", PRINTED)
def test_what_an_encoding_lacks_is_spelled(settings):
    environment = {name: value for name, value in os.environ.items() if name not in LOCALE}
    environment |= dict(setting.split("=") for setting in settings.split())
    command = [sys.executable, "-c", GUARDED + "print('β ± é')"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, timeout=60)
    assert done.stdout.strip() == PRINTED[settings]
