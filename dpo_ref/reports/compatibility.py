"""`compatibility.html` and its pictures: candidate references beside a policy, on one page without a network."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from dpo_ref.evaluation.compatibility import LEVELS, SATURATED, TOLERATED, Alone, Candidate, CompatibilityReport
from dpo_ref.evaluation.kl import BY_TEXT, BY_TOKEN, Divergence
from dpo_ref.evaluation.statistics.estimates import Estimate
from dpo_ref.files.writing import write_text
from dpo_ref.reports import page
from dpo_ref.reports.page import row as page_row
from dpo_ref.reports.page import table
from dpo_ref.reports.plots import INITIAL, SERIES, Panel, write_png
from dpo_ref.reports.tables import MISSING, number, percent
from dpo_ref.tracking.terminal import words


def _pairs_table(report: CompatibilityReport) -> str:
    names, rows = cells(report, pair_entries())
    colours = [INITIAL, *(colour for _, colour in with_colours(report))]
    kinds = [' class="baseline"', *("" for _ in report.candidates)]
    return table(names, [page_row(names, *entries) for entries in zip(rows, colours, kinds, strict=True)])


def _step_table(report: CompatibilityReport) -> str:
    names, rows = cells(report, step_entries(report))
    lines = [page_row(names, texts, colour) for texts, (_, colour) in zip(rows[1:], with_colours(report), strict=True)]
    lines += [
        f'<tr class="failed"><th scope="row">{page.text(refusal.title)}</th><td colspan="{len(names) - 1}">'
        f"{page.text(refusal.reason)}</td></tr>"
        for refusal in report.refused
    ]
    return table(names, lines)


def _betas_table(candidate: Candidate, colour: str) -> str:
    names = ["β", "saturated, right", "saturated, wrong", "DPO loss", "weight 5 %", "25 %", "median", "75 %", "95 %",
             "effective share"]  # fmt: skip
    rows = [
        [f"{at.beta:g}", percent(at.saturated_right), percent(at.saturated_wrong), number(at.loss, 3),
         *(number(weight, 3) for weight in at.weight_quantiles), number(at.effective_share, 3)]
        for at in candidate.start.at
    ]  # fmt: skip
    lines = [page_row(names, entries, colour) for entries in rows]
    return f'<details class="samples"><summary>{page.text(candidate.title)}</summary>{table(names, lines)}</details>'


def _items(sentences: Sequence[tuple[str, str]]) -> str:
    """What is said about each reference."""
    return "".join(
        f'<p class="lead"><b>{page.text(name)}.</b> {page.text(sentence)}</p>' for name, sentence in sentences
    )


def settings(report: CompatibilityReport) -> list[tuple[str, str]]:
    """How the report was made."""
    return [
        ("policy", report.policy),
        ("data", report.data),
        ("pairs", f"{report.num_pairs} drawn from the training data with seed {report.seed}"),
        ("samples", f"{report.num_prompts} prompts, one answer of each model at temperature 1, "
                    f"at most {report.options.max_new_tokens} tokens"),
    ]  # fmt: skip


def compatibility_page(report: CompatibilityReport) -> str:
    """The page as HTML."""
    title = f"{len(report.candidates) + len(report.refused)} references beside {report.policy}"
    audits = [(candidate.title, candidate.audit) for candidate in report.candidates if candidate.audit]
    notes = [(column.title, column.note) for column in entries(report)]
    parts = [
        '<p class="over">Reference compatibility</p>',
        f"<h1>{page.text(title)}</h1>",
        f'<p class="lead">{page.text(headline(report))}.</p>',
        page.alerts([f"{refusal.title} cannot be used: {refusal.reason}" for refusal in report.refused]),
        page.pictures(panels(report)),
        "<h2>What the numbers say</h2>",
        _items([(candidate.title, verdict(candidate, report)) for candidate in report.candidates]),
        "<h2>How far from the policy, and what that makes of beta</h2>",
        _step_table(report),
        "<h2>What they say about the pairs</h2>",
        _pairs_table(report),
        '<details class="notes"><summary>What the columns mean</summary>',
        page.definitions(notes + reading()) + "</details>",
        "<h2>Step 0 at every beta</h2>",
        *(_betas_table(candidate, colour) for candidate, colour in with_colours(report)),
        "<h2>KL and how it was estimated</h2>",
        _items(estimators(report)),
        "<h2>Text for references with another tokenizer</h2>" + _items(audits) if audits else "",
        "<h2>How it was measured</h2>",
        page.definitions(settings(report)),
        "<footer>Made by dpo_ref. All numbers are in compatibility.json.</footer>",
    ]
    return page.page(title, "\n".join(filter(None, parts)))


def write_page(folder: Path, report: CompatibilityReport) -> None:
    """Write `compatibility.html` and `compatibility.png` into `folder`."""
    write_text(folder / "compatibility.html", compatibility_page(report))
    write_png(folder / "compatibility.png", panels(report))


# --- pictures


LABEL = 17  # characters of a row's name in one line
LARGE = 1500  # pairs from which dots would cover each other


def short(title: str) -> str:
    """A title that leaves room for a picture, in at most two lines."""
    return fill(clip(title, 2 * LABEL - 4), LABEL)


def clip(title: str, size: int) -> str:
    """A title without its middle where it is longer than `size` characters."""
    half = size // 2
    return title if len(title) <= size else f"{title[:half]}…{title[1 - half :]}"


def with_colours(report: CompatibilityReport) -> list[tuple[Candidate, str]]:
    """Every candidate and its colour."""
    return [(candidate, SERIES[index % len(SERIES)]) for index, candidate in enumerate(report.candidates)]


def _rows(axes: Any, names: Sequence[str], title: str) -> None:
    axes.set_title(title)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), list(map(short, names)))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def margin_panels(report: CompatibilityReport) -> list[Panel]:
    """One cloud per reference whose margins are neither all zero nor the policy's own."""
    shown = [(c, hue) for c, hue in with_colours(report) if c.margins.any() and c.start.sd > 0]
    return [_cloud(candidate, hue, report) for candidate, hue in shown]


