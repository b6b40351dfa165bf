"""The tables of arXiv 2407.13709: KL strengths as rows; for each model or reference what was won, and how long
answers are. As a page's table, for the terminal, as CSV, Markdown and LaTeX."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_ref.evaluation.results import LENGTH, measure_of
from dpo_ref.evaluation.sweep import Cell, axis_of, short_names
from dpo_ref.files.writing import as_csv
from dpo_ref.reports import page
from dpo_ref.reports.tables import MISSING, in_markdown, number
from dpo_ref.tracking.terminal import in_one_line, words

BROKEN = "†"
IN_A_TERMINAL = 3  # series beside each other in 80 characters
LATEX = {"\\": r"\textbackslash{}", "β": r"$\beta$", "±": r"$\pm$", "−": "$-$", "†": r"$^\dagger$", "–": "--",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{m: f"\\{m}" for m in "&%$#_{}"}}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PaperRow:
    """What one cell of the table says; `best` of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class PaperTable:
    """`rows` hold a label and, for each of the `groups`, an entry for each of the `measures`."""

    corner: str
    groups: list[str]
    measures: list[str]
    rows: list[tuple[str, list[PaperRow]]]
    note: str

    def part(self, first: int, last: int) -> "PaperTable":
        """The table of some of its groups."""
        width = len(self.measures)
        rows = [(label, entries[width * first : width * last]) for label, entries in self.rows]
        return PaperTable(self.corner, self.groups[first:last], self.measures, rows, self.note)


def _text(cell: Cell, key: str, scale: float, decimals: int) -> str:
    value = number(scale * cell.evaluation.get(key), decimals)
    bar = cell.spread(key)
    return value if value == MISSING or not bar else f"{value} ± {number(scale * bar, decimals)}"


def paper_table(cells: Sequence[Cell]) -> PaperTable:
    """The cells of a sweep as the paper's table; the best sound entry of every column is marked. Raises ValueError for
    no cells."""
    if not cells:
        raise ValueError("there are no cells to make a table of")
    measure, short = measure_of([cell.evaluation for cell in cells]), short_names(cells)
    keys = [(measure.key, measure.scale, measure.decimals), (LENGTH.key, 1.0, LENGTH.decimals)]
    at = {(cell.series, cell.point): cell for cell in cells}
    champions = {
        name: max(
            (cell for cell in cells if cell.series == name and not cell.evaluation.degenerate),
            key=lambda cell: cell.evaluation.get(measure.key),
            default=None,
        )
        for name in short
    }

    def entries(name: str, point: float | None) -> list[PaperRow]:
        cell = at.get((name, point))
        if cell is None:
            return [PaperRow(MISSING) for _ in keys]
        first, *rest = (_text(cell, *key) for key in keys)
        marked = f"{first}{BROKEN}" if cell.evaluation.degenerate else first
        return [PaperRow(marked, cell is champions[name]), *map(PaperRow, rest)]

    points = sorted({cell.point for cell in cells}, key=lambda point: math.inf if point is None else point)
    rows = [
        (MISSING if point is None else f"{point:g}", [entry for name in short for entry in entries(name, point)])
        for point in points
    ]
    several = any(len(cell.jobs) > 1 for cell in cells)
    chance = "standard deviation over seeds" if several else "standard error over prompts"
    broken = f" {BROKEN} degenerate." if any(cell.evaluation.degenerate for cell in cells) else ""
    title = f"{measure.title[0].upper()}{measure.title[1:]}, and mean length"
    return PaperTable(
        axis_of(cells).sign, list(short.values()), [measure.short, "tokens"], rows, f"{title}; ± {chance}.{broken}"
    )


def html_table(table: PaperTable) -> str:
    """The table on a page; it scrolls sideways where it does not fit."""
    width = len(table.measures)
    groups = "".join(f'<th scope="colgroup" colspan="{width}">{page.text(name)}</th>' for name in table.groups)
    measures = "".join(f'<th scope="col">{page.text(name)}</th>' for name in table.measures) * len(table.groups)
    rows = "".join(
        f'<tr><th scope="row">{page.text(label)}</th>'
        + "".join(f"<td{' class=best' if entry.best else ''}>{page.text(entry.text)}</td>" for entry in entries)
        + "</tr>"
        for label, entries in table.rows
    )
    return (
        f'<div class="wide"><table class="paper"><thead><tr><th scope="col" rowspan="2">{page.text(table.corner)}</th>'
        f"{groups}</tr><tr>{measures}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="small">{page.text(table.note)} Bold: best of its column.</p>'
    )


def terminal_tables(table: PaperTable) -> list[Any]:
    """The table as rich tables, a few series in each."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    tables, (measure, length) = [], table.measures
    for first in range(0, len(table.groups), IN_A_TERMINAL):
        part = table.part(first, first + IN_A_TERMINAL)
        rich_table = Table(
            box=SIMPLE_HEAD,
            padding=(0, 1),
            collapse_padding=True,
            pad_edge=False,
            title=f"{measure} and {length}",
        )
        rich_table.add_column(words(table.corner))
        for group in part.groups:
            rich_table.add_column(words(group), justify="right", overflow="fold", max_width=24)
            rich_table.add_column(words(length), justify="right")
        for label, entries in part.rows:
            texts = (words(entry.text.replace(" ± ", "±"), style="bold" if entry.best else "") for entry in entries)
            rich_table.add_row(words(label), *texts)
        tables.append(rich_table)
    return tables


def csv_table(table: PaperTable) -> str:
    """The table with one header line."""
    head = [table.corner, *(f"{group}: {name}" for group in table.groups for name in table.measures)]
    return as_csv([head, *([label, *(entry.text for entry in entries)] for label, entries in table.rows)])


def markdown_table(table: PaperTable) -> str:
    """The table in Markdown, which knows one header line only."""
    names = [table.corner, *(f"{group}: {name}" for group in table.groups for name in table.measures)]
    lines = [[in_markdown(name) for name in names], ["---:" for _ in names]]
    for label, row in table.rows:
        texts = [in_markdown(entry.text) for entry in row]
        marked = (f"**{text}**" if entry.best else text for text, entry in zip(texts, row, strict=True))
        lines.append([in_markdown(label), *marked])
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{body}\n{in_markdown(table.note)}\n"


def _latex(text: str) -> str:
    return "".join(LATEX.get(mark, mark) for mark in in_one_line(text))


def latex_table(table: PaperTable) -> str:
    """The table as a LaTeX tabular; needs the package booktabs."""
    width = len(table.measures)
    spans = [f"\\multicolumn{{{width}}}{{c}}{{{_latex(group)}}}" for group in table.groups]
    rules = [f"\\cmidrule(lr){{{2 + width * i}-{1 + width * (i + 1)}}}" for i in range(len(table.groups))]
    measures = [_latex(name) for name in table.measures] * len(table.groups)
    body = [
        " & ".join([_latex(label), *(f"\\textbf{{{_latex(e.text)}}}" if e.best else _latex(e.text) for e in entries)])
        for label, entries in table.rows
    ]
    lines = [
        f"% {table.note}",
        f"\\begin{{tabular}}{{r{'r' * width * len(table.groups)}}}",
        "\\toprule",
        " & ".join(["", *spans]) + r" \\",
        "".join(rules),
        " & ".join([_latex(table.corner), *measures]) + r" \\",
        "\\midrule",
        *(line + r" \\" for line in body),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"
