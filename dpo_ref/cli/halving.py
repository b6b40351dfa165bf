"""Successive halving of a sweep: `python train.py -m +search=halving optim.lr=... beta=... evaluation.every=16`.

All jobs train up to the first rung, the best 1/eta of the cells (jobs that differ in their seed) up to the second, and
so on; those of the last rung train to their end (Jamieson and Talwalkar, arXiv:1502.07943). A rung stops a job as a
signal would, with its checkpoint and in the middle of the learning-rate schedule of the whole run, and what goes on is
resumed: a job that comes to its end is bit for bit the job of a sweep without a search.

Nothing is remembered but the records of the jobs: the same command with the sweep's folder goes on.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import mul
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from dpo_ref.cli.build import tokenise_data, tokenizer_of
from dpo_ref.cli.command_line import quoted
from dpo_ref.cli.resolve import RunConfig, resolve
from dpo_ref.cli.resolve import component as checked_component
from dpo_ref.cli.side_by_side import SideJob, run_side_by_side, swept_names
from dpo_ref.cli.sweeper import JobSweeper
from dpo_ref.component import Component, component
from dpo_ref.evaluation.policy import read_summary
from dpo_ref.evaluation.results import ACCURACY, BEST_BY, LOSS, MARGIN, SCORE, TIES, WIN_RATE, direction
from dpo_ref.evaluation.sweep import SEARCH, Climb, climb_in
from dpo_ref.generation.records import Generation
from dpo_ref.models.folders import stored_positions
from dpo_ref.models.loading import locate
from dpo_ref.tracking import run_record
from dpo_ref.tracking.terminal import progress, say
from dpo_ref.training.model_selection import near
from dpo_ref.training.rounds import objective_groups
from dpo_ref.training.run import Rung, TrainingRun
from dpo_ref.types import Asked, PromptGroup, asked

# --- the rungs of a run


@dataclass(frozen=True, slots=True)
class Ladder:
    """What a run climbs: the optimiser steps of its rungs, the last of which is its end; up to which of them, from 1,
    it trains now; and the metric that it is compared by there."""

    steps: tuple[int, ...]
    rung: int
    metric: str
    better: Literal["higher", "lower"]

    @property
    def ends_at(self) -> Rung | None:
        """Where the run is to end for now; None where that is its own end."""
        return None if self.rung == len(self.steps) else Rung(self.steps[self.rung - 1], self.metric, SEARCH)


def _check_options(metric: str | None, eta: int, rungs: int, rung: int | None) -> None:
    """Raise ValueError, naming the key, for what makes no search."""
    whys = {"eta": "1/eta of the cells go on at each rung", "rungs": "with one, nothing is ever left out"}
    for (name, why), value in zip(whys.items(), (eta, rungs), strict=True):
        if value < 2:
            raise ValueError(f"search.{name}={value} must be at least 2: {why}")
    if rung is not None and not 1 <= rung <= rungs:
        raise ValueError(f"search.rung={rung} is none of the {rungs} rungs; the search sets it itself, leave it out")
    if metric is not None:
        better_way(metric)


def better_way(metric: str) -> Literal["higher", "lower"]:
    """Which way a metric is better. Raises ValueError where it is none of held-out data, or no way is better."""
    better = direction(metric)
    if better is None or better == "none":
        names = [
            f"{prefix}/{row.of(scorer='gold', baseline='initial')}" for prefix, rows in BEST_BY.items() for row in rows
        ]
        what = "is none that training measures of held-out data" if better is None else "has no better direction"
        raise ValueError(
            f"search.metric={metric} {what}; near it are {near(metric, names)} (docs/training.md has all)"
        )
    return better


@component(check=_check_options)
def halving(
    num_steps: int,
    every: int,
    *,
    metric: str | None = None,
    eta: int = 3,
    rungs: int = 3,
    rung: int | None = None,
) -> Ladder:
    """The rungs of a run of `num_steps` optimiser steps whose metric is measured every `every`: rung r of R lies at
    num_steps / eta^(R - r), at the nearest step that is evaluated. A cell that goes on trains eta times as long, so
    all rungs cost about the same.

    Raises ValueError where two rungs would lie at the same step.
    """
    assert metric is not None
    assert rung is not None
    ideal = [num_steps / eta ** (rungs - index) for index in range(1, rungs)]
    steps = (*(every * max(1, round(step / every)) for step in ideal), num_steps)
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(
            f"search.rungs={rungs} with search.eta={eta} would compare runs of {num_steps} steps after "
            f"{', '.join(f'{step:.3g}' for step in ideal)}, and {metric} is measured every {every}: lower "
            f"{cadence_key(metric)}, or take fewer rungs"
        )
    return Ladder(steps, rung, metric, better_way(metric))


def cadence_key(metric: str) -> str:
    """The option that says how often a metric of held-out data is measured."""
    return "trainer.eval_every" if metric.startswith("eval/") else "evaluation.every"


def cadence(config: RunConfig, metric: str) -> int | None:
    """Every how many optimiser steps a run measures a metric of held-out data; None for at its ends alone."""
    if metric.startswith("eval/"):
        return config.trainer.eval_every
    return config.evaluation and config.evaluation.options["every"]


# --- what a job of a search does


def check_search(config: RunConfig, sweep: str | None) -> None:
    """Raise ValueError for a run that is to be compared with others, where there are none."""
    if config.search is None:
        return
    if sweep is None:
        raise ValueError(
            f"+search={config.search.name} compares the jobs of a sweep: add -m and several values, as in "
            "-m optim.lr=1e-4,3e-4 beta=0.1,1, or leave it out"
        )
    if config.search.options["rung"] is None:
        raise ValueError(f"+search={config.search.name} brings the sweeper that it needs; leave hydra/sweeper out")


def ladder_of(config: RunConfig, num_steps: int) -> Ladder | None:
    """The rungs of a run; None for one that no search began. Raises ValueError for too many of them."""
    if config.search is None:
        return None
    every = cadence(config, config.search.options["metric"])
    assert every is not None
    return config.search(num_steps, every)


def climbed(config: RunConfig, training: TrainingRun, steps: int) -> dict[str, Any] | None:
    """For the record of a run of so many steps: which rungs it reached, and what was measured there; None for one that
    no search began. One that ended by itself between two rungs stands where it ended."""
    total = training.rounds.num_steps
    ladder = ladder_of(config, total)
    if ladder is None:
        return None
    ended = [steps] if training.stopped_by not in (None, SEARCH) else []
    reached = [step for step in ladder.steps[: ladder.rung] if step <= steps]
    rows = run_record.read(training.record.path) if training.record.path.is_file() else []
    values = {row["step"]: row[ladder.metric] for row in rows if row.get(ladder.metric) is not None}
    rungs = [(step, _last(values, step)) for step in dict.fromkeys([*reached, *ended])]
    return Climb(ladder.metric, ladder.better, len(ladder.steps), total, tuple(rungs)).record()


def _last(values: Mapping[int, float], step: int) -> float:
    """What was measured last up to a step; nan for nothing."""
    return values[max(steps)] if (steps := [at for at in values if 0 < at <= step]) else math.nan


# --- what is looked at before any job begins


class SearchRefused(ValueError):
    """The search cannot be, whichever job begins."""


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """What cells are compared by, which share of them goes on, how often, and after which optimiser steps; no steps
    where a run makes its data as it goes on."""

    metric: str
    better: Literal["higher", "lower"]
    eta: int
    rungs: int
    steps: tuple[int, ...] = ()


def plan_of(config: RunConfig, swept: Sequence[str]) -> SearchPlan:
    """The plan of a search whose jobs are like this one and differ in the keys `swept`: its data is read and
    tokenised, no model is loaded. Raises SearchRefused for a metric that is not measured, or too seldom."""
    assert config.search is not None
    if config.stage != "train" or config.bandit is not None:
        raise SearchRefused(
            f"+search={config.search.name} compares training runs of a model; leave stage and bandit out"
        )
    data, model = config.data(config.seed, progress), config.model.options
    positions = stored_positions(locate(model["path"]), revision=model["revision"])
    train, held_out = tokenise_data(config, data, tokenizer_of(config), positions)
    known = config.data.hooks.held_out or objective_groups
    metric = _metric(config, measured_by(config, data.test_prompts, len(known(config.objective, held_out.groups))))
    if metric in UNLIKE and (keys := [key for key in swept if key == "beta" or key.startswith("objective")]):
        raise SearchRefused(
            f"search.metric={metric} is in other units at another {keys[0]}, and says nothing about which cell is "
            "better; compare by eval/rewards/accuracies or evaluation/<scorer>/mean"
        )
    options = config.search.options | {"metric": metric, "rung": 1}
    plan = SearchPlan(metric, better_way(metric), options["eta"], options["rungs"])
    every = cadence(config, metric)
    if config.data.hooks.rounds is not None or every is None:
        return plan
    num_steps = config.trainer.num_steps(len(objective_groups(config.objective, train.groups)))
    try:
        return replace(plan, steps=halving(num_steps, every, **options).steps)
    except ValueError as error:
        raise SearchRefused(str(error)) from error


UNLIKE = tuple(f"eval/{row.key}" for row in (LOSS, MARGIN))  # whose unit is the objective's


def _metric(config: RunConfig, measured: Sequence[str]) -> str:
    """The metric that is asked for, or the one that tells most of those that are measured under way."""
    assert config.search is not None
    metric = config.search.options["metric"]
    under_way = [key for key in measured if cadence(config, key) is not None]
    if metric is not None and cadence(config, metric) is None:
        raise SearchRefused(
            f"search.metric={metric} is not measured while these runs train: add {cadence_key(metric)}="
            "<optimiser steps>"
        )
    kind = "" if metric is None else f"{metric.partition('/')[0]}/"
    if not any(key.startswith(kind) for key in measured):
        what = "a search" if metric is None else f"search.metric={metric}"
        raise SearchRefused(
            f"{what} compares runs by held-out data, and nothing is held out: add data.eval_fraction=0.1 or "
            "data.eval_path=<file>"
        )
    if metric is not None and metric not in measured:
        raise SearchRefused(
            f"search.metric={metric} is not measured in these runs; near it are {near(metric, measured)} "
            "(docs/training_evaluation.md says what is when)"
        )
    if not under_way:
        raise SearchRefused(
            "a search compares runs under way, and these are measured at their ends alone: add "
            "evaluation.every=<optimiser steps>, or trainer.eval_every=<optimiser steps> for held-out pairs"
        )
    return metric or under_way[0]


def measured_by(config: RunConfig, prompts: Sequence[Asked], num_held_out: int) -> list[str]:
    """What a run measures of held-out data that is better in one direction; what tells most about a policy first."""
    of_pairs = config.objective.pairwise or "labels" in config.objective.inputs
    told = [*((ACCURACY, MARGIN, TIES) if of_pairs else ()), LOSS] if num_held_out else []
    held_out = [f"eval/{row.key}" for row in told]
    if config.evaluation is None or not prompts:
        return held_out
    scorer = _scorer_name(config.evaluation.options["scorer"], asked(prompts[0]))
    scores = [] if scorer == "none" else [SCORE.of(scorer=scorer), WIN_RATE.of(baseline="initial")]
    texts = [row.key for row in BEST_BY["evaluation"] if row not in (SCORE, WIN_RATE)]
    return [*(f"evaluation/{key}" for key in scores), *held_out, *(f"evaluation/{key}" for key in texts)]


def _scorer_name(scorer: Component, prompt: PromptGroup) -> str:
    """Under which name a scorer gives its scores, which may depend on the prompts: asked about an empty answer."""
    empty = Generation(prompt.prompt, 0, 0, "", (), (), "stop", 1, 0, seed=0, temperature=1.0, top_p=1.0)
    return scorer([empty]).name


def look_at(
    jobs: Sequence[tuple[DictConfig, Mapping[str, str], Sequence[str]]], swept: Sequence[str]
) -> SearchPlan | str:
    """The plan by the first job that can be run, or why there is none. Jobs are trees, choices and words."""
    why = ""
    for tree, choices, words in jobs:
        try:
            return plan_of(resolve(tree, choices, words), swept)
        except SearchRefused as refusal:
            return str(refusal)
        except (ValueError, OSError) as error:
            why = why or str(error)
    return why


# --- the search itself, as Hydra's sweeper


@dataclass(frozen=True, slots=True)
class SearchJob:
    """A job of a sweep: its words, without those of the search; its composed configuration; its folder."""

    words: list[str]
    config: DictConfig
    folder: Path

    @property
    def cell(self) -> tuple[str, ...]:
        """What it shares with the jobs that differ in their seed."""
        return tuple(word for word in self.words if not word.startswith("seed="))

    @property
    def summary(self) -> dict[str, Any]:
        """Its record; empty where it has left none that can be read, which is told where it fails."""
        with suppress(ValueError):
            summary = read_summary(self.folder, str(self.folder), ("search",))
            return summary | {"search": climb_in(summary, str(self.folder))}
        return {}


@dataclass(frozen=True, slots=True)
class Standing:
    """A cell at a rung: the mean of the metric over its seeds, nan where none came there, and whether all of its
    policies are sound."""

    cell: tuple[str, ...]
    value: float
    sound: bool = True


def standings_at(rung: int, jobs: Sequence[SearchJob]) -> list[Standing]:
    """How the cells of some jobs stand at a rung, by the jobs' records."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for job in jobs:
        found.setdefault(job.cell, []).append(job.summary)
    standings = []
    for cell, summaries in found.items():
        values = [summary["search"].value(rung) for summary in summaries if summary.get("search")]
        finite = [value for value in values if math.isfinite(value)]
        sound = not any(summary.get("degenerate") for summary in summaries)
        standings.append(Standing(cell, float(np.mean(finite)) if finite else math.nan, sound))
    return standings


