"""Checkpoints and going on: killed in the worst moment, damaged, changed by hand, on a full disk, in a removed folder.

Where a run goes on, it ends with the weights, moments, random states and metrics of the uninterrupted one.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from dpo_ref.cli.run_folder import Job
from dpo_ref.cli.train import completed, run_job
from tests.support.checkpoints import lines
from tests.support.command import composed, forked, started, train
from tests.support.given_columns import given, written
from tests.support.quick import only

QUIET = ["tracking=none"]
SMALL = [*QUIET, "model.path=lab:tiny", "data.num_pairs=48", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=8", "beta=0.3", "trainer.save_every=2", "trainer.keep_checkpoints=null"]
EQUAL = "weights, moments, random states and metrics equal those of the uninterrupted run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps with checkpoints after 2, 4 and 6."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = train(*SMALL, f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def cut(run):
    """As if killed after step 4 or 5: no last checkpoint, no policy."""
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    shutil.rmtree(run / "policy")
    return run


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def last(run):
    return run / "checkpoints" / "step-00000006"


TENSORS = ("policy.safetensors", "optimizer.safetensors", "random.safetensors", "reference.safetensors")


def equal(run, other):
    """Whether both ended in the same way: the last checkpoints' bytes, the policy's, every line."""
    files = [(last(run) / name, last(other) / name) for name in TENSORS]
    files.append((run / "policy" / "model.safetensors", other / "policy" / "model.safetensors"))
    return lines(run) == lines(other) and all(ours.read_bytes() == theirs.read_bytes() for ours, theirs in files)


def goes_on(run, whole):
    """Gone on with, to the same end; what was printed."""
    done = train(f"resume={run}", *QUIET)
    assert done.returncode == 0, done.stderr
    assert equal(run, whole)
    return done.stdout


def refused(*words):
    """The one sentence on standard error."""
    done = train(*words)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    (sentence,) = done.stderr.splitlines()
    return sentence


def line_with(text, words):
    return next(line for line in text.splitlines() if words in line)


# --- a step that is not finite


def broken_rows(broken):
    """Rows of which some have a reference that makes the loss infinite and its gradient not."""
    return [given(0, -1.7e308 if index in broken else -5, prompt=f"why {index}?") for index in range(32)]


@pytest.mark.parametrize(
    "tokens",
    [pytest.param(8192, id="one pack", marks=pytest.mark.slow), pytest.param(64, id="several packs")],
)
def test_a_loss_that_is_not_finite(tmp_path, tell, tokens):
    options = [*QUIET, "model.path=lab:tiny", "data=jsonl", "reference=columns", "reference.provenance=mine"]
    options += ["trainer.batch_size=4", "optim.schedule=constant", "optim.warmup_ratio=0", "trainer.save_every=4"]
    options += ["optim=adamw_bf16"]  # which draws random numbers
    options += [f"data.tokens_per_batch={tokens}", "beta=2", "data.eval_fraction=0"]
    data = f"data.path={written(tmp_path / 'rows.jsonl', *broken_rows({9}))}"
    broken = tmp_path / "broken"
    sentence = refused(*options, data, f"output_dir={broken}")
    (report,) = broken.glob("non_finite_step_*.json")
    step = json.loads(report.read_text())["step"]
    assert f"step {step}: loss inf, gradient norm" in sentence
    assert "gradient norm inf" not in sentence
    kept = f"step-{(step - 1) // 4 * 4:08d}"
    assert kept not in ("step-00000000", f"step-{step - 1:08d}")
    assert checkpoints(broken) == [kept, f"step-{step - 1:08d}"]
    short = tmp_path / "short"
    done = train(*options, data, f"output_dir={short}", f"trainer.max_steps={step - 1}")
    assert done.returncode == 0, done.stderr
    for name in TENSORS:
        ours, theirs = (folder / "checkpoints" / f"step-{step - 1:08d}" / name for folder in (broken, short))
        assert ours.read_bytes() == theirs.read_bytes(), name
    again = refused(f"resume={broken}", *QUIET)
    assert f"step {step}: loss inf" in again
    tell(
        "lost",
        "a pair whose loss is infinite and whose gradient is not",
        seen=sentence,
        survived=f"the {step - 1} updates before it, as a run of {step - 1} steps saves them; the checkpoint before",
    )


# --- killed while files are moved and deleted


def kill_at(function, words, run):
    """What runs in a process of its own: it goes on with a run, and kills itself where a function of the operating
    system is about to be called with a path that has these words in it."""
    module, _, name = function.rpartition(".")
    call = getattr(sys.modules[module], name)

    def dying(path, *arguments, **options):
        if words in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(path, *arguments, **options)

    setattr(sys.modules[module], name, dying)
    train(f"resume={run}", *QUIET)


KILLS = {
    "before the old checkpoint was moved aside": ("os.replace", "checkpoints/step-00000006"),
    "between moving the old checkpoint aside and the new one to its place": ("os.replace", "/new"),
    "while the old one was deleted, after both moves": ("shutil.rmtree", "checkpoints/.step-00000006"),
}


@pytest.mark.parametrize("moment", only(KILLS, list(KILLS)[1]))
def test_killed_while_a_checkpoint_is_replaced(run, whole, tmp_path, moment, tell):
    """Twice in a row: the last checkpoint is written once more by whoever goes on with a complete run."""
    for name in ("step-00000002", "step-00000004"):
        shutil.rmtree(run / "checkpoints" / name)  # it is the only one
    for _ in range(2):
        process = forked(tmp_path, kill_at, *KILLS[moment], run)
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "err").read_text()
    seen = line_with(goes_on(run, whole), "going on after")
    assert checkpoints(run) == ["step-00000006"]
    tell("killed", f"twice, {moment}", seen=seen, survived=f"the only checkpoint; {EQUAL}")


def test_what_a_kill_leaves_half_deleted_or_half_written_is_swept(cut, whole, tell):
    """Folders whose deletion or writing was cut off, and files of processes that are no more; not of living ones."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine, theirs = cut / f".summary.json.{os.getppid()}", cut / f".summary.json.{dead.pid}"
    for path in (mine, theirs, cut / "checkpoints" / f".deleted.step-00000001/{TENSORS[0]}"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    shutil.copytree(cut / "checkpoints" / "step-00000002", cut / "checkpoints" / f".step-00000006.{dead.pid}" / "new")
    (cut / "checkpoints" / f".step-00000006.{dead.pid}" / "new" / TENSORS[0]).write_bytes(b"half")
    seen = line_with(goes_on(cut, whole), "going on after")
    assert checkpoints(cut) == checkpoints(whole)
    assert mine.exists()
    assert not theirs.exists()
    tell("lost", "killed while a checkpoint was written, one deleted, a file replaced", seen=seen, survived=EQUAL)


def test_without_a_checkpoint_a_run_starts_at_0_and_says_so(cut, whole, tell):
    shutil.rmtree(cut / "checkpoints")
    seen = line_with(goes_on(cut, whole), "starts at step 0")
    tell("killed", "before the first checkpoint", seen=seen, survived=EQUAL)


def test_a_complete_run_that_goes_on_says_everything_once(run, whole, tell):
    seen = line_with(goes_on(run, whole), "going on after step 6")
    assert [row["step"] for row in lines(run)] == [0, 1, 2, 3, 4, 5, 6, 6]
    tell("lost", "a complete run gone on with", seen=seen, survived="its last held-out line stands once")


TOO_LONG = "degeneration.max_length_ratio=0.1"


def test_killed_twice_after_the_last_evaluation(tmp_path, tell):
    """What it measured is on record: it is not measured once more, and a second kill finds the record as the
    checkpoint left it."""
    run = tmp_path / "run"
    done = train(*SMALL, "evaluation.every=3", "evaluation.num_prompts=2", TOO_LONG, f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    measured = (run / "metrics.jsonl").read_bytes()
    degenerate = json.loads((run / "summary.json").read_text())["degenerate"]
    for _ in range(2):
        process = forked(tmp_path, kill_at, *KILLS["before the old checkpoint was moved aside"], run)
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "err").read_text()
    done = train(f"resume={run}", *QUIET)
    assert done.returncode == 0, done.stderr
    assert (run / "metrics.jsonl").read_bytes() == measured
    assert json.loads((run / "summary.json").read_text())["degenerate"] == degenerate != []
    seen = line_with(done.stdout, "going on after step 6")
    tell("killed", "twice, after the last evaluation", seen=seen, survived="every line, and why it is degenerate")


# --- stopped by a signal


def wait_for(path, count):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not path.exists() or len(path.read_bytes().splitlines()) < count):
        time.sleep(0.001)


