"""How strong should the KL constraint of DPO be? (RQ1 of arXiv 2407.13709; plan: conf/experiment/strength.yaml)"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ref.reports.plots import BROKEN, Panel
from studies.intervals import LEVEL, Interval, over_runs, over_runs_and_prompts
from studies.pictures import level, line, strength_axis
from studies.records import (
    Finding,
    Record,
    above,
    apart,
    below,
    findings_table,
    markdown,
    percent,
    rounded,
    row_of,
    shown,
    wrap,
)
from studies.runner import INITIALS, Runs, initial_metrics, sweep

MINUTES = 60
BETAS = ("0.005", "0.02", "0.1", "0.3", "1", "3", "10")
CHOSEN = "1"  # on validation prompts, before (docs/lab.md)
VERBS = {"likes length": "likes length", "length-blind": "does not care for length"}
JUDGES = {"likes length": "length_bias_1", "length-blind": "length_bias_0"}
METRICS = ("gold", "win_rate", "tokens", "kl", "ended", "end", "accuracy")
CLASSES = ("end of the answer", "first of the answer", "punctuation", "other")


def sweeps(folder: Path) -> dict[str, Runs]:
    """The policies of each part of the plan."""
    parts = {
        judge: sweep(folder / name, "+experiment=strength", f"data.length_bias={name[-1]}")
        for judge, name in JUDGES.items()
    }
    words = ("data.length_bias=1", "optim.lr=1.5e-4", "model.path=lab:initial", "seed=0,1,2")
    return parts | {"smaller learning rate": sweep(folder / "low_lr", "+experiment=strength", *words)}


def record(folder: Path) -> Record:
    """Run what is left of the plan, and what came of it."""
    runs, initial = sweeps(folder), initial_metrics(folder / "initial")
    rows = [
        row_of(runs[part].at(beta=beta), METRICS, part=part, beta=beta)
        | {"less_chosen": _less_chosen(runs[part], beta)}
        | _classes(runs[part].at(beta=beta))
        for part in runs
        for beta in BETAS
    ]
    best = {part: _best_shares(runs[part]) for part in runs}
    by_initial = [
        row_of(runs[judge].at(beta=beta).where(lambda run, name=name: run.initial == name), ("gold",), part=judge,
               beta=beta, initial=name)
        for judge in JUDGES
        for beta in BETAS
        for name in INITIALS
    ]  # fmt: skip
    return Record(
        {"curve": rows, "by initial policy": by_initial}, _findings(runs, initial), {"best": best, "initial": initial}
    )


def _less_chosen(runs: Runs, beta: str) -> Interval:
    """Gold less that of the beta that was chosen beforehand."""
    return rounded(over_runs_and_prompts(_difference(runs, beta, CHOSEN), runs.at(beta=beta).initials))


def _classes(runs: Runs) -> dict[str, Any]:
    """Mean log-ratio of the tokens of chosen responses, by class."""
    found = [{bucket.name: bucket.mean.mean for bucket in run.classes("chosen")} for run in runs.runs]
    means = {name: over_runs([each[name] for each in found], runs.initials) for name in CLASSES}
    return {f"logratio, {name}": rounded(mean) for name, mean in means.items()}


def _best_shares(runs: Runs, num_resamples: int = 2000) -> dict[str, float]:
    """How often each beta has the highest gold when runs, within their initial policy, and prompts are drawn anew."""
    generator = np.random.default_rng(0)
    gold = np.stack([runs.at(beta=beta).gold for beta in BETAS])
    initials = np.array(runs.at(beta=BETAS[0]).initials)
    rows = [np.flatnonzero(initials == name) for name in dict.fromkeys(initials)]
    wins = np.zeros(len(BETAS))
    for _ in range(num_resamples):
        units = np.concatenate([generator.choice(of_one, len(of_one)) for of_one in rows])
        prompts = generator.integers(gold.shape[2], size=gold.shape[2])
        wins[gold[:, units][:, :, prompts].mean(axis=(1, 2)).argmax()] += 1
    return dict(zip(BETAS, (wins / num_resamples).tolist(), strict=True))


# --- the tests of the plan


def _findings(runs: dict[str, Runs], initial: dict[str, dict[str, float]]) -> list[Finding]:
    loosest = {judge: runs[judge].at(beta=BETAS[0]) for judge in JUDGES}
    longer, blind = (_lengths(loosest[judge], initial) for judge in JUDGES)
    harms = [_difference(runs[judge], CHOSEN, BETAS[0]) for judge in JUDGES]
    initials = loosest["likes length"].initials
    return [
        *_inside(runs),
        above(f"tokens over the initial policy's at beta {BETAS[0]}, likes length: more than 2", longer, 2.0),
        below(f"tokens over the initial policy's at beta {BETAS[0]}, length-blind: less than 1.25", blind, 1.25),
        below(f"log-ratio of the end token at beta {BETAS[0]}, likes length", loosest["likes length"].mean("end")),
        *(_monotone(runs[judge], judge) for judge in JUDGES),
        apart(
            f"gold, beta {CHOSEN} less beta {BETAS[0]}: of the judge who likes length less of the other",
            over_runs_and_prompts(harms[0] - harms[1], initials),
        ),
    ]


def _inside(runs: dict[str, Runs]) -> list[Finding]:
    """That the chosen beta is above both ends, for either judge; four differences at once."""
    confidence = 1 - (1 - LEVEL) / 4
    findings = []
    for judge in JUDGES:
        initials = runs[judge].at(beta=CHOSEN).initials
        for statement, other in zip(_insides(judge), (BETAS[0], BETAS[-1]), strict=True):
            gain = _difference(runs[judge], CHOSEN, other)
            findings.append(above(statement, over_runs_and_prompts(gain, initials, confidence)))
    return findings


def _lengths(runs: Runs, initial: dict[str, dict[str, float]]) -> Interval:
    ratios = [run.metrics["tokens"] / initial[run.initial]["tokens"] for run in runs.runs]
    return over_runs(ratios, runs.initials)


def _difference(runs: Runs, beta: str, other: str) -> np.ndarray:
    return runs.at(beta=beta).less(runs.at(beta=other))


def _monotone(runs: Runs, judge: str) -> Finding:
    kl = np.array([runs.at(beta=beta).values("kl") for beta in BETAS])
    falls = (np.diff(kl, axis=0) < 0).all(axis=0)
    share = float(falls.mean())
    return Finding(
        f"share of runs in which KL falls at every step of beta, {judge}", Interval(share, share, share), share == 1
    )


# --- as it is shown


def answer(found: Record) -> str:
    """What was found, a paragraph for each judge."""
    return "\n\n".join(wrap(_of_judge(found, judge)) for judge in JUDGES)


def _of_judge(found: Record, judge: str) -> str:
    rows = [row for row in found.rows["curve"] if row["part"] == judge]
    best, loosest = max(rows, key=lambda row: row["gold"].mean), rows[0]
    tokens, kl = best["tokens"].mean, best["kl"].mean
    weak, strong = (shown(each.estimate) for each in found.findings if each.statement in _insides(judge))
    return (
        f"With a judge who {VERBS[judge]}, gold is highest at β = {best['beta']}: {shown(best['gold'])}, with "
        f"{tokens:.0f} tokens an answer and {kl:.1f} nats from the initial policy. β = {CHOSEN}, chosen beforehand, "
        f"earns {weak} more than {BETAS[0]} and {strong} more than {BETAS[-1]}. At {BETAS[0]} answers have "
        f"{loosest['tokens'].mean:.0f} tokens, the end token's log-ratio is {shown(loosest['end'], 1)}, and "
        f"the policy is {loosest['kl'].mean:.0f} nats away."
    )


def _insides(judge: str) -> list[str]:
    return [f"gold, beta {CHOSEN} less beta {other}, {judge}" for other in (BETAS[0], BETAS[-1])]


def parts(found: Record) -> dict[str, str]:
    """What is written into the page."""
    titles = [
        "judge",
        "β",
        "gold",
        f"less β = {CHOSEN}",
        "win rate, %",
        "tokens",
        "KL, nats",
        "end token, nats",
        "accuracy",
        "degenerate",
        "best in",
    ]
    rows = [
        [
            row["part"],
            row["beta"],
            shown(row["gold"]),
            shown(row["less_chosen"]),
            percent(row["win_rate"]),
            shown(row["tokens"], 1),
            shown(row["kl"], 2),
            shown(row["end"], 2),
            shown(row["accuracy"]),
            f"{row['degenerate']} of {row['runs']}",
            f"{found.also['best'][row['part']][row['beta']]:.0%}",
        ]
        for row in found.rows["curve"]
    ]
    initials = _initials_table(found)
    return {"strength": markdown(titles, rows), "strength tests": findings_table(found), "strength initials": initials}


def _initials_table(found: Record) -> str:
    """Gold from each initial policy."""
    rows = [
        [judge, beta, *(shown(found.row("by initial policy", part=judge, beta=beta, initial=name)["gold"])
                        for name in INITIALS)]
        for judge in JUDGES
        for beta in BETAS
    ]  # fmt: skip
    return markdown(["judge", "β", *(f"gold, `{name}`" for name in INITIALS)], rows)


def _curve(found: Record, key: str, title: str, label: str, caption: str, initial: float | None = None) -> Panel:
    def draw(axes: Any) -> None:
        for index, part in enumerate(dict.fromkeys(row["part"] for row in found.rows["curve"])):
            rows = [row for row in found.rows["curve"] if row["part"] == part]
            line(axes, _betas(rows), [row[key] for row in rows], index, part)
            broken = [row for row in rows if 2 * row["degenerate"] > row["runs"]]
            axes.plot(_betas(broken), [row[key].mean for row in broken], "x", color=BROKEN, zorder=4, markersize=9)
        axes.plot([], [], "x", color=BROKEN, markersize=9, label="most runs degenerate")
        if initial is not None:
            level(axes, initial)
        strength_axis(axes, BETAS)
        axes.set_title(title)
        axes.set_ylabel(label)
        if key == "kl":  # where there is room
            level(axes, -1, "initial policies")
            axes.set_ylim(bottom=-0.5)
            axes.legend(loc="upper right")

    return Panel(caption, draw)


def _betas(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(row["beta"]) for row in rows]


def _classes_panel(found: Record) -> Panel:
    def draw(axes: Any) -> None:
        rows = [row for row in found.rows["curve"] if row["part"] == "likes length"]
        for index, name in enumerate(CLASSES):
            line(axes, _betas(rows), [row[f"logratio, {name}"] for row in rows], index, name)
        level(axes, 0.0)
        strength_axis(axes, BETAS)
        axes.set_title("Which tokens move (judge likes length)")
        axes.set_ylabel("log-ratio, nats a token")
        axes.legend(loc="best")

    return Panel("Mean log-ratio to the initial policy of the tokens of held-out chosen responses.", draw)


def panels(found: Record) -> list[Panel]:
    """The pictures: reward, length, distance, and tokens against beta."""
    gold, tokens = (np.mean([each[key] for each in found.also["initial"].values()]) for key in ("gold", "tokens"))
    return [
        _curve(found, "gold", "Reward of the answers", "gold reward", "Gold reward.", float(gold)),
        _curve(found, "tokens", "Length of the answers", "tokens", "Tokens an answer.", float(tokens)),
        _curve(found, "kl", "Distance from the initial policy", "nats an answer", "KL to the initial policy."),
        _classes_panel(found),
    ]
