"""When does fresh data matter? (Tajwar et al. 2024, arXiv 2404.14367; plan: conf/experiment/on_policy.yaml)"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dpo_ref.evaluation.policy import read_summary
from dpo_ref.evaluation.stages import read_evaluated
from dpo_ref.evaluation.sweep import numbered_folders
from dpo_ref.reports.plots import Panel
from studies.intervals import LEVEL, Interval, over_runs, over_runs_and_prompts
from studies.pictures import bars, forest, line, look
from studies.records import Finding, Record, above, apart, below, findings_table, markdown, rounded, shown, wrap
from studies.runner import Run, Runs, initial_metrics, run, sweep
from studies.tuning import SEEDS, slug

MINUTES = 190

# --- bandits

PEAKS = {"near": 20, "far": 70}
SCHEDULES = ("offline", "on_policy")
Where = tuple[str, str]  # peak and schedule
Bandits = Mapping[tuple[str, str], dict[Where, tuple[str, list[float]]]]


@dataclass(frozen=True, slots=True)
class World:
    """A bandit, its methods by name, the learning rates that each is tried at, over three seeds from `tuned_on`, and
    the seeds of its results."""

    experiment: str
    methods: Mapping[str, tuple[str, ...]]
    lrs: tuple[str, ...]
    num_seeds: int
    first_seed: int = 0
    tuned_on: int = 100


BEST = "bandit.samples_per_group=10"
WORLDS = {
    "arms": World(
        "bandit_arms",
        {
            "dpo": ("objective=dpo",),
            "ipo_sum": ("objective=ipo_sum",),
            "sft, better of 2": ("objective=sft",),
            "sft, best of 10": ("objective=sft", BEST),
            "rwr": ("objective=rwr",),
            "reinforce": ("objective=reinforce",),
        },
        ("0.003", "0.01", "0.03", "0.1", "0.3"),
        5,
    ),
    "tokens": World(
        "bandit_tokens",
        {"dpo": ("objective=dpo",), "sft, best of 10": ("objective=sft", BEST), "reinforce": ("objective=reinforce",)},
        ("3e-4", "1e-3", "3e-3"),
        3,
    ),
}
AGAIN = {
    "arms (20 seeds)": replace(
        WORLDS["arms"], lrs=("0.01", "0.03", "0.1", "0.3", "1", "3"), num_seeds=20, first_seed=1000, tuned_on=200
    ),
    "tokens (10 seeds)": replace(
        WORLDS["tokens"], lrs=("3e-4", "1e-3", "3e-3", "1e-2", "3e-2"), num_seeds=10, first_seed=1000, tuned_on=200
    ),
}


def _rewards(
    folder: Path, world: World, words: Sequence[str], lrs: Sequence[str], seed: int, num_seeds: int
) -> dict[tuple[str, Where], list[float]]:
    """Final rewards of one method by seed, for each learning rate and each peak and schedule."""
    asked = ("bandit.beside=[]", "bandit.measure_every=100", f"bandit.lr={','.join(lrs)}", f"seed={seed}")
    words = (f"+experiment={world.experiment}", "hydra/launcher=side_by_side", *words, *asked)
    run(folder, "train.py", "-m", *words, f"bandit.num_seeds={num_seeds}")
    traces = [read_summary(job, job.name)["bandit"] for job in numbered_folders(folder)]
    rewards: dict[tuple[str, Where], list[float]] = {}
    for lr, of_job in zip(lrs, traces, strict=True):
        for name, trace in of_job.items():
            peak, schedule, _ = name.split("/")
            rewards[lr, (peak.removeprefix("peak_"), schedule)] = trace["reward"]
    return rewards


def _bandit(folder: Path, world: World, words: Sequence[str]) -> dict[Where, tuple[str, list[float]]]:
    """The learning rate that was chosen for each peak and schedule, and the rewards there."""
    tried = _rewards(folder / "tuning", world, words, world.lrs, world.tuned_on, 3)
    where = [(peak, schedule) for peak, schedule in product(map(str, PEAKS.values()), SCHEDULES)]
    chosen = {each: max(world.lrs, key=lambda lr, each=each: np.mean(tried[lr, each])) for each in where}
    lrs = [lr for lr in world.lrs if lr in chosen.values()]
    rewards = _rewards(folder / "results", world, words, lrs, world.first_seed, world.num_seeds)
    return {each: (lr, rewards[lr, each]) for each, lr in chosen.items()}


def _bandits(folder: Path, worlds: Mapping[str, World]) -> Bandits:
    """By world and method."""
    return {
        (name, method): _bandit(folder / slug(name) / slug(method), world, words)
        for name, world in worlds.items()
        for method, words in world.methods.items()
    }


# --- the lab

LRS = ("1e-4", "3e-4", "1e-3", "3e-3")
METHODS = {
    "dpo": ("objective=dpo", "beta=0.3"),
    "sft, best of 4": ("objective=sft",),
    "reinforce": ("objective=reinforce", "beta=0.05"),
}
DATA = {"fresh": ("data.sample_every=1",), "stale": ("data.sample_every=64",)}
NEAR, FAR = 13, 60  # tokens
REWARDS: dict[str, tuple[str, ...]] = {
    "gold": ("scorer@data.scorer=gold",),
    "near": ("scorer@data.scorer=length", f"data.scorer.target={NEAR}"),
    "far": ("scorer@data.scorer=length", f"data.scorer.target={FAR}"),
}
PASSES = ("1", "2", "4", "8", "16")
TUNED_ON = ("data.prompts.test_split=validation", "seed=100")
RESULTS_ON = ("data.prompts.test_split=test", *SEEDS)


def _closeness(target: int) -> Callable[[Run], Float[np.ndarray, " P"]]:
    """What scorer=length says of a run's answers, by prompt."""

    def score(one: Run) -> Float[np.ndarray, " P"]:
        generations = read_evaluated(one.folder).generations
        index = np.array([generation.prompt_index for generation in generations])
        values = [-abs(generation.num_tokens - target) / 10 for generation in generations]
        return np.bincount(index, weights=values) / np.bincount(index)

    return score


