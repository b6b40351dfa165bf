"""Services and disks that are slow, lost for a while, or lost for good, under whole commands: the run's own numbers
are those of an undisturbed one, and what is missing is said to be missing everywhere, and is never a number."""

import csv
import ctypes
import json
import os
import shutil
import threading
import time
from contextlib import contextmanager
from functools import cache

import pytest
import safetensors.torch
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from dpo_ref.cli.sweep import SweepReport
from dpo_ref.cli.train import Ended
from dpo_ref.files.cache import entries_in_use
from dpo_ref.models.loading import load_tokenizer
from tests.support.cache import empty_cache
from tests.support.command import train
from tests.support.completions_server import CompletionsServer
from tests.support.evaluate_command import PLAIN, evaluate, numbers
from tests.support.faults import SMALL, Typed, same_weights, summary
from tests.support.judge_server import JudgeServer
from tests.support.loopback import surroundings  # noqa: F401
from tests.support.tokenizers_here import byte_bpe
from tests.support.wandb_runs import Offline, service
from tests.tracking.test_tracking_wandb import KEY, own_wandb  # noqa: F401

pytestmark = pytest.mark.slow  # `make faults` runs it

OF_TIME = ("throughput", "memory", "seconds")  # in the names of numbers that differ between equal runs
JUDGED = ["judge=alpaca_eval", "judge.model=big", "judge.max_workers=1"]
LOST = "judge=alpaca_eval was lost with"
WANDB = ["tracking=wandb", "tracking.timeout=3"]


def measured(run):
    """The lines of metrics.jsonl without what depends on time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not any(word in name for word in OF_TIME)} for row in rows]


def same_run(run, other):
    return measured(run) == measured(other) and same_weights(run, other) and summary(run)["status"] == "completed"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of which nothing was lost."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(*SMALL, f"output_dir={run}").returncode == 0
    return run


@pytest.fixture
def run(undisturbed, tmp_path, monkeypatch):
    """A copy of it to be evaluated, and no answer of a judge known."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key-0123456789")
    empty_cache(monkeypatch, tmp_path / "cache")
    return shutil.copytree(undisturbed, tmp_path / "run")


def judged_by(server, *more):
    return [*PLAIN, *JUDGED, f"judge.base_url={server.url}", *more]


def lost_judge(run, *more, answers=7):
    """Evaluate with a judge that is gone after some answers; the error."""
    with JudgeServer(dies_after=answers) as server, pytest.raises(ValueError, match="gave no answer") as error:
        evaluate(f"policy={run}", *judged_by(server, "judge.retries=1", *more))
    return str(error.value)


# --- a judge


def test_a_judge_that_is_away_for_a_while(run, tmp_path, monkeypatch, tell):
    whole = shutil.copytree(run, tmp_path / "whole" / "run")
    with JudgeServer() as server:
        evaluate(f"policy={whole}", *judged_by(server))
    empty_cache(monkeypatch, tmp_path / "another cache")
    with JudgeServer(faults=["dropped"] * 3 + ["503"] * 3) as server:
        evaluate(f"policy={run}", *judged_by(server, "judge.retries=6"))
    assert numbers(run / "evaluation") == numbers(whole / "evaluation")
    tell("service", "a judge away for six requests of `evaluate.py`", seen="nothing", survived="equal final metrics")


def test_a_judge_that_is_lost_is_said_to_be_missing_everywhere(run, capsys, tell):
    lost_judge(run, "tracking=wandb", "tracking.mode=offline")
    evaluation = numbers(run / "evaluation")
    (why,) = evaluation["missing"]
    assert why.startswith(LOST)
    assert not [key for key in evaluation["metrics"] if "judge" in key]
    assert "winrate/initial" in evaluation["metrics"]
    assert why in (run / "evaluation" / "report.html").read_text()
    told = Offline(run / "evaluation").summary
    assert why in told["evaluation/missing"]
    assert not [key for key in told if "judge" in key]
    (seen,) = (line for line in capsys.readouterr().out.splitlines() if LOST in line)
    tell(
        "service",
        "a judge that is lost in `evaluate.py`",
        seen=seen,
        survived="every other number; `missing` in evaluation.json, report.html and W&B, no win rate in any",
    )


def test_a_judge_that_is_back_leaves_nothing_missing(run, tmp_path, monkeypatch, tell):
    whole = shutil.copytree(run, tmp_path / "whole" / "run")
    seen = lost_judge(run)
    with JudgeServer() as server:
        evaluate(f"policy={run}", *judged_by(server))
        asked_again = server.asked.total()
    empty_cache(monkeypatch, tmp_path / "another cache")
    with JudgeServer() as server:
        evaluate(f"policy={whole}", *judged_by(server))
        assert server.asked.total() == asked_again + 7
    assert numbers(run / "evaluation") == numbers(whole / "evaluation")
    assert LOST not in (run / "evaluation" / "report.html").read_text()
    tell(
        "service",
        "a judge that is lost in `evaluate.py`, and back when the command is repeated",
        seen=seen,
        survived="every answer; equal final metrics, nothing missing",
    )


