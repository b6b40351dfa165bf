"""Does DPO buy more reward with the same distance? (arXiv 2305.18290; plan: conf/experiment/frontier.yaml)"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dpo_ref.evaluation.results import read_evaluation
from dpo_ref.evaluation.stages import read_evaluated
from dpo_ref.evaluation.sweep import collect
from dpo_ref.lab.conversations import FAMILIES
from dpo_ref.reports.plots import Panel
from studies import necessity
from studies.intervals import LEVEL, Interval, over_runs, over_runs_and_prompts
from studies.pictures import kl_axis, level, line
from studies.records import Finding, Record, above, findings_table, markdown, percent, rounded, row_of, shown, wrap
from studies.runner import (
    INITIALS,
    OUTPUTS,
    ROOT,
    Runs,
    by_prompt,
    initial_metrics,
    initial_policies,
    link,
    run,
    sweep,
)
from studies.tuning import SEEDS, Method, Place, best_of, swept, tried

MINUTES = 180
METRICS = ("gold", "win_rate", "tokens", "kl", "end", "accuracy")
EXPERIMENT, SAMPLED = "frontier", "on_policy"  # of methods on pairs, and of those on fresh samples
PPO = ("objective=ppo_clip",)
MODELS = OUTPUTS / "frontier" / "reward_models"


def _scored_by(folder: Path) -> tuple[str, str]:
    """Rewards by the reward model of the run's own initial policy and seed."""
    path = f"{folder.relative_to(ROOT)}/${{model.path}}/${{seed}}"
    return "scorer@data.scorer=reward_model", f"data.scorer.path={path}"


STRENGTHS, OF_PPO = ("0.03", "0.1", "0.3", "1", "3"), ("0.003", "0.01", "0.03", "0.1", "0.3")
FIRST = necessity.METHODS[0]
ON_PAIRS = (
    Method("ipo_sum", ("objective=ipo_sum", "reference=initial"), STRENGTHS),
    Method("unlikelihood", ("objective=unlikelihood",), ("0.01", "0.03", "0.1", "0.3", "1"), "objective.alpha"),
    Method("sft", ("objective=sft",), ("0.25", "0.5", "1", "2", "4"), "trainer.epochs"),
)
LEARNED = "ppo, reward model"
ON_SAMPLES = (
    Method("ppo, gold", PPO, OF_PPO, split="data.prompts.test_split"),
    Method(LEARNED, (*PPO, *_scored_by(MODELS)), OF_PPO, split="data.prompts.test_split"),
)
COUNTS = ("2", "4", "8", "16")
UNSEEN = ("sort", "reverse", "follow_up")
SEEN = f"[{','.join(name for name in FAMILIES if name not in UNSEEN)}]"
TEMPERATURES = ("0", "0.25", "0.5", "0.75", "1")


@dataclass(frozen=True, slots=True)
class Family:
    """A method at the learning rate that was chosen: the chosen place, and the policies at every strength."""

    method: Method
    chosen: Place
    runs: Mapping[Place, Runs]

    @property
    def at_chosen(self) -> Runs:
        """The policies of the chosen place."""
        return self.runs[self.chosen]


# --- running


def _family(folder: Path, experiment: str, method: Method, grid: Mapping[Place, Runs]) -> Family:
    chosen = best_of(grid)
    strengths = sorted({place[1] for place in grid}, key=float)
    runs = swept(folder / method.folder / "results", experiment, method, chosen[:1], strengths, method.results_on)
    return Family(method, chosen, runs)


def _families(folder: Path) -> dict[str, Family]:
    grid = tried(OUTPUTS / "necessity" / FIRST.folder, "necessity", FIRST)
    families = {FIRST.name: _family(folder, EXPERIMENT, FIRST, grid)}
    _reward_models(folder / "reward_model_runs", MODELS)
    for experiment, methods in ((EXPERIMENT, ON_PAIRS), (SAMPLED, ON_SAMPLES)):
        for method in methods:
            grid = tried(folder / method.folder, experiment, method)
            families[method.name] = _family(folder, experiment, method, grid)
    return families