SCORES: dict[str, Callable[[Run], Float[np.ndarray, " P"]]] = {
    "gold": lambda one: one.gold,
    "near": _closeness(NEAR),
    "far": _closeness(FAR),
}


@dataclass(frozen=True, slots=True)
class LabCell:
    """The policies of one method, reward and kind of data at the learning rate that was chosen, and what their answers
    are worth by that reward."""

    lr: str
    runs: Runs
    scores: Float[np.ndarray, "U P"]


def _lab_cell(folder: Path, words: Sequence[str], reward: str) -> LabCell:
    score = SCORES[reward]
    asked = ("+experiment=on_policy", *words, *REWARDS[reward])
    tried = sweep(folder / "tuning", *asked, f"optim.lr={','.join(LRS)}", *TUNED_ON)
    lr = max(LRS, key=lambda lr: np.mean([score(one) for one in tried.at(**{"optim.lr": lr}).runs]))
    runs = sweep(folder / "results", *asked, f"optim.lr={lr}", *RESULTS_ON)
    return LabCell(lr, runs, np.stack([score(one) for one in runs.runs]))


def _lab(folder: Path) -> dict[tuple[str, str, str], LabCell]:
    """By reward, method and data."""
    return {
        (reward, method, data): _lab_cell(folder / reward / slug(method) / data, (*words, *of_data), reward)
        for reward in REWARDS
        for method, words in METHODS.items()
        for data, of_data in DATA.items()
    }


def _reuse(folder: Path, lab: Mapping[tuple[str, str, str], LabCell]) -> dict[tuple[str, str], Runs]:
    """By method and passes."""
    methods = METHODS | {"ppo_clip": ("objective=ppo_clip",)}
    reused = {}
    for method, words in methods.items():
        lr = lab["gold", "reinforce" if method == "ppo_clip" else method, "fresh"].lr
        asked = (*words, f"optim.lr={lr}", "data.rounds=16", f"data.inner_epochs={','.join(PASSES)}", *RESULTS_ON)
        runs = sweep(folder / slug(method), "+experiment=on_policy", *asked)
        reused |= {(method, passes): runs.at(**{"data.inner_epochs": passes}) for passes in PASSES}
    return reused


# --- what came of it


def record(folder: Path) -> Record:
    """Run what is left of the plan, and what came of it."""
    bandits, lab = _bandits(folder / "bandits", WORLDS), _lab(folder / "lab")
    reused = _reuse(folder / "reuse", lab)
    again = _bandits(folder / "bandits", AGAIN)
    rows = {
        "bandits": [
            {"world": world, "method": method, "peak": peak, "data": schedule, "lr": lr,
             "reward": rounded(over_runs(rewards, [world] * len(rewards)))}
            for (world, method), cells in [*bandits.items(), *again.items()]
            for (peak, schedule), (lr, rewards) in cells.items()
        ],
        "lab": [
            {"reward": reward, "method": method, "data": data, "lr": cell.lr, "runs": len(cell.runs.runs),
             "degenerate": cell.runs.num_degenerate,
             "score": rounded(over_runs_and_prompts(cell.scores, cell.runs.initials)),
             "kl": rounded(cell.runs.mean("kl")), "tokens": rounded(cell.runs.mean("tokens"))}
            for (reward, method, data), cell in lab.items()
        ],
        "reuse": [
            {"method": method, "passes": passes, "runs": len(runs.runs), "degenerate": runs.num_degenerate,
             "gold": rounded(runs.mean("gold")), "kl": rounded(runs.mean("kl"))}
            for (method, passes), runs in reused.items()
        ],
    }  # fmt: skip
    findings = [
        *_of_bandits(bandits),
        *_of_bandits(again),
        *_of_lab(lab),
        *_of_reuse(reused),
    ]
    return Record(rows, findings, {"initial": initial_metrics(folder / "initial")})


