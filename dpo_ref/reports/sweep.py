"""The page of a sweep, its table for the terminal, its files and pictures, and its run in the tracker."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dpo_ref.component import Component
from dpo_ref.evaluation import sweep
from dpo_ref.evaluation.results import (
    END_CHOSEN,
    ENDED,
    KL,
    LENGTH,
    SCORE,
    WIN_RATE,
    Evaluated,
    Evaluation,
)
from dpo_ref.evaluation.stages import read_evaluated
from dpo_ref.evaluation.sweep import Cell, SweptRun, axis_of, csv_text, short_names, without_result
from dpo_ref.files.writing import as_csv, write_text
from dpo_ref.reports import page, tables
from dpo_ref.reports.findings import NOTE, best_strengths, findings, strength_table
from dpo_ref.reports.grid import grid_panel, grid_sentence, ranked_grids
from dpo_ref.reports.paper_table import (
    csv_table,
    html_table,
    latex_table,
    markdown_table,
    paper_table,
    terminal_tables,
)
from dpo_ref.reports.plots import (
    BROKEN,
    INITIAL,
    INK,
    SERIES,
    Panel,
    is_scored,
    mean_length_panel,
    reward_panels,
    write_panels,
    write_png,
)
from dpo_ref.reports.policy import TemperatureCurve, log_files, sample_sections, temperature_panels
from dpo_ref.reports.search import search_panels, search_section, search_terminal
from dpo_ref.reports.tables import columns, judge_columns, results_table, settings, titles
from dpo_ref.tracking.terminal import words
from dpo_ref.tracking.tracker import RunInfo
from dpo_ref.tracking.weights_and_biases import known_id

IN_ONE_PICTURE = 4
MOST_MAPS = 4  # of a sweep over two keys and something else
DISTANCE = KL.of(model="initial")
SEEDS_NOTE = "Where a row joins several seeds, ± is the standard deviation over seeds."


def _rows(cells: Sequence[Cell], initial: Evaluation | None) -> list[page.Row]:
    hues, front = series_colours(cells), front_of(cells)
    evaluations = [*([initial] if initial else []), *(cell.evaluation for cell in cells)]
    colours = [*([INITIAL] if initial else []), *(hues[cell.series] for cell in cells)]
    on_front = [*([False] if initial else []), *(cell in front for cell in cells)]
    return list(map(page.Row, evaluations, titles(evaluations), colours, on_front))


def _examples(cells: Sequence[Cell], baseline: Evaluated) -> list[Evaluated]:
    """The baseline, the best cell and the one with the smallest beta or farthest on a path, each by its first seed's
    answers."""
    champion = tables.best([cell.evaluation for cell in cells])
    picked = [cell for cell in cells if cell.evaluation is champion]
    loosest = min(
        (cell for cell in cells if cell.beta), key=lambda cell: (cell.beta, -(cell.share or 0)), default=None
    )
    picked += [loosest] if loosest is not None and loosest not in picked else []
    return [baseline, *(answers for cell in picked if (answers := _answers(cell.jobs[0].results)))]


def _answers(folder: Path) -> Evaluated | None:
    """A job's answers, or None where they cannot be read: the page is made from what there is."""
    try:
        return read_evaluated(folder)
    except ValueError:
        return None


def _pictures(jobs: Sequence[SweptRun], cells: Sequence[Cell], initial: Evaluation | None) -> list[Panel]:
    """All pictures of a sweep; first its grids, where two keys or more were swept."""
    if not cells:
        return []
    before = [TemperatureCurve(initial, "initial policy", INITIAL)] if initial else []
    maps = [*map(grid_panel, ranked_grids(jobs, cells)), *search_panels(jobs)][:MOST_MAPS]
    return [*maps, *panels(jobs, cells, initial), *temperature_panels([*before, *temperature_curves(cells)])]


def _grid_sentences(jobs: Sequence[SweptRun], cells: Sequence[Cell]) -> list[str]:
    return [grid_sentence(ranked) for ranked in ranked_grids(jobs, cells)][:MOST_MAPS]


