"""Types the command lines of a study, and reads what they leave behind.

A sweep that was run to its end is not run again; one that was stopped goes on where it was. Jobs in the lab run side
by side with one thread each, so that their numbers do not depend on how many cores there are.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dpo_ref.evaluation.diagnostics.logratios import Bucket
from dpo_ref.evaluation.results import Evaluated
from dpo_ref.evaluation.stages import read_diagnosis, read_evaluated
from dpo_ref.evaluation.sweep import SweptRun, collect, key_of
from dpo_ref.files.writing import write_text
from dpo_ref.tracking.terminal import say
from studies.intervals import Interval, over_runs, over_runs_and_prompts

ROOT = Path(__file__).parents[1]
OUTPUTS = ROOT / "outputs" / "studies"
FINISHED = "finished.txt"  # in a sweep's folder: the command that it is the result of
INITIALS = ("lab:initial", "lab:initial_2")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as many jobs as cores

METRICS = {
    "gold": "gold/mean",
    "win_rate": "winrate/initial",
    "tokens": "lengths/response",
    "kl": "kl/initial",
    "ended": "ended/share",
    "end": "eos/chosen_logratio",
    "accuracy": "rewards/accuracies",
    "length_baseline": "rewards/length_baseline",
    "reward": "reward_model/mean",
}
"""What is read of every policy: gold reward of its answers; its share of paired comparisons with the initial policy;
tokens an answer; nats an answer to the initial policy; share of answers that end; nats by which the end of chosen
answers moved; share of held-out pairs in the order of their labels, and of those in which the longer one is preferred;
a reward model's mean. What was not measured is nan."""


# --- running


def run(folder: Path, *words: str, environment: Mapping[str, str] = ONE_THREAD) -> None:
    """Type a command that leaves its results in `folder`, unless it was run to its end before. Raises ValueError where
    the folder holds those of another command, and for a command that fails."""
    command = shlex.join(["python", *words])
    finished, begun = folder / FINISHED, folder.parent / f"{folder.name}.begun.txt"
    before = next((path.read_text() for path in (finished, begun) if path.exists()), command)
    if before != command:
        raise ValueError(f"{folder} is the result of\n  {before}\nand not of\n  {command}\nmove it and {begun} away")
    if finished.exists():
        return
    say(command)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(begun, command)
    status = _typed([*words, f"output_dir={folder}", "tracking=none"], environment)
    if status:
        raise ValueError(f"{command}\nended with status {status}; the same command of studies goes on with it")
    folder.mkdir(exist_ok=True)
    write_text(finished, command)


def _typed(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """The status of a command; when the time of the studies is over it is stopped as by Ctrl-C, and saves itself."""
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | environment)
    try:
        return process.wait()
    except TimeoutError:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise


def sweep(folder: Path, *words: str) -> "Runs":
    """Run a sweep, or what is left of it; its policies."""
    run(folder, "train.py", "-m", *words)
    return Runs([read_run(job) for job in collect(folder)]).where(lambda one: True)


# --- what was left behind


@dataclass(frozen=True, slots=True)
class Run:
    """One policy: what was swept to make it, whose training began where, and what its answers came to."""

    words: Mapping[str, str]
    initial: str
    seed: int
    metrics: Mapping[str, float]
    degenerate: bool
    gold: Float[np.ndarray, " P"]
    folder: Path

    def classes(self, text: str) -> Sequence[Bucket]:
        """Log-ratios of tokens to the initial policy by class, on `chosen`, `rejected` or `own` responses."""
        diagnosis = read_diagnosis(self.folder)
        if diagnosis is None:
            raise ValueError(f"{self.folder} has no diagnosis")
        return diagnosis.texts[text].shift.by_class


def by_prompt(evaluated: Evaluated) -> Float[np.ndarray, " P"]:
    """The mean score of the answers to each prompt, in the prompts' order."""
    index = np.array([generation.prompt_index for generation in evaluated.generations])
    return np.bincount(index, weights=evaluated.scores) / np.bincount(index)