def _paired(values: Float[np.ndarray, " S"], count: int) -> Interval:
    return over_runs(values.tolist(), ["world"] * len(values), 1 - (1 - LEVEL) / count)


def _of_bandits(bandits: Bandits) -> list[Finding]:
    return [*_far_gains(bandits), *_negative_gradient(bandits), *_complementary(bandits)]


def _far_gains(bandits: Bandits) -> list[Finding]:
    near, far = map(str, PEAKS.values())
    findings = []
    for (world, method), cells in bandits.items():
        reward = {each: np.array(rewards) for each, (_, rewards) in cells.items()}
        gains = [reward[peak, "on_policy"] - reward[peak, "offline"] for peak in (far, near)]
        statement = f"F1 {world}, {method}: gain of on-policy data, far less near"
        findings.append(above(statement, _paired(gains[0] - gains[1], len(bandits))))
    return findings


def _negative_gradient(bandits: Bandits) -> list[Finding]:
    findings = []
    (world,) = {world for world, method in bandits if method == "ipo_sum"}
    for method, (name, peak) in product(("dpo", "ipo_sum"), PEAKS.items()):
        ours, theirs = (bandits[world, each][str(peak), "offline"][1] for each in (method, "sft, best of 10"))
        statement = f"F4 {world}, offline, {name} peak: {method} less sft on the best of 10"
        findings.append(above(statement, _paired(np.array(ours) - np.array(theirs), 4)))
    return findings


def _complementary(bandits: Bandits) -> list[Finding]:
    findings, far = [], str(PEAKS["far"])
    for world in dict.fromkeys(world for world, _ in bandits):
        ours = np.array(bandits[world, "dpo"][far, "on_policy"][1])
        others = {"offline dpo": ("dpo", "offline"), "on-policy sft, best of 10": ("sft, best of 10", "on_policy")}
        for name, (method, schedule) in others.items():
            gain = ours - np.array(bandits[world, method][far, schedule][1])
            findings.append(above(f"F6 {world}, far peak: on-policy dpo less {name}", _paired(gain, 4)))
    return findings


def _of_lab(lab: Mapping[tuple[str, str, str], LabCell]) -> list[Finding]:
    confidence = 1 - (1 - LEVEL) / len(METHODS)
    far, fresh = [], []
    for method in METHODS:
        gains = {
            reward: lab[reward, method, "fresh"].scores - lab[reward, method, "stale"].scores for reward in REWARDS
        }
        initials = lab["gold", method, "fresh"].runs.initials
        difference = over_runs_and_prompts(gains["far"] - gains["near"], initials, confidence)
        far.append(
            above(f"F1 lab, {method}: gain of fresh samples, far length less near (tens of tokens)", difference)
        )
        gold = over_runs_and_prompts(gains["gold"], initials, confidence)
        fresh.append(apart(f"F2 lab, {method}: gold with fresh less with stale samples", gold))
    return [*far, *fresh]


def _of_reuse(reused: Mapping[tuple[str, str], Runs]) -> list[Finding]:
    methods = [method for method, passes in reused if passes == PASSES[0]]
    count = len(methods) + 2
    confidence = 1 - (1 - LEVEL) / count

    def gain(method: str, passes: str, fewer: str) -> Interval:
        runs = reused[method, passes]
        return over_runs_and_prompts(runs.less(reused[method, fewer]), runs.initials, confidence)

    more = [above(f"F3 lab, {method}: gold at 8 passes less at 1", gain(method, "8", "1")) for method in methods]
    too_many = ("sft, best of 4", "reinforce")
    return [
        *more,
        *(below(f"F3 lab, {method}: gold at 16 passes less at 8", gain(method, "16", "8")) for method in too_many),
    ]


# --- as it is shown


