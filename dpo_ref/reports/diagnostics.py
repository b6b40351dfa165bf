"""The part of a report that is about single tokens and about pairs as wholes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ref.evaluation.diagnostics.diagnose import HELD_OUT, Diagnosis, TextDiagnosis
from dpo_ref.evaluation.diagnostics.examples import ShownResponse, ShownToken, TokenExample
from dpo_ref.evaluation.diagnostics.logratios import EDGES, STEPS, TENTHS, Bucket, Hazard, LogRatios, Moved
from dpo_ref.evaluation.diagnostics.pairs import Displacement, LengthBin, Ranking
from dpo_ref.evaluation.results import KL, Evaluation, read_evaluation
from dpo_ref.evaluation.stages import read_diagnosis, read_examples
from dpo_ref.evaluation.statistics.estimates import Estimate
from dpo_ref.reports import page
from dpo_ref.reports.page import row, table
from dpo_ref.reports.plots import INITIAL, INK, SERIES, Panel
from dpo_ref.reports.tables import MISSING, number, percent, plus_minus

SCORES = {
    "implicit": "implicit reward",
    "length": "length alone",
    "likelihood": "log π",
    "likelihood_per_token": "log π per token",
    "initial": "log initial",
    "reference": "log reference",
}


def _signed_text(estimate: Estimate | None, decimals: int = 2) -> str:
    return MISSING if estimate is None else _with_error(estimate, number(estimate.mean, decimals, True), decimals)


def _with_error(estimate: Estimate, mean: str, decimals: int) -> str:
    return mean if math.isnan(estimate.se) else f"{mean} ± {number(estimate.se, decimals)}"


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return MISSING
    error = "" if math.isnan(estimate.se) else f" ± {100 * estimate.se:.1f}"
    return f"{100 * estimate.mean:.1f}{error}\u00a0%"


def lead(diagnosis: Diagnosis) -> str:
    """The finding in a sentence or two."""
    name = "own" if "own" in diagnosis.texts else "chosen"
    text = diagnosis.texts[name]
    moved = text.shift
    parts = [
        f"On {NAMES[name]} a token's log-probability moved by {number(moved.mean_abs, 3)} nats on average, and 1 % of "
        f"the tokens carry {percent(moved.top_1_percent)} of it."
    ]
    ends = {NAMES[name]: diagnosis.texts[name].end.logratio for name in ("chosen", "own") if name in diagnosis.texts}
    shifts = [f"{_signed_text(end)} on {name}" for name, end in ends.items() if not math.isnan(end.mean)]
    if shifts:
        parts.append(f"Where answers end, that of the end token moved by {' and '.join(shifts)} (nats).")
    return " ".join(parts)


def _text_row(name: str, text: TextDiagnosis, shift: LogRatios) -> list[str]:
    entropy = f"{number(text.entropy.policy.mean, 3)} / {number(text.entropy.initial.mean, 3)}"
    ranks = f"{percent(text.ranks.policy_first)} / {percent(text.ranks.initial_first)}"
    return [
        name, f"{shift.num_tokens:,}", _signed_text(shift.mean, 3), number(shift.mean_abs, 3),
        percent(shift.share_above_1), percent(shift.top_1_percent), percent(shift.top_10_percent),
        _signed_text(text.end.logratio), ranks, entropy,
    ]  # fmt: skip


def _texts(diagnosis: Diagnosis) -> str:
    names = ["Responses", "Tokens", "Mean log-ratio", "Mean size", "Beyond 1 nat", "In top 1 %", "In top 10 %",
             "End token", "First choice, π / initial", "Entropy, π / initial"]  # fmt: skip
    rows = []
    for name, text in diagnosis.texts.items():
        rows.append(row(names, _text_row(NAMES[name], text, text.shift), HUES[name]))
        if text.reference_shift is not None:
            against = _text_row(f"{NAMES[name]}, against {diagnosis.reference}", text, text.reference_shift)
            entropy = text.entropy.reference
            both = MISSING if entropy is None else f"{number(text.entropy.policy.mean, 3)} / {number(entropy.mean, 3)}"
            rows.append(row(names, [*against[:7], MISSING, MISSING, both], HUES[name]))
    notes = [
        ("Mean log-ratio", "log π − log initial of a token, nats, ± standard error clustered by prompt"),
        ("Mean size", "mean of its absolute value"),
        ("In top 1 %", "share of the sum of sizes that the 1 % of tokens with the largest carry; likewise 10 %"),
        ("End token", "log-ratio of the token that ends the answer, where it ended"),
        ("First choice", "share of tokens that are the likeliest of the whole vocabulary to the model"),
        ("Entropy", "of the next token, nats per token, both models on the same prefixes"),
    ]
    explained = f'<details class="notes"><summary>What the columns mean</summary>{page.definitions(notes)}</details>'
    return table(names, rows) + explained


def _buckets(buckets: tuple[Bucket, ...], title: str) -> str:
    names = [title, "Tokens", "Mean log-ratio", "Mean size", "Share of all movement"]
    rows = [
        row(names, [b.name, f"{b.num_tokens:,}", _signed_text(b.mean, 3), number(b.mean_abs, 3), percent(b.share)])
        for b in buckets
    ]
    return table(names, rows)


def _moved_tokens(moved: tuple[Moved, ...], title: str) -> str:
    names = [title, "Occurrences", "Mean log-ratio", "Sum"]
    rows = [
        row(names, [shown_token(m.text), f"{m.num_tokens:,}", number(m.mean, 3, True), number(m.total, 1, True)])
        for m in moved
    ]
    return table(names, rows)


def _details(diagnosis: Diagnosis) -> str:
    parts = []
    for name, text in diagnosis.texts.items():
        shifts = {"the initial policy": text.shift} | (
            {} if text.reference_shift is None else {f"the loss reference {diagnosis.reference}": text.reference_shift}
        )
        for against, shift in shifts.items():
            inner = (
                _buckets(shift.by_class, "Class") + _buckets(shift.by_position, "Position")
                + _moved_tokens(shift.by_total, "Moved most in total")
                + _moved_tokens(shift.by_mean, "Moved most by mean")
            )  # fmt: skip
            title = page.text(f"{NAMES[name]}, against {against}: by class and position, tokens that moved most")
            parts.append(
                f'<details class="samples"><summary>{title}</summary><div class="stack">{inner}</div></details>'
            )
    return "".join(parts)


def _displacement(diagnosis: Diagnosis) -> str:
    if diagnosis.displacement is None:
        return ""

    def entries(name: str, displacement: Displacement) -> list[str]:
        return [
            name,
            _signed_text(displacement.mean),
            number(displacement.median, 2, True),
            _signed_text(displacement.per_token, 3),
            _share(displacement.share_down),
        ]

    names = ["Log-probability", "Mean change", "Median", "Per token", "Pairs in which it fell"]
    both = diagnosis.displacement
    sides = {"chosen": both.chosen, "rejected": both.rejected}
    rows = [row(names, entries(name, side), HUES[name]) for name, side in sides.items()]
    quadrants = [
        ("both rose", percent(both.both_up)),
        ("chosen rose, rejected fell", percent(both.chosen_up_rejected_down)),
        ("chosen fell, rejected rose", percent(both.chosen_down_rejected_up)),
        ("both fell", percent(both.both_down)),
    ]
    heading = "<h3>Did the chosen answers become likelier?</h3>"
    return heading + table(names, rows) + page.definitions(quadrants)


def _rankings(diagnosis: Diagnosis) -> str:
    if not diagnosis.rankings:
        return ""
    scores = [name for name in SCORES if any(name in ranking.accuracy for ranking in diagnosis.rankings.values())]
    names = ["Pairs", "Number", *(SCORES[name] for name in scores), "Above length", "Ties"]

    def entries(name: str, ranking: Ranking) -> list[str]:
        accuracies = [_share(ranking.accuracy.get(score)) for score in scores]
        above = (
            MISSING if ranking.above_length is None else f"{number(100 * ranking.above_length.mean, 1, True)} points"
        )
        return [name, f"{ranking.num_pairs:,}", *accuracies, above, percent(ranking.ties.get("implicit", math.nan))]

    rows = [row(names, entries(name, ranking)) for name, ranking in diagnosis.rankings.items()]
    note = (
        '<p class="small">Share of pairs ranked as labelled, ± standard error; ties are wrong. The implicit reward is '
        f"log π − log of the loss reference, {page.text(diagnosis.reference)}.</p>"
    )
    return "<h3>Which answers it prefers</h3>" + note + table(names, rows)


def _kl(evaluation: Evaluation, reference: str) -> str:
    """KL on own answers, the plain estimate beside the one that is used; "" where there is none."""
    against = {"initial": "initial policy", "loss_reference": f"loss reference, {reference}"}
    keys = {KL.of(model=name): title for name, title in against.items()}
    titles = {key: title for key, title in keys.items() if not math.isnan(evaluation.get(key))}
    if not titles:
        return ""
    names = ["KL on own answers to the", "Nats per answer", "Plain estimate, k1", "Nats per token", "Answers cut"]
    rows = [
        row(names, [title, plus_minus(evaluation, key, 2), plus_minus(evaluation, f"{key}_k1", 2),
                    number(evaluation.get(f"{key}_per_token"), 3), percent(evaluation.get(f"{key}_share_cut"))])
        for key, title in titles.items()
    ]  # fmt: skip
    note = (
        '<p class="small">± standard error. Both estimates have the same expectation, and a cut answer counts as far '
        "as it goes, so that the number is a lower bound.</p>"
    )
    return "<h3>How far it went</h3>" + note + table(names, rows)


def _absent(diagnosis: Diagnosis) -> str:
    lines = "".join(f"<li>{page.text(name)}: {page.text(reason)}.</li>" for name, reason in diagnosis.absent.items())
    return f'<p class="small">Not measured:</p><ul class="small">{lines}</ul>' if lines else ""


def diagnostics_section(folder: Path) -> str:
    """What a diagnosis in `folder` found, as HTML; "" where there is none."""
    diagnosis = read_diagnosis(folder)
    if diagnosis is None:
        return ""
    parts = ["<h2>What happened to single tokens</h2>"]
    if diagnosis.texts:
        parts += [
            f'<p class="lead">{page.text(lead(diagnosis))}</p>',
            page.pictures(panels(diagnosis)),
            _texts(diagnosis),
            _details(diagnosis),
        ]
    parts += [
        _kl(read_evaluation(folder), diagnosis.reference),
        _displacement(diagnosis),
        _rankings(diagnosis),
        token_views(read_examples(folder), diagnosis.reference),
        _absent(diagnosis),
    ]
    return "\n".join(filter(None, parts))


def diagnostics_panels(folder: Path) -> list[Panel]:
    """The pictures of the diagnosis in `folder`; none where there is none."""
    diagnosis = read_diagnosis(folder)
    return panels(diagnosis) if diagnosis else []


# --- pictures of a diagnosis


HUES = {"chosen": SERIES[0], "rejected": SERIES[1], "own": SERIES[3]}
NAMES = {"chosen": "chosen", "rejected": "rejected", "own": "own answers"}
UP, DOWN = "#2563eb", "#d97706"
FEWEST = 10  # responses for a point of a curve
SHOWN = 10  # tokens in a picture
POLICY = SERIES[3]


def shown_token(text: str) -> str:
    """A token with its blanks visible, short."""
    visible = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "(nothing)"
    return visible if len(visible) <= 14 else f"{visible[:13]}…"


def distribution_panel(diagnosis: Diagnosis) -> Panel:
    """How many tokens moved how far."""

    def draw(axes: Any) -> None:
        for name, text in diagnosis.texts.items():
            counts = np.array(text.shift.counts)
            share = np.where(counts > 0, 100 * counts / counts.sum(), np.nan)
            edges = np.arange(len(share) + 1) - 0.5
            axes.stairs(share, edges, color=HUES[name], linewidth=1.8, label=NAMES[name], baseline=None)
        marks = [(edge, x + 0.5) for x, edge in enumerate(EDGES) if f"{abs(edge):g}" in ("0.1", "1", "10")]
        marks.append((0.0, len(STEPS)))
        axes.set_xticks([x for _, x in marks], [f"{edge:g}".replace("-", "−") for edge, _ in marks])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.axvline(len(STEPS), color=INITIAL, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(title="How far single tokens moved", xlabel="log π − log initial (nats)", ylabel="% of tokens")
        axes.set_ylim(top=8 * axes.get_ylim()[1])  # the legend stands above the lines
        axes.legend(loc="upper left")

    return Panel(
        "Log-ratio of every token to the initial policy, in bins that are the same for every run; logarithmic on both "
        "sides of ±0.01, the outermost hold all beyond.",
        draw,
    )


def end_panel(diagnosis: Diagnosis) -> Panel:
    """The shift of the end token in each set of responses."""
    ends = {name: text.end for name, text in diagnosis.texts.items() if not math.isnan(text.end.logratio.mean)}

    def draw(axes: Any) -> None:
        for y, (name, end) in enumerate(ends.items()):
            mean, error = end.logratio
            axes.errorbar(mean, y, xerr=0 if math.isnan(error) else 1.96 * error, fmt="o", color=HUES[name],
                          markersize=8, elinewidth=2)  # fmt: skip
        axes.axvline(0, color=INITIAL, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_ylim(len(ends) - 0.4, -0.6)
        axes.set_yticks(range(len(ends)), [NAMES[name] for name in ends])
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)  # thousandths stay apart
        axes.set(title="Shift of the end token", xlabel="log π(end) − log initial(end) (nats)")

    return Panel(
        "At the end of answers that end; bars are 95 % intervals. Left of 0 the policy is loath to end.", draw
    )


def hazard_panel(hazard: Hazard, answers: str) -> Panel:
    """The probability of ending at every position, policy beside initial policy."""
    alive = np.array(hazard.num_responses)
    positions = np.flatnonzero(alive >= min(FEWEST, alive.max()))

    def draw(axes: Any) -> None:
        for values, colour, name in ((hazard.initial, INITIAL, "initial policy"), (hazard.policy, POLICY, "policy")):
            axes.plot(positions + 1, 100 * np.array(values)[positions], color=colour, linewidth=1.8, label=name)
        axes.set(title=f"Hazard of ending, {answers}", xlabel="token of the answer", ylabel="P(end) in %")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=1)
        axes.legend(loc="best")

    return Panel(
        f"Mean probability that the answer ends at this token, given that it has come so far, on {answers}; both "
        f"models read the same prefixes. Positions that fewer than {FEWEST} answers reach are left out.",
        draw,
    )


def relative_panel(hazard: Hazard, answers: str) -> Panel:
    """The same along the way of each response."""

    def draw(axes: Any) -> None:
        positions = np.arange(len(hazard.policy))
        for values, colour, name in ((hazard.initial, INITIAL, "initial policy"), (hazard.policy, POLICY, "policy")):
            axes.plot(positions, 100 * np.array(values), "o-", color=colour, markersize=5, linewidth=1.2, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks([0, 5, TENTHS], ["first tenth", "half", "last token"])
        axes.set(title=f"Where {answers} could end", ylabel="P(end) in %")
        axes.legend(loc="upper left")

    return Panel(
        f"Mean probability of ending by tenths of the way through {answers}, the token that ends them apart.", draw
    )


def _bars(moved: Sequence[Moved], values: Sequence[float], title: str, unit: str, caption: str) -> Panel:
    def draw(axes: Any) -> None:
        positions = range(len(moved))
        axes.barh(positions, values, color=[UP if value > 0 else DOWN for value in values], height=0.72)
        axes.set_yticks(positions, [f"{shown_token(m.text)}  ×{m.num_tokens}" for m in moved])
        axes.set_ylim(len(moved) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelsize=8.5)
        axes.locator_params(axis="x", nbins=5)  # numbers of four digits stay apart
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(title=title, xlabel=unit)

    return Panel(caption, draw)


def moved_panels(diagnosis: Diagnosis, name: str) -> list[Panel]:
    """The tokens that moved most in a set of responses: in total, and by mean."""
    shift, label = diagnosis.texts[name].shift, NAMES[name]
    total, mean = shift.by_total[:SHOWN], shift.by_mean[:SHOWN]
    blanks = "Blanks are shown as ␣; behind × stands how often a token occurs."
    panels = [
        _bars(total, [m.total for m in total], f"Tokens that carry most, {label}", "sum of log-ratios (nats)",
              f"Sum of the log-ratios over all occurrences of a token. {blanks}"),
        _bars(mean, [m.mean for m in mean], f"Tokens that moved most, {label}", "mean log-ratio (nats)",
              f"Mean log-ratio of a token, of those that are not rare. {blanks}"),
    ]  # fmt: skip
    return [panel for panel, tokens in zip(panels, (total, mean), strict=True) if tokens]


def length_panel(bins: Sequence[LengthBin], overall: Estimate, baseline: Estimate) -> Panel:
    """Accuracy of the implicit reward where the chosen response is shorter, and where it is longer."""

    def draw(axes: Any) -> None:
        for x, b in enumerate(bins):
            axes.plot([x, x], [100 * b.low, 100 * b.high], color=SERIES[0], linewidth=2.2, alpha=0.55)
        positions = range(len(bins))
        axes.plot(
            positions, [100 * b.accuracy for b in bins], "o", color=SERIES[0], markersize=7, label="implicit reward"
        )
        by_length = [{"0": 50, "+": 100, "−": 0}[b.name[0]] for b in bins]
        axes.plot(positions, by_length, "_", color=INITIAL, markersize=14, markeredgewidth=2, label="length alone")
        axes.axhline(50, color=INITIAL, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks(
            list(positions), [b.name.replace(" ", "\n", 1) + f"\n({b.num_pairs})" for b in bins], fontsize=7.5
        )
        axes.set(title="Pairs right, by length difference", ylabel="% right", ylim=(-6, 106))
        axes.set_xlabel("tokens of chosen − tokens of rejected (pairs)")
        axes.legend(loc="lower right")

    return Panel(
        f"Held-out pairs that the implicit reward ranks as labelled: {100 * overall.mean:.1f} % of all; preferring "
        f"the longer response, {100 * baseline.mean:.1f} %. Bars are 95 % Wilson intervals.",
        draw,
    )


def panels(diagnosis: Diagnosis) -> list[Panel]:
    """All pictures for which there are numbers."""
    if not diagnosis.texts:
        return []
    pictures = [distribution_panel(diagnosis), end_panel(diagnosis)]
    if "own" in diagnosis.texts:
        pictures.append(hazard_panel(diagnosis.texts["own"].hazard, "own answers"))
    if "chosen" in diagnosis.texts:
        pictures.append(relative_panel(diagnosis.texts["chosen"].relative_hazard, "chosen answers"))
    pictures += moved_panels(diagnosis, "chosen" if "chosen" in diagnosis.texts else "own")
    ranking = diagnosis.rankings.get(HELD_OUT)
    if ranking and ranking.by_length:
        pictures.append(length_panel(ranking.by_length, ranking.accuracy["implicit"], ranking.accuracy["length"]))
    return pictures


# --- single responses with every token coloured by its log-ratio
# The scale is blue (likelier than under the initial policy) to orange (less likely), which colour-blind readers can
# tell apart; it is the same on every page.


FULL = 3.0  # nats of log-ratio at full colour
BLUE, ORANGE = (74, 144, 226), (240, 140, 30)
MARKS = (-3.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0)  # in the legend


def colour(logratio: float) -> str:
    """Background of a token: white at 0, full at 3 nats and beyond; the square root lets small shifts show."""
    strength = min(1.0, abs(logratio) / FULL) ** 0.5
    end = BLUE if logratio > 0 else ORANGE
    return "#" + "".join(f"{round(255 + strength * (part - 255)):02x}" for part in end)


def _probability(logp: float) -> str:
    return f"10^{logp / 2.302585092994046:.1f}".replace("-", "−")


def _title(token: ShownToken, reference: str) -> str:
    """What the pointer shows."""
    assert token.logratio is not None
    assert token.policy is not None
    assert token.initial is not None
    text = f"{number(token.logratio, 3, True)} nats; policy {_probability(token.policy)}, "
    text += f"initial policy {_probability(token.initial)}"
    if token.reference is not None:
        text += f"; against {reference} {number(token.policy - token.reference, 3, True)} nats"
    return text


def _token(token: ShownToken, reference: str) -> str:
    text = page.text(token.text.replace("\n", "⏎\n"))
    if token.logratio is None:
        return f'<span class="masked">{text}</span>'
    style, title = f"background:{colour(token.logratio)}", page.text(_title(token, reference))
    return f'<span class="tok" style="{style}" title="{title}">{text}</span>'


def _response(response: ShownResponse, reference: str) -> str:
    total = sum(token.logratio or 0.0 for token in response.tokens)
    tokens = "".join(_token(token, reference) for token in response.tokens)
    return f"<p><b>{page.text(response.name)}, {number(total, 2, True)} nats</b>{tokens}</p>"


def _view(example: TokenExample, reference: str) -> str:
    responses = "".join(_response(response, reference) for response in example.responses)
    return (
        f'<article class="sample example"><p><b>prompt, {page.text(example.picked)}</b>'
        f'<span class="masked">{page.text(example.prompt)}</span></p>{responses}</article>'
    )


def legend() -> str:
    """The scale."""
    marks = " ".join(  # where a line may break
        f'<span class="tok" style="background:{colour(mark)}">{number(mark, 1, True) if mark else "0"}</span>'
        for mark in MARKS
    )
    return (
        f'<p class="scale">less likely than under the initial policy {marks} likelier; log-ratio in nats, the same '
        "scale on every page</p>"
    )


def token_views(examples: Sequence[TokenExample], reference: str) -> str:
    """All examples with the legend above; "" for none."""
    if not examples:
        return ""
    return "<h3>Token by token</h3>" + legend() + "".join(_view(example, reference) for example in examples)
