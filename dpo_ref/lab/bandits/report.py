"""A study as files: metrics by step, a self-contained page, a picture; and as a table in the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dpo_ref.files.writing import write_text
from dpo_ref.lab.bandits.study import Trace
from dpo_ref.reports import page
from dpo_ref.reports.plots import INITIAL, INK, SERIES, Panel, write_png
from dpo_ref.tracking.terminal import words

# --- pictures: reward against KL, reward against reward queries, and the distribution at the end


LINES = {"offline": (0, (3, 2)), "on_policy": "solid"}
MARKERS = {"offline": "s", "on_policy": "o"}


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """What is known of one reward in closed form; distributions are of a token.

    `optimum` is None for an objective without a KL strength.
    """

    peak: int
    reference: Float[np.ndarray, " V"]
    frontier: tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]  # KL, reward
    optimum: Float[np.ndarray, " V"] | None
    optimum_at: tuple[float, float] | None  # KL, reward
    beta: float | None


def _colours(traces: Sequence[Trace]) -> dict[str, str]:
    labels = list(dict.fromkeys(trace.label for trace in traces))
    return {label: SERIES[i % len(SERIES)] for i, label in enumerate(labels)}


def _mean(values: Float[np.ndarray, "S P"]) -> Float[np.ndarray, " P"]:
    return values.mean(axis=0)


def _legend(axes: Any, traces: Sequence[Trace], location: str, columns: int) -> None:
    """One entry for each objective by colour, one for each schedule by line."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, linewidth=2, label=label) for label, c in _colours(traces).items()]
    schedules = dict.fromkeys(trace.schedule for trace in traces)
    handles += [
        Line2D([], [], color=INK, linestyle=LINES[s], marker=MARKERS[s], markersize=4, label=SCHEDULE_WORDS[s])
        for s in schedules
    ]
    axes.legend(handles=handles, loc=location, ncols=columns, fontsize=8, handlelength=2.2, labelspacing=0.3)


def frontier_panel(traces: Sequence[Trace], closed_form: ClosedForm) -> Panel:
    """Where training leads each method, below what is possible."""

    def draw(axes: Any) -> None:
        axes.plot(*closed_form.frontier, color=INITIAL, linewidth=1.4, zorder=1)
        for trace in traces:
            colour, kl, reward = _colours(traces)[trace.label], _mean(trace.kl), _mean(trace.reward)
            axes.plot(kl, reward, color=colour, linestyle=LINES[trace.schedule], linewidth=1.7)
            axes.plot(kl[-1], reward[-1], marker=MARKERS[trace.schedule], color=colour, markersize=6)
        if closed_form.optimum_at is not None:
            axes.plot(*closed_form.optimum_at, marker="*", markersize=13, color=INK, linestyle="none", zorder=5)
        axes.set_xlim(left=0, right=1.12 * max(float(_mean(trace.kl).max()) for trace in traces))
        axes.set_ylim(0, 1.04)
        axes.set_title(f"Peak {closed_form.peak}: reward against distance")
        axes.set_xlabel("KL to the reference (nats per response)")
        axes.set_ylabel("expected reward")

    star = "" if closed_form.beta is None else f" The star is the optimum at β = {closed_form.beta:g}."
    return Panel(
        f"Reward peak {closed_form.peak}: means over seeds along training; the mark is the end. Grey is the frontier, "
        f"what the best policy earns at that KL.{star}",
        draw,
    )