def parts(found: Record) -> dict[str, str]:
    """What is written into the page."""
    bandits = [
        [row["world"], row["method"], row["peak"], row["data"].replace("_", "-"), row["lr"], shown(row["reward"])]
        for row in found.rows["bandits"]
    ]
    lab = [
        [row["reward"], row["method"], row["data"], row["lr"], shown(row["score"]), shown(row["kl"], 2),
         shown(row["tokens"], 1), f"{row['degenerate']} of {row['runs']}"]
        for row in found.rows["lab"]
    ]  # fmt: skip
    reuse = [
        [
            row["method"],
            row["passes"],
            shown(row["gold"]),
            shown(row["kl"], 2),
            f"{row['degenerate']} of {row['runs']}",
        ]
        for row in found.rows["reuse"]
    ]
    lab_titles = ["reward", "method", "data", "learning rate", "reward earned", "KL, nats", "tokens", "degenerate"]
    return {
        "on_policy tests": findings_table(found),
        "on_policy bandits": markdown(["bandit", "method", "peak", "data", "learning rate", "reward"], bandits),
        "on_policy lab": markdown(lab_titles, lab),
        "on_policy reuse": markdown(["method", "passes", "gold", "KL, nats", "degenerate"], reuse),
    }


def answer(found: Record) -> str:
    """What was found, in a paragraph: how many of each letter's tests are borne out in each world."""
    sentences = []
    for letter, claim in CLAIMS.items():
        held: dict[str, list[bool]] = {}
        for finding in found.findings:
            if finding.statement.startswith(f"{letter} "):
                held.setdefault(finding.statement.split(",")[0].removeprefix(f"{letter} "), []).append(finding.holds)
        sentences.append(f"{claim}: {', '.join(f'{world} {sum(of)} of {len(of)}' for world, of in held.items())}.")
    return wrap(" ".join(sentences))


CLAIMS = {
    "F1": "Fresh data gains more where the peak is far",
    "F2": "Fresh and stale samples differ in gold",
    "F3": "Reuse helps up to 8 passes, and 16 are too many for sft and reinforce",
    "F4": "A negative gradient helps offline",
    "F6": "On-policy dpo earns more than either alone",
}


def panels(found: Record) -> list[Panel]:
    """The pictures: the arms offline and on-policy at either peak; fresh less stale in the lab; reuse."""
    near, far = (_arms_panel(found, name) for name in PEAKS)
    return [near, far, _fresh_panel(found), _reuse_panel(found)]


def _arms_panel(found: Record, peak: str) -> Panel:
    world, *_ = AGAIN
    rows = [row for row in found.rows["bandits"] if row["world"] == world and row["peak"] == str(PEAKS[peak])]
    methods = list(WORLDS["arms"].methods)

    def draw(axes: Any) -> None:
        for index, schedule in enumerate(SCHEDULES):
            rewards = {row["method"]: row["reward"] for row in rows if row["data"] == schedule}
            means, lengths = bars([rewards[method] for method in methods])
            places = np.arange(len(methods)) + (index - 0.5) / 4
            label = schedule.replace("_", "-")
            axes.errorbar(means, places, xerr=lengths, linestyle="none", capsize=3, label=label, **look(index))
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_title(f"100 arms, the peak {peak}")
        axes.set_xlabel("reward")
        axes.legend(loc="best")

    return Panel(f"Reward of each method at its own learning rate, the peak {peak}; 95 % intervals over seeds.", draw)


def _fresh_panel(found: Record) -> Panel:
    findings = [each for each in found.findings if each.statement.startswith(("F1 lab", "F2 lab"))]
    of_gold = [each.statement.startswith("F2") for each in findings]
    methods = [each.statement.removeprefix("F1 lab, ").removeprefix("F2 lab, ").split(":")[0] for each in findings]
    names = [f"{method}: {'gold' if gold else 'far − near'}" for method, gold in zip(methods, of_gold, strict=True)]

    def draw(axes: Any) -> None:
        forest(axes, names, [each.estimate for each in findings], 0.0)
        axes.set_title("Fresh less stale samples in the lab")
        axes.set_xlabel("reward (lengths: tens of tokens)")

    return Panel("Differences with their intervals.", draw)


def _reuse_panel(found: Record) -> Panel:
    methods = list(dict.fromkeys(row["method"] for row in found.rows["reuse"]))

    def draw(axes: Any) -> None:
        for index, method in enumerate(methods):
            rows = [row for row in found.rows["reuse"] if row["method"] == method]
            line(axes, [float(row["passes"]) for row in rows], [row["gold"] for row in rows], index, method)
        axes.set_xscale("log", base=2)
        axes.set_xticks([float(passes) for passes in PASSES], PASSES)
        axes.set_title("Sample reuse, 2,048 rewards")
        axes.set_xlabel("passes over each round's samples")
        axes.set_ylabel("gold reward")
        axes.legend(loc="best")

    return Panel("Gold reward with 95 % intervals over seeds and prompts.", draw)
