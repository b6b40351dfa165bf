"""What one evaluated policy leaves behind: `evaluation.json`, and the scores of its generations in `scores.json`.

`evaluation.json` is one flat object of `metrics` beside what was evaluated and how. Values that could not be measured
are null. Which metrics there are says the table below: what shows, draws or explains one reads its row.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_ref.files.digests import Damaged, sealed, unsealed
from dpo_ref.files.writing import write_json
from dpo_ref.generation.records import Generation
from dpo_ref.tracking.terminal import say
from dpo_ref.types import digest

RESULTS = "evaluation"  # where an evaluation's files lie in a run's folder
STORED = ("**/*.json*",)  # those of them that it goes on from


# --- the table of metrics: a number is a row here, and the function that measures it


Style = Literal["number", "error", "percent", "percent_error", "interval", "beside_length"]  # `reports.tables.STYLES`


class Heading(NamedTuple):
    """How a table shows a metric: its column's title, how entries are written, and what the column's note says of that
    beyond the metric's meaning."""

    title: str
    style: Style
    note: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table. Texts hold names in braces: the scorer's, the baseline's, that of a model or a set of
    responses; `beside` is what follows the key for an error, the ends of an interval and the like."""

    key: str
    title: str  # in lists and above curves
    unit: str
    better: Literal["higher", "lower", "none"]
    meaning: str = ""
    beside: tuple[str, ...] = ()
    column: Heading | None = None  # of the tables on pages
    brief: Heading | None = None  # of those in a terminal
    unscored: Heading | None = None  # of those, where nobody scored the answers
    decimals: int = 2
    signed: bool = False
    otherwise: str | None = None  # the key that stands in where this metric was not measured

    @property
    def by_judge(self) -> bool:
        """Whether a judge has to be asked for it."""
        return self.key.startswith("judge")

    def of(self, **names: str | None) -> str:
        """The key with its names filled in."""
        return self.key.format(**names)


ERROR, INTERVAL = ("_se",), ("_low", "_high")

SCORE = Metric(
    "{scorer}/mean", "reward of own answers", "the scorer's", "higher", "mean over all answers", ERROR,
    column=Heading("{scorer} reward", "error", " ± standard error, clustered by prompt"),
    brief=Heading("{scorer}", "error"), decimals=3,
)  # fmt: skip
WIN_RATE = Metric(
    "winrate/{baseline}", "win rate against the {baseline} policy", "share of comparisons", "higher",
    "paired by prompt against the baseline, ties half", (*INTERVAL, "_ties"),
    column=Heading("Win rate", "interval", "; 95 % bootstrap interval over prompts"),
    brief=Heading("win rate", "interval"),
)  # fmt: skip
JUDGE_WIN_RATE = Metric(
    "judge_winrate/{baseline}", "the judge's win rate", "share of comparisons", "higher",
    "mean preference of {judge} against the baseline",
    (*ERROR, *INTERVAL, "_discrete", "_length_adjusted", "_length_adjusted_low", "_length_adjusted_high"),
    column=Heading("Judge's win rate", "interval", "; 95 % bootstrap interval over prompts"),
    brief=Heading("judge", "percent_error"),
)  # fmt: skip

LENGTH = Metric(
    "lengths/response", "length of answers, tokens", "tokens", "none", "tokens per answer, the end token counted",
    (*ERROR, "_median", "_p95"),
    column=Heading("Length", "error", ", ± standard error"), brief=Heading("tokens", "number"), decimals=1,
)  # fmt: skip
LENGTH_CHARS = Metric("lengths/response_chars", "length of answers, characters", "characters", "none", beside=ERROR)
ENDED = Metric(
    "ended/share", "answers that end", "share of answers", "higher",
    "share of answers that ended by themselves before the token limit", ERROR,
    column=Heading("Ended", "percent"), brief=Heading("ended", "percent"),
)  # fmt: skip
REPETITION = Metric(
    "repetition/seq_rep_4", "repetition", "share of 4-grams", "lower",
    "share of an answer's 4-grams that repeat an earlier one", ERROR,
    column=Heading("seq-rep-4", "number"), decimals=3,
)  # fmt: skip

KL = Metric(
    "kl/{model}", "KL to the {model} policy", "nats per answer", "none",
    "nats per answer from the policy's own samples, Rao-Blackwellised",
    (*ERROR, "_k1", "_k1_se", "_per_token", "_per_byte", "_share_cut"),
    column=Heading("KL to initial", "error", ", ± standard error"), brief=Heading("KL", "number"),
)  # fmt: skip
END_OWN = Metric(
    "eos/own_logratio", "end-token shift on own answers", "nats", "none", "after own answers that end", ERROR
)
END_CHOSEN = Metric(
    "eos/chosen_logratio", "end-token shift", "nats", "none",
    "log p(end) under the policy minus under the initial policy, after held-out chosen responses, in nats", ERROR,
    column=Heading("End-token shift", "error"), brief=Heading("end Δ", "number"),
    signed=True, otherwise=END_OWN.key,
)  # fmt: skip
END_REJECTED = Metric(
    "eos/rejected_logratio", "end-token shift on rejected", "nats", "none", "after held-out rejected responses", ERROR
)

LOGRATIO = Metric(
    "logratios/{side}", "log-ratio of {side} responses", "nats", "none",
    "log-probability under the policy minus under the initial policy, held-out pairs", ERROR,
)  # fmt: skip
ACCURACY = Metric(
    "rewards/accuracies", "pair accuracy", "share of pairs", "higher",
    "held-out pairs that the implicit reward ranks as labelled", ERROR,
    column=Heading("Pair accuracy", "beside_length", " (in brackets: preferring the longer response)"),
    unscored=Heading("pairs (longer)", "beside_length"),
)  # fmt: skip
TIES = Metric("rewards/ties", "pairs of equal rewards", "share of pairs", "lower", "they count as wrong")
MARGIN = Metric(
    "rewards/margins", "reward margin", "nats", "higher", "chosen minus rejected log-ratio to the loss reference"
)
LENGTH_BASELINE = Metric(
    "rewards/length_baseline", "accuracy of length alone", "share of pairs", "none", "preferring the longer response"
)
NUM_PAIRS = Metric("rewards/num_pairs", "held-out pairs", "pairs", "none")
ABOVE_LENGTH = Metric(
    "rewards/above_length", "accuracy above length alone", "share of pairs", "higher", "pair by pair", ERROR
)

TOKEN_SHIFT = Metric("tokens/{text}_abs", "size of token log-ratios", "nats per token", "none", "mean absolute value")
TOP_1 = Metric("tokens/{text}_top_1_percent", "what the largest 1 % carry", "share of all sizes", "none", "of tokens")
TOP_10 = Metric(
    "tokens/{text}_top_10_percent", "what the largest 10 % carry", "share of all sizes", "none", "of tokens"
)
ENTROPY = Metric(
    "entropy/{text}", "entropy of the next token", "nats per token", "none",
    "of the policy, and of the other models on the same prefixes", (*ERROR, "_initial", "_initial_se", "_reference"),
)  # fmt: skip
MOVED_MEDIAN = Metric("displacement/{side}_median", "median change of log-probability", "nats", "none")
MOVED_DOWN = Metric("displacement/{side}_share_down", "log-probability fell", "share of pairs", "none", beside=ERROR)
MOVED_PER_TOKEN = Metric(
    "displacement/{side}_per_token", "change of log-probability", "nats per token", "none", beside=ERROR
)
BOTH_UP = Metric("displacement/both_up", "both rose", "share of pairs", "none")
CHOSEN_UP = Metric("displacement/chosen_up_rejected_down", "chosen rose, rejected fell", "share of pairs", "none")
CHOSEN_DOWN = Metric("displacement/chosen_down_rejected_up", "chosen fell, rejected rose", "share of pairs", "none")
BOTH_DOWN = Metric("displacement/both_down", "both fell", "share of pairs", "none")
PAIR_FILE = Metric(
    "pairs/{file}/{score}", "accuracy of {score} on pairs of a file", "share of pairs", "higher", beside=ERROR
)

CONSISTENCY = Metric(
    "judge/position_consistency", "same winner in both orders", "share of pairs", "higher",
    "share of pairs for which {judge} has the same winner whichever answer is shown first",
    column=Heading("Same in both orders", "percent"),
)  # fmt: skip
FIRST_POSITION = Metric(
    "judge/first_position", "answer shown first wins", "share of questions", "none", "half without a bias"
)
JUDGE_TIES = Metric("judge/ties", "ties", "share of preferences", "none", "preferences of exactly one half")
WINRATE_LONGER = Metric("judge/winrate_longer", "policy wins where it is longer", "share of pairs", "none")
WINRATE_SHORTER = Metric("judge/winrate_shorter", "policy wins where it is shorter", "share of pairs", "none")
LONGER_SHARE = Metric("judge/longer_share", "the policy's answer is longer", "share of pairs", "none")
NUM_JUDGE_PAIRS = Metric("judge/num_pairs", "pairs of answers", "pairs", "none")
NUM_JUDGED = Metric("judge/num_judged", "pairs with a preference", "pairs", "none")
NUM_MISSING = Metric("judge/num_missing", "pairs without a preference", "pairs", "lower")
IDENTICAL = Metric(
    "judge/identical", "pairs of identical answers", "pairs", "none", "ties about which nobody is asked"
)
PARSE_FAILURES = Metric("judge/parse_failures", "answers without a verdict", "questions", "lower")
REFUSALS = Metric("judge/refusals", "refused questions", "questions", "lower")
PROMPT_TOKENS = Metric(
    "judge/prompt_tokens", "tokens of questions", "tokens", "lower", "whether asked now or known before"
)
COMPLETION_TOKENS = Metric("judge/completion_tokens", "tokens of answers", "tokens", "lower", "likewise")
COST = Metric("judge/cost", "cost", "the prices'", "lower", "of all these tokens, where prices are given")

AT_TEMPERATURE = Metric(
    "temperature/{temperature}/{key}", "a metric by temperature", "the metric's", "none",
    "at each of several temperatures, written 0, 0.7, 1: what depends on answers alone",
)  # fmt: skip
LOSS = Metric("loss", "loss of the objective", "the objective's", "lower", "held-out items; while training only")
DEGENERATE = Metric("degenerate", "degenerate", "0 or 1", "lower", "beyond a threshold; while training only")
SECONDS = Metric("seconds", "duration of the evaluation", "seconds", "lower", "while training only")

METRICS = tuple(row for row in list(vars().values()) if isinstance(row, Metric))  # all of the above, in their order


BEST_BY = {  # what a run measures of held-out data while it trains, by the name before it, where one way is better
    "eval": (LOSS, ACCURACY, MARGIN, TIES),
    "evaluation": (SCORE, WIN_RATE, ENDED, REPETITION, DEGENERATE),
}


def direction(key: str) -> Literal["higher", "lower", "none"] | None:
    """Which way a metric of `metrics.jsonl` is better; None where it is none that training measures of held-out
    data."""
    prefix, _, name = key.partition("/")
    rows = [row for row in METRICS if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(row.key)), name)]
    if prefix not in BEST_BY or not rows:
        return None
    return rows[0].better if rows[0] in BEST_BY[prefix] or rows[0].better == "none" else None


# --- an evaluation, and its files


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
    missing: list[str] = field(default_factory=list)  # what was asked for and is not among the metrics, and why

    def get(self, key: str) -> float:
        """A metric, nan where it was not measured."""
        return self.metrics.get(key, math.nan)

    def key(self, metric: Metric) -> str:
        """Where a metric stands among this policy's: KL is to the initial policy."""
        key = metric.of(scorer=self.scorer, baseline=self.baseline, model="initial")
        return metric.otherwise if metric.otherwise and key not in self.metrics else key

    def value(self, metric: Metric) -> float:
        """The metric in this row of the table, nan where it was not measured."""
        return self.get(self.key(metric))


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation with the answers it rests on and the scorer's number for each of them."""

    evaluation: Evaluation
    generations: list[Generation]
    scores: list[float]