def going_on(standings: Sequence[Standing], better: Literal["higher", "lower"], eta: int) -> list[Standing]:
    """The best 1/eta of the cells at a rung, rounded up, best first: degenerate ones after all others, those without a
    number never, the earlier of equal ones."""
    sign = -1 if better == "higher" else 1
    ranked = sorted(
        (standing for standing in standings if math.isfinite(standing.value)),
        key=lambda standing: (not standing.sound, sign * standing.value),
    )
    return ranked[: math.ceil(len(standings) / eta)]


class Halving(JobSweeper):
    """Runs the jobs of a multirun rung by rung, with the launcher that is chosen (Hydra finds it by
    `hydra_plugins/`)."""

    def sweep(self, arguments: list[str]) -> Any:
        """Run every rung; what the jobs of each came to. Ends the process, with why, for what makes no search."""
        overrides, lists = self.swept(arguments)
        try:
            check_words(overrides)
            jobs = [self._job(index, words) for index, words in enumerate(lists)]
            plan = _plan(jobs, [override.key_or_group for override in overrides if override.is_sweep_override()])
        except ValueError as error:
            sys.exit(f"error: {error}")
        OmegaConf.save(self._config, Path(self._config.hydra.sweep.dir) / "multirun.yaml")
        return self._run(jobs, plan)

    def _job(self, index: int, words: list[str]) -> SearchJob:
        """A job with its folder, which is the same at every rung."""
        config = self.job_config(index, words)
        return SearchJob(words, config, Path(config.hydra.runtime.output_dir))

    def _run(self, jobs: Sequence[SearchJob], plan: SearchPlan) -> list[Sequence[JobReturn]]:
        cells = list(dict.fromkeys(job.cell for job in jobs))
        names = dict(zip(cells, swept_names(cells), strict=True))
        say(announced(plan, len(jobs), len(cells)))
        returns, entering = [], jobs
        for rung in range(1, plan.rungs + 1):
            words = [[*job.words, *_words_at(rung, job, plan)] for job in entering]
            returns.append(self._launcher.launch(words, initial_job_idx=0))
            if rung == plan.rungs:
                break
            standings = standings_at(rung, entering)
            best = going_on(standings, plan.better, plan.eta)
            say(*told(best, len(standings), rung, plan, names))
            entering = [job for job in entering if job.cell in {standing.cell for standing in best}]
            if not entering:
                return returns
        say(spent(jobs))
        return returns


