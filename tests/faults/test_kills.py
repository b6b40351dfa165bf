"""kill -9 at random moments, of every kind of work that takes long. What was killed is typed again, killed again, and
ends as if it had never been: metrics, weights, moments and random states bit for bit.

`make test` kills each once; `make faults` kills over a hundred times, and tells what was hit.
"""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import pytest

from dpo_ref.cli import sweep as end_of_sweep
from dpo_ref.evaluation.judging.answers import FILE
from dpo_ref.files.digests import file_digest
from dpo_ref.references import table
from tests.support import on_policy
from tests.support.command import ROOT
from tests.support.evaluate_command import QUICK
from tests.support.faults import SMALL, steps, summary
from tests.support.judge_server import JudgeServer
from tests.support.kills import Work, deaths, ends_after, whole, without_clock
from tests.support.loopback import surroundings  # noqa: F401
from tests.support.pictures import undrawn
from tests.support.training_evaluation import lines

SEED = int(os.environ.get("KILLS_SEED", "0"))  # what is killed when; printed where a test fails
KILLS_OF_EACH = 15


# --- training, until it has ended


def run_of(folder):
    return folder / "run"


def gone_on_with(run, *words):
    """What goes on with a run, or begins it where it was killed before it was one."""
    return ["train.py", f"resume={run}", "tracking=none"] if (run / "config.yaml").is_file() else ["train.py", *words]


def training(*words):
    return lambda folder: gone_on_with(run_of(folder), *words, f"output_dir={run_of(folder)}")


def digests(folder, *patterns):
    return {str(path.relative_to(folder)): file_digest(path) for pattern in patterns for path in folder.glob(pattern)}


def end_of_run(run):
    """Every number, weight, moment and random state of a run that has ended."""
    record = summary(run)
    return {
        "lines": lines(run),
        "tensors": digests(run, "checkpoints/*/*.safetensors", "policy/*.safetensors", "rounds/*/old/*.safetensors"),
        "metrics": without_clock(record["metrics"]),
        "summary": {key: record[key] for key in ("status", "steps", "identities", "objective", "reference", "seed")},
    }


def saves(run):
    return any((run / "checkpoints").glob(".*"))


def is_trained(run):
    return (run / "policy").is_dir()


def phase_of_run(run):
    if saves(run):
        return "in a save"
    if not steps(run):
        return "before the first step"
    return "after the last step" if is_trained(run) else "in a step"


def steps_of(run):
    return sum("train/loss" in line for line in lines(run)) if steps(run) else 0


# --- the table of the reference


def tables(folder):
    return list((folder / "cache").glob("reference/*/*"))


def phase_of_pass(folder):
    if steps(run_of(folder)):
        return phase_of_run(run_of(folder))
    return "in the reference pass" if tables(folder) else "before the pass"


# --- a round of samples


ROUNDS = 4


def draws(run):
    """Whether all rounds that are drawn have been trained on."""
    drawn = len(list(run.glob("rounds/*/record.json")))
    return 0 < drawn < ROUNDS and steps_of(run) == drawn * 2


def phase_of_rounds(run):
    return "in the sampling of a round" if draws(run) else phase_of_run(run)


# --- an evaluation


EVALUATED = {
    "generations.jsonl": "while answers were sampled",
    "measurements.json": "while the models were measured",
    "diagnostics.json": "while it was diagnosed",
    "evaluation.json": "while answers were scored",
    "report.html": "while the page was written",
}


def results_of(folder):
    return run_of(folder) / "evaluation"


def phase_of_evaluation(folder):
    missing = (phase for name, phase in EVALUATED.items() if not (results_of(folder) / name).is_file())
    return next(missing, "after the page")


def records_of(folder):
    names = [*(name for name in EVALUATED if name.startswith(("gen", "mea", "dia", "eva"))), "judge.json"]
    names += ["judgments.jsonl", "scores.json", "token_examples.json"]
    return {name: path.read_bytes() for name in names if (path := results_of(folder) / name).is_file()}


# --- a judge


