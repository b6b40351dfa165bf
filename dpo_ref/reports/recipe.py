"""The page of a recipe: the chain of its commands, what each began with and was measured against, what it came to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpo_ref.evaluation.results import Evaluation
from dpo_ref.evaluation.sweep import SweptRun
from dpo_ref.reports import page
from dpo_ref.reports.tables import MISSING, Column, brief_columns, headline
from dpo_ref.tracking.terminal import clock

DIGITS = 12  # of a digest


class Link(NamedTuple):
    """A command of the chain. `identities` are those of a run's summary, `job` what it left behind, if it left a
    policy."""

    name: str
    command: str
    seconds: float
    identities: Mapping[str, str]
    job: SweptRun | None


def recipe_page(name: str, links: Sequence[Link], report: str | None) -> str:
    """The whole page; `report` is where the comparison of the policies is, relative to it."""
    evaluated = [(link, link.job.evaluation) for link in links if link.job and link.job.evaluation]
    title = headline([evaluation for _, evaluation in evaluated]) if evaluated else f"The chain of {name}"
    parts = [
        f'<p class="over">Recipe {page.text(name)}, {len(links)} steps</p>',
        f"<h1>{page.text(title)}</h1>",
        "<h2>The chain</h2>",
        page.plain_table(("Step", "Began with", "Measured against", "Took"), [_chain_row(link) for link in links]),
        '<p class="small">Digests are of weights; equal ones are the same model.</p>',
    ]
    if evaluated:
        columns = brief_columns(evaluated[0][1].scorer)
        parts += ["<h2>What it came to</h2>", _results(evaluated, columns)]
    if report:
        parts.append(
            f'<p><a href="{page.text(report)}">All comparisons, with pictures and answers side by side</a></p>'
        )
    parts += ["<h2>Commands</h2>", *(_command(link) for link in links)]
    parts.append("<footer>Made by dpo_ref. recipe.json has the same, for programs.</footer>")
    return page.page(title, "\n".join(parts))


def _chain_row(link: Link) -> list[str]:
    began, against = (link.identities.get(key, "") for key in ("initial_policy", "loss_reference_weights"))
    whose = link.job.reference if link.job and link.job.reference else ""
    measured = " ".join(filter(None, [whose, against[:DIGITS]]))
    return [link.name, began[:DIGITS] or MISSING, measured or MISSING, clock(link.seconds)]


def _results(evaluated: Sequence[tuple[Link, Evaluation]], columns: Sequence[Column]) -> str:
    named = [link.name + (", degenerate" if evaluation.degenerate else "") for link, evaluation in evaluated]
    rows = [
        [name, *(column.text(evaluation) for column in columns)]
        for name, (_, evaluation) in zip(named, evaluated, strict=True)
    ]
    return page.plain_table(["Step", *(column.title for column in columns)], rows)


def _command(link: Link) -> str:
    return f"<details><summary>{page.text(link.name)}</summary><pre>python {page.text(link.command)}</pre></details>"