def check_words(overrides: Sequence[Override]) -> None:
    """Raise ValueError for what a search sets itself, and for a sweep over its own options."""
    for override in overrides:
        key = override.key_or_group
        if key == SEARCH:
            raise ValueError(f"{override.input_line}: the search says itself how far a job trains; leave it out")
        if override.is_sweep_override() and key.partition(".")[0] == "search":
            raise ValueError(f"{override.input_line}: a search has one {key}; type a command for each")
    if not any(override.is_sweep_override() for override in overrides):
        raise ValueError("a search compares the jobs of a sweep, and nothing is swept: add several values of a key")


def _words_at(rung: int, job: SearchJob, plan: SearchPlan) -> list[str]:
    """What a job is told besides its own words, to train up to a rung in its folder."""
    return [
        f"search.metric={quoted(plan.metric)}",
        f"{SEARCH}={rung}",
        f"hydra.sweep.subdir={quoted(job.folder.name)}",
    ]


def _plan(jobs: Sequence[SearchJob], swept: Sequence[str]) -> SearchPlan:
    """Look at the jobs in a process of its own: those that train are forked from one that has computed nothing. Raises
    ValueError for what makes no search."""
    checked_component("search", jobs[0].config.search, "halving")
    looked = [(_tree(job.config), _choices(job.config), job.words) for job in jobs]
    (end,) = run_side_by_side([SideJob("the search's data", partial(look_at, looked, swept))], 1)
    if not isinstance(end.value, SearchPlan):
        raise ValueError(end.value or end.error)
    return end.value


