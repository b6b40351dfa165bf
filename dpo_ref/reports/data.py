"""`data.html`: what the data is like, with pictures, rows to look at, and examples in which every scored token can be
seen.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import Match, SequenceMatcher
from typing import Any

import numpy as np

from dpo_ref.data.anomalies import Case, Finding
from dpo_ref.data.inspection import Example, Hygiene, Tokens, Turn, concerns, quantiles
from dpo_ref.data.tokenise import BAD
from dpo_ref.data.turns import common_start
from dpo_ref.reports import page
from dpo_ref.reports.plots import INITIAL, SERIES, Panel


def _bins(*values: np.ndarray) -> np.ndarray:
    """Bins of equal width on a logarithmic axis, which holds short and long texts alike."""
    highest = max((int(lengths.max()) for lengths in values if len(lengths)), default=1)
    lowest = min((int(lengths.min()) for lengths in values if len(lengths)), default=1)
    return np.unique(np.geomspace(max(lowest, 1), highest + 1, 40).round())


def _lengths(hygiene: Hygiene) -> Panel:
    parts = {
        "prompt": hygiene.prompts,
        "chosen": hygiene.chosen,
        "rejected": hygiene.rejected,
        "response": hygiene.alone,
    }
    lengths = {name: values for name, values in parts.items() if len(values)}

    def draw(axes: Any) -> None:
        from matplotlib.ticker import LogLocator

        bins = _bins(*lengths.values())
        for (name, values), colour in zip(lengths.items(), (INITIAL, *SERIES), strict=False):
            axes.hist(values, bins=bins, histtype="step", linewidth=1.8, color=colour, label=name)
        axes.set(title="Lengths", xlabel="tokens", ylabel="texts", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()  # matplotlib labels them in TeX where lengths are alike
        axes.legend()

    medians = ", ".join(f"{name} {quantiles(values)}" for name, values in lengths.items())
    return Panel(f"Tokens of each part; medians: {medians}.", draw)


def _differences(hygiene: Hygiene) -> Panel:
    gap = hygiene.chosen - hygiene.rejected

    def draw(axes: Any) -> None:
        reach = max(1.0, float(np.quantile(np.abs(gap), 0.98)))
        bins = np.linspace(-reach, reach, 41)
        axes.hist(np.clip(gap, -reach, reach), bins=bins, color=SERIES[0], alpha=0.75)
        axes.axvline(0, color=INITIAL, linewidth=1)
        axes.set(title="Is the longer one chosen?", xlabel="tokens of chosen - tokens of rejected", ylabel="pairs")

    return Panel(
        f"The longer response is chosen in {hygiene.longer_chosen:.1%} of pairs (ties count half): as often would a "
        "judge agree who looks at length alone. The outermost bars hold all that lies beyond.",
        draw,
    )


def _margins(margins: np.ndarray) -> Panel:
    def draw(axes: Any) -> None:
        axes.hist(margins, bins=40, color=SERIES[2], alpha=0.75)
        axes.axvline(0, color=INITIAL, linewidth=1)
        axes.set(title="Scores", xlabel="score of chosen - score of rejected", ylabel="pairs")

    wrong = float(np.mean(margins < 0))
    return Panel(f"Differences of the scores that came with the rows; {wrong:.1%} prefer the lower score.", draw)


def reference_margins_panel(margins: np.ndarray, kept: np.ndarray | None = None) -> Panel:
    """How far the reference prefers the chosen responses, in nats; which pairs are `kept`, where some are not."""

    def draw(axes: Any) -> None:
        reach = float(np.quantile(np.abs(margins), 0.98)) or 1.0
        bins, shown = np.linspace(-reach, reach, 41), np.clip(margins, -reach, reach)
        axes.hist(shown, bins=bins, color=SERIES[0], alpha=0.35, label="all pairs")
        if kept is not None and not kept.all():
            axes.hist(shown[kept], bins=bins, color=SERIES[0], alpha=0.85, label="kept")
            axes.legend()
        axes.axvline(0, color=INITIAL, linewidth=1)
        axes.set(title="What the reference prefers", xlabel="log p(chosen) - log p(rejected), nats", ylabel="pairs")

    return Panel(
        f"Reference margins of {len(margins):,} pairs; in {np.mean(margins < 0):.1%} the reference prefers the "
        "rejected response. The outermost bars hold all that lies beyond.",
        draw,
    )


def panels(hygiene: Hygiene, margins: np.ndarray) -> list[Panel]:
    """The pictures of a data page; `margins` are score differences, empty where rows have no scores."""
    pairs = [_differences(hygiene)] if len(hygiene.chosen) else []
    return [_lengths(hygiene), *pairs, *([_margins(margins)] if len(margins) else [])]


# --- examples


@dataclass(frozen=True)
class Looked:
    """What there is to see of the data: examples and whose their tokens are, the same of a sample of groups, and rows
    to look at."""

    examples: Sequence[Example]
    roles: Mapping[str, Tokens]
    sampled: Mapping[str, Tokens]
    num_sampled: int
    findings: Sequence[Finding]


def example_article(example: Example) -> str:
    """An example whose scored tokens are marked, and how its sides differ."""
    tools = f'<p class="small">Tools on offer: {page.text(", ".join(example.tools))}</p>' if example.tools else ""
    turns = [_turn(turn.role, "", turn) for turn in example.prompt]
    for name, said in example.responses.items():
        turns += [_turn(f"{name}: {turn.role}", name, turn) for turn in said]
    return f'<article class="sample example">{tools}{"".join(turns)}{_difference(example)}</article>'


def _turn(title: str, kind: str, turn: Turn) -> str:
    tokens = "".join(
        f'<span class="{"token" if piece.scored else "masked"}">{page.text(piece.text)}</span>'
        for piece in turn.pieces
    )
    counts = {"read": turn.num_read, "scored": turn.num_scored}
    counted = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    return f'<p class="{page.text(kind)}"><b>{page.text(title)} · {counted}</b>{tokens}</p>'


def _roles(looked: Looked) -> str:
    """Tokens by role."""
    sample = f"in {looked.num_sampled} groups"
    names = ["role", "read below", "scored below", f"read {sample}", f"scored {sample}"]
    none = Tokens(0, 0)
    rows = [(role, *looked.roles.get(role, none), *tokens) for role, tokens in looked.sampled.items()]
    return page.plain_table(names, [[role, *(f"{number:,}" for number in numbers)] for role, *numbers in rows])


# --- what differs, word by word


MOST_WORDS = 400  # of each side that are compared: the time grows with their square
OPENING, AROUND = 12, 8  # words: what is folded is longer, what is shown around a difference
FEWEST = 3  # words that are the same on both sides by more than chance


def _difference(example: Example) -> str:
    """Chosen against rejected; nothing for other responses."""
    if list(example.responses) not in (["chosen", "rejected"], ["rejected", "chosen"]):
        return ""
    chosen, rejected = ("".join(turn.text for turn in example.responses[name]) for name in ("chosen", "rejected"))
    return _folded("Chosen against rejected, word by word", difference(chosen, rejected))


def _folded(title: str, content: str) -> str:
    """What opens with a click."""
    summary = f"<summary>{page.text(title)}</summary>"
    return f'<details class="notes example">{summary}{content}</details>' if content else ""


def difference(first: str, second: str) -> str:
    """Two texts as one: what the first alone has is inserted, what the second alone has is struck out."""
    ours, theirs = (re.findall(r"\s*\S+|\s+", text) for text in (first, second))
    opening = common_start(ours, theirs)
    folded = opening if opening > OPENING else 0
    parts = [_opening(ours[:folded])] if folded else []
    ours, theirs = ours[folded:], theirs[folded:]
    shown = ours[:MOST_WORDS], theirs[:MOST_WORDS]
    parts.append(f"<p>{''.join(_changes(*shown))}</p>")
    left = len(ours) - len(shown[0]), len(theirs) - len(shown[1])
    if any(left):
        parts.append(f'<p class="small">{left[0]:,} words of the first and {left[1]:,} of the second go on.</p>')
    return "".join(parts)


def _opening(words: Sequence[str]) -> str:
    summary = f"<summary>both begin with the same {len(words):,} words</summary>"
    return f'<details>{summary}<p><span class="masked">{page.text(_in_short("".join(words)))}</span></p></details>'


def _changes(ours: Sequence[str], theirs: Sequence[str]) -> Iterator[str]:
    begin = 0, 0
    for first, second, size in _alike(ours, theirs):
        inserted, struck = "".join(ours[begin[0] : first]), "".join(theirs[begin[1] : second])
        if inserted:
            yield f'<ins class="token">{page.text(_in_short(inserted))}</ins>'
        if struck:
            yield f'<span class="rejected"><del class="token">{page.text(_in_short(struck))}</del></span>'
        if size:
            yield f'<span class="masked">{page.text(_around(ours[first : first + size]))}</span>'
        begin = first + size, second + size


def _alike(ours: Sequence[str], theirs: Sequence[str]) -> list[Match]:
    """Where both have the same words, and the ends; a word or two that both happen to have between others are not."""
    *blocks, end = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    places = [((at.a, at.b) == (0, 0) or (at.a + at.size, at.b + at.size) == (end.a, end.b), at) for at in blocks]
    return [at for is_outermost, at in places if is_outermost or at.size >= FEWEST] + [end]


def _around(words: Sequence[str]) -> str:
    """Words alike, without the middle of many."""
    if len(words) <= 2 * AROUND + 2:
        return "".join(words)
    return f"{''.join(words[:AROUND])} [{len(words) - 2 * AROUND:,} words alike]{''.join(words[-AROUND:])}"


# --- rows to look at


SHOWN = 600  # characters of each text


def _finding(finding: Finding) -> str:
    cases = "".join(map(_case, finding.cases))
    return (
        f'<details class="samples"><summary>{page.text(finding.name)}<small>{finding.count:,}</small></summary>'
        f"{cases}</details>"
    )


def _case(case: Case) -> str:
    asked = f'<p class="turn"><span>{page.text(case.origin)}</span> {page.text(_in_short(case.prompt))}</p>'
    texts = "".join(
        f'<div class="answer"><header><b>{page.text(name)}</b></header><p>{page.text(_in_short(text))}</p></div>'
        for name, text in case.texts
    )
    compared = difference(*(text for _, text in case.texts)) if len(case.texts) == 2 else ""
    return (
        f'<article class="sample"><div class="prompt">{asked}</div><div class="answers">{texts}</div>'
        f"{_folded('Word by word', compared)}</article>"
    )


def _in_short(text: str) -> str:
    """A text without the middle of a long one."""
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} [...] {text[-half:]}"


# --- the page


LEAVES_OUT = "the chat template leaves out"  # begins why a group is refused
_LEGEND = (
    "Grey text is read, coloured tokens are scored; their borders are the tokens' borders. Every block is a turn with "
    "what the chat template writes around it; template is what it says by itself."
)


def counts_of(hygiene: Hygiene) -> list[tuple[str, str]]:
    """What became of the rows, as names and counts."""
    reading = hygiene.reading
    rows = [("rows read", f"{reading.num_rows:,} ({', '.join(reading.formats)})")] if reading.num_rows else []
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in reading.dropped.items()]
    rows += [(name, f"{count:,}") for name, count in hygiene.counts.items() if name != "groups"]
    rows += [("groups to train on", f"{hygiene.num_train:,}"), ("groups held out", f"{hygiene.num_eval:,}")]
    return rows + [(name, f"{count:,}") for name, count in concerns(hygiene).items()]


def _columns(notes: Sequence[str]) -> list[tuple[str, str]]:
    """What is said about columns: what stands before a colon is the name of the rest."""
    parts = [note.partition(": ") for note in notes]
    return [(name, said) if said else ("note", name) for name, _, said in parts]


def _left_out(hygiene: Hygiene) -> tuple[str, str]:
    """What the template leaves out of what is said: nothing, for a group of which it would is refused."""
    lines = [f"nothing (every word of {hygiene.num_written:,} groups was looked for)"]
    refused = {name.removeprefix(BAD): n for name, n in hygiene.counts.items() if name.startswith(BAD + LEAVES_OUT)}
    lines += [f"{count:,} groups were dropped because {why}" for why, count in refused.items()]
    return "left out by the chat template", "; ".join(lines)


@dataclass(frozen=True, slots=True)
class ReferenceMargins:
    """Reference margins of the training pairs, which of them would be kept, what is said of them, and whose they
    are."""

    values: np.ndarray
    kept: np.ndarray
    told: Mapping[str, str]
    whose: str


def _preferred(margins: ReferenceMargins | None) -> list[str]:
    if margins is None:
        return []
    return ["<h2>What the reference prefers</h2>", page.definitions([("whose", margins.whose), *margins.told.items()]),
            page.pictures([reference_margins_panel(margins.values, margins.kept)])]  # fmt: skip


def data_page(
    hygiene: Hygiene, margins: np.ndarray, looked: Looked, title: str, preferred: ReferenceMargins | None = None
) -> str:
    """The page as HTML, readable without a network."""
    worrying = [f"{count:,} {concern}" for concern, count in concerns(hygiene).items() if count]
    lead = f"The longer response is chosen in {hygiene.longer_chosen:.0%} of the pairs." if len(hygiene.chosen) else ""
    skipped = "".join(f"<li>{page.text(example)}</li>" for example in hygiene.reading.examples)
    found = [finding for finding in looked.findings if finding.count]
    parts = [
        '<p class="over">Data</p>',
        f"<h1>{page.text(title)}: {hygiene.num_train:,} groups to train on</h1>",
        f'<p class="lead">{lead}</p>' if lead else "",
        page.alerts(worrying),
        page.pictures(panels(hygiene, margins)),
        "<h2>What became of the rows</h2>",
        page.definitions(counts_of(hygiene)),
        f"<ul>{skipped}</ul>" if skipped else "",
        *_preferred(preferred),
        "<h2>What was read of them</h2>",
        page.definitions([*_columns((*hygiene.reading.columns, *hygiene.reading.notes)), _left_out(hygiene)]),
        "<h2>Rows to look at</h2>",
        *map(_finding, found),
        page.definitions([(finding.name, "none") for finding in looked.findings if not finding.count]),
        "<h2>Whose the tokens are</h2>",
        _roles(looked),
        "<h2>Examples</h2>",
        f'<p class="scale">{_LEGEND}</p>',
        *map(example_article, looked.examples),
    ]
    return page.page(title, "\n".join(filter(None, parts)))