def _points_section(cells: Sequence[Cell]) -> str:
    """The best strength of every series and the paper's table, where there are several strengths or steps."""
    if len({cell.point for cell in cells}) < 2:
        return ""
    names, rows = strength_table(cells)
    hues = [*series_colours(cells).values()]
    return (
        f"<h2>Best {names[1].removeprefix('Best ')} of each series</h2>{page.plain_table(names, rows, hues)}"
        f'<p class="small">{page.text(NOTE)}</p><h2>Table for a paper</h2>{html_table(paper_table(cells))}'
    )


def sweep_page(jobs: Sequence[SweptRun], baseline: Evaluated | None) -> str:
    """The page of a sweep; jobs without a result are rows of its table."""
    cells, initial = sweep.cells(jobs), baseline.evaluation if baseline else None
    evaluations = [cell.evaluation for cell in cells]
    policies = [*([initial] if initial else []), *evaluations]
    title = tables.headline(policies) if cells else f"None of the {len(jobs)} jobs left a result."
    scorer = policies[0].scorer if policies else "gold"
    failures = [(job.name, job.state) for job in without_result(jobs)]
    pictures = _pictures(jobs, cells, initial)
    parts = [
        f'<p class="over">Sweep of {len(jobs)} run{"" if len(jobs) == 1 else "s"}</p>',
        f"<h1>{page.text(title)}</h1>",
        *(f'<p class="lead">{page.text(s)}</p>' for s in (*findings(cells, initial), *_grid_sentences(jobs, cells))),
        page.alerts([*tables.broken(evaluations), *tables.lacking(evaluations)]),
        page.pictures(pictures) + f'<p class="small">{BARS}</p>' if pictures else "",
        search_section(jobs),
        _points_section(cells),
        "<h2>Numbers</h2>",
        page.policy_table(_rows(cells, initial), [*columns(scorer), *judge_columns(policies)], failures),
        f'<p class="small">{SEEDS_NOTE}</p>' if any(e.num_seeds > 1 for e in evaluations) else "",
    ]
    if cells and baseline:
        parts += ["<h2>Answers side by side</h2>", sample_sections(_examples(cells, baseline))]
    if cells:
        parts += ["<h2>How it was measured</h2>", page.definitions(settings(evaluations[-1]))]
    parts.append("<footer>Made by dpo_ref. Every job's numbers are in sweep.csv.</footer>")
    return page.page(title, "\n".join(parts))


def sweep_tables(jobs: Sequence[SweptRun], initial: Evaluation | None) -> list[Any]:
    """The sweep for the terminal: the initial policy, a row per cell, a row per job without a result; then the paper's
    table, where there are several strengths or steps, what a search compared, and the best of every grid."""
    cells = sweep.cells(jobs)
    evaluations = [*([initial] if initial else []), *(cell.evaluation for cell in cells)]
    everything = results_table(evaluations, [(job.name, job.state) for job in without_result(jobs)])
    several = len({cell.point for cell in cells}) > 1
    grids = [words(sentence) for sentence in _grid_sentences(jobs, cells)]
    return [everything, *(terminal_tables(paper_table(cells)) if several else []), *search_terminal(jobs), *grids]