LONGER = ["trainer.epochs=6", "optim.schedule=constant", "optim.warmup_ratio=0"]


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """36 steps, so that it lasts until a signal comes, and no checkpoint but the last."""
    run = tmp_path_factory.mktemp("longer") / "run"
    assert train(*SMALL, *LONGER, "trainer.save_every=null", f"output_dir={run}").returncode == 0
    return run


def same_policy(run, other):
    ours, theirs = (folder / "policy" / "model.safetensors" for folder in (run, other))
    return ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1], ids=lambda signum: signum.name)
def test_a_signal_saves_and_stops(longer, tmp_path, signum, tell):
    """A connection that is gone sends it twice, a batch system when the time is almost up; here it comes again and
    again until the process has ended."""
    run = tmp_path / "run"
    process = started(tmp_path, "train.py", *SMALL, *LONGER, "trainer.save_every=null", f"output_dir={run}")
    wait_for(run / "metrics.jsonl", 3)
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        os.kill(process.pid, signum)
        time.sleep(0.005)
    out = (tmp_path / "out").read_text()
    assert process.exitcode == 130, out
    done = train(f"resume={run}", *QUIET)
    assert done.returncode == 0, done.stderr
    assert lines(run) == lines(longer)
    assert same_policy(run, longer)
    tell("killed", f"{signum.name}, again and again", seen=line_with(out, "stopped at step"), survived=EQUAL)


