"""`python train.py resume_sweep=<folder>`: the jobs of a sweep that have not come to their ends.

The command is written out as the sweep's, with what Hydra recorded of it (`multirun.yaml`), before Hydra reads it; and
the sweeper `unfinished` leaves out what is finished. Interrupted jobs go on from their checkpoints as they do when the
command is typed again (`run_folder.left_by_sweep`). A search goes on by itself: its own sweeper knows who is left.
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn

from dpo_ref.cli.command_line import MULTIRUN, directory_words, overrides_in, quoted
from dpo_ref.cli.launchers import JOBLIB, LOCAL, SLURM
from dpo_ref.cli.side_by_side import LAUNCHER
from dpo_ref.cli.sweeper import JobSweeper
from dpo_ref.evaluation.sweep import SweptRun, collect, key_of, numbered_folders
from dpo_ref.tracking.terminal import say

KEY, SWEEPER = "resume_sweep", "unfinished"
RECORD = "multirun.yaml"  # Hydra's, in the folder of a sweep
HOW = ("hydra/launcher", "hydra.launcher.", "tracking", "tracking.")  # say how jobs are run, not which

# --- the command


def written_out(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, those of the sweep in place of `resume_sweep=<folder>`. What is refused ends the
    process with one sentence."""
    named = [word.partition("=")[2] for word in arguments if word.startswith(f"{KEY}=")]
    if not named:
        return list(arguments)
    try:
        return _words_of(Path(named[-1]).expanduser(), arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _words_of(folder: Path, arguments: Sequence[str]) -> list[str]:
    typed = [word for word in overrides_in(arguments) if not word.startswith(f"{KEY}=")]
    for word in typed:
        key = key_of(word)
        if not any(key == how or (how.endswith(".") and key.startswith(how)) for how in HOW):
            raise ValueError(
                f"{word} would change what the sweep runs; {KEY}={folder} takes hydra/launcher=, hydra.launcher.* and "
                f"tracking=. With other options type a command with -m, into another folder"
            )
    flags = [word for word in arguments if word not in overrides_in(arguments) and word not in MULTIRUN]
    swept, launched = _recorded(folder)
    again = [] if any(key_of(word) == "hydra/launcher" for word in typed) else _launched_again(launched, folder)
    words = [word for word in (*swept, *again) if not _said_by(word, typed)]
    searches = any(key_of(word) == "search" for word in swept)
    sweeper = [] if searches else [f"hydra/sweeper={SWEEPER}"]
    return [*flags, "-m", *words, *typed, *sweeper, f"hydra.sweep.dir={quoted(str(folder))}"]


def _launched_again(words: Sequence[str], folder: Path) -> list[str]:
    """The recorded words about the launcher, as far as they are as good here, and run nothing that a folder says.
    Raises ValueError for a cluster, whose are not."""
    if f"hydra/launcher={SLURM}" in words:
        raise ValueError(
            f"{KEY}={folder}: the sweep ran on a cluster: add hydra/launcher={SLURM} and its options, such as "
            "hydra.launcher.partition=, or hydra/launcher=side_by_side to run the rest here"
        )
    return [word for word in words if LAUNCHED.fullmatch(word)]


def _said_by(word: str, typed: Sequence[str]) -> bool:
    """Whether what is typed takes the place of a recorded word; another tracker may not take the options of this."""
    key, keys = key_of(word), {key_of(other) for other in typed}
    return key in keys or (key.startswith("tracking.") and "tracking" in keys)


def _recorded(folder: Path) -> tuple[list[str], list[str]]:
    """What was swept, and words about the launcher. Raises ValueError for a folder that is no sweep's."""
    from dpo_ref.cli.saved_run import PARAMETER, read_sweep

    origin = f"{KEY}={folder}"
    if not (folder / RECORD).is_file():
        run = (folder / "summary.json").is_file()
        remedy = f"it is a run's: resume={folder} goes on with that" if run else "give the folder that a sweep named"
        raise ValueError(f"{origin} is no sweep's folder, as it has no {RECORD}; {remedy}")
    task, hydra = read_sweep(folder / RECORD, origin)
    return (
        [*task, *(word for word in hydra if word.startswith(PARAMETER))],
        [word for word in hydra if word.startswith(LAUNCHER_WORDS)],
    )


LAUNCHER_WORDS = ("hydra/launcher=", "hydra.launcher.")
LAUNCHED = re.compile(rf"hydra/launcher=({LAUNCHER}|{JOBLIB}|{LOCAL})|hydra\.launcher\.n_jobs=(-?\d+|null)")


def command_for(folder: Path, arguments: Sequence[str]) -> str:
    """What one types to go on with a sweep, launched as by these words."""
    launched = [word for word in arguments if word.startswith(LAUNCHER_WORDS)]
    return shlex.join(["python", "train.py", *directory_words(arguments), f"{KEY}={folder}", *launched])


# --- the jobs


class UnfinishedJobs(JobSweeper):
    """Launches the jobs of a sweep that are not finished, each in its folder (Hydra finds it by `hydra_plugins/`)."""

    def sweep(self, arguments: list[str]) -> Any:
        """Tell what is finished, and run the rest; what each of that came to. Ends the process where nothing is left,
        neither to train nor to evaluate. What is recorded of the sweep stays."""
        folder, (_, jobs) = Path(self._config.hydra.sweep.dir), self.swept(arguments)
        configs = [self.job_config(index, words) for index, words in enumerate(jobs)]
        names = [Path(config.hydra.runtime.output_dir).name for config in configs]
        states = {job.name: job for job in _begun(folder)}
        left = [(words, name) for words, name in zip(jobs, names, strict=True) if not _is_done(states.get(name))]
        say(*_told(names, [name for _, name in left], states, folder))
        if not left:
            return _nothing_left(folder, list(states.values()))
        rest = [[*words, f"hydra.sweep.subdir={quoted(name)}"] for words, name in left]
        return [self._launcher.launch(rest, initial_job_idx=0)]


def _begun(folder: Path) -> list[SweptRun]:
    return collect(folder) if numbered_folders(folder) else []


def _is_done(job: SweptRun | None) -> bool:
    return job is not None and job.finished


def _told(names: Sequence[str], left: Sequence[str], states: Mapping[str, SweptRun], folder: Path) -> list[str]:
    """How the jobs stand."""
    done = [name for name in names if name not in left]
    lines = [f"{len(done)} of {len(names)} jobs are finished{': ' if done else ''}{', '.join(done)}"]
    lines += [f"  {name}: {states[name].state if name in states else 'not begun'}" for name in left]
    strangers = [job for name, job in states.items() if name not in names and not job.finished]
    lines += [f"of another command, and left alone: {job.name}: {job.state}; resume={job.folder}" for job in strangers]
    return lines


def _nothing_left(folder: Path, jobs: Sequence[SweptRun]) -> list[Sequence[JobReturn]]:
    if (folder / "sweep.csv").is_file() and all(job.evaluation is not None for job in jobs):
        say(f"nothing is left to do: {folder / 'report.html'} has the results")
        sys.exit()
    say("nothing is left to train; what has not been evaluated is now")
    return []
