"""Many runs as one result: which folders `sweep=` names, what each of them left behind, joined over seeds, against the
KL strength, the step, or the share on a path between two policies.
"""

import glob
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_ref.evaluation.policy import FINISHED, SUMMARY, read_summary
from dpo_ref.evaluation.results import RESULTS, Evaluation, read_evaluation
from dpo_ref.files.writing import as_csv
from dpo_ref.models.averages import AVERAGE, Average, read_average, run_averaged_in

# --- the runs that a sweep joins


STRENGTHS = ("beta", "objective.beta", "objective.tau")
NOT_OF_A_POLICY = ("seed", "output_dir", "search")  # sections of keys that say nothing about the policy that is sought
CHECKPOINT = re.compile(r"step-(\d+)$")


SEARCH = "search.rung"  # what a run says that a search has ended for now (`cli/halving.py`)


@dataclass(frozen=True, slots=True)
class Climb:
    """How far a search let a run go, as the run's record says: the metric that runs are compared by and its better
    direction; of how many rungs, the last of which is the run's end; the optimiser steps of the whole run; and for
    each rung that it reached the step and the metric there, nan where it had none."""

    metric: str
    better: Literal["higher", "lower"]
    of: int
    num_steps: int
    rungs: tuple[tuple[int, float], ...]

    @property
    def steps(self) -> int:
        """Optimiser steps up to the last rung that it reached."""
        return self.rungs[-1][0] if self.rungs else 0

    def value(self, rung: int) -> float:
        """The metric at a rung, from 1; of a run that ended by itself before, at its end. nan where it never was."""
        reached = self.rungs[:rung]
        return reached[-1][1] if reached else math.nan

    def __str__(self) -> str:
        step, value = self.rungs[-1]
        where = f"at step {step:,} of {self.num_steps:,}, rung {len(self.rungs)} of {self.of}"
        return f"{where}: {self.metric} {value:.4g}"

    def record(self) -> dict[str, Any]:
        """What the run's record holds."""
        rungs = [{"step": step, "value": value if math.isfinite(value) else None} for step, value in self.rungs]
        return {
            "metric": self.metric,
            "better": self.better,
            "of": self.of,
            "num_steps": self.num_steps,
            "rungs": rungs,
        }


def climb_in(summary: Mapping[str, Any], origin: str) -> Climb | None:
    """How far a search let a run go; None for one that no search began. Raises ValueError for what is no such
    record."""
    content = summary.get("search")
    if content is None:
        return None
    try:
        values = [math.nan if rung["value"] is None else float(rung["value"]) for rung in content["rungs"]]
        steps = [int(rung["step"]) for rung in content["rungs"]]
        better: Literal["higher", "lower"] = "higher" if content["better"] == "higher" else "lower"
        rungs = tuple(zip(steps, values, strict=True))
        return Climb(str(content["metric"]), better, int(content["of"]), int(content["num_steps"]), rungs)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{origin}: its search is no record of rungs ({error!r})") from error


def stands_at(summary: Mapping[str, Any], climb: Climb | None) -> bool:
    """Whether a search has ended the run of this record at a rung."""
    return summary["status"] == "stopped" and summary.get("stopped_by") == SEARCH and bool(climb and climb.rungs)


@dataclass(frozen=True, slots=True)
class SweptRun:
    """One run of a sweep, one checkpoint of a run, or one average of policies. `evaluation` is None where it failed or
    was not evaluated."""

    name: str
    folder: Path
    status: str  # as in summary.json; "missing" without one
    error: str | None
    objective: str | None
    reference: str | None
    beta: float | None
    seed: int | None
    options: tuple[str, ...]  # the other overrides, beside beta and seed
    evaluation: Evaluation | None
    step: int | None = None  # of a checkpoint
    share: float | None = None  # of the second of `ends`, on the path between two policies
    ends: tuple[str, ...] = ()
    climb: Climb | None = None  # of a run that a search began
    left_behind: bool = False  # a search ended it at its last rung
    words: tuple[str, ...] = ()  # all overrides but those about the seed, the folder and a search

    @property
    def results(self) -> Path:
        """Where its evaluation's files lie; those of a checkpoint beside those of its run."""
        return self.folder / RESULTS if self.step is None else results_of_checkpoint(self.folder)

    @property
    def finished(self) -> bool:
        """Whether it left a policy to be compared: at its end, or where training was stopped because its policy was
        degenerate, but not where a search left it behind, which is sooner than the others."""
        return self.status in FINISHED and not self.left_behind

    @property
    def state(self) -> str:
        """The status in words, with what went wrong."""
        if self.left_behind and self.climb is not None:
            return f"stopped {self.climb}"
        words = f"{self.status}, not evaluated" if self.finished and not self.evaluation else self.status
        return f"{words}: {self.error}" if self.error else words


