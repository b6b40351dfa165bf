"""What one evaluated policy leaves behind: `evaluation.json`, and the scores of its generations in `scores.json`.

`evaluation.json` is one flat object of `metrics` under the names below, beside what was evaluated and how. Values that
could not be measured are null. For a scorer `gold` and a baseline `initial`:

    gold/mean gold/mean_se                          scorer's mean over prompts
    winrate/initial (_low _high _ties)              share of comparisons won, 95 % interval, share of ties
    lengths/response (_se _median _p95), lengths/response_chars, ended/share, repetition/seq_rep_4
    kl/initial (_se _k1 _k1_se _per_token _share_cut)     nats per answer; share of answers cut at the limit
    eos/chosen_logratio, eos/rejected_logratio, eos/own_logratio (_se)     shift of the end token against the initial
        policy
    logratios/chosen, logratios/rejected (_se)      against the initial policy, held-out pairs
    rewards/accuracies (_se), rewards/ties, rewards/margins, rewards/length_baseline, rewards/num_pairs
    rewards/above_length (_se)                      accuracy - length_baseline, pair by pair
    tokens/own_abs, tokens/own_top_1_percent, tokens/own_top_10_percent     size of token log-ratios, concentration;
        also of chosen and rejected, as the next
    entropy/own, entropy/own_initial (_se)          of the next token, nats, both models on the same prefixes
    displacement/chosen_median, displacement/chosen_share_down (_se), displacement/chosen_per_token (_se), of rejected
    displacement/both_up, chosen_up_rejected_down, chosen_down_rejected_up, both_down      shares of pairs
    pairs/<subset>/<score> (_se)                    accuracy of each score on pairs of files
    judge_winrate/initial (_se _low _high _discrete)       mean preference of the judge, over the pairs it judged
    judge_winrate/initial_length_adjusted (_low _high)     the same as if both answers were equally long
    judge/num_pairs, judge/num_judged, judge/num_missing   pairs; those with a preference, and without
    judge/identical, judge/ties                            pairs of equal answers, which are ties; share of ties
    judge/position_consistency, judge/first_position       same winner in both orders; the answer shown first wins
    judge/winrate_longer, judge/winrate_shorter, judge/longer_share    where the policy's answer is longer, shorter
    judge/parse_failures, judge/refusals                   questions without a verdict
    judge/prompt_tokens, judge/completion_tokens, judge/cost   of all questions, whether asked now or known before
    temperature/<T>/<key>                           at each of several temperatures, written 0, 0.7, 1: what depends on
                                                    answers alone (gold/mean, winrate/initial, lengths/response, ...)
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dpo_ref.files import write_json
from dpo_ref.generation.records import Generation
from dpo_ref.types import digest

RESULTS = "evaluation"  # where an evaluation's files lie in a run's folder


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One policy's metrics, and what they are of. `degenerate` says why it counts as degenerate, if it does."""

    name: str
    scorer: str
    metrics: dict[str, float]
    baseline: str | None = None  # whom the win rate is against; None for the baseline itself
    objective: str | None = None
    reference: str | None = None
    beta: float | None = None
    seed: int | None = None
    num_seeds: int = 1  # above 1 where several runs were joined
    num_prompts: int = 0
    num_generations: int = 0
    generation: dict[str, Any] = field(default_factory=dict)  # temperature, top_p, max_new_tokens, seed, ...
    degenerate: list[str] = field(default_factory=list)
    judge: dict[str, Any] = field(default_factory=dict)  # who compared the answers, with which template and orders
    thresholds: dict[str, float] = field(default_factory=dict)  # beyond which a policy counts as degenerate

    def get(self, key: str) -> float:
        """A metric, nan where it was not measured."""
        return self.metrics.get(key, math.nan)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation with the answers it rests on and the scorer's number for each of them."""

    evaluation: Evaluation
    generations: list[Generation]
    scores: list[float]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); run evaluate.py again with stage=all") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; run evaluate.py again with stage=all")
    return content


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write `evaluation.json`."""
    finite = {key: value if math.isfinite(value) else None for key, value in sorted(evaluation.metrics.items())}
    write_json(folder / "evaluation.json", asdict(evaluation) | {"metrics": finite})


def read_evaluation(folder: Path) -> Evaluation:
    """Read `evaluation.json`; metrics that could not be measured are left out. ValueError if there is none."""
    path = folder / "evaluation.json"
    content = read_json(path)
    if missing := [name for name in ("name", "scorer", "metrics") if name not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; run evaluate.py again with stage=all")
    known = {f.name: content[f.name] for f in fields(Evaluation) if f.name in content}
    known["metrics"] = {key: value for key, value in content["metrics"].items() if value is not None}
    return Evaluation(**known)


def _answers(generations: Sequence[Generation]) -> str:
    return digest([[g.prompt, g.sample_index, g.output, g.finish_reason] for g in generations])


def write_scores(folder: Path, scorer: str, generations: Sequence[Generation], scores: Sequence[float]) -> None:
    """Write `scores.json`: one number for each line of `generations.jsonl`, and which answers they belong to."""
    numbers = [None if math.isnan(score) else score for score in scores]  # an answer nobody scored
    content = {"scorer": scorer, "generations": _answers(generations), "scores": numbers}
    write_json(folder / "scores.json", content)


def read_scores(folder: Path, generations: Sequence[Generation]) -> list[float]:
    """Read `scores.json`. Raises ValueError if it belongs to other generations."""
    content = read_json(folder / "scores.json")
    if content.get("generations") != _answers(generations):
        raise ValueError(f"{folder / 'scores.json'} belongs to other generations; score again with stage=score")
    return [math.nan if score is None else score for score in content["scores"]]


# --- when a policy counts as degenerate: its text is broken, whatever its reward says


@dataclass
class Thresholds:
    """`degeneration.*`: a policy beyond any of these is degenerate. Raises ValueError for what no policy could meet or
    miss.

    Chosen so that a healthy fine-tuned model, which ends nearly every answer and hardly repeats a 4-gram, is far from
    all of them, while a policy that lost its end token, loops, or doubled its length crosses one.
    """

    min_ended_share: float = 0.8
    max_seq_rep_4: float = 0.5
    max_length_ratio: float = 2.0  # mean length in tokens over the initial policy's

    def __post_init__(self) -> None:
        for name in ("min_ended_share", "max_seq_rep_4"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"degeneration.{name}={getattr(self, name)} is a share: it must lie in [0, 1]")
        if not self.max_length_ratio > 0:
            raise ValueError(f"degeneration.max_length_ratio={self.max_length_ratio} must be positive")


def degeneration(
    metrics: Mapping[str, float], initial: Mapping[str, float], thresholds: Thresholds | None = None
) -> list[str]:
    """Why a policy with these `metrics` is degenerate, beside the initial policy's; empty if it is not.

    A metric that was not measured convicts nobody.
    """
    limits = thresholds or Thresholds()
    ended = metrics.get("ended/share", math.nan)
    repetition = metrics.get("repetition/seq_rep_4", math.nan)
    ratio = metrics.get("lengths/response", math.nan) / (initial.get("lengths/response") or math.nan)
    reasons = []
    if ended < limits.min_ended_share:
        reasons.append(f"only {ended:.0%} of answers end (below {limits.min_ended_share:.0%})")
    if repetition > limits.max_seq_rep_4:
        reasons.append(f"seq-rep-4 is {repetition:.2f} (above {limits.max_seq_rep_4:g})")
    if ratio > limits.max_length_ratio:
        reasons.append(
            f"answers are {ratio:.2f} times as long as the initial policy's (above {limits.max_length_ratio:g})"
        )
    return reasons


# --- the one number by which policies are compared: the best one that was measured


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric that is better when larger: its key, its title in full and in short, and how it is written."""

    key: str
    title: str
    short: str
    scale: float
    decimals: int


