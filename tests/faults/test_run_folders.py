"""The folder of a run: one process writes to it, a finished run's record survives, and a kill leaves a run or none."""

import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_ref.cli.schemas import slug
from dpo_ref.files.holding import new_folder
from tests.support.checkpoints import changed_state
from tests.support.command import ROOT, train
from tests.support.evaluate_command import PLAIN, QUICK, evaluate
from tests.support.faults import SMALL, Typed, forge_summary, killed_at, same_weights, steps, summary

pytestmark = pytest.mark.slow  # `make faults` runs it

LONG = [*SMALL, "trainer.epochs=1000", "trainer.save_every=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(*SMALL, f"output_dir={run}").returncode == 0
    return run


@pytest.fixture
def finished(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


ATTEMPTS = {
    "the same command typed again": (lambda run: [*SMALL, f"output_dir={run}"], "already holds a run"),
    "another seed in the same folder": (lambda run: [*SMALL, f"output_dir={run}", "seed=1"], "already holds a run"),
    "a resume that cannot go on": (lambda run: [f"resume={run}", "trainer.epochs=2", "tracking=none"], "was another"),
    "a resume that is refused": (lambda run: [f"resume={run}", "beta=3"], "cannot change when a run goes on"),
    "options that are refused": (lambda run: [*SMALL, f"output_dir={run}", "beta=-1"], "must be positive"),
    "stage=data that fails": (
        lambda run: ["stage=data", "data=jsonl", "data.path=nowhere.jsonl", f"output_dir={run}", "tracking=none"],
        "does not exist",
    ),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_the_record_of_a_finished_run_survives(finished, attempt, tell):
    words, message = ATTEMPTS[attempt]
    if message == "was another":
        changed_state(finished, reference="another")
    before = {name: (finished / name).read_bytes() for name in ("summary.json", "config.yaml", "metrics.jsonl")}
    done = train(*words(finished))
    assert done.returncode == 1
    assert message in done.stderr
    assert before == {name: (finished / name).read_bytes() for name in before}
    tell(
        "lost",
        f"{attempt}, in the folder of a finished run",
        seen=done.stderr,
        survived="summary.json, config.yaml and metrics.jsonl byte for byte",
    )


def test_an_evaluation_of_a_record_without_its_results_is_told_how_to_complete_it(finished, whole, tell):
    """As a version wrote it whose failed attempts wrote over the record."""
    lacking = ("identities", "metrics", "steps", "objective", "reference")
    record = {key: value for key, value in summary(finished).items() if key not in lacking}
    forge_summary(finished, record | {"status": "failed", "error": "an attempt"})
    with pytest.raises(ValueError, match="lacks objective, reference, identities, steps") as told:
        evaluate(f"policy={finished}", *PLAIN)
    assert train(f"resume={finished}").returncode == 0
    assert summary(finished)["identities"] == summary(whole)["identities"]
    assert same_weights(finished, whole)
    tell(
        "lost",
        "evaluation of a run whose record a failed attempt wrote over",
        seen=str(told.value),
        survived="the run: resume= completed its record, weights equal",
    )


def test_a_failure_keeps_what_the_record_says(whole, tmp_path, tell):
    """A run that was stopped half-way, whose next attempt fails."""
    run, config = shutil.copytree(whole, tmp_path / "run"), "config.yaml"
    forge_summary(run, summary(run) | {"status": "interrupted"})
    changed_state(run, reference="another")
    before = (run / config).read_bytes()
    done = train(f"resume={run}", "trainer.epochs=2")
    assert "was another" in done.stderr
    assert (run / config).read_bytes() == before
    assert "was another" in (run / "error.txt").read_text()
    record = summary(run)
    assert (record["status"], record["identities"]) == ("failed", summary(whole)["identities"])
    tell(
        "lost",
        "a resume that fails, of an interrupted run",
        seen=done.stderr,
        survived="identities, metrics and steps in summary.json, the configuration; the error is in error.txt",
    )


# --- two processes


def is_held(folder):
    lock = folder / ".lock"
    return lock.is_file() and lock.stat().st_size > 0


def test_a_second_process_is_told_who_writes_to_the_folder(tmp_path, tell):
    run = tmp_path / "run"
    first = Typed(tmp_path / "first", "train.py", *LONG, f"output_dir={run}")
    first.until(lambda: steps(run) > 4)
    first.send(signal.SIGSTOP)
    holder = rf"{run} is in use: process {first.process.pid} on \S+, since [\d-]+ [\d:+]+, writes to it"
    attempts = ([*LONG, f"output_dir={run}"], [*LONG, f"output_dir={run}", "seed=1"], [f"resume={run}"])
    for words in attempts:
        told = train(*words)
        assert told.returncode == 1
        assert re.search(holder, told.stderr), told.stderr
    first.send(signal.SIGKILL)
    first.end()
    done = train(f"resume={run}", "trainer.epochs=3")
    assert done.returncode == 0, done.stderr
    assert not (run / ".lock").exists()
    tell(
        "used silently",
        "the same command, another seed and a resume, in the folder of a run that still trains",
        seen=told.stderr,
        survived="the first run; a kill -9 of it lets go of the folder, and the resume goes on",
    )


def test_of_two_evaluations_of_one_folder_another_is_told_and_the_same_waits(finished, tmp_path, tell):
    words = [*QUICK, "scorer=none", "stage=generate", f"policy={finished}"]
    first = Typed(tmp_path / "first", "evaluate.py", *words)
    first.until(lambda: is_held(finished / "evaluation"))
    first.send(signal.SIGSTOP)
    with pytest.raises(ValueError, match=f"in use: process {first.process.pid} on") as told:
        evaluate(*words, "seed=5")
    second = Typed(tmp_path / "second", "evaluate.py", *words)
    second.until(lambda: "waiting for it" in (second.folder / "out").read_text())
    first.send(signal.SIGCONT)
    ends = [first.end(), second.end()]
    assert [end.returncode for end in ends] == [0, 0], ends
    tell(
        "used silently",
        "a second evaluation of a folder while the first runs: other settings, and the same",
        seen=str(told.value),
        survived="the first's answers; the second of the same settings waited, and both ended well",
    )


def test_runs_started_together_under_default_names_have_a_folder_each(tmp_path, tell):
    wordy = ["trainer.max_steps=1", "optim.warmup_ratio=0", "optim.schedule=constant", "data.max_length=512"]
    commands = [["train.py", *SMALL, *wordy, f"seed={seed}"] for seed in (0, 1, 1)]
    together = [Typed(tmp_path / "here", *command) for command in commands]
    codes = [command.end().returncode for command in together]
    assert codes == [0, 0, 0], together[0].end().stderr
    runs = sorted(path.parent for path in (tmp_path / "here").glob("outputs/default/*/summary.json"))
    assert sorted(summary(run)["seed"] for run in runs) == [0, 1, 1]
    assert all(f"seed-{summary(run)['seed']}" in run.name for run in runs)
    tell(
        "lost",
        "runs of several seeds started together under default names, whose words are longer than a name",
        seen=runs[0].name,
        survived="each run in a folder of its own, its seed in the name",
    )


def test_a_name_keeps_what_distinguishes_and_fits_a_file_system(tmp_path):
    long = "data.path=" + "é" * 300
    names = [slug(f"{long},seed={seed}") for seed in range(4)]
    names += [slug(f"{long}{middle},{long},seed=0") for middle in "ab"]
    assert len(set(names)) == 6
    assert all(len(f"2026-11-27_00-00-00_{name}_12".encode()) < 255 for name in names)
    assert [name.endswith(f"seed-{seed}") for seed, name in enumerate(names[:4])] == [True] * 4
    assert [new_folder(tmp_path / "run").name for _ in range(3)] == ["run", "run_2", "run_3"]


# --- killed as it began


@pytest.mark.parametrize("moves", [1, 2, 3])
def test_a_kill_leaves_a_folder_to_begin_again_or_a_run_to_go_on_with(whole, tmp_path, moves, tell):
    """In place of the first moves of whole files into the run's folder: summary.json, config.yaml, and one later."""
    run, command = tmp_path / "run", [*SMALL, f"output_dir={tmp_path / 'run'}"]
    assert Typed(tmp_path, "train.py", *command, before=killed_at(run, moves)).end().returncode == -signal.SIGKILL
    resumed = train(f"resume={run}")
    begun = moves > 2
    assert (resumed.returncode == 0) == begun, resumed.stderr
    if not begun:
        assert "nothing was trained" in resumed.stderr
        again = train(*command)
        assert again.returncode == 0, again.stderr
    if moves == 2:
        assert f"type python train.py {' '.join(command)} again" in resumed.stderr
    assert same_weights(run, whole)
    file = ("summary.json", "config.yaml", "the policy's last files")[moves - 1]
    tell(
        "killed",
        f"kill -9 before {file} was in its place, then resume=" + ("" if begun else ", then the same command"),
        seen=resumed.stderr or resumed.stdout.strip().splitlines()[-1],
        survived="the run: final weights equal those of one that was not killed",
    )


# --- records that are broken


DECAYED = {
    "one digit of config.yaml": ("beta: 0.1", "beta: 0.5"),
    "the last lines of config.yaml": ("  max_seq_rep_4: 0.5\n  max_length_ratio: 2.0\n", ""),
    "one digit of summary.json": ('"seed": 0', '"seed": 4'),
}


@pytest.mark.parametrize("case", DECAYED)
def test_what_decayed_in_a_record_is_told(finished, case, tell):
    """The file reads as well as before. Without a checkpoint none but its digest knows."""
    (old, new), path = DECAYED[case], finished / case.rpartition(" ")[2]
    shutil.rmtree(finished / "checkpoints")
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match="digest") as told:
        evaluate(f"policy={finished}", *PLAIN)
    resumed = train(f"resume={finished}")
    assert resumed.returncode == 1
    for words in (str(told.value), resumed.stderr):
        assert str(path) in words
        assert re.search("its digest is that of other content|its first line is the digest of another text", words)
    tell(
        "used silently",
        f"{case} of a run that is evaluated or goes on is another or lost",
        seen=resumed.stderr,
        survived="nothing was computed with it",
    )


BROKEN = {
    "empty": ("", "is damaged: it is not JSON"),
    "truncated": ('{"status": "compl', "is damaged: it is not JSON"),
    "a list": ("[]", "is damaged: it is no JSON object"),
    "without a status": ("{}", "lacks status"),
    "of another form": ('{"status": "completed", "overrides": "beta=3", "seed": "0"}', "(overrides, seed)"),
    "not a text": ("\udcff", "cannot be read"),
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_record_is_told(finished, content, tell):
    text, message = BROKEN[content]
    (finished / "summary.json").write_text(text, errors="surrogateescape")
    resumed = train(f"resume={finished}")
    assert (resumed.returncode, "Traceback" in resumed.stderr) == (1, False)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(f"policy={finished}", *PLAIN)
    evaluate(f"sweep={finished}", *PLAIN, f"output_dir={finished.parent / 'table'}")
    assert "unreadable" in (finished.parent / "table" / "sweep.csv").read_text()
    assert message in resumed.stderr
    assert str(finished / "summary.json") in resumed.stderr
    tell(
        "untidy",
        f"summary.json {content}, of a run given to resume=, policy= and sweep=",
        seen=resumed.stderr,
        survived="nothing was written to the run; the sweep's table says that it cannot be read",
    )


# --- folders that cannot be


def no_space():
    """What is written ends after 300 bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))


UNWRITABLE = {
    "is a file": ("LICENSE", "File exists", None),
    "lies in a file": ("LICENSE/run", "Not a directory", None),
    "has too long a name": ("x" * 300, "File name too long", None),
    "lies where nothing can be made": ("/proc/nowhere", "No such file or directory", None),
    "lies on a full disk": ("run", "File too large", no_space),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("mode", [["seed=0"], ["-m", "seed=0,1"]])
def test_an_output_folder_that_cannot_be_written_is_told(tmp_path, kind, mode, tell):
    name, reason, before = UNWRITABLE[kind]
    shutil.copy(ROOT / "LICENSE", tmp_path)
    folder = tmp_path / name
    if before is not None and "-m" in mode:
        return  # Hydra itself writes the sweep's first file
    words = ["train.py", *mode, *SMALL, f"output_dir={folder}"]
    done = Typed(tmp_path, *words, before=before or (lambda: None)).end()
    assert done.returncode == 1, done
    assert f"{folder} cannot be written: {reason}; see output_dir" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    if mode == ["seed=0"]:
        tell("untidy", f"output_dir that {kind}", seen=done.stderr, survived="nothing was trained or written")


# --- stopped before or after training


STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
EACH_STOP = [signal.SIGINT, *(pytest.param(signum, marks=pytest.mark.slow) for signum in (*STOPS,)[1:])]


def stopped_line(done, code):
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = [line for line in (done.stderr + done.stdout).splitlines() if "stopped" in line]
    return line


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize("signum", EACH_STOP)
def test_a_stop_of_what_is_still_importing_is_one_line(script, signum, tell):
    process = subprocess.Popen(
        [sys.executable, script, *SMALL], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    libraries = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in libraries.read_text():
        time.sleep(0.005)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip(), out) == (STOPS[signum], "stopped while starting, nothing was done", "")
    name = signal.Signals(signum).name
    tell("killed", f"{name} while {script} still imports", seen=err, survived="nothing had been done")


@pytest.mark.parametrize("signum", EACH_STOP)
def test_a_stop_before_the_first_step_is_one_line(tmp_path, whole, signum, tell):
    run = tmp_path / "run"
    command = Typed(tmp_path, "train.py", *SMALL, f"output_dir={run}")
    command.until((run / "config.yaml").is_file)
    command.send(signum)
    line = stopped_line(command.end(), 130)
    assert f"python train.py resume={run}" in line
    assert summary(run)["status"] == "interrupted"
    assert train(f"resume={run}").returncode == 0
    assert same_weights(run, whole)
    name = signal.Signals(signum).name
    tell("killed", f"{name} before the first step", seen=line, survived="the run: resumed, final weights equal")


def test_a_second_stop_is_one_line(tmp_path, tell):
    run = tmp_path / "run"
    command = Typed(tmp_path, "train.py", *LONG, f"output_dir={run}")
    command.until(lambda: steps(run) > 4)
    for _ in range(2):
        command.send(signal.SIGINT)
        time.sleep(0.002)
    line = stopped_line(command.end(), 130)
    assert train(f"resume={run}", "trainer.epochs=3").returncode == 0
    tell("killed", "two Ctrl-C within milliseconds", seen=line, survived="the run: it was resumed")


def test_a_stop_of_an_evaluation_is_one_line(finished, tmp_path, tell):
    words = [*QUICK, "scorer=none", "stage=generate", f"policy={finished}"]
    command = Typed(tmp_path, "evaluate.py", *words)
    command.until(lambda: is_held(finished / "evaluation"))
    command.send(signal.SIGINT)
    line = stopped_line(command.end(), 130)
    assert not (finished / "evaluation" / ".lock").exists()
    evaluate(*words)
    tell("killed", "Ctrl-C in an evaluation", seen=line, survived="the same command goes on")
