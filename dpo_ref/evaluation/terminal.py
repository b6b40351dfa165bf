"""The table of results in a terminal."""

from collections.abc import Sequence
from typing import Any

from dpo_ref.evaluation.columns import MISSING, brief_columns, titles
from dpo_ref.evaluation.records import Evaluation


def results_table(evaluations: Sequence[Evaluation], failures: Sequence[tuple[str, str]] = ()) -> Any:
    """A rich table with a row per policy, 80 characters wide for short names.

    `failures` are names of runs without numbers, and what went wrong: rows too, their reasons below the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    every = brief_columns(evaluations[0].scorer if evaluations else "gold")
    shown = [c for c in every if any(c.text(e) != MISSING for e in evaluations)] or every
    reasons = Text("\n".join(f"{name}: {why}" for name, why in failures), style="red")
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption=reasons if failures else None,
        caption_justify="left",
    )  # fmt: skip
    table.add_column("policy", overflow="fold", min_width=14)
    for column in shown:
        table.add_column(column.title, justify="right", no_wrap=True)
    for evaluation, name in zip(evaluations, titles(evaluations), strict=True):
        seeds = f" ({evaluation.num_seeds} seeds)" if evaluation.num_seeds > 1 else ""
        label = Text(name + seeds)
        if evaluation.degenerate:
            label.append(" degenerate", style="bold red")
        table.add_row(label, *(Text(_narrow(column.text(evaluation))) for column in shown))
    for name, _ in failures:
        table.add_row(Text(name, style="red"), *("–" for _ in shown))
    return table


def _narrow(entry: str) -> str:
    """Without the spaces that a page has room for."""
    return entry.replace(" ± ", "±").replace(", ", ",").replace("\u00a0%", "%")
