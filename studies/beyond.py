"""Other constraints, when to stop, how much data (after the papers; plan: conf/experiment/beyond.yaml)"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dpo_ref.reports.plots import Panel
from studies import necessity, stronger
from studies.intervals import LEVEL, over_runs, over_runs_and_prompts
from studies.pictures import line
from studies.records import Finding, Record, above, apart, findings_table, markdown, rounded, row_of, shown, wrap
from studies.runner import OUTPUTS, Run, Runs, initial_metrics, sweep
from studies.tuning import LR, SEEDS, Method, Tuned, chosen_panels, chosen_table, neighbours_table, tuned

MINUTES = 180
METRICS = ("gold", "win_rate", "tokens", "kl", "end", "accuracy")
STRENGTHS = ("0.03", "0.1", "0.3", "1", "3")
PER_BYTE = ("3", "10", "30", "100", "300")
METHODS = (
    Method("beta_dpo", ("objective=beta_dpo", "reference=initial"), STRENGTHS),
    Method("epsilon_dpo", ("objective=epsilon_dpo", "reference=initial"), STRENGTHS),
    Method("hypo", ("objective=hypo", "reference=initial"), STRENGTHS),
    Method("tempered", ("objective=dpo", "reference=initial", "reference.strength=0.5"), STRENGTHS),
    Method("moving", ("objective=dpo", "reference=moving", "reference.every=32", "reference.share=0.5"), STRENGTHS),
    Method("bema", ("objective=dpo", "reference=bema", "reference.every=16"), STRENGTHS),
    Method("per byte", ("objective=dpo_per_byte", "reference=initial"), PER_BYTE),
    Method("per byte, foreign", ("objective=dpo_per_byte", "reference=other", "reference.path=lab:foreign"), PER_BYTE),
)
FOREIGN = "per byte, foreign"


def record(folder: Path) -> Record:
    """Run what is left of the plan, and what came of it."""
    base = {method.name: _of_necessity(method) for method in necessity.METHODS}
    every = [tuned(folder / method.folder, "beyond", method) for method in METHODS]
    stops = _stopping(folder / "stopping")
    scaled = _scaling(folder / "scaling", base)
    first = base[necessity.METHODS[0].name]
    rows = {
        "chosen": [each.chosen_row(METRICS) for each in (first, *every)],
        "neighbours": [row for each in (first, *every) for row in each.rows(METRICS)],
        "grid": [row for each in every for row in each.grid_rows()],
        "stopping": [row for row, _ in stops],
        "scaling": [
            row_of(runs, ("gold", "tokens", "kl"), method=name, pairs=pairs) for (name, pairs), runs in scaled.items()
        ],
    }
    findings = [*_gains(every, first), *(finding for _, finding in stops), *_more_data(scaled)]
    edges = {each.method.name: each.at_edge for each in (first, *every)}
    return Record(rows, findings, {"edges": edges, "initial": initial_metrics(folder / "initial")})


def _of_necessity(method: Method) -> Tuned:
    return tuned(OUTPUTS / "necessity" / method.folder, "necessity", method)


# --- other constraints


def _gains(every: Sequence[Tuned], first: Tuned) -> list[Finding]:
    (foreign,) = (method for method in stronger.METHODS if method.name == "strong, foreign")
    against_foreign = tuned(OUTPUTS / "stronger" / foreign.folder, "stronger", foreign)
    findings = []
    for each in every:
        name, base = ("dpo, foreign", against_foreign) if each.method.name == FOREIGN else ("dpo", first)
        ours, theirs = each.results[each.chosen], base.results[base.chosen]
        gain = over_runs_and_prompts(ours.less(theirs), ours.initials, 1 - (1 - LEVEL) / len(every))
        findings.append(apart(f"gold, {each.method.name} less {name}", gain))
    return findings


# --- when to stop

BETAS = ("0.02", "0.1", "0.3")
THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
LOOKS = (
    "optim.lr=5e-4",
    "data.num_pairs=8192",
    f"beta={','.join(BETAS)}",
    "reference=initial",
    "trainer.eval_every=16",
)
LOOKS += ("evaluation.every=16", "evaluation.num_prompts=256", "evaluation.max_new_tokens=64")


class Curve(NamedTuple):
    """What was seen of a run every so many steps: gold of its answers, and how far the end token moved."""

    gold: Float[np.ndarray, " K"]
    end: Float[np.ndarray, " K"]

    def stops_at(self, threshold: float) -> int:
        """The first look at which the end token has become less likely by more, or the last."""
        beyond = np.flatnonzero(self.end < -threshold)
        return int(beyond[0]) if len(beyond) else len(self.end) - 1


def curve_of(run: Run) -> Curve:
    """What a run noted as it was trained; looks without one of the two numbers are left out."""
    gold: dict[int, float] = {}
    end: dict[int, float] = {}
    for row in map(json.loads, (run.folder.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        for key, values in (("evaluation/gold/mean", gold), ("eval/eos/chosen_logratio", end)):
            if key in row:
                values[row["step"]] = row[key]
    steps = sorted(gold.keys() & end.keys())
    return Curve(np.array([gold[step] for step in steps]), np.array([end[step] for step in steps]))


def _stopping(folder: Path) -> list[tuple[dict[str, Any], Finding]]:
    words = ("+experiment=beyond", *LOOKS)
    tried = sweep(folder / "tuning", *words, "data.test_split=validation", "seed=100,101")
    curves = [curve_of(run) for run in tried.runs]
    threshold = max(THRESHOLDS, key=lambda value: np.mean([curve.gold[curve.stops_at(value)] for curve in curves]))
    runs = sweep(folder / "results", *words, "data.test_split=test", *SEEDS)
    return [_stopped(runs.at(beta=beta), beta, threshold) for beta in BETAS]


def _stopped(runs: Runs, beta: str, threshold: float) -> tuple[dict[str, Any], Finding]:
    curves = [curve_of(run) for run in runs.runs]
    stops = np.array([curve.gold[curve.stops_at(threshold)] for curve in curves])
    ends, best = (np.array([value(curve.gold) for curve in curves]) for value in (lambda gold: gold[-1], np.max))
    looks = [float(curve.stops_at(threshold)) for curve in curves]
    means = {"stopped": stops, "end": ends, "best": best, "looks": np.array(looks)}
    row = {key: rounded(over_runs(values.tolist(), runs.initials)) for key, values in means.items()}
    gain = over_runs((stops - ends).tolist(), runs.initials, 1 - (1 - LEVEL) / len(BETAS))
    finding = above(f"gold where the end token stops it less at the end, beta {beta}", gain)
    return {"beta": beta, "threshold": threshold, "runs": len(curves), **row}, finding


# --- how much data

PAIRS = ("512", "2048", "8192")
SCALED = ("dpo, initial", "simpo", "orpo", "cpo")


def _scaling(folder: Path, base: Mapping[str, Tuned]) -> dict[tuple[str, str], Runs]:
    scaled = {}
    for name in SCALED:
        method, (lr, strength) = base[name].method, base[name].chosen
        asked = (f"{LR}={lr}", f"{method.key}={strength}", f"data.num_pairs={','.join(PAIRS)}")
        asked += method.results_on
        runs = sweep(folder / method.folder, "+experiment=beyond", *method.words, *asked)
        scaled |= {(name, pairs): runs.at(**{"data.num_pairs": pairs}) for pairs in PAIRS}
    return scaled


def _more_data(scaled: Mapping[tuple[str, str], Runs]) -> list[Finding]:
    confidence, findings = 1 - (1 - LEVEL) / len(SCALED), []
    for name in SCALED:
        more, less = scaled[name, PAIRS[2]], scaled[name, PAIRS[1]]
        gain = over_runs_and_prompts(more.less(less), more.initials, confidence)
        findings.append(above(f"gold on {PAIRS[2]} pairs less on {PAIRS[1]}, {name}", gain))
    return findings


# --- as it is shown


def parts(found: Record) -> dict[str, str]:
    """What is written into the page."""
    stopping = [
        [
            row["beta"],
            f"{row['threshold']:g}",
            *(shown(row[key]) for key in ("stopped", "end", "best")),
            shown(row["looks"], 1),
        ]
        for row in found.rows["stopping"]
    ]
    scaling = [
        [row["method"], row["pairs"], shown(row["gold"]), shown(row["tokens"], 1), shown(row["kl"], 2)]
        for row in found.rows["scaling"]
    ]
    titles = ["β", "threshold, nats", "gold where it stops", "at the end", "at the best look", "looks until it stops"]
    return {
        "beyond": chosen_table(found),
        "beyond tests": findings_table(found),
        "beyond neighbours": neighbours_table(found),
        "beyond stopping": markdown(titles, stopping),
        "beyond scaling": markdown(["method", "pairs", "gold", "tokens", "KL, nats"], scaling),
    }


def answer(found: Record) -> str:
    """What was found, in a paragraph."""
    gains = [each for each in found.findings if " less dpo" in each.statement]
    told = [f"{each.statement.removeprefix('gold, ').partition(' less ')[0]} {shown(each.estimate)}" for each in gains]
    stopped = [each for each in found.findings if "stops it" in each.statement]
    stops = [f"{shown(each.estimate)} at β = {each.statement.split()[-1]}" for each in stopped]
    return wrap(
        f"At equal tuning, gold less that of DPO with a fixed β: {'; '.join(told)}. Ending a run where the end token "
        f"tells earns, over its end, {'; '.join(stops)}."
    )


def panels(found: Record) -> list[Panel]:
    """The pictures: reward, length and reward against KL of the constraints; how much data."""
    return [*chosen_panels(found), _scaling_panel(found)]


def _scaling_panel(found: Record) -> Panel:
    def draw(axes: Any) -> None:
        for index, method in enumerate(SCALED):
            rows = [row for row in found.rows["scaling"] if row["method"] == method]
            line(axes, [float(row["pairs"]) for row in rows], [row["gold"] for row in rows], index, method)
        axes.set_xscale("log")
        axes.set_xticks([float(pairs) for pairs in PAIRS], PAIRS)
        axes.set_xticks([], minor=True)
        axes.set_title("How much data")
        axes.set_xlabel("preference pairs (one epoch)")
        axes.set_ylabel("gold reward")
        axes.legend(loc="best")

    return Panel("Gold reward with 95 % intervals over seeds and prompts.", draw)
