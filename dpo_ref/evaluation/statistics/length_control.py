"""AlpacaEval's length-controlled win rate (Dubois et al. 2024, arXiv:2404.04475), `length_controlled_v1`.

A model's preferences against the baseline are explained by

    logit P(model beats baseline | prompt i) = theta + phi tanh(d_i / s.d.(d)) + psi gamma_i

with d the characters of the baseline's answer less the model's, s.d. over the model's prompts (n - 1), gamma_i the
difficulty of instruction i, which AlpacaEval publishes, and no other intercept. The win rate is the mean of the
prediction at d = 0. To tie phi and psi down, two gamed variants of the baseline (told to be concise, told to be
verbose) are fitted along, without theta, each with a tenth of a row's weight.
"""

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from dpo_ref.evaluation.statistics.comparisons import check_preferences
from dpo_ref.evaluation.statistics.estimates import percentile_interval, resampled_counts, sigmoid

# --- the arithmetic


GAMED_WEIGHT = 0.2 / 2  # lambda 0.2, shared by two gamed baselines
NUM_FOLDS = 5
CLIP = 1e-15
NUM_REFITS = 200
SOLVER: Any = {"solver": "liblinear", "fit_intercept": False, "random_state": 123}


@dataclass(frozen=True, slots=True, eq=False)
class Gamed:
    """The gamed baselines' rows: P(gamed wins), the standardised length difference, the prompt's difficulty."""

    preferences: Float[np.ndarray, " M"]
    scaled_differences: Float[np.ndarray, " M"]
    difficulties: Float[np.ndarray, " M"]


class LengthControlled(NamedTuple):
    """The length-controlled win rate in [0, 1] and the model's coefficients.

    `standard_error` is AlpacaEval's: that of the mean of predictions over prompts, which leaves out that theta, phi
    and psi are estimates; `refit_interval` does not. `inverse_penalty` is the C that cross-validation chose.
    """

    win_rate: float
    standard_error: float
    theta: float
    phi: float
    psi: float
    inverse_penalty: float


class _Rows(NamedTuple):
    """What is fitted: features tanh, difficulty, not gamed; the share won; the weight. Gamed rows come first."""

    features: Float[np.ndarray, "R 3"]
    shares: Float[np.ndarray, " R"]
    weights: Float[np.ndarray, " R"]


def _rows(
    preferences: Float[np.ndarray, " N"],
    differences: Float[np.ndarray, " N"],
    difficulties: Float[np.ndarray, " N"],
    gamed: Gamed,
) -> _Rows:
    present = ~np.isnan(preferences)
    ours = np.column_stack([np.tanh(differences), difficulties, np.ones(len(differences))])[present]
    theirs = np.column_stack([np.tanh(gamed.scaled_differences), gamed.difficulties, np.zeros(len(gamed.preferences))])
    weights = np.concatenate([np.full(len(theirs), GAMED_WEIGHT), np.ones(len(ours))])
    return _Rows(np.concatenate([theirs, ours]), np.concatenate([gamed.preferences, preferences[present]]), weights)


def _log_loss(y: Int[np.ndarray, " R"], p: Float[np.ndarray, " R"], share: Any, weight: Any) -> float:
    """Weighted cross entropy. Every row is there twice, and `share` is that of its own y."""
    p, won = np.clip(p, CLIP, 1 - CLIP), np.where(y == 1, share, 1 - np.asarray(share))
    return -float(np.mean(weight * (won * np.log(p) + (1 - won) * np.log(1 - p))))