ALL_AGAIN = "run evaluate.py again with stage=all, which makes it again"


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of an evaluation, with its digest."""
    write_json(path, sealed(content))


def read_record(path: Path, remedy: str = ALL_AGAIN) -> dict[str, Any]:
    """What `write_record` wrote. Raises Damaged, naming the file and `remedy`, for anything else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error})", remedy) from error
    return unsealed(content, str(path), remedy)


def stored_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote, for the stage that else makes it: empty where there is none, or none that is whole,
    and then that is said."""
    try:
        return read_record(path) if path.is_file() else {}
    except Damaged as damage:
        say(f"{damage.what}: it is made again")
        return {}


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
    write_record(folder / "evaluation.json", asdict(evaluation) | {"metrics": finite})


def read_evaluation(folder: Path) -> Evaluation:
    """Read `evaluation.json`; metrics that could not be measured are left out. ValueError if there is none."""
    path = folder / "evaluation.json"
    content = read_record(path)
    if missing := [name for name in ("name", "scorer", "metrics") if name not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; run evaluate.py again with stage=all")
    arguments = {f.name: content[f.name] for f in fields(Evaluation) if f.name in content}
    arguments["metrics"] = {key: value for key, value in content["metrics"].items() if value is not None}
    return Evaluation(**arguments)


def _answers(generations: Sequence[Generation]) -> str:
    return digest([[g.prompt, g.sample_index, g.output, g.finish_reason] for g in generations])


def write_scores(folder: Path, scorer: str, generations: Sequence[Generation], scores: Sequence[float]) -> None:
    """Write `scores.json`: one number for each line of `generations.jsonl`, and which answers they belong to."""
    values = [None if math.isnan(score) else score for score in scores]  # an answer nobody scored
    content = {"scorer": scorer, "generations": _answers(generations), "scores": values}
    write_record(folder / "scores.json", content)


def read_scores(folder: Path, generations: Sequence[Generation]) -> list[float]:
    """Read `scores.json`. Raises ValueError if it belongs to other generations."""
    content = read_record(folder / "scores.json", "score again with stage=score")
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
        for name, share in (("min_ended_share", self.min_ended_share), ("max_seq_rep_4", self.max_seq_rep_4)):
            if not 0 <= share <= 1:
                raise ValueError(f"degeneration.{name}={share} is a share: it must lie in [0, 1]")
        if not self.max_length_ratio > 0:
            raise ValueError(f"degeneration.max_length_ratio={self.max_length_ratio} must be positive")


def degeneration(
    metrics: Mapping[str, float], initial: Mapping[str, float], thresholds: Thresholds | None = None
) -> list[str]:
    """Why a policy with these `metrics` is degenerate, beside the initial policy's; empty if it is not.

    A metric that was not measured convicts nobody.
    """
    limits = thresholds or Thresholds()
    ended = metrics.get(ENDED.key, math.nan)
    repetition = metrics.get(REPETITION.key, math.nan)
    ratio = metrics.get(LENGTH.key, math.nan) / (initial.get(LENGTH.key) or math.nan)
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
    scorer, baseline = evaluations[0].scorer, evaluations[0].baseline
    reward = f"{scorer} reward"
    measures = [
        Measure(WIN_RATE.of(baseline=baseline), f"win rate against {baseline}, %", "win rate, %", 100.0, 1),
        Measure(SCORE.of(scorer=scorer), reward, reward, 1.0, SCORE.decimals),
    ]
    whole = [measure for measure in measures if not any(math.isnan(e.get(measure.key)) for e in evaluations)]
    return (whole or measures)[0]


# --- several sampling temperatures
# An evaluation for each, in a folder of its own, joined into one curve. The first of them, or 1 where it is among them
# (KL is measured there), is the evaluation proper; the others lie in `temperature-<T>/` below it, with the same files.
# `evaluation.json` of the evaluation proper holds what was found at each of them, as `temperature/<T>/<key>`.


FOLDER = "temperature-"


def in_order(temperature: float | list[float]) -> list[float]:
    """The temperatures, that of the evaluation proper first."""
    temperatures = temperature if isinstance(temperature, list) else [temperature]
    return sorted(temperatures, key=lambda value: value != 1)


def folder_at(folder: Path, temperature: float) -> Path:
    """Where the evaluation at a further temperature lies."""
    return folder / f"{FOLDER}{temperature:g}"


def stored_in(folder: Path) -> list[float]:
    """The further temperatures that were evaluated, ascending."""
    names = (path.parent.name for path in folder.glob(f"{FOLDER}*/generations.jsonl"))
    return sorted(float(name.removeprefix(FOLDER)) for name in names)


def with_curve(evaluated: Evaluated, others: Sequence[Evaluated]) -> Evaluated:
    """The evaluation proper with what was found at every temperature. What is measured there alone (KL, held-out
    pairs) is no part of the curve."""
    shared = {key for other in others for key in other.evaluation.metrics}
    curve = {
        AT_TEMPERATURE.of(temperature=f"{member.evaluation.generation['temperature']:g}", key=key): value
        for member in (evaluated, *others)
        for key, value in member.evaluation.metrics.items()
        if key in shared
    }
    return replace(evaluated, evaluation=replace(evaluated.evaluation, metrics=evaluated.evaluation.metrics | curve))


def join_temperatures(folder: Path, evaluated: Evaluated, others: Sequence[Evaluated]) -> Evaluated:
    """The evaluation proper with its curve, stored."""
    whole = with_curve(evaluated, others)
    write_evaluation(folder, whole.evaluation)
    return whole
