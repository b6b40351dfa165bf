"""Invented sweeps over two keys, with the records that real jobs leave."""

from dataclasses import replace
from pathlib import Path

from dpo_ref.evaluation.results import RESULTS, Evaluated, Evaluation, write_evaluation
from dpo_ref.evaluation.sweep import Climb
from tests.support import evaluations as invented


def job(folder: Path, words: list[str], beta: float, seed: int = 0, **record) -> Path:
    """A job's record; `words` are its overrides."""
    invented.summary(folder, objective="dpo", reference="initial", beta=beta, seed=seed,
                     overrides=["objective=dpo", *words, f"beta={beta}", f"seed={seed}"], **record)  # fmt: skip
    return folder


def measured(folder: Path, beta: float, seed: int, gold: float, degenerate: bool = False) -> None:
    """An evaluation of which the gold reward is known, with a standard error of 0.01."""
    metrics = {"gold/mean": gold, "gold/mean_se": 0.01, "lengths/response": 10.0, "lengths/response_se": 0.1}
    reasons = ["answers are 3.00 times as long as the initial policy's (above 2)"] if degenerate else []
    evaluation = Evaluation("x", "gold", metrics, "initial", "dpo", "initial", beta, seed, degenerate=reasons)
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    write_evaluation(folder / RESULTS, evaluation)


def typed_in(folder: Path, *words: str) -> None:
    """What Hydra keeps of a sweep's command."""
    lines = "".join(f"    - {word}\n" for word in words)
    (folder / "multirun.yaml").write_text(f"hydra:\n  overrides:\n    task:\n{lines}beta: null\n")


def grid(folder: Path, gold: dict[tuple[str, float], float], degenerate: tuple[tuple[str, float], ...] = ()) -> None:
    """A sweep over the learning rate, as its jobs get it, and beta, one seed, with these gold rewards."""
    for index, ((lr, beta), value) in enumerate(gold.items()):
        place = job(folder / f"{index}_beta-{beta:g}_optim.lr-{lr}", [f"optim.lr={lr}"], beta)
        measured(place, beta, 0, value, (lr, beta) in degenerate)


def search(folder: Path, values: dict[tuple[str, float], tuple[float, ...]], steps=(32, 80, 256)) -> None:
    """A search over the same: the metric at each rung that a job reached."""
    for index, ((lr, beta), reached) in enumerate(values.items()):
        climb = Climb(
            "evaluation/gold/mean", "higher", len(steps), steps[-1], tuple(zip(steps, reached, strict=False))
        )
        whole = len(reached) == len(steps)
        ended = {} if whole else {"status": "stopped", "stopped_by": "search.rung"}
        words = [f"optim.lr={lr}", "+search=halving", "search.rung=1"]
        place = job(folder / f"{index}_beta-{beta:g}_optim.lr-{lr}", words, beta, search=climb.record(), **ended)
        if whole:
            measured(place, beta, 0, reached[-1])


def baseline(folder: Path) -> Evaluated:
    """The initial policy, whose gold reward is 0.5."""
    whole = invented.initial(folder, num_prompts=4)
    metrics = whole.evaluation.metrics | {"gold/mean": 0.5, "gold/mean_se": 0.01}
    return replace(whole, evaluation=replace(whole.evaluation, metrics=metrics))