def write_sweep(folder: Path, jobs: Sequence[SweptRun], baseline: Evaluated | None) -> None:
    """Write what there is to say about jobs into `folder`, whatever they came to: `sweep.csv`, `report.html`, and
    where any has a result `frontier.csv`, `paper_table.csv`, `.md` and `.tex`, `sweep.png` and `panels/`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "sweep.csv", csv_text(jobs))
    cells, initial = sweep.cells(jobs), baseline.evaluation if baseline else None
    if cells:
        write_text(folder / "frontier.csv", frontier_csv(cells))
        table = paper_table(cells)
        for kind, render in {"csv": csv_table, "md": markdown_table, "tex": latex_table}.items():
            write_text(folder / f"paper_table.{kind}", render(table))
        pictures = _pictures(jobs, cells, initial)
        write_png(folder / "sweep.png", pictures[:IN_ONE_PICTURE])
        write_panels(folder / "panels", pictures)
    write_text(folder / "report.html", sweep_page(jobs, baseline))


# --- pictures: reward, win rate, length and KL against beta, the step or the share, one line per series


FEW = 5  # lines of a picture over temperatures
BARS = "Bars are standard deviations over seeds (faint dots); with one seed, standard errors over prompts."


FEW_ENTRIES = 5  # of a legend that stands among the curves
LONGEST_ENTRY = 34  # characters
SMALLER = 0.88  # the letters of a legend below the curves
ROW = 1.7  # its lines, in letters


def series_colours(cells: Sequence[Cell]) -> dict[str, str]:
    """One colour per series, in their order."""
    names = list(dict.fromkeys(cell.series for cell in cells))
    return {name: SERIES[index % len(SERIES)] for index, name in enumerate(names)}


def point_axis(axes: Any, cells: Sequence[Cell]) -> None:
    """The axis of the KL strengths, logarithmic, of a run's steps, or of the shares on a path."""
    axis = axis_of(cells)
    axes.set_xlabel(axis.title)
    if not axis.is_strength:
        return
    betas = sorted({cell.beta for cell in cells if cell.beta})
    axes.set_xscale("log")
    labelled = _apart(betas)
    axes.set_xticks(labelled, [f"{beta:g}" for beta in labelled])
    axes.set_xticks([], minor=True)


LABEL = 0.09  # of the axis, which the longest label of a strength takes


def _apart(betas: Sequence[float]) -> list[float]:
    """Those of ascending strengths whose labels do not meet on a logarithmic axis; the first is one of them."""
    labelled: list[float] = []
    for beta in betas:
        if not labelled or math.log(beta / labelled[-1]) > LABEL * math.log(betas[-1] / betas[0]):
            labelled.append(beta)
    return labelled


def legend(axes: Any) -> None:
    """Inside where it leaves room for the curves, else below them in two columns, for which the picture grows."""
    from matplotlib import rcParams

    handles, names = axes.get_legend_handles_labels()
    if len(names) <= FEW_ENTRIES:
        axes.legend(loc="best")
        return
    half = LONGEST_ENTRY // 2
    short = [name if len(name) <= LONGEST_ENTRY else f"{name[:half]}…{name[-half:]}" for name in names]
    points = SMALLER * rcParams["legend.fontsize"]
    axes.figure.set_figheight(axes.figure.get_figheight() + ROW * points / 72 * math.ceil(len(names) / 2))
    axes.legend(handles, short, loc="upper left", bbox_to_anchor=(-0.12, -0.2), ncols=2, fontsize=points)


@dataclass(frozen=True, slots=True)
class Against:
    """A metric to draw against beta, the step or the share: its key, the initial policy's value, a factor for its
    unit."""

    key: str
    title: str
    caption: str
    level: float
    scale: float = 1.0


def _line(axes: Any, cells: Sequence[Cell], against: Against, colour: str, label: str) -> None:
    key, scale = against.key, against.scale
    points = [cell.point for cell in cells]
    means = [scale * cell.evaluation.get(key) for cell in cells]
    bars = [scale * cell.spread(key) for cell in cells]
    axes.errorbar(
        points, means, yerr=bars, color=colour, linewidth=1.8, elinewidth=1.4, capsize=3, marker="o", label=label
    )
    for cell, mean in zip(cells, means, strict=True):
        dots = [scale * value for value in cell.values(key)]
        if len(dots) > 1:
            axes.plot([cell.point] * len(dots), dots, ".", color=colour, alpha=0.35, markersize=6)
        if cell.evaluation.degenerate:
            axes.plot([cell.point], [mean], "X", color=BROKEN, markersize=9, zorder=4)