def _without_hangups(*words):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    train(*words)


def test_what_nohup_ignores_stays_ignored(longer, tmp_path, tell):
    run = tmp_path / "run"
    process = forked(tmp_path, _without_hangups, *SMALL, *LONGER, f"output_dir={run}")
    wait_for(run / "metrics.jsonl", 3)
    os.kill(process.pid, signal.SIGHUP)
    process.join(timeout=60)
    assert lines(run) == lines(longer)
    assert same_policy(run, longer)
    status = json.loads((run / "summary.json").read_text())["status"]
    tell("killed", "SIGHUP under nohup", seen=f"status {status}", survived="the run, which goes on to its end")


def test_a_checkpoint_by_the_clock_changes_nothing(whole, tmp_path, tell):
    run = tmp_path / "run"
    options = ["trainer.save_every=null", "trainer.save_minutes=1e-9"]
    assert train(*SMALL, *options, f"output_dir={run}").returncode == 0
    assert checkpoints(run) == [f"step-{step:08d}" for step in range(1, 7)]
    assert equal(run, whole)
    seen = " ".join(checkpoints(run))
    tell(
        "killed", "trainer.save_minutes, without save_every", seen=seen, survived="the results, which it leaves alone"
    )


# --- damaged


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = {
    "a flipped bit": flip,
    "truncated": truncate,
    "missing": Path.unlink,
    "emptied": lambda p: p.write_bytes(b""),
}
DAMAGED = [
    *((name, "a flipped bit") for name in TENSORS[:3]),
    *(("state.json", "truncated"), ("digests.json", "missing"), ("optimizer.safetensors", "missing")),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(run, whole, name, damage, tell):
    DAMAGES[damage](last(run) / name)
    seen = line_with(goes_on(run, whole), f"step-00000006/{name} is ")
    assert "an earlier checkpoint is taken, step-00000004" in seen
    tell("used silently", f"{name} of the last checkpoint: {damage}", seen=seen, survived=EQUAL)


def test_where_no_checkpoint_is_whole_it_is_told_how_to_start_again(run, tell):
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "optimizer.safetensors")
    seen = refused(f"resume={run}", *QUIET)
    assert all(f"step-0000000{step}/optimizer.safetensors is damaged" in seen for step in (2, 4, 6))
    assert f"rm -r {run}/checkpoints" in seen
    tell("used silently", "a flipped bit in every checkpoint", seen=seen, survived="nothing was trained")


def test_a_checkpoint_under_another_steps_name_is_told(run, whole, tell):
    (run / "checkpoints" / "step-00000004").rename(run / "checkpoints" / "step-00000005")
    shutil.rmtree(last(run))
    seen = line_with(goes_on(run, whole), "is of step 4, which is not what its folder says")
    tell("used silently", "a checkpoint renamed to another step", seen=seen, survived=EQUAL)


# --- changed by hand


EDITS = {
    "optim.lr": ("lr: 0.0003", "lr: 0.003"),
    "beta": ("beta: 0.3", "beta: 0.1"),
    "trainer.batch_size": ("batch_size: 8", "batch_size: 4"),
    "data.length_bias": ("length_bias: 1.0", "length_bias: 1.5"),
}