def _tree(config: DictConfig) -> DictConfig:
    """The configuration as a job gets it."""
    tree = config.copy()
    with read_write(tree), open_dict(tree):
        del tree["hydra"]
    return tree


def _choices(config: DictConfig) -> dict[str, str]:
    return {group: choice for group, choice in config.hydra.runtime.choices.items() if choice is not None}


# --- in words


def announced(plan: SearchPlan, num_jobs: int, num_cells: int) -> str:
    """What the search is going to do, and at most how many optimiser steps it takes."""
    head = f"successive halving by {plan.metric} ({plan.better} is better)"
    cells = [num_cells]
    while len(cells) < plan.rungs:
        cells.append(math.ceil(cells[-1] / plan.eta))
    jobs = [count * num_jobs // num_cells for count in cells]
    counts = [f"{count} job{'' if count == 1 else 's'}" for count in jobs]
    if not plan.steps:
        return f"{head}: {', '.join(counts)} to the {plan.rungs} rungs"
    parts = [f"{count} to step {step:,}" for count, step in zip(counts, plan.steps, strict=True)]
    gained = [later - earlier for earlier, later in pairwise((0, *plan.steps))]
    cost, whole = sum(map(mul, jobs, gained)), num_jobs * plan.steps[-1]
    return f"{head}: {', '.join(parts)}: {cost:,} optimiser steps of the {whole:,} of the whole grid"


def told(
    best: Sequence[Standing], num_cells: int, rung: int, plan: SearchPlan, names: Mapping[tuple[str, ...], str]
) -> list[str]:
    """What a rung decided, where so many cells came."""
    where = f"rung {rung} of {plan.rungs}" + (f", step {plan.steps[rung - 1]:,}" if plan.steps else "")
    if not best:
        return [f"{where}: nothing was measured there, and the search ends"]
    states = ["" if each.sound else ", degenerate" for each in best]
    lines = [f"  {names[each.cell]}  {each.value:.4g}{state}" for each, state in zip(best, states, strict=True)]
    return [f"{where}: {len(best)} of {num_cells} cells go on, by {plan.metric}", *lines]


def spent(jobs: Sequence[SearchJob]) -> str:
    """How many optimiser steps the jobs have made, of how many to all their ends."""
    summaries = [summary for job in jobs if (summary := job.summary).get("search")]
    made, whole = (sum(each) for each in ([s["steps"] for s in summaries], [s["search"].num_steps for s in summaries]))
    return f"the search made {made:,} optimiser steps; all {len(summaries)} jobs to their ends would make {whole:,}"
