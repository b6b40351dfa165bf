"""What frames a multirun: its folder is this process's alone, a stop says how to go on, and at its end every job is
evaluated, one table and one plot are made, and the jobs that failed are named.
"""

import atexit
import gc
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dpo_ref.cli import resume_sweep
from dpo_ref.cli.command_line import NEXT_OF_SCORES, ON_QUESTIONS, directory_words, python, tracking_words
from dpo_ref.cli.launchers import JOBLIB, LOCAL, SLURM, run_on_cluster, visible_gpus
from dpo_ref.cli.run_folder import record_death
from dpo_ref.cli.saved_run import addresses_in, read_summary, trust_words
from dpo_ref.cli.schemas import note_swept_keys
from dpo_ref.cli.side_by_side import LAUNCHER
from dpo_ref.cli.stopping import advise
from dpo_ref.evaluation.sweep import SweptRun, collect, key_of
from dpo_ref.files.holding import held
from dpo_ref.tracking.terminal import say

ANEW = ("output_dir=", "hydra.sweep.dir=", "hydra/sweeper=", "seed=")  # what another sweep has of its own
ENTRY_POINT = Path(__file__).parents[2] / "evaluate.py"


class SweepReport(Callback):
    """Holds a multirun's folder, and runs `evaluate.py sweep=<folder>` when its jobs are done.

    Jobs that fail do not raise (see `train.run_job`), so this is called whatever they came to. `then` are words that
    make another sweep of this one, which is named among what to type next.
    """

    def __init__(self, then: Sequence[str] = ()) -> None:
        self._then = list(then)
        self.failed: dict[str, str] = {}  # jobs of this process, and why
        self.again = ""  # what goes on with the sweep

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hold the folder to the end of the process, and say what to type should that be sooner than the sweep's."""
        folder, holding = Path(config.hydra.sweep.dir), ExitStack()
        try:
            holding.enter_context(held(folder, say))
        except ValueError as error:
            sys.exit(f"error: {error}")
        atexit.register(holding.close)
        words = sys.argv[1:]
        note_swept_keys([*words, *(f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items())])
        if not any(word.startswith(("output_dir=", "hydra.sweep.dir=")) for word in words):
            words = [*words, f"output_dir={folder}"]
            print(f"the sweep is in {folder}; with output_dir={folder} the same command goes on with it", flush=True)
        resumed = config.hydra.runtime.choices["hydra/sweeper"] == resume_sweep.SWEEPER
        again = shlex.join(["python", "train.py", *words])
        self.again = resume_sweep.command_for(folder, words) if resumed else again
        advise(f"finished jobs are kept, go on with\n  {self.again}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note what a job came to, and let go of all else: its trees, which Hydra keeps to the end of the sweep, and
        what refers to itself, such as models, before the next job loads its own."""
        ended = job_return.return_value
        job_return.cfg = job_return.hydra_cfg = None
        gc.collect()
        if ended.code:
            folder = Path(config.hydra.runtime.output_dir)
            self.failed[folder.name] = ended.error
            record_death(folder, ended.error)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Evaluate in a process of its own, so that no memory of the last job is held. Exits where jobs failed, or
        where their evaluation did."""
        code = 0
        folder = Path(config.hydra.sweep.dir)
        if config.stage == "train" and not _print_bandits(folder) and _can_be_asked(folder):
            words = config.hydra.overrides.task
            command = [sys.executable, str(ENTRY_POINT), *directory_words(sys.argv[1:])]
            command += [f"sweep={folder}", *tracking_words(config.hydra.runtime.choices["tracking"], words)]
            command += [*_evaluated_beside(config), *trust_words(addresses_in(words))]
            print("evaluating the sweep; by hand: python evaluate.py " + shlex.join(command[2:]), flush=True)
            if config.hydra.runtime.choices["hydra/launcher"] == SLURM:
                code = run_on_cluster(config.hydra.launcher, command)
            else:
                code = subprocess.run(command, check=False).returncode
            if code == 0:
                print_next(folder, sys.argv[1:], self._then)
        failed = self.failed | (_failed_in(folder) if config.stage == "train" else {})
        if failed:
            sys.exit("\n".join(_in_words(failed, resume_sweep.command_for(folder, sys.argv[1:]))))
        if code:
            sys.exit(code)


def print_next(folder: Path, words: Sequence[str], then: Sequence[str]) -> None:
    """What to type next; `then` as far as the `words` of this sweep say nothing about it."""
    from dpo_ref.reports.tables import best

    everything = collect(folder)
    jobs = [job for job in everything if job.evaluation is not None and not job.left_behind]
    champion = best([job.evaluation for job in jobs if job.evaluation is not None])
    again = [*shlex.split(python()), "train.py", *(word for word in words if not word.startswith(ANEW))]
    first = next((job for job in jobs if job.evaluation is champion), None)
    if first is not None:
        command = [*shlex.split(python()), "evaluate.py", *directory_words(words), f"policy={first.folder}"]
        say("the answers of the first, in a report.html of its own:", f"  {shlex.join(command)}")
    seeds = [job.seed for job in jobs if job.seed is not None]
    more = [f"seed={max(seeds) + 1},{max(seeds) + 2}"] if seeds else []
    searched = any(job.climb for job in everything)
    if more and searched and first is not None:
        say("the first cell with two seeds more:", f"  {shlex.join([*_alone(first, everything, again), *more])}")
    elif more:
        say("two seeds more, which join these:", f"  {shlex.join([*again, *more, f'output_dir={folder}'])}")
    if any(job.left_behind for job in everything):
        whole = [
            *_without_search(again),
            *(word for word in words if word.startswith("seed=")),
            f"output_dir={folder}",
        ]
        say("the cells that the search left behind, to their ends:", f"  {shlex.join(whole)}")
    said = {word.partition("=")[0] for word in words}
    if then := [word for word in then if word.partition("=")[0] not in said]:
        say(f"another sweep, with {' '.join(then)}:", f"  {shlex.join([*again, *then])}")


def _without_search(words: Sequence[str]) -> list[str]:
    return [word for word in words if key_of(word).partition(".")[0] != "search"]


def _alone(job: SweptRun, jobs: Sequence[SweptRun], words: Sequence[str]) -> list[str]:
    """The words of a sweep with one job's in place of those that differ, and without a search."""
    shared = set.intersection(*(set(other.words) for other in jobs if other.words))
    own = {key_of(word): word for word in job.words if word not in shared}
    return [*(word for word in _without_search(words) if key_of(word) not in own), *own.values()]


def _evaluated_beside(config: DictConfig) -> list[str]:
    """Policies whose training ran side by side are evaluated so, but for those that had GPUs of their own: evaluations
    are all on one."""
    launcher = config.hydra.runtime.choices["hydra/launcher"]
    if launcher not in (LAUNCHER, JOBLIB, LOCAL):
        return []
    if launcher != LAUNCHER and config.device != "cpu" and visible_gpus():
        return []
    n_jobs = config.hydra.launcher.n_jobs
    return [f"n_jobs={'null' if n_jobs in (None, -1) else n_jobs}"]


def _failed_in(folder: Path) -> dict[str, str]:
    """The jobs that are not finished by their records: a launcher may have run them in other processes."""
    return {job.name: job.state for job in collect(folder) if not (job.finished or job.left_behind)}


def _in_words(failed: dict[str, str], again: str) -> list[str]:
    head = f"error: {len(failed)} job{'s' if len(failed) > 1 else ''} of the sweep failed:"
    jobs = [f"  {name}: {error}" for name, error in failed.items()]
    return [head, *jobs, "once that is mended, these alone are run by", f"  {again}"]


def _can_be_asked(folder: Path) -> bool:
    """Whether a job writes answers and has held-out prompts to write them to; where none has, says what to type."""
    records = [read_summary(job.folder, f"sweep={folder}") for job in collect(folder) if job.finished]
    if records and all(record.get("scores_answers") for record in records):
        say(
            "not evaluated, as reward models write no answers; one that scores the answers of a policy:",
            f"  {python()} evaluate.py {NEXT_OF_SCORES.format(folder / '<job>')}",
        )
        return False
    if {record.get("held_out_prompts") for record in records} != {0}:
        return True
    words = [*directory_words(sys.argv[1:]), f"sweep={folder}", *ON_QUESTIONS.split()]
    say(
        "not evaluated, as no prompts are held out (data.eval_fraction and data.eval_path hold some out); on others:",
        f"  {python()} evaluate.py {shlex.join(words)}",
    )
    return False


def _print_bandits(folder: Path) -> bool:
    """Print the table of the jobs that trained no language model; whether there are any."""
    from dpo_ref.cli.bandit import print_sweep

    return print_sweep(folder)