def results_of_checkpoint(folder: Path) -> Path:
    """Where the evaluation of a run's checkpoint goes: checkpoints are deleted as the run goes on."""
    return folder.parents[1] / RESULTS / "checkpoints" / folder.name


def numbered_folders(folder: Path) -> list[Path]:
    """The folders of a multirun's jobs, in the order of their numbers."""
    folders = [p for p in folder.glob("*") if p.is_dir() and re.match(r"\d+(_|$)", p.name)]
    return sorted(folders, key=lambda p: int(re.split(r"\D", p.name)[0]))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if CHECKPOINT.match(path.name) and path.is_dir())


def averages_in(folder: Path) -> list[Path]:
    """The averages of policies in a folder, those of a path by their shares."""
    averages = {path.parent: read_average(path.parent) for path in folder.glob(f"*/{AVERAGE}")}
    return sorted(averages, key=lambda path: (_share(averages[path]) or 0.0, path.name))


def _share(average: Average | None) -> float | None:
    return None if average is None else average.share


def _jobs_in(folder: Path) -> list[Path]:
    """The jobs a folder stands for: those of a multirun, the checkpoints of a run, averages of policies, or the run,
    checkpoint or average that it is."""
    alone = CHECKPOINT.match(folder.name) or any((folder / name).is_file() for name in (SUMMARY, AVERAGE))
    return numbered_folders(folder) or _checkpoints(folder) or averages_in(folder) or ([folder] if alone else [])


