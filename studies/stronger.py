"""Does DPO gain from a better reference? (RQ3 of arXiv 2407.13709; plan: conf/experiment/stronger.yaml)"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dpo_ref.evaluation.compatibility import spearman
from dpo_ref.reports.plots import Panel
from studies import necessity
from studies.intervals import LEVEL, Interval, over_runs_and_prompts
from studies.pictures import look
from studies.records import Finding, Record, above, apart, findings_table, markdown, rounded, row_of, shown, wrap
from studies.runner import INITIALS, OUTPUTS, ROOT, Runs, initial_metrics, link, read_json, run, sweep
from studies.tuning import Method, Tuned, chosen_panels, chosen_table, neighbours_table, tuned

MINUTES = 130
METRICS = ("gold", "win_rate", "tokens", "kl", "end", "accuracy")
STRENGTHS = ("0.1", "0.3", "1", "3", "10")
STRONG, TERSE = "{reference: other, path: lab:strong}", "{reference: other, path: lab:strong_terse}"
GUIDES = OUTPUTS / "stronger" / "guides"
GUIDE = f"reference.path={GUIDES.relative_to(ROOT)}/${{model.path}}/${{seed}}"
METHODS = (
    Method("strong", ("reference=other", "reference.path=lab:strong"), STRENGTHS),
    Method("strong, terse", ("reference=other", "reference.path=lab:strong_terse"), STRENGTHS),
    Method("strong, foreign", ("reference=other", "reference.path=lab:foreign"), STRENGTHS),
    Method("initial and strong", ("reference=mixture", f"reference.parts=[initial, {STRONG}]"), STRENGTHS),
    Method("Pre-DPO", ("reference=other", GUIDE), STRENGTHS),
)  # fmt: skip
CANDIDATES = (
    "initial", "lab:strong", "lab:strong_terse", "lab:foreign", "lab:tiny", "{other}", "prior", "none",
    "uniform_token",
    f"{{reference: mixture, parts: [initial, {STRONG}]}}",
    f"{{reference: mixture, parts: [initial, {TERSE}]}}",
    f"{{reference: mixture, parts: [{STRONG}, {TERSE}]}}",
    "{reference: interpolate, path: lab:strong, share: 0.5}",
    "{reference: interpolate, path: lab:strong_terse, share: 0.5}",
)  # fmt: skip
BETAS = ("0.1", "0.3", "1")
NUMBERS = ("advice", "pairs right", "rank correlation per byte", "KL(policy || reference)", "s.d. of the margin")
LESS_IS_BETTER = NUMBERS[-2:]
SET_ASIDE = INITIALS[1]


def record(folder: Path) -> Record:
    """Run what is left of the plan, and what came of it."""
    base = tuned(OUTPUTS / "necessity" / necessity.METHODS[0].folder, "necessity", necessity.METHODS[0])
    _link_guides(base)
    every = [base, *(tuned(folder / method.folder, "stronger", method) for method in METHODS)]
    ranked = [row for policy in INITIALS for row in _ranked(folder / "ranking" / policy.replace(":", "_"), policy)]
    rows = {
        "chosen": [each.chosen_row(METRICS) for each in every],
        "neighbours": [row for each in every for row in each.rows(METRICS)],
        "grid": [row for each in every for row in each.grid_rows()],
        "ranking": ranked,
        "correlations": _correlations(ranked),
    }
    edges = {each.method.name: each.at_edge for each in every}
    also = {"edges": edges, "initial": initial_metrics(folder / "initial")}
    return Record(rows, [*_gains(every), *_orders(rows["correlations"])], also)


# --- tuned references


def _link_guides(base: Tuned) -> None:
    """The policies that are Pre-DPO's references, under the names by which it asks for them."""
    for one in (*base.grid[base.chosen].runs, *base.results[base.chosen].runs):
        link(GUIDES / one.initial / str(one.seed), one.folder.parent / "policy")


def _gains(every: Sequence[Tuned]) -> list[Finding]:
    base, *others = every
    level, theirs = 1 - (1 - LEVEL) / len(others), base.results[base.chosen]
    return [
        apart(
            f"gold, reference {each.method.name} less initial",
            over_runs_and_prompts(each.results[each.chosen].less(theirs), theirs.initials, level),
        )
        for each in others
    ]


# --- the ranking of references


def _ranked(folder: Path, policy: str) -> list[dict[str, Any]]:
    """Of each candidate the report's numbers, and the gold of what it trained at each beta."""
    (other,) = (name for name in INITIALS if name != policy)
    candidates = ", ".join(CANDIDATES).replace("{other}", other)
    asked = ("data=lab", "data.num_pairs=4096", f"policy={policy}", f"references=[{candidates}]")
    run(folder / "report", "evaluate.py", "stage=compatibility", *asked)
    report = read_json(folder / "report" / "compatibility.json")
    rows = []
    for index, candidate in enumerate(report["candidates"]):
        words = (
            f"model.path={policy}",
            "optim.lr=3e-4",
            f"beta={','.join(BETAS)}",
            "seed=0,1",
            "data.test_split=test",
        )
        runs = sweep(folder / f"candidate_{index:02}", "+experiment=stronger", *candidate["words"], *words)
        rows += [_ranked_row(runs.at(beta=beta), candidate, policy, beta) for beta in BETAS]
    return rows