def _cloud(candidate: Candidate, colour: str, report: CompatibilityReport) -> Panel:
    ours, theirs = report.policy_margins, candidate.margins

    def dots(axes: Any) -> None:
        axes.scatter(ours, theirs, s=9, color=colour, alpha=0.4, linewidths=0)

    def honeycomb(axes: Any) -> None:
        axes.hexbin(ours, theirs, gridsize=36, mincnt=1, bins="log", cmap="Blues", linewidths=0.1)

    def draw(axes: Any) -> None:
        axes.set_title(f"Margins: {clip(candidate.title, 28)}")
        (honeycomb if len(ours) > LARGE else dots)(axes)
        axes.axline((0, 0), slope=1, color=INITIAL, linewidth=1, linestyle=(0, (4, 3)))
        axes.axhline(0, color=INITIAL, linewidth=0.6)
        axes.axvline(0, color=INITIAL, linewidth=0.6)
        axes.locator_params(axis="x", nbins=6)  # thousands stay apart
        axes.set_xlabel("margin of the policy (nats)")
        axes.set_ylabel("margin of the reference")

    return Panel(
        f"{candidate.title}: each dot a pair. On the dashed line the step-0 margin is zero; above the horizontal line "
        "the reference prefers the chosen response, right of the vertical one the policy.",
        draw,
    )


def _lines(report: CompatibilityReport, axes: Any, value: Callable[[Any], float]) -> None:
    for candidate, colour in with_colours(report):
        betas = [at.beta for at in candidate.start.at]
        axes.plot(betas, [value(at) for at in candidate.start.at], marker="o", markersize=4, linewidth=1.8,
                  color=colour, label=short(candidate.title))  # fmt: skip
    axes.set_xscale("log")
    betas = [at.beta for at in report.candidates[0].start.at]
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("β")