def queries_panel(traces: Sequence[Trace], closed_form: ClosedForm) -> Panel:
    """What each method made of so many scored samples."""

    def draw(axes: Any) -> None:
        for trace in traces:
            colour = _colours(traces)[trace.label]
            rounds = np.flatnonzero(np.diff(trace.queries, append=-1))  # the last step on each batch of samples
            rounds = rounds[trace.queries[rounds] > 0] if trace.schedule == "on_policy" else rounds[-1:]
            queries, reward = trace.queries[rounds], trace.reward[:, rounds]
            error = 0 if len(reward) < 2 else reward.std(axis=0, ddof=1)
            style = {"marker": MARKERS[trace.schedule], "color": colour, "linewidth": 1.6}
            if trace.schedule == "on_policy":
                axes.plot(queries, _mean(reward), color=colour, linewidth=1.7)
                axes.fill_between(
                    queries, _mean(reward) - error, _mean(reward) + error, color=colour, alpha=0.13, lw=0
                )
            else:
                axes.errorbar(queries, _mean(reward), yerr=error, markersize=6, elinewidth=1.5, **style)
        axes.axhline(float(closed_form.frontier[1][0]), color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_ylim(0, 1.04)
        axes.set_xlim(left=0)
        axes.set_title(f"Peak {closed_form.peak}: reward against reward queries")
        axes.set_xlabel("scored samples")
        axes.set_ylabel("expected reward")
        below = closed_form.frontier[1][0] > 0.3  # no method falls far below the reference: room under it
        _legend(axes, traces, *(("lower center", 3) if below else ("upper left", 1)))

    return Panel(
        f"Reward peak {closed_form.peak}: on-policy after each round; offline once, since its samples are all drawn "
        "before training. Bands and bars are one standard deviation over seeds; dashed is the reference.",
        draw,
    )


def distribution_panel(traces: Sequence[Trace], closed_form: ClosedForm) -> Panel:
    """Which arms the first method ended with, beside the reference and the optimum."""
    first_traces = [trace for trace in traces if trace.label == traces[0].label]

    def draw(axes: Any) -> None:
        arms = np.arange(len(closed_form.reference))
        axes.fill_between(arms, closed_form.reference, step="mid", color=INITIAL, alpha=0.35, lw=0, label="reference")
        if closed_form.optimum is not None:
            axes.plot(arms, closed_form.optimum, color=INK, linewidth=1.5, label=f"optimum, β = {closed_form.beta:g}")
        for trace in first_traces:
            mean, colour = _mean(trace.tokens), SERIES[0 if trace.schedule == "offline" else 1]
            label = f"{trace.label}, {SCHEDULE_WORDS[trace.schedule]}"
            axes.plot(arms, mean, color=colour, linestyle=LINES[trace.schedule], linewidth=1.7, label=label)
        axes.set_xlim(0, len(arms) - 1)
        axes.set_ylim(bottom=0)
        axes.set_title(f"Peak {closed_form.peak}: the distribution at the end")
        axes.set_xlabel("arm")
        axes.set_ylabel("probability")
        axes.legend(loc="upper right" if closed_form.peak < len(arms) / 2 else "upper center", fontsize=8)

    return Panel(
        f"Reward peak {closed_form.peak}: probability of each arm at the end of training, mean over seeds.", draw
    )


def panels(traces: Sequence[Trace], closed_forms: Sequence[ClosedForm]) -> list[Panel]:
    """Three pictures for every reward, as rows of a grid with one column a reward."""
    groups = [[trace for trace in traces if trace.peak == closed_form.peak] for closed_form in closed_forms]
    kinds = (frontier_panel, queries_panel, distribution_panel)
    return [
        panel(group, closed_form) for panel in kinds for group, closed_form in zip(groups, closed_forms, strict=True)
    ]


# --- the files


HEAD = ("method", "data", "reward", "KL", "best at this KL")


def metrics_by_step(traces: Sequence[Trace]) -> dict[int, dict[str, float]]:
    """For every step measured: mean and, of several seeds, standard deviation of reward and KL, and the queries."""
    lines: dict[int, dict[str, float]] = {}
    for trace in traces:
        for point, step in enumerate(trace.steps.tolist()):
            line = lines.setdefault(step, {})
            line[f"{trace.key}/queries"] = float(trace.queries[point])
            for name, values in (("reward", trace.reward[:, point]), ("kl", trace.kl[:, point])):
                line[f"{trace.key}/{name}"] = float(values.mean())
                if len(values) > 1:
                    line[f"{trace.key}/{name}_sd"] = spread(values)
    return dict(sorted(lines.items()))


def results(traces: Sequence[Trace]) -> dict[str, dict[str, Any]]:
    """What every method came to, seed by seed, for summary.json."""
    return {
        trace.key: {
            "reward": [round(value, 6) for value in trace.reward[:, -1].tolist()],
            "kl": [round(value, 6) for value in trace.kl[:, -1].tolist()],
            "queries": int(trace.queries[-1]),
            "steps": int(trace.steps[-1]),
        }
        for trace in traces
    }


def _best_reward(kl: float, closed_form: ClosedForm) -> float:
    """The frontier's reward at a KL."""
    import numpy as np

    return float(np.interp(kl, *closed_form.frontier))


def _with_deviation(mean: float, deviation: float, decimals: int) -> str:
    return f"{mean:.{decimals}f}" + ("" if deviation != deviation else f" ± {deviation:.{decimals}f}")


def rows(traces: Sequence[Trace], closed_form: ClosedForm) -> list[tuple[str, ...]]:
    """A row for every method under one reward, the best first, then what was known beforehand."""
    rows = []
    for trace in ranking(traces, closed_form.peak):
        reward, kl = trace.reward[:, -1], trace.kl[:, -1]
        rows.append(
            (
                trace.label,
                SCHEDULE_WORDS[trace.schedule],
                _with_deviation(float(reward.mean()), spread(reward), 3),
                _with_deviation(float(kl.mean()), spread(kl), 2),
                f"{_best_reward(float(kl.mean()), closed_form):.3f}",
            )
        )
    if closed_form.optimum_at is not None:
        kl, reward = closed_form.optimum_at
        rows.append(
            (f"optimum at β = {closed_form.beta:g}", "closed form", f"{reward:.3f}", f"{kl:.2f}", f"{reward:.3f}")
        )
    rows.append(
        ("reference", "closed form", f"{closed_form.frontier[1][0]:.3f}", "0.00", f"{closed_form.frontier[1][0]:.3f}")
    )
    return rows


def terminal_tables(traces: Sequence[Trace], closed_forms: Sequence[ClosedForm]) -> list[Any]:
    """A rich table for every reward."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    tables = []
    for closed_form in closed_forms:
        table = Table(box=SIMPLE_HEAD, title=f"reward peak {closed_form.peak}", title_justify="left", pad_edge=False)
        for name in HEAD:
            table.add_column(name, justify="left" if name in HEAD[:2] else "right", no_wrap=name in HEAD[:2])
        for row in rows(traces, closed_form):
            table.add_row(*map(words, row))
        tables.append(table)
    return tables


def _table(traces: Sequence[Trace], closed_form: ClosedForm) -> str:
    head = "".join(f"<th>{page.text(name)}</th>" for name in HEAD)
    body = "".join(
        f'<tr><th scope="row">{page.text(first)}</th>'
        + "".join(
            f'<td data-label="{page.text(name)}"><span>{page.text(value)}</span></td>'
            for name, value in zip(HEAD[1:], values, strict=True)
        )
        + "</tr>"
        for first, *values in rows(traces, closed_form)
    )
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def document(
    title: str,
    traces: Sequence[Trace],
    closed_forms: Sequence[ClosedForm],
    notes: Sequence[str],
    settings: Mapping[str, Any],
) -> str:
    """The page."""
    leads = "".join(f'<p class="lead">{page.text(sentence)}</p>' for sentence in findings(traces))
    tables = "".join(
        f"<h2>Reward peak {closed_form.peak}</h2>{_table(traces, closed_form)}" for closed_form in closed_forms
    )
    body = (
        f'<p class="over">Bandit</p><h1>{page.text(title)}</h1>{leads}{tables}'
        '<p class="small">Means ± standard deviation over seeds, at the end of training.</p>'
        f"<h2>Pictures</h2>{page.pictures(panels(traces, closed_forms))}"
        "<h2>How it was made</h2>"
        + "".join(f'<p class="small">{page.text(note)}</p>' for note in notes)
        + page.definitions([(name, str(value)) for name, value in settings.items()])
        + "<footer>Made by dpo_ref. All numbers are in metrics.jsonl and summary.json.</footer>"
    )
    return page.page(title, body)


def write_report(
    folder: Path,
    title: str,
    traces: Sequence[Trace],
    closed_forms: Sequence[ClosedForm],
    notes: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Write `report.html` and `report.png` into the run's folder."""
    write_text(folder / "report.html", document(title, traces, closed_forms, notes, settings))
    write_png(folder / "report.png", panels(traces, closed_forms))


# --- what a study says, in sentences that its seeds carry


SCHEDULE_WORDS = {"offline": "offline", "on_policy": "on-policy"}


def name_of(trace: Trace) -> str:
    """A method in words."""
    return f"{SCHEDULE_WORDS[trace.schedule]} {trace.label}"


def spread(values: Float[np.ndarray, " S"]) -> float:
    """Standard deviation over seeds; nan for one."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


class MethodDifference(NamedTuple):
    """The final reward of one method less another's, paired by seed: mean, standard error, and in how many seeds it
    has the sign of the mean."""

    mean: float
    error: float
    agreeing: int
    num_seeds: int

    @property
    def told_apart(self) -> bool:
        """All of at least three seeds agree, and the mean is three standard errors from 0."""
        return self.agreeing == self.num_seeds >= 3 and abs(self.mean) > 3 * self.error


def difference(first: Trace, second: Trace) -> MethodDifference:
    """Of the rewards at the end."""
    values = first.reward[:, -1] - second.reward[:, -1]
    mean, error = float(values.mean()), spread(values) / math.sqrt(len(values))
    return MethodDifference(mean, error, int((np.sign(values) == np.sign(mean)).sum()), len(values))


def _schedule_sentences(traces: Sequence[Trace], peak: int) -> list[str]:
    by_label = {(trace.label, trace.schedule): trace for trace in traces if trace.peak == peak}
    sentences = []
    for label in dict.fromkeys(label for label, _ in by_label):
        pair = by_label.get((label, "on_policy")), by_label.get((label, "offline"))
        if pair[0] is None or pair[1] is None:
            continue
        gap, rewards = difference(pair[0], pair[1]), [float(trace.reward[:, -1].mean()) for trace in pair if trace]
        figures = f"{rewards[0]:.3f} on-policy, {rewards[1]:.3f} offline"
        if gap.told_apart:
            more = "more" if gap.mean > 0 else "less"
            sentences.append(f"{label} earns {more} on-policy ({figures}; in each of {gap.num_seeds} seeds)")
        else:
            sentences.append(f"{label} cannot be told apart by these seeds ({figures})")
    return sentences


def findings(traces: Sequence[Trace]) -> list[str]:
    """One sentence for each peak: on-policy against offline, method by method, at equal reward queries and steps."""
    sentences = []
    for peak in dict.fromkeys(trace.peak for trace in traces):
        clauses = _schedule_sentences(traces, peak)
        if clauses:
            sentences.append(f"Peak {peak}: {'; '.join(clauses)}.")
    return sentences


def ranking(traces: Sequence[Trace], peak: int) -> list[Trace]:
    """The methods under one reward, the highest mean final reward first."""
    return sorted((t for t in traces if t.peak == peak), key=lambda trace: -float(trace.reward[:, -1].mean()))