def _ranked_row(runs: Runs, candidate: Mapping[str, Any], policy: str, beta: str) -> dict[str, Any]:
    start, kl = candidate["start"], candidate["forward"]["per_answer"]
    values = (
        -start["mean"] / start["sd"] if start["sd"] else 0.0,
        candidate["alone"]["accuracy"]["mean"],
        candidate["beside"]["per_byte_spearman"],
        kl and kl["mean"],
        start["sd"],
    )
    numbers = {name: None if value is None else round(value, 6) for name, value in zip(NUMBERS, values, strict=True)}
    return row_of(runs, ("gold", "tokens"), reference=candidate["title"], policy=policy, beta=beta) | {
        "numbers": numbers
    }


def _correlations(ranked: Sequence[Mapping[str, Any]], num_resamples: int = 2000) -> list[dict[str, Any]]:
    """Mean rank correlation of each number with gold over the blocks of one policy or both; the interval is over
    references, each of which is drawn with all its cells."""
    rows = []
    for name in NUMBERS:
        for cells, policies in {"all": INITIALS, "set aside": (SET_ASIDE,)}.items():
            blocks = [_block(ranked, name, policy, beta) for policy in policies for beta in BETAS]
            known = np.flatnonzero(~np.isnan(np.stack(blocks)).any(axis=(0, 1)))
            generator, drawn = np.random.default_rng(0), []
            for _ in range(num_resamples):
                drawn.append(_mean_correlation(blocks, generator.choice(known, len(known))))
            low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            correlation = rounded(Interval(_mean_correlation(blocks, known), float(low), float(high)))
            rows.append({"number": name, "cells": cells, "references": len(known), "correlation": correlation})
    return rows


def _block(ranked: Sequence[Mapping[str, Any]], name: str, policy: str, beta: str) -> Float[np.ndarray, "2 N"]:
    """A number of each reference, the better the larger, and the gold that it came to."""
    sign = -1 if name in LESS_IS_BETTER else 1
    rows = [row for row in ranked if row["policy"] == policy and row["beta"] == beta]
    numbers = [math.nan if row["numbers"][name] is None else sign * row["numbers"][name] for row in rows]
    return np.array([numbers, [row["gold"].mean for row in rows]])


def _mean_correlation(blocks: Sequence[Float[np.ndarray, "2 N"]], columns: np.ndarray) -> float:
    return float(np.mean([spearman(*block[:, columns]) for block in blocks]))


def _orders(correlations: Sequence[Mapping[str, Any]]) -> list[Finding]:
    return [
        above(f"rank correlation of {row['number']} with gold, cells {row['cells']}", row["correlation"])
        for row in sorted(correlations, key=lambda row: row["cells"] != "set aside")
    ]


# --- as it is shown


def parts(found: Record) -> dict[str, str]:
    """What is written into the page."""
    correlations = [
        [row["number"], row["cells"], str(row["references"]), shown(row["correlation"], 2)]
        for row in found.rows["correlations"]
    ]
    return {
        "stronger": chosen_table(found),
        "stronger tests": findings_table(found),
        "stronger neighbours": neighbours_table(found),
        "stronger correlations": markdown(["number", "cells", "references", "mean rank correlation"], correlations),
        "stronger ranking": _ranking_table(found),
    }


def _ranking_table(found: Record) -> str:
    """Every reference of the ranking, the best first: the report's numbers, and gold at each beta."""
    titles = ["policy", "reference", *NUMBERS, *(f"gold, β = {beta}" for beta in BETAS)]
    rows = []
    for policy in INITIALS:
        ranked = [row for row in found.rows["ranking"] if row["policy"] == policy]
        names = list(dict.fromkeys(row["reference"] for row in ranked))
        gold = {name: [row["gold"] for row in ranked if row["reference"] == name] for name in names}
        numbers = {row["reference"]: row["numbers"] for row in ranked}
        for name in sorted(names, key=lambda name: -np.mean([each.mean for each in gold[name]])):
            values = ["–" if numbers[name][key] is None else f"{numbers[name][key]:.2f}" for key in NUMBERS]
            rows.append([policy, f"`{name}`", *values, *(f"{each.mean:.3f}" for each in gold[name])])
    return markdown(titles, rows)


def panels(found: Record) -> list[Panel]:
    """The pictures: reward, length, reward against KL; and what the report's new number says of gold."""
    return [*chosen_panels(found), _advice_panel(found)]


def _advice_panel(found: Record) -> Panel:
    def draw(axes: Any) -> None:
        for index, policy in enumerate(INITIALS):
            rows = [row for row in found.rows["ranking"] if row["policy"] == policy and row["beta"] == BETAS[1]]
            advice, gold = [row["numbers"]["advice"] for row in rows], [row["gold"].mean for row in rows]
            axes.plot(advice, gold, linestyle="none", label=f"{policy}, β = {BETAS[1]}", **look(index))
        axes.set_title("What was known before training")
        axes.set_xlabel("advice: −mean / s.d. of the step-0 margin")
        axes.set_ylabel("gold reward after training")
        axes.legend(loc="best")

    return Panel("A point for each reference.", draw)


def answer(found: Record) -> str:
    """What was found, in a paragraph."""
    gains = [finding for finding in found.findings if finding.statement.startswith("gold")]
    told = [
        f"{each.statement.split('reference ')[1].removesuffix(' less initial')} {shown(each.estimate)}"
        for each in gains
    ]
    (aside,) = (row for row in found.rows["correlations"] if row["number"] == "advice" and row["cells"] == "set aside")
    (right,) = (
        row for row in found.rows["correlations"] if row["number"] == "pairs right" and row["cells"] == "set aside"
    )
    return wrap(
        f"At equal tuning, gold less that of the initial policy as the reference: {'; '.join(told)}. On cells set "
        f"aside, the rank correlation with gold of a number known before training is {shown(aside['correlation'], 2)} "
        f"for advice and {shown(right['correlation'], 2)} for the share of pairs that the reference ranks right."
    )