def answers(folder):
    path = folder / "cache" / FILE
    if not path.is_file():
        return 0
    with closing(sqlite3.connect(path)) as connection:
        try:
            return connection.execute("SELECT count(*) FROM answers").fetchone()[0]
        except sqlite3.OperationalError:  # the table is not there yet
            return 0


def phase_of_judging(folder):
    if (results_of(folder) / "judge.json").is_file():
        return "after the judgments"
    return "in the judge's calls" if answers(folder) else "before the judge was asked"


# --- a sweep


BETAS = ("0.1", "0.3", "3")


def jobs(folder):
    return [folder / "sweep" / f"{number}_beta-{beta}" for number, beta in enumerate(BETAS)]


def phase_of_sweep(folder):
    begun = [job for job in jobs(folder) if job.is_dir()]
    if is_trained(jobs(folder)[-1]):
        return "after the last job"
    return f"in job {len(begun)} of {len(BETAS)}" if begun else "before the first job"


# What was measured stands in metrics.jsonl when a round of two steps is over, and no save is under way then.
ON_POLICY = [*on_policy.SMALL, "objective=ppo_clip", "data.samples_per_prompt=2", "trainer.eval_every=2"]
ON_POLICY += ["trainer.save_every=3", "data.max_new_tokens=32", f"data.rounds={ROUNDS}"]
LONG_ANSWERS = ["generation.max_new_tokens=48", "generation.batch_size=4"]
SHORT = [*SMALL, "trainer.epochs=2"]
LONGER = [*SMALL, "data.num_pairs=160"]
SWEEP = ["train.py", "-m", *SMALL, "trainer.save_every=2", f"beta={','.join(BETAS)}"]
WORKS = {
    "steps": Work(
        training(*SHORT, "trainer.save_every=3"),
        lambda folder: phase_of_run(run_of(folder)),
        lambda folder: end_of_run(run_of(folder)),
        lambda folder: steps(run_of(folder)) > 0,
    ),
    "saves": Work(
        training(
            *SHORT, "optim=adamw_bf16", "trainer.save_every=1", "trainer.keep_checkpoints=2"
        ),  # it draws random numbers
        lambda folder: phase_of_run(run_of(folder)),
        lambda folder: end_of_run(run_of(folder)),
        lambda folder: saves(run_of(folder)),
    ),
    "a reference pass": Work(
        training(*LONGER, "trainer.max_steps=2"),
        phase_of_pass,
        lambda folder: end_of_run(run_of(folder)),
        lambda folder: bool(tables(folder)),
    ),
    "on-policy rounds": Work(
        training(*ON_POLICY),
        lambda folder: phase_of_rounds(run_of(folder)),
        lambda folder: end_of_run(run_of(folder)),
        lambda folder: draws(run_of(folder)),
    ),
    "a sweep": Work(
        lambda folder: [*SWEEP, f"output_dir={folder / 'sweep'}"],
        phase_of_sweep,
        lambda folder: list(map(end_of_run, jobs(folder))),
        lambda folder: jobs(folder)[1].is_dir(),
    ),
    "an evaluation": Work(
        lambda folder: ["evaluate.py", f"policy={run_of(folder)}", *QUICK, *LONG_ANSWERS],
        phase_of_evaluation,
        records_of,
        lambda folder: results_of(folder).is_dir(),
    ),
}


@pytest.fixture
def folder_for(tmp_path, trained, monkeypatch):
    """Makes a folder for a command: an empty cache, and a run where one is evaluated."""
    monkeypatch.setattr(table, "SHARD_TOKENS", 400)  # a pass writes some shards
    ended = SimpleNamespace(run=lambda command, check: SimpleNamespace(returncode=0))
    monkeypatch.setattr(end_of_sweep, "subprocess", ended)  # a sweep's evaluation is a work of its own

    def make(name, with_run):
        folder = tmp_path / name
        (folder / "cache").mkdir(parents=True)
        if with_run:
            shutil.copytree(trained, run_of(folder))
        return folder

    with undrawn():
        yield make