def _reward_models(folder: Path, links: Path, *words: str) -> None:
    """A reward model for every initial policy and seed, under the names by which runs ask for it."""
    asked = ("objective=reward_model", "reference=auto", "optim.lr=3e-4", "trainer.epochs=4", *words)
    for name, on in {"tuning": ("seed=100", f"model.path={INITIALS[0]}"), "results": SEEDS}.items():
        run(folder / name, "train.py", "-m", f"+experiment={EXPERIMENT}", *asked, *on)
        for job in collect(folder / name):
            initial = next(word.partition("=")[2] for word in job.words if word.startswith("model.path="))
            link(links / initial / str(job.seed), job.folder / "policy")


def _best_of_n(folder: Path) -> dict[tuple[str, str], list[tuple[str, Float[np.ndarray, " P"]]]]:
    """By who chooses and n: the initial policy and the gold of the answers by prompt, of each seed."""
    found: dict[tuple[str, str], list[tuple[str, Float[np.ndarray, " P"]]]] = {}
    for initial in INITIALS:
        for seed in range(5):
            scorers = {
                "gold": ("scorer@generation.scorer=gold",),
                "reward model": (
                    "scorer@generation.scorer=reward_model",
                    f"generation.scorer.path={(MODELS / initial / str(seed)).relative_to(ROOT)}",
                ),
            }
            for chooser, words in scorers.items():
                for count in COUNTS:
                    to = folder / f"{initial.replace(':', '_')}_{seed}_{chooser.replace(' ', '_')}_{count}"
                    asked = (f"policy={initial}", "prompts=lab", f"seed={seed}", "generation=best_of", *words)
                    run(to, "evaluate.py", *asked, f"generation.best_of={count}")
                    found.setdefault((chooser, count), []).append((initial, by_prompt(read_evaluated(to))))
    return found


def _temperatures(folder: Path, family: Family) -> Float[np.ndarray, "T U"]:
    """Win rate against the initial policy at each temperature, of each run of the chosen place."""
    jobs = [one.folder.parent for one in family.at_chosen.runs]
    words = (f"sweep=[{','.join(str(job.relative_to(ROOT)) for job in jobs)}]", "n_jobs=null")
    run(folder, "evaluate.py", *words, f"generation.temperature=[{','.join(TEMPERATURES)}]")
    metrics = [read_evaluation(job / "evaluation").metrics for job in jobs]
    return np.array([[each[f"temperature/{value}/winrate/initial"] for each in metrics] for value in TEMPERATURES])


def _unseen(folder: Path, family: Family) -> Runs:
    """The chosen cell once more, trained without some families."""
    method, (lr, strength) = family.method, family.chosen
    on_samples = method in ON_SAMPLES
    words = [*method.words, f"optim.lr={lr}", f"{method.key}={strength}", *method.results_on]
    if on_samples:
        links = folder / "reward_models"
        _reward_models(folder / "reward_model_runs", links, f"data.families={SEEN}")
        words = [*PPO, *_scored_by(links), *words[len(method.words) :], f"data.prompts.families={SEEN}"]
    else:
        words.append(f"data.families={SEEN}")
    return sweep(folder / method.folder, f"+experiment={SAMPLED if on_samples else EXPERIMENT}", *words)


# --- what came of it


def record(folder: Path) -> Record:
    """Run what is left of the plan, and what came of it."""
    families = _families(folder)
    chosen_best = _best_of_n(folder / "best_of_n")
    asked = {name: families[name] for name in (FIRST.name, "sft", LEARNED)}
    warm = {name: _temperatures(folder / "temperatures" / each.method.folder, each) for name, each in asked.items()}
    unseen = {name: _unseen(folder / "unseen", each) for name, each in asked.items()}
    initial = {name: by_prompt(each) for name, each in initial_policies(folder / "initial").items()}
    at_dpo = families[FIRST.name].at_chosen.mean("kl").mean
    lines = {name: _line_of(each) for name, each in families.items()} | _lines_of_best(chosen_best)
    rows = {
        "families": [
            row_of(runs, METRICS, method=name, lr=place[0], strength=place[1], chosen=place == each.chosen)
            for name, each in families.items()
            for place, runs in each.runs.items()
        ],
        "best of n": [
            {"chooser": chooser, "n": count, "runs": len(cells), "kl": _kl_of_best(count), "gold": _gold_of(cells)}
            for (chooser, count), cells in chosen_best.items()
        ],
        "temperatures": [
            {"method": name, "temperature": value, "runs": len(rates),
             "win_rate": rounded(over_runs(rates.tolist(), families[name].at_chosen.initials))}
            for name, table in warm.items()
            for value, rates in zip(TEMPERATURES, table, strict=True)
        ],
    }  # fmt: skip
    findings = [*_at_equal_kl(lines, at_dpo), _fall(warm, families), *_on_unseen(unseen, initial)]
    reached = {name: line.reaches(at_dpo) for name, line in lines.items()}
    also = {"kl": at_dpo, "reached": reached, "initial": initial_metrics(folder / "initial")}
    return Record(rows, findings, also)