def _job_folders(source: str) -> list[Path]:
    """The jobs that one entry of `sweep=` names; of a pattern, those of every folder that it matches and that holds
    some. Raises ValueError for none."""
    path = Path(source).expanduser()
    matched = [path] if path.is_dir() else sorted(map(Path, glob.glob(str(path))))
    jobs = [job for folder in matched if folder.is_dir() for job in _jobs_in(folder)]
    if not jobs:
        raise ValueError(
            f"sweep={source} holds no jobs; give a folder that `python train.py -m ...` made, runs, "
            "the checkpoints/ of a run, a pattern such as 'outputs/default/*_sweep', or a list of these"
        )
    return jobs


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, as long as they must be to tell the jobs apart."""
    for length in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return list(map(str, folders))


def _summary(folder: Path) -> dict[str, Any]:
    if not (folder / SUMMARY).is_file():
        return {"status": "missing"}
    try:
        summary = read_summary(folder, folder.name)
        return {**summary, "search": climb_in(summary, f"{folder.name}: {folder / SUMMARY}")}
    except ValueError as error:
        return {"status": "unreadable", "error": str(error)}


def key_of(word: str) -> str:
    """What an override is about."""
    return word.lstrip("+").partition("=")[0]


def _job(folder: Path, name: str) -> SweptRun:
    """One job, whatever state its files are in: the table of a sweep must come out whatever failed."""
    checkpoint, average = CHECKPOINT.match(folder.name), read_average(folder)
    run = folder.parents[1] if checkpoint else folder if average is None else run_averaged_in(folder)
    summary = {} if run is None else _summary(run)
    is_whole = bool(checkpoint) or average is not None  # whatever became of its run
    climb = None if is_whole else summary.get("search")
    words = [str(override).removeprefix("++") for override in summary.get("overrides") or []]
    words = [word.replace("\\:", ":") for word in words]  # Hydra writes lab\:strong where lab:strong was swept
    words = [word for word in words if key_of(word).partition(".")[0] not in NOT_OF_A_POLICY]
    job = SweptRun(
        name=name,
        folder=folder,
        status="completed" if is_whole else summary["status"],
        error=None if is_whole else summary.get("error"),
        objective=summary.get("objective"),
        reference=summary.get("reference"),
        beta=None if summary.get("beta") is None else float(summary["beta"]),
        seed=summary.get("seed"),
        options=tuple(word for word in words if key_of(word) not in STRENGTHS),
        evaluation=None,
        step=int(checkpoint[1]) if checkpoint else None,
        share=_share(average),
        ends=() if average is None else average.policies,
        words=tuple(words),
        climb=climb,
        left_behind=not is_whole and stands_at(summary, climb),
    )
    job = _with_evaluation(job)
    return job if average is None or average.share is not None else _as_average(job)


def _as_average(job: SweptRun) -> SweptRun:
    """An average of runs is named as what it is, and is no seed of theirs."""
    title = f"{job.objective or 'policies'}, average of {len(job.ends)}"
    evaluation = job.evaluation and replace(job.evaluation, objective=title, seed=None)
    return replace(job, objective=title, seed=None, evaluation=evaluation)


def _with_evaluation(job: SweptRun) -> SweptRun:
    """The job with its evaluation, or with why that cannot be read."""
    if not (job.results / "evaluation.json").is_file():
        return job
    try:
        return replace(job, evaluation=read_evaluation(job.results))
    except ValueError as unreadable:
        return replace(job, error=str(unreadable))


def collect(*sources: str | Path) -> list[SweptRun]:
    """Every job of what `sources` name, failed and missing ones included, each once; of a multirun in the order of its
    numbers. A source is a multirun's folder, a run's, the `checkpoints` of a run, or a pattern that matches such.

    Raises ValueError for a source that holds no jobs.
    """
    folders = list(dict.fromkeys(folder for source in sources for folder in _job_folders(str(source))))
    return [_job(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def results_folder(sources: Sequence[str]) -> Path:
    """Where the results of a sweep go unless told: into the multirun's folder, beside the evaluation of the run whose
    checkpoints they are of, or into a folder named after the first of several sources."""
    first = Path(sources[0]).expanduser()
    if len(sources) == 1 and first.is_dir() and (numbered_folders(first) or averages_in(first)):
        return first
    if len(sources) == 1 and _checkpoints(first):
        return first.parent / RESULTS / first.name
    others = f"_and_{len(sources) - 1}_more" if len(sources) > 1 else ""
    return Path("outputs/evaluations") / (re.sub(r"[^a-zA-Z0-9.-]+", "_", "_".join(first.parts[-2:])) + others)


# --- joined


NAMED_BY_ITSELF = ("objective", "reference", "reference.path", "reference.model", "reference.parts")


class PointAxis(NamedTuple):
    """What the points of a series differ in: its sign, its title on an axis, its values in a sentence, and whether it
    is a strength, which is positive and drawn on a logarithmic scale."""

    sign: str
    title: str
    values: str
    is_strength: bool = False


BETA = PointAxis("β", "β (larger: closer to the reference)", "values of β", is_strength=True)
STEP = PointAxis("step", "optimiser step", "values of β")


def _share_axis(ends: Sequence[str]) -> PointAxis:
    first, second = ("the initial policy" if end == "initial" else Path(end).name for end in ends)
    return PointAxis("share", f"share of {second} (0: {first})", "shares")


@dataclass(frozen=True, slots=True)
class Cell:
    """The jobs of one series that differ in their seed only, and their metrics joined."""

    series: str
    beta: float | None
    jobs: list[SweptRun]
    evaluation: Evaluation
    step: int | None = None  # of checkpoints
    share: float | None = None  # of averages on a path

    @property
    def axis(self) -> PointAxis:
        """What its point is a value of."""
        if self.share is not None:
            return _share_axis(self.jobs[0].ends)
        return BETA if self.step is None else STEP

    @property
    def point(self) -> float | None:
        """Where on its axis it stands: at its share of a path, at its step if it joins checkpoints, else at its KL
        strength."""
        if self.share is not None:
            return self.share
        return self.beta if self.step is None else float(self.step)

    @property
    def is_drawn(self) -> bool:
        """Whether its axis has its point: a logarithmic one has no 0."""
        return self.point is not None and (self.point > 0 or not self.axis.is_strength)

    def values(self, key: str) -> list[float]:
        """The metric of every seed."""
        return [job.evaluation.get(key) for job in self.jobs if job.evaluation]

    def error(self, key: str) -> float:
        """The metric's standard error over prompts, root mean square over the seeds; nan if unknown."""
        evaluations = [job.evaluation for job in self.jobs if job.evaluation]
        from_intervals = [(e.get(f"{key}_high") - e.get(f"{key}_low")) / (2 * 1.96) for e in evaluations]
        clustered = [e.get(f"{key}_se") for e in evaluations]
        errors = [se if math.isnan(half) else half for se, half in zip(clustered, from_intervals, strict=True)]
        return math.sqrt(sum(se**2 for se in errors) / len(errors)) if errors else math.nan

    def spread(self, key: str) -> float:
        """Half the length of the metric's bar: over seeds if there are several, else of the one evaluation; 0 if
        unknown."""
        values = self.values(key)
        if len(values) > 1:
            return float(np.std(values, ddof=1))
        alone = self.error(key)
        return 0.0 if math.isnan(alone) else alone


