"""The page of a report, piece by piece. Every text that comes from a model, a file or a user is escaped here."""

import base64
import hashlib
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_ref.evaluation.results import WIN_RATE, Evaluated, Evaluation
from dpo_ref.generation.records import Generation
from dpo_ref.reports.plots import Panel, svg, theme_colour
from dpo_ref.reports.tables import MISSING, Column
from dpo_ref.tracking.terminal import OF_SCRIPTS, visible
from dpo_ref.types import Message, thoughts_of

# --- tables with any columns; on a narrow screen every row becomes a card


def row(names: Sequence[str], entries: Sequence[str], colour: str | None = None, kind: str = "") -> str:
    """One row under these column names, the first entry its head; `kind` is an attribute of the row."""
    head, *rest = entries
    dot = "" if colour is None else f'<i style="background:{theme_colour(colour)}"></i>'
    cells = "".join(
        f'<td data-label="{text(name)}"{" class=empty" if entry == MISSING else ""}><span>{text(entry)}</span></td>'
        for name, entry in zip(names[1:], rest, strict=True)
    )
    return f'<tr{kind}><th scope="row">{dot}{text(head)}</th>{cells}</tr>'


def table(names: Sequence[str], rows: Sequence[str]) -> str:
    """Rows as `row` made them, under their names."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


# --- which answers are shown beside each other: drawn at random first, so that nothing is hand-picked


@dataclass(frozen=True, slots=True)
class Comparison:
    """The baseline's and the policy's answer to one prompt, with their scores."""

    baseline: Generation
    policy: Generation
    baseline_score: float
    policy_score: float

    @property
    def gain(self) -> float:
        """How much better the policy's answer scores."""
        return self.policy_score - self.baseline_score

    @property
    def growth(self) -> int:
        """How many tokens longer the policy's answer is."""
        return self.policy.num_tokens - self.baseline.num_tokens


@dataclass(frozen=True, slots=True)
class Selection:
    """A titled list of comparisons."""

    title: str
    comparisons: list[Comparison]


def by_question(evaluated: Evaluated) -> dict[tuple[str, int], tuple[Generation, float]]:
    """Answers and their scores by what was asked, whatever was answered before, and by which sample it was."""
    scored = zip(evaluated.generations, evaluated.scores, strict=True)
    return {(g.question, g.sample_index): (g, score) for g, score in scored}


def _pairs(policy: Evaluated, baseline: Evaluated) -> list[Comparison]:
    """First samples of every prompt both were asked."""
    theirs = by_question(baseline)
    comparisons = []
    for generation, score in zip(policy.generations, policy.scores, strict=True):
        counterpart = theirs.get((generation.question, generation.sample_index))
        if generation.sample_index == 0 and counterpart is not None:
            comparisons.append(Comparison(counterpart[0], generation, counterpart[1], score))
    return comparisons


def select(policy: Evaluated, baseline: Evaluated, count: int = 5, seed: int = 0) -> list[Selection]:
    """`count` comparisons drawn at random, then the largest gains and the largest losses among the others."""
    pairs = _pairs(policy, baseline)
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    sample, rest = [pairs[i] for i in order[:count]], [pairs[i] for i in order[count:]]
    ranked = sorted(rest, key=lambda pair: pair.gain)
    losses = [pair for pair in ranked[:count] if pair.gain < 0]
    gains = [pair for pair in ranked[::-1][:count] if pair.gain > 0]
    selections = [Selection("Drawn at random", sample), Selection("Largest gains", gains)]
    return [s for s in [*selections, Selection("Largest losses", losses)] if s.comparisons]


# --- the page


STYLE_SHEET, SCRIPT = Path(__file__).with_name("page.css"), Path(__file__).with_name("page.js")


def text(value: object) -> str:
    """A value as HTML text; what turns the direction of writing or takes up no room is spelled."""
    return html.escape(visible(str(value), OF_SCRIPTS), quote=True)