@dataclass(frozen=True, slots=True)
class Line:
    """Gold against KL of a method: for each of U runs and seeds K points, and the initial policy of each."""

    initials: list[str]
    kl: Float[np.ndarray, "U K"]
    gold: Float[np.ndarray, "U K"]

    def reaches(self, kl: float) -> bool:
        """Whether the points of every run lie on both sides of a KL."""
        return bool(((self.kl.min(axis=1) <= kl) & (kl <= self.kl.max(axis=1))).all())

    def at(self, kl: float) -> Float[np.ndarray, " U"]:
        """Gold of each at a KL that it reaches, between its points over ln KL."""
        values = []
        for x, y in zip(np.log(self.kl), self.gold, strict=True):
            order = np.argsort(x)
            values.append(np.interp(math.log(kl), x[order], y[order]))
        return np.array(values)


def _line_of(family: Family) -> Line:
    runs = list(family.runs.values())
    kl, gold = (np.array([each.values(metric) for each in runs]).T for metric in ("kl", "gold"))
    return Line(runs[0].initials, kl, gold)


def _gold_of(cells: Sequence[tuple[str, Float[np.ndarray, " P"]]]) -> Interval:
    initials = [initial for initial, _ in cells]
    return rounded(over_runs_and_prompts(np.stack([gold for _, gold in cells]), initials))


def _kl_of_best(count: str) -> float:
    return round(math.log(int(count)) - (int(count) - 1) / int(count), 6)


def _lines_of_best(
    found: Mapping[tuple[str, str], Sequence[tuple[str, Float[np.ndarray, " P"]]]],
) -> dict[str, Line]:
    lines = {}
    for chooser in dict.fromkeys(chooser for chooser, _ in found):
        gold = np.array([[answers.mean() for _, answers in found[chooser, count]] for count in COUNTS]).T
        initials = [initial for initial, _ in found[chooser, COUNTS[0]]]
        kl = np.broadcast_to([_kl_of_best(count) for count in COUNTS], gold.shape)
        lines[f"best of n, {chooser}"] = Line(initials, kl, gold)
    return lines


def _at_equal_kl(lines: Mapping[str, Line], kl: float) -> list[Finding]:
    ours = lines[FIRST.name]
    others = {name: line for name, line in lines.items() if name != FIRST.name and line.reaches(kl)}
    confidence = 1 - (1 - LEVEL) / max(1, len(others))
    return [
        above(
            f"gold at the KL of dpo's chosen cell, dpo less {name}",
            over_runs((ours.at(kl) - line.at(kl)).tolist(), ours.initials, confidence),
        )
        for name, line in others.items()
    ]


def _fall(warm: Mapping[str, Float[np.ndarray, "T U"]], families: Mapping[str, Family]) -> Finding:
    falls = {name: table[0] - table[-1] for name, table in warm.items()}
    gap = falls[LEARNED] - falls[FIRST.name]
    statement = "fall of the win rate from temperature 0 to 1, ppo with the reward model less dpo"
    return above(statement, over_runs(gap.tolist(), families[FIRST.name].at_chosen.initials))


def _on_unseen(unseen: Mapping[str, Runs], initial: Mapping[str, Float[np.ndarray, " P"]]) -> list[Finding]:
    confidence, findings = 1 - (1 - LEVEL) / len(unseen), []
    for name, runs in unseen.items():
        mask = of_families(len(runs.gold[0]), UNSEEN)
        gain = runs.gold - np.stack([initial[each] for each in runs.initials])
        interval = over_runs_and_prompts(gain[:, mask], runs.initials, confidence)
        findings.append(above(f"gold on families not trained on, {name} less the initial policy", interval))
    return findings


def of_families(num_prompts: int, names: Sequence[str]) -> Bool[np.ndarray, " P"]:
    """Which of the lab's first prompts are of these families, which take turns."""
    return np.array([name in names for name in islice(cycle(FAMILIES), num_prompts)])


# --- as it is shown