def point_panel(cells: Sequence[Cell], against: Against, with_legend: bool) -> Panel:
    """One metric against beta, the step or the share, one line per series."""
    short = short_names(cells)

    def draw(axes: Any) -> None:
        for name, colour in series_colours(cells).items():
            _line(axes, [cell for cell in cells if cell.series == name], against, colour, short[name])
        if not math.isnan(against.level):
            level = against.scale * against.level
            axes.axhline(level, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.4, label="initial policy")
        if any(cell.evaluation.degenerate for cell in cells):
            axes.plot([], [], "X", color=BROKEN, markersize=8, label="degenerate")
        axes.set_title(against.title)
        point_axis(axes, cells)
        if with_legend:
            legend(axes)

    return Panel(against.caption, draw)


def sweep_panels(cells: Sequence[Cell], initial: Evaluation | None) -> list[Panel]:
    """The pictures against beta, the step or the share, up to four. Every cell of `cells` has one."""
    first = cells[0].evaluation
    scorer, reward = first.scorer, first.key(SCORE)
    before = initial or Evaluation("", scorer, {})
    metrics = [
        Against(reward, f"{scorer.capitalize()} reward", "Mean reward of sampled answers.", before.get(reward)),
        Against(
            first.key(WIN_RATE),
            f"Win rate against {first.baseline}, %",
            "Share of paired comparisons won, ties half.",
            level=0.5,
            scale=100.0,
        ),
        Against(
            LENGTH.key,
            "Answer length, tokens",
            "Mean over sampled answers, the end token counted.",
            before.value(LENGTH),
        ),
        Against(DISTANCE, "KL to the initial policy, nats", "Per answer, from the policy's own samples.", math.nan),
    ]
    available = [a for a in metrics if all(a.key in cell.evaluation.metrics for cell in cells)]
    return [point_panel(cells, against, with_legend=against is available[0]) for against in available]


def temperature_curves(cells: Sequence[Cell]) -> list[TemperatureCurve]:
    """Lines over sampling temperatures: every cell where these are few, else the best of each series. Those of one
    series share its colour, the fainter the smaller beta or step."""
    hues, short = series_colours(cells), short_names(cells)
    shown = cells if len(cells) <= FEW else [strength.best for strength in best_strengths(cells) if strength.best]
    curves = []
    for cell in shown:
        members = [sibling.point for sibling in shown if sibling.series == cell.series]
        faint = 1 - 0.6 * sum((sibling or 0) > (cell.point or 0) for sibling in members) / len(members)
        colour = f"{hues[cell.series]}{round(255 * faint):02x}"
        curves.append(TemperatureCurve(cell.evaluation, f"{short[cell.series]}{_point(cell)}", colour))
    return curves


def _point(cell: Cell) -> str:
    """Where a cell stands in its series."""
    equals = " = " if cell.axis.is_strength else " "
    return "" if cell.point is None else f", {cell.axis.sign}{equals}{cell.point:g}"


def panels(jobs: Sequence[SweptRun], cells: Sequence[Cell], initial: Evaluation | None) -> list[Panel]:
    """Pictures against beta, the step or the share where there are several, else of the jobs beside each other."""
    swept = [cell for cell in cells if cell.is_drawn]
    if len({cell.point for cell in swept}) < 2:
        evaluations = [*([initial] if initial else []), *(job.evaluation for job in jobs if job.evaluation)]
        return [*reward_panels(evaluations), mean_length_panel(evaluations)]
    end = Against(
        swept[0].evaluation.key(END_CHOSEN),
        "End-token shift, nats",
        "Change of log p(end) against the initial policy, after held-out chosen responses.",
        level=0.0,
    )
    found = sweep_panels(swept, initial)
    if not all(DISTANCE in cell.evaluation.metrics for cell in swept):
        return found
    if any(is_scored(cell.evaluation) for cell in swept):
        found.append(frontier_panel(swept, initial))
    measured = any(end.key in cell.evaluation.metrics for cell in swept)
    return [*found, *([point_panel(swept, end, with_legend=False)] if measured else [])]


# --- what reward each policy bought with how much KL, over runs, KL strengths and checkpoints