def killed(work, make, most, label):
    """Kill one command after the other until `most` have been killed; how many in which phase, and of how
    many commands, the one that was not killed among them."""
    uninterrupted, chance = whole(work, make("whole")), random.Random(f"{SEED} {label}")
    phases: Counter[str] = Counter()
    moments = deaths(chance, uninterrupted)
    attempts = 0
    while phases.total() < most:
        attempts += 1
        folder = make(f"attempt {attempts}")
        phases += ends_after(work, folder, moments, min(5, most - phases.total()))
        assert work.outcome(folder) == uninterrupted.outcome, f"KILLS_SEED={SEED}: {folder}"
        shutil.rmtree(folder)
    return phases, attempts + 1


def in_words(phases):
    return ", ".join(f"{count} {phase}" for phase, count in phases.most_common())


RECORDS = "after it was typed again until it ended: answers, measurements, diagnosis, scores byte for byte"
EQUAL = "after it was typed again until it ended: metrics, weights, moments, random states equal those of no kill"


IN_SHORT = ("steps", "a reference pass")  # in `make test`; the others take longer, `make faults` kills all
ONCE = [pytest.param(name, 1, marks=[] if name in IN_SHORT else pytest.mark.slow) for name in WORKS]
OFTEN = [pytest.param(name, KILLS_OF_EACH, marks=pytest.mark.slow) for name in WORKS]


@pytest.mark.parametrize(("name", "most"), [*ONCE, *OFTEN])
def test_what_is_killed_ends_as_if_it_had_not_been(name, most, folder_for, tell):
    phases, _ = killed(WORKS[name], partial(folder_for, with_run=name == "an evaluation"), most, name)
    tell(
        "killed",
        f"kill -9 of {name}, {phases.total()}x at random moments",
        seen=in_words(phases),
        survived=RECORDS if name == "an evaluation" else EQUAL,
    )


AT_ONCE = 2  # questions under way


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, KILLS_OF_EACH])
def test_what_is_killed_while_a_judge_answers(most, folder_for, monkeypatch, tell):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key-0123456789")
    with JudgeServer(wait=0.02) as server:
        asks = ["judge=alpaca_eval", "judge.model=big", f"judge.base_url={server.url}", f"judge.max_workers={AT_ONCE}"]
        work = Work(
            lambda folder: ["evaluate.py", f"policy={run_of(folder)}", *QUICK, "diagnostic=none", *asks],
            phase_of_judging,
            records_of,
            lambda folder: answers(folder) > 0,
        )
        phases, folders = killed(work, partial(folder_for, with_run=True), most, "a judge")
        assert server.asked.total() <= len(server.asked) * folders + AT_ONCE * phases.total()
    tell(
        "killed",
        f"kill -9 of judging, {phases.total()}x at random moments",
        seen=in_words(phases),
        survived="every answer that had come: only questions under way were asked twice; equal records in the end",
    )


def typed_whole(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def killed_in_a_step(words, run, seconds):
    """Kill what is typed, some time after it has measured something."""
    before = steps(run)
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    while steps(run) <= before and process.poll() is None:
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_what_is_typed_and_killed_is_no_other(tmp_path, tell):
    """The same with interpreters of their own, which import everything: the copies above are no other."""
    run, other, chance, hits = tmp_path / "run", tmp_path / "other", random.Random(f"{SEED} typed"), Counter()
    options = [*SMALL, "trainer.epochs=30", "trainer.save_every=4"]
    typed_whole(["train.py", *options, f"output_dir={other}"])
    for _ in range(4):
        killed_in_a_step(gone_on_with(run, *options, f"output_dir={run}"), run, chance.uniform(0, 0.2))
        hits[phase_of_run(run)] += 1
    typed_whole(gone_on_with(run, *options, f"output_dir={run}"))
    assert end_of_run(run) == end_of_run(other), f"KILLS_SEED={SEED}"
    tell(
        "killed",
        f"kill -9 of typed commands that train, {hits.total()}x at random moments",
        seen=in_words(hits),
        survived=EQUAL,
    )