def axis_of(cells: Sequence[Cell]) -> PointAxis:
    """What the points of some cells are values of; where runs stand among checkpoints or averages, what those are."""
    return next((cell.axis for cell in cells if not cell.axis.is_strength), BETA)


def short_names(cells: Sequence[Cell]) -> dict[str, str]:
    """What tells each series from the others: its name without the parts that all of them share."""
    parts = {cell.series: cell.series.split(", ") for cell in cells}
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    return {name: ", ".join(part for part in own if part not in shared) or name for name, own in parts.items()}


def _series(jobs: Sequence[SweptRun]) -> list[str]:
    """A name per job that jobs share which differ in beta and seed only; in step and seed only for checkpoints. Runs
    of several folders that are equal by name are not taken for seeds: their folder is part of the name."""
    measured = [job for job in jobs if job.evaluation]
    common = set.intersection(*(set(job.options) for job in measured)) if measured else set()
    several_references = len({job.reference for job in measured}) > 1

    def name(job: SweptRun) -> str:
        reference = [f"reference {job.reference}"] if several_references else []
        extra = [o for o in job.options if o not in common and o.partition("=")[0] not in NAMED_BY_ITSELF]
        beta = [] if (job.step is None and job.share is None) or job.beta is None else [f"beta {job.beta:g}"]
        return ", ".join([job.objective or "average", *reference, *extra, *beta])

    def sweep(job: SweptRun) -> Path:
        return (job.folder if job.step is None else job.folder.parents[1]).parent

    names = [name(job) for job in jobs]
    sweeps: dict[tuple[object, ...], set[Path]] = defaultdict(set)
    for job, series in zip(jobs, names, strict=True):
        sweeps[series, job.beta, job.step, job.share, job.seed].add(sweep(job))
    unclear = {key[0] for key, folders in sweeps.items() if len(folders) > 1}
    return [
        f"{series}, in {sweep(job).name}" if series in unclear else series
        for job, series in zip(jobs, names, strict=True)
    ]