def test_numbers_of_a_judge_from_before_stay_when_it_is_lost(run, tell):
    with JudgeServer() as server:
        evaluate(f"policy={run}", *judged_by(server))
    before = numbers(run / "evaluation")
    seen = lost_judge(run, "judge.temperature=0.5")
    assert numbers(run / "evaluation") == before  # of the judge that was asked then
    tell("service", "a judge that is lost in a second evaluation", seen=seen, survived="the numbers of the first")


def test_a_win_rate_of_some_pairs_says_of_how_many(run, capsys, tell):
    with JudgeServer(faults=["too long"] * 3) as server:
        evaluate(f"policy={run}", *judged_by(server))
    metrics = numbers(run / "evaluation")["metrics"]
    part = f"{metrics['judge/num_judged']:g} of {metrics['judge/num_pairs']:g} pairs"
    assert metrics["judge/num_missing"] > 0
    page, out = (run / "evaluation" / "report.html").read_text(), capsys.readouterr().out
    assert f"({part})" in page  # in the table
    assert f"what the judge says is over {part}" in page
    (seen,) = (line for line in out.splitlines() if part in line)
    assert f"({part.removesuffix(' pairs')})" in out
    tell("service", "a judge that refuses some questions", seen=seen, survived="the win rate says of how many pairs")


def test_a_judge_that_is_lost_in_a_sweep(run, tmp_path, monkeypatch, capsys, tell):
    sweep = tmp_path / "sweep"
    for name in ("0_seed-0", "1_seed-1"):
        shutil.copytree(run, sweep / name)
    with JudgeServer() as server:
        evaluate(f"policy={sweep / '0_seed-0'}", *judged_by(server))
    empty_cache(monkeypatch, tmp_path / "another cache")
    with JudgeServer(dies_after=3) as server, pytest.raises(ValueError, match="gave no answer"):
        evaluate(f"sweep={sweep}", *judged_by(server, "judge.retries=1"))
    with (sweep / "sweep.csv").open() as file:
        rows = {row["job"]: row for row in csv.DictReader(file)}
    assert [bool(row["missing"]) for row in rows.values()] == [False, True]
    assert [row["judge_winrate/initial"] == "" for row in rows.values()] == [False, True]
    page = (sweep / "report.html").read_text()
    assert "1 of 2 seeds" in page
    seen = next(line for line in capsys.readouterr().out.splitlines() if "of 2 seeds" in line)
    tell("service", "a judge that is lost in a sweep", seen=seen, survived="what was judged; empty cells for the rest")


# --- a served reference


SERVED = [*SMALL, "reference=served", "reference.model=big", "reference.tokenizer=lab:tiny", "reference.batch_size=4"]


@cache
def served_model():
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_ref.lab.models import locate

    return AutoModelForCausalLM.from_pretrained(locate("lab:tiny"), dtype=torch.float32)


def trained_against(server, run, *more):
    return train(*SERVED, f"reference.url={server.url}", f"output_dir={run}", *more)


def test_a_served_reference_that_is_lost_and_back(tmp_path, monkeypatch, tell):
    whole, run = tmp_path / "whole", tmp_path / "run"
    empty_cache(monkeypatch, tmp_path / "cache")
    with CompletionsServer(served_model()) as server:
        assert trained_against(server, whole).returncode == 0
    empty_cache(monkeypatch, tmp_path / "another cache")
    with CompletionsServer(served_model(), faults=["dropped"] * 3 + ["503"] * 400, healthy=4) as server:
        done = trained_against(server, run, "reference.retries=1")
    assert done.returncode == 1
    assert not (run / "metrics.jsonl").exists()
    with CompletionsServer(served_model(), faults=["dropped"] * 3 + ["503"] * 3, healthy=4) as server:
        assert trained_against(server, run, "reference.retries=6").returncode == 0
    assert same_run(run, whole)
    tell(
        "service",
        "a served reference that is lost while its table is filled, and back when the command is repeated",
        seen=done.stderr.splitlines()[-1],
        survived="no step is made without it; equal final weights and metrics",
    )


# --- W&B


class Weather:
    """What the service answers: as it is told, from some moment on."""

    def __init__(self, broken):
        self.broken, self.is_broken = broken, threading.Event()

    def __call__(self, data):
        if self.is_broken.is_set():
            return self.broken()
        return json.dumps({"data": data}).encode()


def fails():
    return 500, b"try again"


def hangs():
    time.sleep(60)
    return fails()


@contextmanager
def tracked(monkeypatch, broken):
    """The environment of a run that believes to be online."""
    weather = Weather(broken)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with service(weather) as (url, _):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        yield weather


BROKEN = {"answers with 500": fails, "hangs": hangs}