def read_run(job: SweptRun) -> Run:
    """A policy of a sweep. Raises ValueError where it failed or was not evaluated."""
    if job.evaluation is None or job.seed is None:
        raise ValueError(f"{job.folder}: {job.state}")
    words = {key_of(word): word.partition("=")[2] for word in job.words}
    metrics = {name: job.evaluation.get(key) for name, key in METRICS.items()}
    gold = by_prompt(read_evaluated(job.results))
    initial = words.pop("model.path", INITIALS[0])
    return Run(words, initial, job.seed, metrics, bool(job.evaluation.degenerate), gold, job.results)


@dataclass(frozen=True, slots=True)
class Runs:
    """Policies of a sweep, or some of them."""

    runs: Sequence[Run]

    def at(self, **words: str) -> "Runs":
        """Those with these words; of numbers, 1e-4 is 0.0001."""
        wanted = words.items()
        return self.where(lambda run: all(key in run.words and _same(run.words[key], value) for key, value in wanted))

    def where(self, keep: Callable[[Run], bool]) -> "Runs":
        """Those that are to be kept, by initial policy and seed. Raises ValueError for none."""
        kept = sorted(filter(keep, self.runs), key=lambda run: (run.initial, run.seed))
        if not kept:
            raise ValueError("no run is left of what was asked for")
        return Runs(kept)

    @property
    def units(self) -> list[tuple[str, int]]:
        """Initial policy and seed of each."""
        return [(run.initial, run.seed) for run in self.runs]

    @property
    def initials(self) -> list[str]:
        """The initial policy of each."""
        return [run.initial for run in self.runs]

    def values(self, metric: str) -> list[float]:
        """A number of each."""
        return [run.metrics[metric] for run in self.runs]

    def mean(self, metric: str) -> Interval:
        """The mean of a number; of `gold` over runs and prompts, of others over runs."""
        if metric == "gold":
            return over_runs_and_prompts(self.gold, self.initials)
        return over_runs(self.values(metric), self.initials)

    @property
    def gold(self) -> Float[np.ndarray, "U P"]:
        """Gold reward of each on each prompt."""
        return np.stack([run.gold for run in self.runs])

    @property
    def num_degenerate(self) -> int:
        """How many are degenerate."""
        return sum(run.degenerate for run in self.runs)

    def less(self, other: "Runs") -> Float[np.ndarray, "U P"]:
        """Gold less that of other policies with the same initial policies and seeds, run by run and prompt by prompt.
        Raises ValueError where those differ."""
        if self.units != other.units:
            raise ValueError(f"differences are paired by initial policy and seed: {self.units} and {other.units}")
        return self.gold - other.gold


def _same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def link(name: Path, policy: Path) -> None:
    """Let a run's policy be found under a name that other runs ask for it by."""
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)
    os.symlink(policy.resolve(), name)


def initial_policies(folder: Path) -> dict[str, Evaluated]:
    """The policies that training begins with, asked the test prompts."""
    evaluated = {}
    for name in INITIALS:
        of_one = folder / name.replace(":", "_")
        run(of_one, "evaluate.py", f"policy={name}", "prompts=lab")
        evaluated[name] = read_evaluated(of_one)
    return evaluated


def initial_metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Gold reward and tokens of each initial policy, with the standard error of one draw of answers."""
    numbers = {}
    for name, evaluated in initial_policies(folder).items():
        metrics = evaluated.evaluation.metrics
        keys = {"gold": "gold/mean", "gold_error": "gold/mean_se", "tokens": "lengths/response"}
        numbers[name] = {word: metrics[key] for word, key in keys.items()}
    return numbers


def read_json(path: Path) -> dict:
    """A committed record."""
    return json.loads(path.read_text(encoding="utf-8"))