def page(title: str, body: str) -> str:
    """A whole document that needs nothing but itself. Its policy forbids whatever comes from elsewhere, and any script
    but the one of this page, which adds sorting and searching and is named by its digest."""
    script = SCRIPT.read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{text(title)}</title>\n<style>\n{STYLE_SHEET.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A policy in a table."""

    evaluation: Evaluation
    name: str
    colour: str
    on_front: bool = False  # of reward and KL


def _intervals(evaluation: Evaluation) -> list[float]:
    return [evaluation.get(f"{evaluation.key(WIN_RATE)}{part}") for part in ("", "_low", "_high")]


def _reach(entries: Sequence[Row]) -> float:
    """How far from one half the win rates of a table reach: half the width of its glyphs' axis."""
    values = [abs(value - 0.5) for entry in entries for value in _intervals(entry.evaluation) if not math.isnan(value)]
    return max(0.1, 1.1 * max(values, default=0.0))


def _interval_glyph(evaluation: Evaluation, reach: float) -> str:
    """The win rate's interval on a line around one half, which is marked."""
    mean, low, high = (50 + 50 * (value - 0.5) / reach for value in _intervals(evaluation))
    if math.isnan(mean):
        return ""
    return (
        '<svg class="glyph" viewBox="0 0 100 12" aria-hidden="true"><line x1="0" y1="6" x2="100" y2="6"/>'
        '<line class="half" x1="50" y1="1" x2="50" y2="11"/>'
        f'<line class="interval" x1="{low:.1f}" y1="6" x2="{high:.1f}" y2="6"/>'
        f'<circle cx="{mean:.1f}" cy="6" r="3.4"/></svg>'
    )


def _cell(column: Column, evaluation: Evaluation, reach: float) -> str:
    entry = column.text(evaluation)
    glyph = _interval_glyph(evaluation, reach) if column.title == "Win rate" else ""
    empty = ' class="empty"' if entry == MISSING else ""
    return f'<td data-label="{text(column.title)}"{empty}>{glyph}<span>{text(entry)}</span></td>'


def _row(index: int, entry: Row, columns: Sequence[Column], reach: float) -> str:
    broken = "; ".join(entry.evaluation.degenerate)
    tag = f'<em class="broken" title="{text(broken)}">degenerate</em>' if broken else ""
    tag += '<em class="front" title="no sound policy has more reward at less KL">Pareto</em>' if entry.on_front else ""
    cells = "".join(_cell(column, entry.evaluation, reach) for column in columns)
    kind = ' class="baseline"' if entry.evaluation.baseline is None else ""
    dot = f'<i style="background:{theme_colour(entry.colour)}"></i>'
    return f'<tr{kind}><th scope="row" data-sort="{index}">{dot}{text(entry.name)} {tag}</th>{cells}</tr>'


def policy_table(entries: Sequence[Row], columns: Sequence[Column], failures: Sequence[tuple[str, str]] = ()) -> str:
    """Policies as rows; on a narrow screen every row becomes a card. `failures` are names and what went wrong."""
    head = "".join(f'<th scope="col" title="{text(c.note)}">{text(c.title)}</th>' for c in columns)
    reach = _reach(entries)
    rows = [_row(index, entry, columns, reach) for index, entry in enumerate(entries)]
    rows += [
        f'<tr class="failed"><th scope="row">{text(name)}</th><td colspan="{len(columns)}">{text(why)}</td></tr>'
        for name, why in failures
    ]
    notes = "".join(f"<dt>{text(c.title)}</dt><dd>{text(c.note)}</dd>" for c in columns)
    return (
        f'<div class="wide"><table class="numbers"><thead><tr><th scope="col">Policy</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<details class="notes"><summary>What the columns mean</summary><dl>{notes}</dl></details>'
    )


def _plain_row(names: Sequence[str], entries: Sequence[str], colour: str | None) -> str:
    head, *rest = entries
    dot = "" if colour is None else f'<i style="background:{theme_colour(colour)}"></i>'
    cells = "".join(
        f'<td data-label="{text(name)}"{" class=empty" if entry == MISSING else ""}><span>{text(entry)}</span></td>'
        for name, entry in zip(names[1:], rest, strict=True)
    )
    return f'<tr><th scope="row">{dot}{text(head)}</th>{cells}</tr>'


def plain_table(names: Sequence[str], rows: Sequence[Sequence[str]], colours: Sequence[str] | None = None) -> str:
    """A sortable table of texts under `names`, the first of each row its head; `colours` are dots before the heads."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    hues = colours or [None] * len(rows)
    lines = "".join(_plain_row(names, row, hue) for row, hue in zip(rows, hues, strict=True))
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def alerts(sentences: Sequence[str]) -> str:
    """What a reader must not overlook."""
    lines = "<br>".join(text(sentence) for sentence in sentences)
    return f'<p class="alert">{lines}</p>' if sentences else ""


def pictures(panels: Sequence[Panel]) -> str:
    """Panels side by side where there is room."""
    figures = (f"<figure>{svg(p)}<figcaption>{text(p.caption)}</figcaption></figure>" for p in panels)
    return f'<div class="pictures">{"".join(figures)}</div>'


def _score(score: float, scorer: str) -> str:
    """The score on a coloured ground, red to green for 0 to 1; nothing for an answer nobody scored."""
    level = f"--level:{min(1.0, max(0.0, score)):.3f}"
    return "" if math.isnan(score) else f'<span class="score" style="{level}">{text(scorer)} {score:.2f}</span>'


def _answer(name: str, generation: Generation, score: float, scorer: str) -> str:
    cut = "" if generation.finished else '<span class="cut">cut at the limit</span>'
    body = text(generation.answer) or '<span class="nothing">(empty)</span>'
    thought = "\n".join(thoughts_of(generation.parsed or {}))
    folded = f"<details><summary>thought</summary><p>{text(thought)}</p></details>" if thought else ""
    return (
        f'<div class="answer"><header><b>{text(name)}</b>{_score(score, scorer)}'
        f'<span class="count">{generation.num_tokens} tokens</span>{cut}</header>{folded}<p>{body}</p></div>'
    )


def _keys(pair: Comparison) -> str:
    """What a comparison can be sorted and filtered by, as attributes; without those of answers nobody scored."""
    values = {"score": pair.policy_score, "gain": pair.gain, "tokens": pair.policy.num_tokens, "growth": pair.growth}
    attributes = "".join(f' data-{name}="{value:.6g}"' for name, value in values.items() if not math.isnan(value))
    return attributes if pair.policy.finished else f"{attributes} data-cut"


def _turn(message: Message, speaker: str) -> str:
    return f'<p class="turn {text(message["role"])}"><span>{text(speaker)}</span>{text(message["content"])}</p>'


def _turns(pair: Comparison, names: tuple[str, str]) -> str:
    """The conversation up to the answers. In a later turn both have given answers of their own before."""
    parts = []
    for theirs, ours in zip(pair.baseline.prompt, pair.policy.prompt, strict=True):
        messages = [(ours, ours["role"])] if theirs == ours else [(theirs, names[0]), (ours, names[1])]
        parts += [_turn(message, speaker) for message, speaker in messages]
    return "".join(parts)


def _comparison(pair: Comparison, names: tuple[str, str], scorer: str) -> str:
    left = _answer(names[0], pair.baseline, pair.baseline_score, scorer)
    right = _answer(names[1], pair.policy, pair.policy_score, scorer)
    return (
        f'<article class="sample"{_keys(pair)}><div class="prompt">{_turns(pair, names)}</div>'
        f'<div class="answers">{left}{right}</div></article>'
    )


def samples(selections: Sequence[Selection], names: tuple[str, str], scorer: str, opened: bool) -> str:
    """Side-by-side answers of the baseline and one policy, which a reader can search, filter and sort."""
    parts = [
        f"<h4>{text(selection.title)}</h4>"
        + "".join(_comparison(pair, names, scorer) for pair in selection.comparisons)
        for selection in selections
    ]
    state, count = " open" if opened else "", sum(len(selection.comparisons) for selection in selections)
    return (
        f'<details class="samples"{state}><summary>{text(names[1])}<small>{count} prompts</small></summary>'
        f'<div class="comparisons">{"".join(parts)}</div></details>'
    )


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """Settings, as names and values."""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)
    return f'<dl class="settings">{rows}</dl>'
