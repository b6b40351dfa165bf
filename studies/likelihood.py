"""Do ORPO and CPO earn by imitating the chosen responses? (plan: conf/experiment/likelihood.yaml)"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dpo_ref.reports.plots import Panel
from studies import necessity
from studies.intervals import LEVEL, Interval, over_runs_and_prompts
from studies.pictures import level, line
from studies.records import Finding, Record, above, apart, findings_table, markdown, percent, row_of, shown, wrap
from studies.runner import OUTPUTS, Runs, initial_metrics
from studies.tuning import Method, Place, best_of, swept, tried, tuned

MINUTES = 50
METRICS = ("gold", "win_rate", "tokens", "kl", "end", "accuracy")
WORLDS = {"good": (), "poor": ("data.competences=[0.15]",)}  # of the chosen responses
OF_NECESSITY = {method.name: method for method in necessity.METHODS if method.name in ("dpo, initial", "orpo", "cpo")}
DPO = necessity.METHODS[0].name
BOTH = "dpo and likelihood"
MIXED = ("objective=mix", "objective.parts=[dpo,sft]", "objective.weights=[1,1]", "reference=initial")
METHODS = (*OF_NECESSITY.values(), replace(OF_NECESSITY[DPO], name=BOTH, words=MIXED))
Cell = tuple[str, str]  # world and method
Gains = Float[np.ndarray, "U P"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The place that was chosen for a method in a world, and the policies there."""

    place: Place
    runs: Runs


def record(folder: Path) -> Record:
    """Run what is left of the plan, and what came of it."""
    cells = {("good", name): _of_necessity(method) for name, method in OF_NECESSITY.items()}
    cells["good", BOTH] = _tuned_here(folder, "good", METHODS[-1])
    cells |= {("poor", method.name): _tuned_here(folder, "poor", method) for method in METHODS}
    rows = [
        row_of(each.runs, METRICS, world=world, method=name, lr=each.place[0], strength=each.place[1])
        for (world, name), each in cells.items()
    ]
    also = {"initial": initial_metrics(OUTPUTS / "necessity" / "initial")}
    return Record({"chosen": rows}, _findings({cell: each.runs for cell, each in cells.items()}), also)


def _of_necessity(method: Method) -> Chosen:
    found = tuned(OUTPUTS / "necessity" / method.folder, "necessity", method)
    return Chosen(found.chosen, found.results[found.chosen])


def _tuned_here(folder: Path, world: str, method: Method) -> Chosen:
    asked, at = replace(method, words=(*method.words, *WORLDS[world])), folder / world / method.folder
    lr, strength = place = best_of(tried(at, "likelihood", asked))
    return Chosen(place, swept(at / "results", "likelihood", asked, [lr], [strength], method.results_on)[place])


def _findings(runs: Mapping[Cell, Runs]) -> list[Finding]:
    initials = runs["good", DPO].initials

    def earned(world: str, one: str, other: str) -> Gains:
        return runs[world, one].less(runs[world, other])

    def interval(gains: Gains, at_once: int) -> Interval:
        return over_runs_and_prompts(gains, initials, 1 - (1 - LEVEL) / at_once)

    alike = [name for name in OF_NECESSITY if name != DPO]
    others = [*alike, BOTH]
    findings = [above(f"L1 good pairs: {BOTH} less dpo", interval(earned("good", BOTH, DPO), 1))]
    for name in alike:
        findings.append(apart(f"L2 good pairs: {BOTH} less {name}", interval(earned("good", BOTH, name), len(alike))))
    for name in others:
        findings.append(above(f"L3 poor pairs: dpo less {name}", interval(earned("poor", DPO, name), len(others))))
    for name in others:
        change = earned("good", name, DPO) - earned("poor", name, DPO)
        findings.append(above(f"L4 {name} less dpo: with good less with poor pairs", interval(change, len(others))))
    return findings


# --- as it is shown


def parts(found: Record) -> dict[str, str]:
    """What is written into the page."""
    rows = [
        [row["world"], row["method"], row["lr"], row["strength"], shown(row["gold"]), percent(row["win_rate"]),
         shown(row["tokens"], 1), shown(row["kl"], 2), shown(row["accuracy"]), f"{row['degenerate']} of {row['runs']}"]
        for row in found.rows["chosen"]
    ]  # fmt: skip
    titles = ["pairs", "method", "learning rate", "strength", "gold", "win rate, %", "tokens", "KL, nats", "accuracy"]
    return {"likelihood": markdown([*titles, "degenerate"], rows), "likelihood tests": findings_table(found)}


def answer(found: Record) -> str:
    """What was found, in a paragraph."""
    told = {each.statement: shown(each.estimate) for each in found.findings}
    good = {row["method"]: shown(row["gold"]) for row in found.rows["chosen"] if row["world"] == "good"}
    poor = {row["method"]: shown(row["gold"]) for row in found.rows["chosen"] if row["world"] == "poor"}
    over = {name: told[f"L2 good pairs: {BOTH} less {name}"] for name in ("orpo", "cpo")}
    less = {name: told[f"L3 poor pairs: dpo less {name}"] for name in ("orpo", "cpo", BOTH)}
    return wrap(
        f"With the lab's pairs, DPO that imitates the chosen response too earns {good[BOTH]}: "
        f"{told[f'L1 good pairs: {BOTH} less dpo']} more than DPO ({good[DPO]}), {over['orpo']} more than ORPO and "
        f"{over['cpo']} more than CPO. With pairs whose chosen responses are no better than what the policy writes, "
        f"DPO earns {poor[DPO]}: {less[BOTH]} more than with imitation, {less['cpo']} more than CPO, and "
        f"{less['orpo']} more than ORPO."
    )


def panels(found: Record) -> list[Panel]:
    """The picture: gold of each method with good and with poor pairs."""

    def draw(axes: Any) -> None:
        for index, method in enumerate(METHODS):
            rows = [row for row in found.rows["chosen"] if row["method"] == method.name]
            beside = (index - (len(METHODS) - 1) / 2) / 25  # so that intervals do not cover each other
            line(axes, [0 + beside, 1 + beside], [row["gold"] for row in rows], index, method.name)
        level(axes, sum(each["gold"] for each in found.also["initial"].values()) / 2)
        axes.set_xticks(range(len(WORLDS)), [f"{world} pairs" for world in WORLDS])
        axes.set_xlim(-0.3, 1.3)
        axes.set_title("What imitation of the chosen response is worth")
        axes.set_ylabel("gold reward")
        axes.legend(loc="best")

    return [Panel("Gold reward with 95 % intervals over seeds and prompts; dashed: the initial policies.", draw)]