@pytest.mark.parametrize("key", EDITS)
def test_a_configuration_changed_by_hand_is_told(cut, key, tell):
    path, (old, new) = cut / "config.yaml", EDITS[key]
    content = path.read_text()
    assert content.count(f" {old}\n") + content.count(f"\n{old}\n") == 1
    path.write_text(content.replace(f"{old}\n", f"{new}\n"))
    seen = refused(f"resume={cut}", *QUIET)
    was, is_now = (text.partition(": ")[2] for text in (old, new))
    assert f"{key} was {was} and is {is_now} now" in seen
    assert "policy" not in os.listdir(cut)
    tell("used silently", f"{key} changed in config.yaml before resume=", seen=seen, survived="nothing was trained")


RECORDS = {
    "without its third line": lambda rows: rows[:2] + rows[3:],
    "with a line torn in the middle": lambda rows: [rows[0], rows[1][:20] + b"\n", *rows[2:]],
    "with its last lines lost": lambda rows: rows[:3],
}


@pytest.mark.parametrize("change", RECORDS)
def test_a_record_with_lost_lines_is_told(cut, change, tell):
    path = cut / "metrics.jsonl"
    path.write_bytes(b"".join(RECORDS[change](path.read_bytes().splitlines(keepends=True))))
    seen = refused(f"resume={cut}", *QUIET)
    assert f"{path} is not as the checkpoint left it" in seen
    tell("used silently", f"metrics.jsonl {change}", seen=seen, survived="nothing was trained")


def test_data_changed_before_a_resume_is_told(tmp_path, tell):
    rows = [given(-3, -4, prompt=f"why {index}?") for index in range(8)]
    path, run = tmp_path / "rows.jsonl", tmp_path / "run"
    options = [*QUIET, "model.path=lab:tiny", "data=jsonl", f"data.path={written(path, *rows)}", f"output_dir={run}"]
    assert train(*options, "reference=none", "objective=simpo", "trainer.batch_size=4").returncode == 0
    rows[3]["chosen"] = "because it is"
    written(path, *rows)
    seen = refused(f"resume={run}", *QUIET)
    assert ": data was " in seen
    tell("used silently", "one answer of the data changed before resume=", seen=seen, survived="nothing was trained")


# --- a disk that is full, a folder that is gone or not to be written


def _with_files_up_to(size, *words):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.exit(train_aloud(*words))


def train_aloud(*words):
    done = train(*words)
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


def test_no_room_for_a_checkpoint(cut, whole, tmp_path, tell):
    """The operating system refuses to make a file as large as the moments."""
    size = (cut / "checkpoints" / "step-00000004" / "optimizer.safetensors").stat().st_size
    process = forked(tmp_path, _with_files_up_to, size - 1000, f"resume={cut}", *QUIET)
    process.join(timeout=60)
    (seen,) = (tmp_path / "err").read_text().splitlines()
    assert process.exitcode == 1
    assert "the checkpoint of step 6 was not written" in seen
    assert checkpoints(cut) == ["step-00000002", "step-00000004"]
    goes_on(cut, whole)
    tell("lost", "no room for a checkpoint", seen=seen, survived=f"the earlier ones; {EQUAL}")


def test_an_output_folder_removed_while_training(longer, tmp_path, tell):
    run = tmp_path / "run"
    process = started(tmp_path, "train.py", *SMALL, *LONGER, f"output_dir={run}")
    wait_for(run / "metrics.jsonl", 3)
    run.rename(tmp_path / "gone")
    process.join(timeout=60)
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    seen = line_with((tmp_path / "out").read_text(), "was removed while training, and is made again")
    assert same_policy(run, longer)
    assert train(f"resume={run}", *QUIET).returncode == 0
    tell("lost", "the output folder removed while training", seen=seen, survived="the policy, with equal weights")


def _as_nobody(folder, *words):
    """Nobody may read what is imported and which models are here, so the configuration is completed before."""
    cfg, choices = composed(*words)
    job = Job(folder, list(words), choices, sweep=None)
    cfg = completed(cfg, job)
    os.setuid(65534)
    sys.exit(run_job(cfg, job).code)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_an_output_folder_that_may_not_be_written(tmp_path, tell):
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        process = forked(tmp_path, _as_nobody, folder / "run", *SMALL)
        process.join(timeout=60)
    (seen,) = (tmp_path / "err").read_text().splitlines()
    assert process.exitcode == 1
    assert f"the folder {folder / 'run'} cannot be written" in seen
    seen = seen.replace(str(folder), "…")
    tell("untidy", "an output folder that may not be written", seen=seen, survived="told before anything is loaded")