@pytest.mark.parametrize("done", BROKEN)
def test_a_service_that_breaks_in_mid_run(undisturbed, tmp_path, monkeypatch, done, own_wandb, tell):  # noqa: F811
    run = tmp_path / "run"
    with tracked(monkeypatch, BROKEN[done]) as weather:
        typed = Typed(tmp_path / "typed", "train.py", *SMALL, *WANDB, f"output_dir={run}")
        typed.until(lambda: (run / "metrics.jsonl").exists())
        weather.is_broken.set()
        ended = typed.end()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert same_run(run, undisturbed)
    history = Offline(run, "run-*").history
    losses = [row["train/loss"] for row in history if "train/loss" in row]
    assert losses == [row["train/loss"] for row in measured(run) if "train/loss" in row]
    seen = next(line for line in ended.stdout.splitlines() if "wandb sync --include-online" in line)
    tell(
        "service",
        f"W&B {done} from the first step on",
        seen=seen,
        survived="metrics.jsonl and W&B's own record are complete; equal final weights",
    )


def test_a_service_that_is_lost_and_back(undisturbed, tmp_path, monkeypatch, own_wandb, tell):  # noqa: F811
    run = tmp_path / "run"
    with tracked(monkeypatch, fails) as weather:
        typed = Typed(tmp_path / "typed", "train.py", *SMALL, *WANDB, "tracking.timeout=30", f"output_dir={run}")
        typed.until(lambda: (run / "metrics.jsonl").exists())
        weather.is_broken.set()
        typed.until(lambda: (run / "policy").exists())
        weather.is_broken.clear()
        ended = typed.end()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert same_run(run, undisturbed)
    seen = [line for line in ended.stdout.splitlines() if line.startswith("W&B")][-1]
    tell("service", "W&B lost in mid-run, and back before its end", seen=seen, survived="equal final weights")


# --- a slow disk


def slow_disk(seconds=0.02):
    """Makes every file that a process opens, moves or saves wait."""

    def slowly(call):
        def wait(*arguments, **options):
            time.sleep(seconds)
            return call(*arguments, **options)

        return wait

    def prepare():
        from dpo_ref.models import checkpoint

        for name in ("replace", "rename", "unlink", "fsync"):
            setattr(os, name, slowly(getattr(os, name)))
        checkpoint.save_file = slowly(safetensors.torch.save_file)
        from pathlib import Path

        Path.open = slowly(Path.open)

    return prepare


def test_a_slow_disk(undisturbed, tmp_path, tell):
    run = tmp_path / "run"
    words = [*SMALL, "trainer.save_every=1", f"output_dir={run}"]
    done = Typed(tmp_path / "typed", "train.py", *words, before=slow_disk()).end()
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_run(run, undisturbed)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    tell("untidy", "a disk on which every file waits", seen="nothing", survived="equal final weights and metrics")


# --- a sweep of hundreds of jobs


def test_a_job_that_is_done_holds_no_entry_of_the_cache(tmp_path, tell):
    before = entries_in_use()
    assert train(*SMALL, f"output_dir={tmp_path / 'run'}", "seed=5").returncode == 0
    assert entries_in_use() == before
    tell(
        "untidy", "a sweep of more jobs than files may be open", seen="nothing", survived="each closes what it opened"
    )


def test_a_job_that_is_done_leaves_nothing_in_memory_but_how_it_ended(tell):
    done = JobReturn(cfg=OmegaConf.create({"seed": 1}), hydra_cfg=OmegaConf.create({"job": 1}))
    done.return_value, done.status = Ended(0), JobStatus.COMPLETED
    SweepReport().on_job_end(OmegaConf.create(), done)
    assert (done.cfg, done.hydra_cfg, done.return_value) == (None, None, Ended(0))
    tell("untidy", "a sweep of hundreds of jobs in one process", seen="nothing", survived="no job's trees are kept")


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 says, in bytes."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def in_use() -> int:
    """Bytes of the heap that are in use, those that no Python object owns among them."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not count its heap")
    libc.mallinfo2.restype = Heap
    return libc.mallinfo2().uordblks


def test_tokenizers_that_are_gone_leave_nothing_in_memory(tmp_path, tell):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        byte_bpe().save_pretrained(folder)
    words = " ".join(f"word{number} lantern{number * 7}" for number in range(2000))
    encoded = [load_tokenizer(str(folder))(words).input_ids for folder in folders * 2]  # warm
    assert encoded[0] == encoded[1]
    before = in_use()
    for folder in folders * 8:
        assert load_tokenizer(str(folder))(words).input_ids == encoded[0]
    left = (in_use() - before) / 16 / 2**10
    assert left < 32  # KiB a tokenizer; each thread's words alone are some hundreds
    tell("untidy", "a tokenizer for each of hundreds of jobs", seen="nothing", survived="equal ones share their words")


def test_tokenizers_of_other_files_share_nothing(tmp_path):
    tokenizers = []
    for name, start in (("a", "<here alone>"), ("b", "<there alone>"), ("c", "<here alone>")):
        byte_bpe(bos=start).save_pretrained(tmp_path / name)
        tokenizers.append(load_tokenizer(str(tmp_path / name)))
    tokenizers[0].backend_tokenizer.model.dropout = 0.5
    assert [tokenizer.backend_tokenizer.model.dropout for tokenizer in tokenizers] == [0.5, None, 0.5]
