"""The page of a sweep, its table for the terminal, and its files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_ref.evaluation import findings, page
from dpo_ref.evaluation.columns import columns, titles
from dpo_ref.evaluation.plots import INITIAL, write_png
from dpo_ref.evaluation.records import RESULTS, Evaluated, Evaluation
from dpo_ref.evaluation.report import sample_sections, settings, write_text
from dpo_ref.evaluation.stages import read_evaluated
from dpo_ref.evaluation.sweep import Cell, Job, cells, collect, csv_text, without_result
from dpo_ref.evaluation.sweep_plots import BARS, panels, series_colours
from dpo_ref.evaluation.terminal import results_table

SEEDS_NOTE = "Where a row joins several seeds, ± is the standard deviation over seeds."


def _rows(found: Sequence[Cell], initial: Evaluation | None) -> list[page.Row]:
    hues = series_colours(found)
    evaluations = [*([initial] if initial else []), *(cell.evaluation for cell in found)]
    colours = [*([INITIAL] if initial else []), *(hues[cell.series] for cell in found)]
    return list(map(page.Row, evaluations, titles(evaluations), colours))


def _shown(folder: Path, found: Sequence[Cell], baseline: Evaluated) -> list[Evaluated]:
    """The baseline, the best cell and the one with the smallest beta, each by its first seed's answers."""
    champion = findings.best([cell.evaluation for cell in found])
    picked = [cell for cell in found if cell.evaluation is champion]
    loosest = min((cell for cell in found if cell.beta), key=lambda cell: cell.beta or 0, default=None)
    picked += [loosest] if loosest is not None and loosest not in picked else []
    return [baseline, *(one for cell in picked if (one := _answers(folder / cell.jobs[0].name / RESULTS)))]


def _answers(folder: Path) -> Evaluated | None:
    """A job's answers, or None where they cannot be read: the page is made from what there is."""
    try:
        return read_evaluated(folder)
    except ValueError:
        return None


def sweep_page(folder: Path, jobs: Sequence[Job], baseline: Evaluated | None) -> str:
    """The page of a sweep; jobs without a result are rows of its table."""
    found, initial = cells(jobs), baseline.evaluation if baseline else None
    evaluations = [cell.evaluation for cell in found]
    shown = [*([initial] if initial else []), *evaluations]
    title = findings.headline(shown) if found else f"None of the {len(jobs)} jobs left a result."
    drift = findings.drift(initial, evaluations) if initial else None
    scorer = shown[0].scorer if shown else "gold"
    failures = [(job.name, job.state) for job in without_result(jobs)]
    parts = [
        f'<p class="over">Sweep of {len(jobs)} runs</p>',
        f"<h1>{page.text(title)}</h1>",
        f'<p class="lead">{page.text(drift)}</p>' if drift else "",
        page.pictures(panels(jobs, found, initial)) + f'<p class="small">{BARS}</p>' if found else "",
        "<h2>Numbers</h2>",
        page.alerts(findings.broken(evaluations)),
        page.table(_rows(found, initial), columns(scorer), failures),
        f'<p class="small">{SEEDS_NOTE}</p>' if any(e.num_seeds > 1 for e in evaluations) else "",
    ]
    if found and baseline:
        parts += ["<h2>Answers side by side</h2>", sample_sections(_shown(folder, found, baseline))]
    if found:
        parts += ["<h2>How it was measured</h2>", page.definitions(settings(evaluations[-1]))]
    parts.append("<footer>Made by dpo_ref. Every job's numbers are in sweep.csv.</footer>")
    return page.page(title, "\n".join(parts))


def sweep_table(jobs: Sequence[Job], initial: Evaluation | None) -> Any:
    """The sweep for the terminal: the initial policy, a row per cell, a row per job without a result."""
    evaluations = [*([initial] if initial else []), *(cell.evaluation for cell in cells(jobs))]
    return results_table(evaluations, [(job.name, job.state) for job in without_result(jobs)])


def write_sweep(folder: Path, baseline: Evaluated | None) -> list[Job]:
    """Write `sweep.csv`, `sweep.png` and `report.html` into a multirun folder, whatever its jobs came to.

    Returns the jobs. Raises ValueError for a folder without jobs.
    """
    jobs = collect(folder)
    write_text(folder / "sweep.csv", csv_text(jobs))
    found = cells(jobs)
    if found:
        write_png(folder / "sweep.png", panels(jobs, found, baseline.evaluation if baseline else None)[:4])
    write_text(folder / "report.html", sweep_page(folder, jobs, baseline))
    return jobs