def mean_over_seeds(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several seeds as one evaluation: means over seeds; `_se` becomes the standard deviation over seeds.

    An interval, such as a win rate's, holds both kinds of chance: the mean squared error of one evaluation (its
    prompts are the same for every seed, so seeds do not shrink it) plus the variance over seeds / seeds.
    """
    first = evaluations[0]
    if len(evaluations) == 1:
        return first
    keys = dict.fromkeys(key for e in evaluations for key in e.metrics)
    table = {key: np.array([e.get(key) for e in evaluations]) for key in keys}
    metrics = {key: float(np.mean(values)) for key, values in table.items()}
    metrics |= {key: float(np.std(table[key.removesuffix("_se")], ddof=1)) for key in keys if key.endswith("_se")}
    for key in (key for key in table if f"{key}_low" in table and f"{key}_high" in table):
        errors = (table[f"{key}_high"] - table[f"{key}_low"]) / (2 * 1.96)
        half = 1.96 * math.sqrt(np.square(errors).mean() + table[key].var(ddof=1) / len(evaluations))
        metrics |= {f"{key}_low": metrics[key] - half, f"{key}_high": metrics[key] + half}
    broken = [e for e in evaluations if e.degenerate]
    share = f"{len(broken)} of {len(evaluations)} seeds"
    reasons = [f"{share}: {reason} in seed {e.seed}" for e in broken[:1] for reason in e.degenerate]
    lacking = [why for e in evaluations for why in e.missing]
    missing = [f"{lacking.count(why)} of {len(evaluations)} seeds: {why}" for why in dict.fromkeys(lacking)]
    joined = {"metrics": metrics, "degenerate": reasons, "missing": missing}
    return replace(first, **joined, seed=None, num_seeds=len(evaluations))


def cells(jobs: Sequence[SweptRun]) -> list[Cell]:
    """Evaluated jobs joined over seeds, ordered by series, then by step or beta; without those that a search left
    behind, whoever evaluated them."""
    grouped: dict[tuple[str, float | None, int | None, float | None], list[SweptRun]] = defaultdict(list)
    for job, series in zip(jobs, _series(jobs), strict=True):
        if job.evaluation is not None and not job.left_behind:
            grouped[series, job.beta, job.step, job.share].append(job)
    unsorted = []
    for (series, beta, step, share), members in grouped.items():
        whole = mean_over_seeds([job.evaluation for job in members if job.evaluation])
        cell = Cell(series, beta, members, whole, step, share)
        point = [] if cell.point is None else [f"{cell.axis.sign.replace('β', 'beta')} {cell.point:g}"]
        unsorted.append(replace(cell, evaluation=replace(whole, name=", ".join([series, *point]))))
    return sorted(unsorted, key=lambda cell: (cell.series, cell.point is None, cell.point or 0.0))


def without_result(jobs: Sequence[SweptRun]) -> list[SweptRun]:
    """Jobs that have no numbers, though no search left them behind."""
    return [job for job in jobs if job.evaluation is None and not job.left_behind]


def csv_text(jobs: Sequence[SweptRun]) -> str:
    """One line per job, failed ones included, with every metric; where a search began them, with the last rung that
    each reached, its step and the metric there."""
    keys = sorted({key for job in jobs if job.evaluation for key in job.evaluation.metrics})
    about = (
        "job",
        "status",
        "error",
        "series",
        "objective",
        "reference",
        "beta",
        "step",
        "share",
        "seed",
        "degenerate",
        "missing",
    )
    searched = ["rung", "rung_step", "rung_value"] if any(job.climb for job in jobs) else []
    rows: list[list[Any]] = [[*about, *searched, *keys]]
    for job, series in zip(jobs, _series(jobs), strict=True):
        metrics = job.evaluation.metrics if job.evaluation else {}
        broken = "; ".join(job.evaluation.degenerate) if job.evaluation else ""
        kind = (job.objective, job.reference, job.beta, job.step, job.share, job.seed)
        missing = "; ".join(job.evaluation.missing) if job.evaluation else ""
        facts = (job.name, job.status, job.error, series, *kind, broken, missing, *_last_rung(job)[: len(searched)])
        rows.append([*facts, *(metrics.get(key) for key in keys)])
    return as_csv(rows)


def _last_rung(job: SweptRun) -> tuple[Any, Any, Any]:
    if job.climb is None or not job.climb.rungs:
        return None, None, None
    step, value = job.climb.rungs[-1]
    return len(job.climb.rungs), step, value
