"""Is a reference needed? (RQ2 of arXiv 2407.13709; plan: conf/experiment/necessity.yaml)"""

from collections.abc import Sequence
from pathlib import Path

from dpo_ref.reports.plots import Panel
from studies.intervals import LEVEL, over_runs_and_prompts
from studies.records import Finding, Record, above, findings_table, shown, wrap
from studies.runner import initial_metrics
from studies.tuning import Method, Tuned, chosen_panels, chosen_table, neighbours_table, tuned

MINUTES = 120
METRICS = ("gold", "win_rate", "tokens", "kl", "end", "accuracy")
METHODS = (
    Method("dpo, initial", ("objective=dpo", "reference=initial"), ("0.03", "0.1", "0.3", "1", "3")),
    Method("dpo, none", ("objective=dpo", "reference=none"), ("0.003", "0.01", "0.03", "0.1", "0.3")),
    Method("dpo, prior", ("objective=dpo", "reference=prior"), ("0.001", "0.003", "0.01", "0.03", "0.1")),
    Method(
        "dpo, uniform token", ("objective=dpo", "reference=uniform_token"), ("0.001", "0.003", "0.01", "0.03", "0.1")
    ),
    Method("simpo", ("objective=simpo",), ("0.3", "1", "3", "10", "30")),
    Method("orpo", ("objective=orpo",), ("0.03", "0.1", "0.3", "1", "3"), "objective.weight"),
    Method("cpo", ("objective=cpo",), ("0.01", "0.03", "0.1", "0.3", "1")),
)
AFTERWARDS = Method("dpo, none, larger", ("objective=dpo", "reference=none"), ("1", "3", "10", "30", "100"))


def record(folder: Path) -> Record:
    """Run what is left of the plan, and what came of it."""
    every = [tuned(folder / method.folder, "necessity", method) for method in (*METHODS, AFTERWARDS)]
    rows = {
        "chosen": [each.chosen_row(METRICS) for each in every],
        "neighbours": [row for each in every for row in each.rows(METRICS)],
        "grid": [row for each in every for row in each.grid_rows()],
    }
    edges = {each.method.name: each.at_edge for each in every}
    return Record(rows, _findings(every), {"edges": edges, "initial": initial_metrics(folder / "initial")})


def _findings(every: list[Tuned]) -> list[Finding]:
    first, *others, afterwards = every
    at_once = 1 - (1 - LEVEL) / len(others)
    return [*(_gain(first, other, at_once) for other in others), _gain(first, afterwards, LEVEL)]


def _gain(first: Tuned, other: Tuned, level: float) -> Finding:
    ours, theirs = (each.results[each.chosen] for each in (first, other))
    interval = over_runs_and_prompts(ours.less(theirs), ours.initials, level)
    return above(f"gold, dpo with reference=initial less {other.method.name}", interval)


# --- as it is shown


def parts(found: Record) -> dict[str, str]:
    """What is written into the page."""
    return {
        "necessity": chosen_table(found),
        "necessity tests": findings_table(found),
        "necessity neighbours": neighbours_table(found),
    }


def panels(found: Record) -> list[Panel]:
    """The pictures: reward, length, and reward against KL."""
    return chosen_panels(found)


def answer(found: Record) -> str:
    """What was found, in a paragraph."""
    first = found.rows["chosen"][0]
    above_all = [finding for finding in found.findings if finding.holds]
    others = [finding for finding in found.findings if not finding.holds]
    sentences = [
        f"DPO with the initial policy as its reference earns {shown(first['gold'])} at its chosen cell (learning rate "
        f"{first['lr']}, β = {first['strength']}; {first['tokens'].mean:.0f} tokens, {first['kl'].mean:.1f} nats)."
    ]
    if above_all:
        sentences.append(f"That is more than {_less(above_all)}.")
    if others:
        sentences.append(f"It is not told to be more than {_less(others)}.")
    return wrap(" ".join(sentences))


def _less(findings: Sequence[Finding]) -> str:
    return ", ".join(
        f"{finding.statement.partition(' less ')[2]} (by {shown(finding.estimate)})" for finding in findings
    )