def saturation_panel(report: CompatibilityReport) -> Panel:
    """Share of saturated pairs against beta."""

    def draw(axes: Any) -> None:
        axes.set_title("Saturated pairs at step 0")
        _lines(report, axes, lambda at: 100 * at.saturated.mean)
        axes.axhline(100 * TOLERATED, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_ylabel("% of pairs")
        axes.set_ylim(-3, 103)
        axes.legend(loc="upper left", fontsize=8)

    return Panel(
        f"Pairs with |beta × step-0 margin| above {SATURATED:g}; start with a beta at which a reference's line is "
        f"below the dashed one ({LIMIT}).",
        draw,
    )


def weight_panel(report: CompatibilityReport) -> Panel:
    """Where the gradient weights lie at the quoted beta."""
    quoted = report.candidates[0].quoted.beta

    def draw(axes: Any) -> None:
        _rows(axes, [c.title for c in report.candidates], f"Gradient weights at β = {quoted:g}")
        for row, (candidate, colour) in enumerate(with_colours(report)):
            low, left, middle, right, high = candidate.quoted.weight_quantiles
            axes.plot([low, high], [row, row], color=colour, linewidth=2, alpha=0.45, solid_capstyle="round")
            axes.plot([left, right], [row, row], color=colour, linewidth=8, alpha=0.45, solid_capstyle="butt")
            axes.plot([middle], [row], "o", color=colour, markersize=7)
        axes.axvline(0.5, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("sigmoid(−β × step-0 margin)")

    whole = 100 * (LEVELS[-1] - LEVELS[0])
    return Panel(
        f"Median, half and {whole:.0f} % of the pairs' weights in DPO's first gradient. At 0 a pair is ignored; at 1 "
        "it counts in full: the policy prefers the rejected response more than the reference does.",
        draw,
    )


def accuracy_panel(report: CompatibilityReport) -> Panel:
    """Pairs ranked as labelled, with intervals."""

    def draw(axes: Any) -> None:
        candidates = [(c.title, c.alone, colour) for c, colour in with_colours(report)]
        entries = [("policy", report.policy_alone, INITIAL), *candidates]
        _rows(axes, [name for name, _, _ in entries], "Pairs ranked as labelled")
        axes.axvline(50, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
        for row, (_, alone, colour) in enumerate(entries):
            low, high = (100 * end for end in interval(alone.accuracy))
            axes.plot([low, high], [row, row], color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="round")
            axes.plot([100 * alone.accuracy.mean], [row], "o", color=colour, markersize=8)
        axes.margins(x=0.12)
        axes.set_xlabel("% of pairs, ties half")

    return Panel("Pairs whose chosen response the model finds likelier; bars are 95 % intervals over prompts.", draw)


def gap_panel(report: CompatibilityReport) -> Panel:
    """How much likelier the policy finds the responses, per byte."""
    shown = [(c, hue) for c, hue in with_colours(report) if np.isfinite(c.beside.gap_per_byte.mean)]

    def draw(axes: Any) -> None:
        _rows(axes, [c.title for c, _ in shown], "Gap per byte")
        axes.axvline(0, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
        for row, (c, colour) in enumerate(shown):
            low, high = interval(c.beside.gap_per_byte)
            axes.plot([low, high], [row, row], color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="round")
            axes.plot([c.beside.gap_per_byte.mean], [row], "o", color=colour, markersize=8)
        axes.margins(x=0.12)
        axes.set_xlabel("(log π − log ref) / bytes, nats")

    return Panel(
        "Left of zero the reference finds the data's responses likelier than the policy does. Bars are 95 % "
        "intervals.",
        draw,
    )


def panels(report: CompatibilityReport) -> list[Panel]:
    """The pictures of the report."""
    gaps = [gap_panel(report)] if any(np.isfinite(c.beside.gap_per_byte.mean) for c in report.candidates) else []
    return [
        saturation_panel(report),
        accuracy_panel(report),
        *margin_panels(report),
        weight_panel(report),
        *gaps,
    ]


# --- the columns, and the table in a terminal


MARKS = {BY_TEXT: "*", BY_TOKEN: "", None: ""}


def _no_entry(alone: Alone) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """A column: its title, what its numbers mean, a reference's entry, and the policy's where it has one. A `brief`
    title puts it into the terminal's 80 characters."""

    title: str
    note: str
    text: Callable[[Candidate], str]
    policy: Callable[[Alone], str] = _no_entry
    brief: str = ""


def plus_minus(estimate: Estimate, decimals: int) -> str:
    """A mean and its standard error."""
    mean, error = number(estimate.mean, decimals, signed=True), number(estimate.se, decimals)
    return mean if MISSING in (mean, error) else f"{mean} ± {error}"


def _kl_cell(kl: Divergence) -> str:
    return f"{kl_text(kl)}{MARKS[kl.estimator]}"


def _overlap(candidate: Candidate) -> str:
    if candidate.tokens is None:
        return MISSING
    return f"{percent(candidate.tokens.shared)}, {candidate.tokens.tokens_per_token:.2f}"


def _correlations(pearson: float, spearman: float) -> str:
    return MISSING if math.isnan(pearson) else f"{number(pearson, 2)}, {number(spearman, 2)}"


def _unit(candidate: Candidate) -> str:
    return "any" if candidate.start.unit is None else beta_text(candidate.start.unit)


def _beta(candidate: Candidate) -> str:
    unit, listed = candidate.start.unit, candidate.start.listed
    return "any" if unit is None else MISSING if listed is None else f"{listed:g}"


def pair_entries() -> list[CandidateRow]:
    """What each model says about the pairs, and how that relates to what the policy says."""
    return [
        CandidateRow(
            "pairs right", "share of pairs whose chosen response it finds likelier, ties half; 95 % interval",
            lambda c: share(c.alone.accuracy), lambda a: share(a.accuracy), brief="pairs right",
        ),
        CandidateRow(
            "margin", "mean of log p(chosen) − log p(rejected), nats, ± standard error clustered by prompt",
            lambda c: plus_minus(c.alone.margin, 2), lambda a: plus_minus(a.margin, 2),
        ),
        CandidateRow(
            "length corr.", "correlation of its margin with the difference in bytes, chosen − rejected",
            lambda c: number(c.alone.length_correlation, 2), lambda a: number(a.length_correlation, 2),
        ),
        CandidateRow(
            "r, ρ log-probs", "correlation and rank correlation of responses' log-probs with the policy's",
            lambda c: _correlations(c.beside.logps_pearson, c.beside.logps_spearman),
        ),
        CandidateRow(
            "r, ρ margins", "the same of pair margins",
            lambda c: _correlations(c.beside.margins_pearson, c.beside.margins_spearman),
        ),
        CandidateRow(
            "ρ per byte", "rank correlation of log p / bytes with the policy's: sums follow the length anyway",
            lambda c: number(c.beside.per_byte_spearman, 2), brief="ρ/byte",
        ),
        CandidateRow(
            "gap/byte", "mean over responses of (log π − log ref) / bytes, nats, ± standard error",
            lambda c: plus_minus(c.beside.gap_per_byte, 3),
        ),
        CandidateRow(
            "vocabulary, tokens", "share of the policy's vocabulary that a reference of another tokenizer has too; "
            "its tokens for one of the policy's", _overlap,
        ),
    ]  # fmt: skip


def step_entries(report: CompatibilityReport) -> list[CandidateRow]:
    """How far the reference is from the policy, and what DPO's first step makes of that."""
    quoted = f"{report.candidates[0].quoted.beta:g}"
    return [
        CandidateRow(
            "KL(π‖ref)", f"nats per answer on the policy's samples ± standard error: {BY_TOKEN}; * {BY_TEXT}",
            lambda c: _kl_cell(c.forward), brief="π‖ref",
        ),
        CandidateRow(
            "KL(ref‖π)", "the same on the reference's samples", lambda c: _kl_cell(c.reverse), brief="ref‖π",
        ),
        CandidateRow("s.d.", "of the step-0 margin, nats", lambda c: f"{c.start.sd:.3g}", brief="s.d."),
        CandidateRow(
            f"saturated at β {quoted}", f"share of pairs with |beta × step-0 margin| above {SATURATED:g}",
            lambda c: percent(c.quoted.saturated.mean), brief=f"sat. {quoted}",
        ),
        CandidateRow(
            "start β", f"the largest listed beta with at most {LIMIT} of pairs saturated", _beta, brief="start β",
        ),
        CandidateRow("β at s.d. 1", "1 / s.d. of the step-0 margin", _unit),
    ]  # fmt: skip


def entries(report: CompatibilityReport) -> list[CandidateRow]:
    """All columns."""
    return [*pair_entries(), *step_entries(report)]


def cells(report: CompatibilityReport, columns: Sequence[CandidateRow]) -> tuple[list[str], list[list[str]]]:
    """The columns' titles, and the rows: the policy first, each opened by its name."""
    rows = [["policy", *(column.policy(report.policy_alone) or MISSING for column in columns)]]
    rows += [[c.title, *(column.text(c) for column in columns)] for c in report.candidates]
    return ["reference", *(column.title for column in columns)], rows


def estimators(report: CompatibilityReport) -> list[tuple[str, str]]:
    """How each reference's KLs were estimated, or why there is none."""
    return [
        (c.title, f"KL(π‖ref): {_estimation(c.forward)}. KL(ref‖π): {_estimation(c.reverse)}.")
        for c in report.candidates
    ]


def _estimation(kl: Divergence) -> str:
    if kl.per_answer is None or kl.per_byte is None:
        return f"none, {kl.reason}"
    cut = "counted as far as they go" if kl.estimator == BY_TOKEN else "left out"
    error = "" if math.isnan(kl.per_byte.se) else f" ± {kl.per_byte.se:.2g}"
    return (
        f"{kl_text(kl)} nats per answer, {number(kl.per_byte.mean, 4)}{error} per byte ({kl.estimator}, "
        f"{kl.num_answers} answers; {kl.num_cut} had not ended and are {cut})"
    )


def terminal_table(report: CompatibilityReport) -> Any:
    """The brief columns as a rich table; refused references are rows with their reason below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    brief = [column for column in entries(report) if column.brief]
    notes = [f"π‖ref, ref‖π: KL in nats per answer, {BY_TOKEN}; * {BY_TEXT}"]
    notes += [f"{refusal.title}: {refusal.reason}" for refusal in report.refused]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False,
                  caption=words("\n".join(notes)), caption_justify="left")  # fmt: skip
    table.add_column("reference", overflow="fold", min_width=13)
    for column in brief:
        table.add_column(words(column.brief), justify="right", no_wrap=True)
    table.add_row(words("policy"), *(words(_narrow(c.policy(report.policy_alone))) for c in brief))
    for candidate in report.candidates:
        table.add_row(words(candidate.title), *(words(_narrow(column.text(candidate))) for column in brief))
    for refusal in report.refused:
        table.add_row(words(refusal.title, style="red"), *(MISSING for _ in brief))
    return table


def _narrow(entry: str) -> str:
    """Without spaces and standard errors, which are on the page."""
    mean, plus, error = entry.partition(" ± ")
    return (mean + "*" * error.endswith("*") if plus else entry).replace(", ", ",").replace("\u00a0%", "%")


# --- what the numbers say, in sentences
# All are computed; a comparison is claimed only where its 95 % interval carries it.


NORMAL = 1.96
LIMIT = f"{100 * TOLERATED:.0f}\u00a0%"


def interval(estimate: Estimate) -> tuple[float, float]:
    """95 % interval of a mean."""
    return estimate.mean - NORMAL * estimate.se, estimate.mean + NORMAL * estimate.se


def share(estimate: Estimate) -> str:
    """71 % [69, 73]; no interval where there is one prompt only, or where all agree: an error of 0 claims too much."""
    if not estimate.se > 0:
        return f"{100 * estimate.mean:.0f}\u00a0%"
    low, high = (100 * min(1.0, max(0.0, end)) for end in interval(estimate))
    return f"{100 * estimate.mean:.0f}\u00a0% [{low:.0f}, {high:.0f}]"


def beta_text(beta: float | None) -> str:
    """A beta to two digits."""
    return "–" if beta is None else f"{beta:.2g}"


def _margins(candidate: Candidate) -> str:
    start = candidate.start
    if start.unit is None and start.mean == 0:
        return "At step 0 all margins are 0: every pair starts with gradient weight 1/2 whatever beta is."
    if start.unit is None:
        return f"At step 0 all margins are {number(start.mean, 1, signed=True)} nats."
    quoted = candidate.quoted
    remark = " (they are the policy's own: there is no reference)" if candidate.silent else ""
    wrong = f", {100 * quoted.saturated_wrong:.0f}\u00a0% on the wrong side" if quoted.saturated.mean else ""
    return (
        f"Margins at step 0 have s.d. {start.sd:.3g} nats{remark}: with beta {quoted.beta:g}, "
        f"{share(quoted.saturated)} of pairs are saturated{wrong}."
    )


def _start(candidate: Candidate) -> str:
    start = candidate.start
    if start.unit is None:
        return "Nothing about beta follows from step 0."
    unit = f"beta times the margin has s.d. 1 at beta {beta_text(start.unit)}"
    if start.listed is None:
        return f"No listed beta keeps saturation at {LIMIT} or less; {unit}."
    top = ", the largest listed" if start.listed == start.at[-1].beta else ""
    return f"Start near beta {start.listed:g}{top} (at most {LIMIT} saturated); {unit}."


def _accuracy(candidate: Candidate, report: CompatibilityReport) -> str:
    if not candidate.margins.any():
        return ""
    low, high = interval(candidate.beside.accuracy_difference)
    points = ", ".join(number(100 * end, 1, signed=True) for end in (low, high))
    beyond = "more often" if low > 0 else "less often" if high < 0 else "no difference that the interval carries"
    return (
        f"It prefers the chosen response in {share(candidate.alone.accuracy)} of pairs, the policy in "
        f"{share(report.policy_alone.accuracy)}: {beyond} ([{points}] points, pair by pair)."
    )


def _ranking(candidate: Candidate) -> str:
    beside, (low, high) = candidate.beside, candidate.beside.margins_spearman_interval
    if math.isnan(beside.margins_spearman):
        return ""
    return (
        f"Rank correlation with the policy: {number(beside.margins_spearman, 2)} "
        f"[{number(low, 2)}, {number(high, 2)}] of margins, {number(beside.logps_spearman, 2)} of log-probs, "
        f"{number(beside.per_byte_spearman, 2)} of those per byte."
    )


def kl_text(kl: Divergence) -> str:
    """A KL per answer with its standard error, in nats; a dash where there is none."""
    if kl.per_answer is None:
        return "–"
    error = "" if math.isnan(kl.per_answer.se) else f" ± {number(kl.per_answer.se, 2)}"
    return f"{number(kl.per_answer.mean, 2)}{error}"


def _kl_sentence(candidate: Candidate) -> str:
    divergences = (("KL(policy ‖ reference)", candidate.forward), ("KL(reference ‖ policy)", candidate.reverse))
    parts = [f"{name} is {kl_text(kl)} nats per answer" for name, kl in divergences if kl.per_answer]
    return f"{', '.join(parts)}." if parts else ""


def verdict(candidate: Candidate, report: CompatibilityReport) -> str:
    """The evidence on one reference."""
    if candidate.start.unit is None and candidate.start.mean == 0:
        return f"{_margins(candidate)} {_start(candidate)}"
    parts = (
        _margins(candidate),
        _start(candidate),
        _accuracy(candidate, report),
        _ranking(candidate),
        _kl_sentence(candidate),
    )
    return " ".join(filter(None, parts))


def headline(report: CompatibilityReport) -> str:
    """Where to start with each reference."""

    def start(c: Candidate) -> str:
        if c.start.unit is None:
            return "any"
        return f"below {c.start.at[0].beta:g}" if c.start.listed is None else f"{c.start.listed:g}"

    starts = ", ".join(f"{start(c)} with {c.title}" for c in report.candidates)
    return f"Beta to start with for {report.policy}: {starts}"


def reading() -> list[tuple[str, str]]:
    """What the words mean."""
    return [
        ("margin", "log p(chosen) − log p(rejected) of one model, in nats"),
        ("step-0 margin", "the policy's margin less the reference's; times beta it is the implicit reward's margin"),
        (
            "saturated",
            f"|beta × step-0 margin| above {SATURATED:g}: the pair's gradient weight is below 0.018 (right side) or "
            "above 0.982 (wrong side), so the loss is all but linear or flat in it",
        ),
        ("start β", f"the largest listed beta at which at most {LIMIT} of pairs are saturated"),
        ("β at s.d. 1", "1 / s.d. of the step-0 margin"),
        ("effective share", "(sum of gradient weights)² / (pairs × sum of squares): 1 where all pairs weigh alike"),
    ]