def _doubled_rows(rows: _Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels, shares and weights with every row once as won and once as lost."""
    size = len(rows.shares)
    labels = np.repeat([1, 0], size)
    shares = np.concatenate([rows.shares, 1 - rows.shares])
    return np.tile(rows.features, (2, 1)), labels, shares, np.tile(rows.weights, 2)


def _cross_validate(rows: _Rows) -> tuple[Float[np.ndarray, " 3"], float]:
    """Coefficients and C of an L1-penalised fit, C chosen by 5 folds of whole rows."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    features, labels, shares, weights = _doubled_rows(rows)
    with config_context(enable_metadata_routing=True):
        scorer: Any = make_scorer(_log_loss, response_method="predict_proba", greater_is_better=False)
        scorer = scorer.set_score_request(share=True, weight=True)
        options: Any = {"l1_ratios": (1.0,), "use_legacy_attributes": False, **SOLVER}
        model: Any = LogisticRegressionCV(Cs=10, cv=GroupKFold(n_splits=NUM_FOLDS), scoring=scorer, **options)
        model.set_fit_request(sample_weight=True)
        groups = np.tile(np.arange(len(rows.shares)), 2)
        model.fit(features, labels, sample_weight=shares * weights, groups=groups, share=shares, weight=weights)
    return model.coef_[0], float(model.C_)


def scaled_differences(
    policy_lengths: Num[np.ndarray, " N"], baseline_lengths: Num[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """The baseline's length less the model's over its standard deviation. Raises ValueError where all are equal."""
    differences = (baseline_lengths - policy_lengths).astype(np.float64)
    if len(differences) < 2 or np.ptp(differences) == 0:
        raise ValueError("all answers are longer than the baseline's by one same amount: length cannot be told apart")
    return differences / differences.std(ddof=1)


def length_controlled(
    preferences: Float[np.ndarray, " N"],
    policy_lengths: Num[np.ndarray, " N"],
    baseline_lengths: Num[np.ndarray, " N"],
    difficulties: Float[np.ndarray, " N"],
    gamed: Gamed,
) -> LengthControlled:
    """Fit a model's rows, in AlpacaEval's order of prompts: the folds depend on it.

    Preferences are P(model wins); rows where one is missing (nan) are predicted but not fitted, as AlpacaEval does.
    Raises ValueError for lengths that differ by one same amount everywhere and for preferences outside [0, 1].
    """
    check_preferences(preferences)
    differences = scaled_differences(policy_lengths, baseline_lengths)
    coefficients, inverse_penalty = _cross_validate(_rows(preferences, differences, difficulties, gamed))
    phi, psi, theta = coefficients.tolist()
    predicted = sigmoid(theta + psi * difficulties)
    error = predicted.std(ddof=1) / np.sqrt(len(predicted))
    return LengthControlled(float(predicted.mean()), float(error), theta, phi, psi, inverse_penalty)


def predict(ours: LengthControlled, theirs: LengthControlled, difficulties: Float[np.ndarray, " P"]) -> float:
    """The length-controlled win rate of one model against another that it was never compared with, both fitted against
    the same baseline."""
    return float(sigmoid(ours.theta - theirs.theta + (ours.psi - theirs.psi) * difficulties).mean())


def refit_interval(
    fit: LengthControlled,
    preferences: Float[np.ndarray, " N"],
    policy_lengths: Num[np.ndarray, " N"],
    baseline_lengths: Num[np.ndarray, " N"],
    difficulties: Float[np.ndarray, " N"],
    gamed: Gamed,
    seed: int,
    num_refits: int = NUM_REFITS,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the win rate: prompts are drawn anew and everything is fitted again, but
    for the penalty, which stays the one that was chosen. Unlike AlpacaEval's error it covers that the coefficients are
    estimates."""
    from sklearn.linear_model import LogisticRegression

    rates = []
    for counts in resampled_counts(len(preferences), seed, num_resamples=num_refits):
        for count in counts.astype(np.int64):
            sample = np.repeat(np.arange(len(count)), count)
            differences = scaled_differences(policy_lengths[sample], baseline_lengths[sample])
            rows = _rows(preferences[sample], differences, difficulties[sample], gamed)
            features, labels, shares, weights = _doubled_rows(rows)
            model: Any = LogisticRegression(C=fit.inverse_penalty, l1_ratio=1.0, **SOLVER)
            _, psi, theta = model.fit(features, labels, sample_weight=shares * weights).coef_[0].tolist()
            rates.append(sigmoid(theta + psi * difficulties[sample]).mean())
    return percentile_interval(np.array(rates))


# --- what may be called AlpacaEval 2's
# Its 805 instructions, its baseline, its gamed rows. Everything is joined by the text of the instruction. AlpacaEval's
# own files number the instructions by their place in the list, so a list of the instructions in that order is needed
# too: a complete annotation file in AlpacaEval's order is one, else the baseline's answers are read.


BASELINE = "gpt4_1106_preview"
NUM_PROMPTS = 805
MAX_MISSING = NUM_PROMPTS // 100  # published models lack up to two judgments
ORDER = "2a82b0f830c70ece2a10aa5279e0b1a82b43a5507217169dbd2b3905b7badb6a"
REPOSITORY, REVISION = "tatsu-lab/alpaca_eval", "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
GAMED_FILE, BASELINE_FILE = "df_gamed.csv", "alpaca_eval_gpt4_baseline.json"
SHA256 = {
    GAMED_FILE: "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d",
    BASELINE_FILE: "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
}
HUB = "hub"
COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
OTHERWISE = "leave df_gamed out: length_adjusted is then the estimate for equal lengths, under its own name"


@dataclass(frozen=True, slots=True, eq=False)
class LengthControl:
    """The gamed baselines' rows, the difficulty of each instruction, and the instructions' places by their text."""

    gamed: Gamed
    difficulties: Float[np.ndarray, " P"]
    places: dict[str, int]

    def check(self, model: str, baseline: str, prompts: Sequence[str]) -> None:
        """Raise ValueError if a model's win rate on these prompts is not AlpacaEval's."""
        fault = f"{model} has no length-controlled AlpacaEval win rate:"
        if baseline != BASELINE:
            raise ValueError(
                f"{fault} it was compared with {baseline}, AlpacaEval's baseline is {BASELINE}; {OTHERWISE}"
            )
        if foreign := [prompt for prompt in prompts if prompt not in self.places]:
            raise ValueError(
                f"{fault} {len(foreign)} of its {len(prompts)} prompts are not AlpacaEval's, such as "
                f"{foreign[0][:60]!r}; {OTHERWISE}"
            )
        if len(set(prompts)) < len(prompts):
            raise ValueError(f"{fault} a prompt is there twice, and AlpacaEval judges one answer to each; {OTHERWISE}")
        if len(prompts) < len(self.places) - MAX_MISSING:
            raise ValueError(f"{fault} only {len(prompts)} of its {len(self.places)} prompts are there; {OTHERWISE}")


def order_digest(prompts: Iterable[str]) -> str:
    """Digest of a list of instructions in its order."""
    short = [hashlib.sha256(prompt.encode()).hexdigest()[:12] for prompt in prompts]
    return hashlib.sha256("\n".join(short).encode()).hexdigest()


def length_control(df_gamed: str, prompt_lists: Iterable[Sequence[str]]) -> LengthControl:
    """What the length-controlled win rate needs: `df_gamed` is the path of AlpacaEval's df_gamed.csv or of a folder
    with it, or `hub`. `prompt_lists` are those of the annotations. Raises ValueError for a file that is missing or
    not AlpacaEval's, and where the order of the instructions cannot be known."""
    source = Path(df_gamed).expanduser()
    folder = None if df_gamed == HUB else source if source.is_dir() else source.parent
    path = _locate(GAMED_FILE, folder) if folder is None or source.is_dir() else _original(source, GAMED_FILE)
    gamed, difficulties = read_gamed(path)
    complete = (list(prompts) for prompts in prompt_lists if order_digest(prompts) == ORDER)
    prompts = next(complete, None) or _instructions(_locate(BASELINE_FILE, folder))
    return LengthControl(gamed, difficulties, {prompt: index for index, prompt in enumerate(prompts)})


def _locate(name: str, folder: Path | None) -> Path:
    """A file in a folder, or from the hub."""
    if folder is not None:
        return _original(folder / name, name)
    from huggingface_hub import hf_hub_download

    try:
        return _original(Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=REVISION)), name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"df_gamed=hub: {name} of the dataset {REPOSITORY} cannot be had ({str(error).splitlines()[0]}); "
            f"{_remedy(name)}"
        ) from error


def _remedy(name: str) -> str:
    also = "" if name == GAMED_FILE else ", in the same folder as df_gamed.csv"
    return (
        f"download {name} from huggingface.co/datasets/{REPOSITORY} (revision {REVISION}){also}, and give "
        f"df_gamed=<its path>; or {OTHERWISE}"
    )


def _original(path: Path, name: str) -> Path:
    """The file, which must be AlpacaEval's own, byte for byte."""
    if not path.is_file():
        raise ValueError(f"df_gamed: {path} does not exist; {_remedy(name)}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != SHA256[name]:
        raise ValueError(
            f"df_gamed: {path} is not AlpacaEval's {name} (sha256 {sha256[:12]}, not {SHA256[name][:12]}), and with "
            f"any other the win rate is not AlpacaEval's; {_remedy(name)}"
        )
    return path


def _instructions(path: Path) -> list[str]:
    """The instructions in AlpacaEval's order, from the baseline's answers."""
    prompts = [row["instruction"] for row in json.loads(path.read_text(encoding="utf-8"))]
    if order_digest(prompts) != ORDER:
        raise ValueError(f"df_gamed: {path} does not list AlpacaEval's instructions in its order; {OTHERWISE}")
    return prompts


def read_gamed(path: Path) -> tuple[Gamed, Float[np.ndarray, " P"]]:
    """df_gamed.csv: the gamed rows, without those that were not judged, and the difficulty of each instruction.

    As in AlpacaEval the first rows, one for each instruction, give the difficulties. Raises ValueError for another
    layout.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it is not AlpacaEval's df_gamed.csv")
        rows = list(reader)
    preferences, scaled, difficulties = (
        np.array([float(row[name]) if row[name] else math.nan for row in rows])
        for name in ("preference", "std_delta_len", "instruction_difficulty")
    )
    num_prompts = len({row["index"] for row in rows})
    if len({row["index"] for row in rows[:num_prompts]}) < num_prompts:
        raise ValueError(f"{path}: its first {num_prompts} rows are not one for each instruction")
    if any(row["not_gamed_baseline"] != "False" for row in rows):
        raise ValueError(f"{path}: not_gamed_baseline must be False everywhere")
    present = ~np.isnan(preferences)
    return Gamed(preferences[present], scaled[present], difficulties[present]), difficulties[:num_prompts]