def measure_of(evaluations: Sequence[Evaluation]) -> Measure:
    """The win rate against the evaluations' baseline if all of them have it, else the scorer's mean."""
    scorer = evaluations[0].scorer
    known = [
        Measure(
            f"winrate/{evaluations[0].baseline}",
            f"win rate against {evaluations[0].baseline}, %",
            "win rate, %",
            100.0,
            1,
        ),
        Measure(f"{scorer}/mean", f"{scorer} reward", f"{scorer} reward", 1.0, 3),
    ]
    whole = [one for one in known if not any(math.isnan(e.get(one.key)) for e in evaluations)]
    return (whole or known)[0]


# --- several sampling temperatures
# An evaluation for each, in a folder of its own, joined into one curve. The first of them, or 1 where it is among them
# (KL is measured there), is the evaluation proper; the others lie in `temperature-<T>/` below it, with the same files.
# `evaluation.json` of the evaluation proper holds what was found at each of them, as `temperature/<T>/<key>`.


FOLDER = "temperature-"


def in_order(temperature: float | list[float]) -> list[float]:
    """The temperatures, that of the evaluation proper first."""
    found = temperature if isinstance(temperature, list) else [temperature]
    return sorted(found, key=lambda one: one != 1)


def folder_at(folder: Path, temperature: float) -> Path:
    """Where the evaluation at a further temperature lies."""
    return folder / f"{FOLDER}{temperature:g}"


def stored_in(folder: Path) -> list[float]:
    """The further temperatures that were evaluated, ascending."""
    found = (path.parent.name for path in folder.glob(f"{FOLDER}*/generations.jsonl"))
    return sorted(float(name.removeprefix(FOLDER)) for name in found)


def with_curve(found: Evaluated, others: Sequence[Evaluated]) -> Evaluated:
    """The evaluation proper with what was found at every temperature. What is measured there alone (KL, held-out
    pairs) is no part of the curve."""
    shared = {key for other in others for key in other.evaluation.metrics}
    curve = {
        f"temperature/{one.evaluation.generation['temperature']:g}/{key}": value
        for one in (found, *others)
        for key, value in one.evaluation.metrics.items()
        if key in shared
    }
    return replace(found, evaluation=replace(found.evaluation, metrics=found.evaluation.metrics | curve))


def joined(folder: Path, found: Evaluated, others: Sequence[Evaluated]) -> Evaluated:
    """The evaluation proper with its curve, stored."""
    whole = with_curve(found, others)
    write_evaluation(folder, whole.evaluation)
    return whole
