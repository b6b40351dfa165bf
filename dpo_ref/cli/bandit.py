"""`python train.py bandit=...`: a run without a language model, from its configuration to its files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_ref.cli.command_line import compose_command
from dpo_ref.cli.resolve import RunConfig, resolve, strength
from dpo_ref.component import Component
from dpo_ref.evaluation.policy import FINISHED, SUMMARY, read_summary
from dpo_ref.evaluation.sweep import numbered_folders
from dpo_ref.lab.bandits.report import ClosedForm, findings, metrics_by_step, results, terminal_tables, write_report
from dpo_ref.lab.bandits.study import Method, Problem, StudyOptions, Trace, slug, trace
from dpo_ref.lab.bandits.worlds import World, divergence, frontier, optimum
from dpo_ref.tracking.run_record import MetricsFile
from dpo_ref.tracking.terminal import say, show, words
from dpo_ref.tracking.tracker import Tracker
from dpo_ref.types import Progress

NOTES = (
    "Offline and on-policy cost the same reward queries and the same optimiser steps; offline draws every sample from "
    "the reference before training, on-policy draws each round from the policy as it then is.",
    "The frontier and the optimum are those of the reference in closed form; for sequences of independent tokens, to "
    "which the initial policy is fitted.",
    "A method that is said to earn more does so in every seed, by at least three standard errors of the paired mean.",
)


def _beta(run: RunConfig) -> float | None:
    key = strength(run.objective.function.func)
    return None if key is None else run.objective.function.keywords[key]


def _method(run: RunConfig, bandit: Component, words: tuple[str, ...] = ()) -> Method:
    return Method(run.objective, StudyOptions.of(bandit.options), _beta(run), words)


def _method_beside(bandit: Component, words: str) -> Method:
    """A method to compare with: `words` as after train.py, the objective's name first. Raises ValueError for words
    that train.py would refuse."""
    name, *rest = words.split()
    typed = [f"objective={name}", f"bandit={bandit.name}", *rest]
    try:
        run = resolve(*compose_command(typed), typed)
    except Exception as error:  # Hydra's own, for an objective that does not exist
        raise ValueError(f"bandit.beside: {words}: {error}") from error
    assert run.bandit is not None
    changed = {word.partition("=")[0].removeprefix("bandit.") for word in rest if word.startswith("bandit.")}
    own = {option: run.bandit.options[option] for option in changed}
    method_words = tuple(word for word in rest if not word.startswith("bandit."))
    return _method(run, replace(bandit, options=bandit.options | own), method_words)


def methods_of(run: RunConfig) -> list[Method]:
    """The run's own method, and those beside it that have another name. Raises ValueError for what train.py would
    refuse."""
    assert run.bandit is not None
    own = _method(run, run.bandit)
    others = [_method_beside(run.bandit, words) for words in own.options.beside]
    return [own, *{method.label: method for method in others if method.label != own.label}.values()]


def _reference(run: RunConfig) -> str:
    """Which reference `auto` is."""
    usual = "initial" if run.objective.uses_reference else "none"
    return usual if run.reference.name == "auto" else run.reference.name


def _closed_form(world: World, peak: int, method: Method) -> ClosedForm:
    rewards, reference = world.rewards(peak), world.reference
    best = None
    if method.beta is not None:
        best = optimum(reference, rewards, method.options.label_steepness / method.beta, world.length)
    at = None if best is None else (world.length * float(divergence(best, reference)), float(best @ rewards))
    kl, reward = frontier(reference, rewards, world.length)
    return ClosedForm(
        peak, reference.numpy(), (kl.numpy(), reward.numpy()), None if best is None else best.numpy(), at, method.beta
    )


def _traces(run: RunConfig, world: World, methods: Sequence[Method], progress: Progress) -> list[Trace]:
    """Every method under every reward, the run's own first."""
    options = methods[0].options
    seeds = range(options.num_seeds)
    starts = [world.initial(run.seed * 1000 + index) for index in seeds]
    jobs = [(peak, m, schedule) for peak in options.peaks for m in methods for schedule in options.schedules]
    return [
        trace(Problem(world, peak, run.reference.name != "none"), method, schedule, starts, run.seed)
        for peak, method, schedule in progress(jobs, "methods", len(jobs))
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several threads make models this small slower, not faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_bandit(run: RunConfig, directory: Path, tracker: Tracker, progress: Progress) -> dict[str, Any]:
    """Train every method, write what they came to into the run's folder; what it contributes to the summary."""
    assert run.bandit is not None
    methods = methods_of(run)
    torch.manual_seed(run.seed)
    world: World = run.bandit()
    with _one_thread():
        traces = _traces(run, world, methods, progress)
    closed_forms = [_closed_form(world, peak, methods[0]) for peak in methods[0].options.peaks]
    file, lines = MetricsFile(directory / "metrics.jsonl"), metrics_by_step(traces)
    for step, metrics in lines.items():
        file.append(metrics, step=step)
        tracker.log(metrics, step=step)
    settings = {"objective": run.objective.name, "beta": methods[0].beta, "seed": run.seed, **run.bandit.options}
    write_report(
        directory, f"{run.objective.name} in the bandit of {run.bandit.name}", traces, closed_forms, NOTES, settings
    )
    tracker.image("report", directory / "report.png")
    tracker.file(directory / "report.html")
    show(*terminal_tables(traces, closed_forms))
    return {
        "objective": run.objective.name,
        "reference": _reference(run),
        "policy": None,
        "steps": methods[0].options.num_steps,
        "own_method": slug(methods[0].label),
        "bandit": results(traces),
        "findings": findings(traces),
    }


def _summaries(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    jobs = [job for job in numbered_folders(folder) if (job / SUMMARY).is_file()]
    summaries = [(job.name, _summary(job, f"sweep={folder}")) for job in jobs]
    return [(name, summary) for name, summary in summaries if summary.get("choices", {}).get("bandit")]


def _summary(job: Path, key: str) -> dict[str, Any]:
    """A job's record; empty where it cannot be read, which is said."""
    try:
        return read_summary(job, key)
    except ValueError as error:
        say(f"{error}; its job is left out of the table")
        return {}


def print_sweep(folder: Path) -> bool:
    """Print the table of a multirun's bandits, a row for each of a job's own methods; whether there are any."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    jobs = _summaries(folder)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("job", "method", "reward", "KL"):
        table.add_column(name, justify="right" if name in ("reward", "KL") else "left", overflow="fold")
    for name, summary in jobs:
        for row in _sweep_rows(summary):
            table.add_row(words(name), *map(words, row))
    if jobs:
        show(table)
    return bool(jobs)


def _sweep_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Method, reward and KL of a job, or what it came to instead."""
    if summary["status"] not in FINISHED:
        return [(str(summary.get("error") or summary["status"]), "–", "–")]
    own = {key: v for key, v in summary["bandit"].items() if key.endswith("/" + summary["own_method"])}
    return [(key, _mean_text(values["reward"]), _mean_text(values["kl"])) for key, values in own.items()]


def _mean_text(values: Sequence[float]) -> str:
    """Mean and, of several seeds, standard deviation."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.3f}"