def undominated(distances: Float[np.ndarray, " N"], rewards: Float[np.ndarray, " N"]) -> list[int]:
    """Indices of the points that no other beats: none has at least their reward at no more distance, and is better in
    one of both. Ascending in distance; points that are not known (nan) are left out."""
    candidates = [index for index in range(len(distances)) if not math.isnan(distances[index] + rewards[index])]
    front, best = [], -math.inf
    for index in sorted(candidates, key=lambda index: (distances[index], -rewards[index])):
        equal = bool(front) and distances[front[-1]] == distances[index] and rewards[front[-1]] == rewards[index]
        if rewards[index] > best or equal:
            front.append(index)
            best = rewards[index]
    return front


def _kl_and_score(cells: Sequence[Cell]) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """KL to the initial policy and mean score of each cell."""
    scorer = cells[0].evaluation.scorer if cells else ""
    keys = (DISTANCE, SCORE.of(scorer=scorer))
    distances, rewards = ([cell.evaluation.get(key) for cell in cells] for key in keys)
    return np.array(distances, float), np.array(rewards, float)


def front_of(cells: Sequence[Cell]) -> list[Cell]:
    """The cells on the Pareto front of KL and mean score, ascending in KL; degenerate ones never are."""
    sound = [cell for cell in cells if not cell.evaluation.degenerate]
    return [sound[index] for index in undominated(*_kl_and_score(sound))]


MANY = 10  # points of a series, of which only the ends are named: their numbers would cover each other


def _draw_series(axes: Any, members: Sequence[Cell], colour: str, label: str) -> None:
    distances, rewards = _kl_and_score(members)
    bars = {"xerr": [cell.spread(DISTANCE) for cell in members],
            "yerr": [cell.spread(cell.evaluation.key(SCORE)) for cell in members]}  # fmt: skip
    axes.errorbar(
        distances, rewards, **bars, fmt="-o", color=colour, linewidth=1.5, elinewidth=0.9, markersize=5, label=label
    )
    named = [0, len(members) - 1] if len(members) > MANY else range(len(members))
    for index, (cell, *point) in enumerate(zip(members, distances, rewards, strict=True)):
        if index in named:
            axes.annotate(
                f"{cell.point:g}", point, xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour
            )
        if cell.evaluation.degenerate:
            axes.plot(*point, "X", color=BROKEN, markersize=8, zorder=4)


def _draw_front(axes: Any, cells: Sequence[Cell], initial: Evaluation | None) -> None:
    """The best reward to be had at or below each distance, from the initial policy on, and rings at its corners."""
    front = front_of(cells)
    distances, rewards = _kl_and_score(front)
    start = [] if initial is None else [initial.value(SCORE)]
    above = rewards > max(start, default=-math.inf)
    x, y = [*(0.0 for _ in start), *distances[above]], [*start, *rewards[above]]
    axes.step(x, y, where="post", color=INK, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1, label="Pareto front")
    axes.plot(distances[above], rewards[above], "o", markersize=11, fillstyle="none", color=INK, zorder=3)


def frontier_panel(cells: Sequence[Cell], initial: Evaluation | None) -> Panel:
    """The curve that each series draws between distance and reward, and the Pareto front of all of them."""
    short, sign = short_names(cells), axis_of(cells).sign

    def draw(axes: Any) -> None:
        scorer = cells[0].evaluation.scorer
        for name, colour in series_colours(cells).items():
            _draw_series(axes, [cell for cell in cells if cell.series == name], colour, short[name])
        if initial is not None:
            axes.plot(
                0, initial.get(SCORE.of(scorer=scorer)), "s", color=INITIAL, markersize=7, label="initial policy"
            )
        _draw_front(axes, cells, initial)
        axes.set_title("Reward against distance")
        axes.set_xlabel("KL to the initial policy (nats per answer)")
        axes.set_ylabel(f"{scorer.capitalize()} reward")
        axes.margins(x=0.08, y=0.14)
        legend(axes)

    plural = {"step": "steps", "share": "shares"}
    return Panel(
        f"Reward bought with distance; the numbers at the points are {plural.get(sign, sign)}. Rings are on the "
        "Pareto front: no sound policy had more reward at less KL. Degenerate ones are crossed out.",
        draw,
    )