def parts(found: Record) -> dict[str, str]:
    """What is written into the page."""
    families = [
        [row["method"], row["lr"], row["strength"], "yes" if row["chosen"] else "", shown(row["gold"]),
         shown(row["kl"], 2), shown(row["tokens"], 1), f"{row['degenerate']} of {row['runs']}"]
        for row in found.rows["families"]
    ]  # fmt: skip
    best = [[row["chooser"], row["n"], shown(row["gold"]), f"{row['kl']:.2f}"] for row in found.rows["best of n"]]
    warm = [[row["method"], row["temperature"], percent(row["win_rate"])] for row in found.rows["temperatures"]]
    titles = ["method", "learning rate", "strength", "chosen", "gold", "KL, nats", "tokens", "degenerate"]
    return {
        "frontier tests": findings_table(found),
        "frontier": markdown(titles, families),
        "frontier best of n": markdown(["chosen by", "n", "gold", "KL, nats (bound)"], best),
        "frontier temperatures": markdown(["method", "temperature", "win rate, %"], warm),
        "frontier unreached": _unreached(found),
    }


def _unreached(found: Record) -> str:
    names = "; ".join(name for name, reached in found.also["reached"].items() if not reached)
    return wrap(f"Not compared at {found.also['kl']:.2f} nats, which not all of their runs reach: {names or 'none'}.")


def answer(found: Record) -> str:
    """What was found, in a paragraph."""
    equal = [each for each in found.findings if " dpo less " in each.statement]
    told = [f"{each.statement.partition(' dpo less ')[2]} {shown(each.estimate)}" for each in equal]
    (fall,) = (each for each in found.findings if each.statement.startswith("fall"))
    unseen = [each for each in found.findings if "not trained on" in each.statement]
    others = [f"{each.statement.partition(', ')[2].partition(' less')[0]} {shown(each.estimate)}" for each in unseen]
    return wrap(
        f"At {found.also['kl']:.2f} nats, gold of DPO less that of {'; '.join(told) or 'nothing that reaches it'}. "
        f"From temperature 0 to 1 the win rate of PPO with a reward model falls by {shown(fall.estimate)} more than "
        f"DPO's. On families that were not trained on, gold over the initial policy's: {'; '.join(others)}."
    )


def panels(found: Record) -> list[Panel]:
    """The pictures: gold against KL of all methods, and win rate against temperature."""
    return [_frontier_panel(found), _temperature_panel(found)]


def _frontier_panel(found: Record) -> Panel:
    def draw(axes: Any) -> None:
        methods = list(dict.fromkeys(row["method"] for row in found.rows["families"]))
        for index, method in enumerate(methods):
            rows = [row for row in found.rows["families"] if row["method"] == method]
            rows.sort(key=lambda row: row["kl"].mean)
            line(axes, [row["kl"].mean for row in rows], [row["gold"] for row in rows], index, method)
        for index, chooser in enumerate(dict.fromkeys(row["chooser"] for row in found.rows["best of n"])):
            rows = [row for row in found.rows["best of n"] if row["chooser"] == chooser]
            label = f"best of n, {chooser}"
            line(axes, [row["kl"] for row in rows], [row["gold"] for row in rows], len(methods) + index, label)
        kl_axis(
            axes, [row["kl"].mean for row in found.rows["families"]] + [row["kl"] for row in found.rows["best of n"]]
        )
        axes.set_title("Reward against distance")
        axes.set_ylabel("gold reward")
        axes.legend(loc="best", fontsize=7)

    return Panel("Gold reward against KL, a point for each strength; 95 % intervals of gold.", draw)


def _temperature_panel(found: Record) -> Panel:
    def draw(axes: Any) -> None:
        for index, method in enumerate(dict.fromkeys(row["method"] for row in found.rows["temperatures"])):
            rows = [row for row in found.rows["temperatures"] if row["method"] == method]
            intervals = [Interval(*(100 * value for value in row["win_rate"])) for row in rows]
            line(axes, [float(row["temperature"]) for row in rows], intervals, index, method)
        level(axes, 50.0)
        axes.set_title("Win rate at each temperature")
        axes.set_xlabel("temperature of policy and initial policy")
        axes.set_ylabel("% of comparisons, ties half")
        axes.legend(loc="best")

    return Panel("Win rate against the initial policy at the same temperature; 95 % intervals over seeds.", draw)