def frontier_csv(cells: Sequence[Cell]) -> str:
    """One line per cell: KL, reward, win rate, length with their spread, and whether it is on the Pareto front."""
    front = {id(cell) for cell in front_of(cells)}
    about = cells[0].evaluation
    reward, win = about.key(SCORE), about.key(WIN_RATE)
    keys = (DISTANCE, f"{DISTANCE}_se", reward, f"{reward}_se", win, f"{win}_low", f"{win}_high", LENGTH.key,
            f"{LENGTH.key}_se")  # fmt: skip
    rows: list[list[Any]] = [["series", "beta", "step", "share", "seeds", *keys, "degenerate", "pareto"]]
    for cell in cells:
        values = [cell.evaluation.metrics.get(key) for key in keys]
        broken = "; ".join(cell.evaluation.degenerate)
        rows.append(
            [
                cell.series,
                cell.beta,
                cell.step,
                cell.share,
                cell.evaluation.num_seeds,
                *values,
                broken,
                int(id(cell) in front),
            ]
        )
    return as_csv(rows)


# --- in the tracker: one run for a sweep as a whole, in the group of the training


FRONTIER = (
    "job", "training_run", "objective", "reference", "beta", "seed", "kl", "kl_se", "score", "score_se", "win_rate",
    "win_rate_low", "win_rate_high", "tokens", "ended", "degenerate", "frontier",
)  # fmt: skip
FILES_OF_A_SWEEP = ("sweep.png", "sweep.csv", "frontier.csv", "paper_table.csv", "report.html")


def _frontier_row(job: SweptRun) -> list[Any]:
    """What a job bought with how much KL, in the order of `FRONTIER` but for its last."""
    assert job.evaluation is not None
    evaluation = job.evaluation
    reward, win = evaluation.key(SCORE), evaluation.key(WIN_RATE)
    keys = [DISTANCE, f"{DISTANCE}_se", reward, f"{reward}_se", win, f"{win}_low", f"{win}_high"]
    values = [evaluation.get(key) for key in (*keys, LENGTH.key, ENDED.key)]
    about = [job.name, known_id(job.folder, "train"), job.objective, job.reference, job.beta, job.seed]
    return [*about, *values, bool(evaluation.degenerate)]


def frontier(jobs: Sequence[SweptRun]) -> list[list[Any]]:
    """A row per evaluated job, columns `FRONTIER`; on the frontier is what no other sound job beats."""
    rows = [_frontier_row(job) for job in jobs if job.evaluation is not None]
    kl, score, broken = (FRONTIER.index(name) for name in ("kl", "score", "degenerate"))
    sound = [index for index, row in enumerate(rows) if not row[broken]]
    points = np.array([[rows[index][kl], rows[index][score]] for index in sound], float).reshape(-1, 2)
    front = {sound[index] for index in undominated(points[:, 0], points[:, 1])}
    return [[*row, index in front] for index, row in enumerate(rows)]


def track_sweep(tracking: Component, config: dict[str, Any], folder: Path, jobs: Sequence[SweptRun]) -> None:
    """Log a sweep as a whole: the table and picture of reward against KL, and its files."""
    name = folder.resolve().name
    below = all(job.folder.is_relative_to(folder) for job in jobs)
    tracker = tracking(RunInfo(folder, config, f"sweep {name}", name, "sweep", resume=False, runs_below=below))
    rows = frontier(jobs)
    tracker.scatter("frontier", FRONTIER, rows, x="kl", y="score", title="Reward against KL to the initial policy")
    log_files(tracker, [path for name in FILES_OF_A_SWEEP if (path := folder / name).is_file()])
    tracker.summary({"num_jobs": len(jobs), "num_evaluated": len(rows)})
    tracker.finish(0)
