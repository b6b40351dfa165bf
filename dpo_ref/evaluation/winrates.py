"""What judged answers of several models come to: win rates, paired differences, Bradley–Terry strengths. Whoever
judged them: AlpacaEval's annotation files and our own `judgments.jsonl` are read.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dpo_ref.evaluation.judging.judge import Judgment, read_judgments
from dpo_ref.evaluation.results import read_record
from dpo_ref.evaluation.stages import JUDGE_AGAIN, RECORD
from dpo_ref.evaluation.statistics.bradley_terry import BradleyTerry, bradley_terry
from dpo_ref.evaluation.statistics.comparisons import (
    PairedDifference,
    alpaca_share,
    alpaca_win_rate,
    paired_difference,
    preference_metrics,
)
from dpo_ref.evaluation.statistics.length_control import (
    LengthControl,
    LengthControlled,
    length_controlled,
    predict,
    refit_interval,
)
from dpo_ref.tracking.terminal import say
from dpo_ref.types import Progress, digest

# --- judged answers on disk


JUDGMENTS = "judgments.jsonl"
PATTERNS = ("annotations*.json", JUDGMENTS)


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """One model's answers judged against a baseline's. Preferences are P(model wins), nan where the judge gave none;
    lengths are characters; `baseline_answers` are digests."""

    model: str
    baseline: str
    judge: str
    prompts: tuple[str, ...]
    preferences: Float[np.ndarray, " N"]
    lengths: Int[np.ndarray, " N"]
    baseline_lengths: Int[np.ndarray, " N"]
    baseline_answers: tuple[str, ...]
    source: Path


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: str
    output: str
    baseline_output: str
    share: float


def annotation_files(paths: Iterable[str]) -> list[Path]:
    """The files that are meant: files as they are, and all that folders hold, at any depth. ValueError for none."""
    files: dict[Path, None] = {}
    for entry in paths:
        path = Path(entry).expanduser()
        inside = sorted(file for pattern in PATTERNS for file in path.rglob(pattern)) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"annotations: {path} holds no {' or '.join(PATTERNS)}; name the files themselves")
        files |= dict.fromkeys(inside)
    return list(files)


def read_matches(files: Sequence[Path]) -> list[Match]:
    """Every model against every baseline it was judged with, by judge. Raises ValueError, naming file and row, for
    what cannot be read, and for a model that is judged twice by the same judge against the same baseline."""
    matches = [match for file in files for match in (_judgments if file.suffix == ".jsonl" else _alpaca)(file)]
    sources: dict[tuple[str, str, str], Path] = {}
    for match in matches:
        key = (match.model, match.baseline, match.judge)
        if key in sources:
            raise ValueError(
                f"annotations: {match.model} against {match.baseline}, judged by {match.judge}, is in {sources[key]} "
                f"and in {match.source}; give one of them"
            )
        sources[key] = match.source
    return distinct_baselines(matches)


def _match(names: tuple[str, str, str], rows: Sequence[_Row], path: Path) -> Match:
    model, baseline, judge = names
    return Match(
        model=model,
        baseline=baseline,
        judge=judge,
        prompts=tuple(row.prompt for row in rows),
        preferences=np.array([row.share for row in rows]),
        lengths=np.array([len(row.output) for row in rows]),
        baseline_lengths=np.array([len(row.baseline_output) for row in rows]),
        baseline_answers=tuple(digest(row.baseline_output) for row in rows),
        source=path,
    )


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, not text")
    return value


def _number(row: Mapping[str, Any]) -> float | int | None:
    value = row["preference"]
    if value is not None and not isinstance(value, (int, float)):
        raise TypeError(f"preference={value!r} is no number")
    return value


ALPACA = (
    "AlpacaEval's annotations are a list of {instruction, output_1, output_2, generator_1, generator_2, preference}"
)


def _alpaca(path: Path) -> list[Match]:
    """output_1 and generator_1 are the baseline's; a preference of 2 is a win of generator_2."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"annotations: {path} cannot be read ({error}); give a JSON file, {JUDGMENTS} or a folder"
        ) from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"annotations: {path} is no list of rows; {ALPACA}")
    grouped: dict[tuple[str, str, str], list[_Row]] = defaultdict(list)
    for index, row in enumerate(content, start=1):
        try:
            names, entry = _alpaca_row(row)
        except KeyError as error:
            raise ValueError(f"{path} row {index} lacks {error}; {ALPACA}") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} row {index}: {error}; {ALPACA}") from error
        grouped[names].append(entry)
    return [_match(names, rows, path) for names, rows in grouped.items()]


def _alpaca_row(row: Mapping[str, Any]) -> tuple[tuple[str, str, str], _Row]:
    names = (_text(row, "generator_2"), _text(row, "generator_1"), str(row.get("annotator", "unknown judge")))
    prompt, output, baseline_output = (_text(row, name) for name in ("instruction", "output_2", "output_1"))
    return names, _Row(prompt, output, baseline_output, alpaca_share(_number(row)))


def _judgments(path: Path) -> list[Match]:
    """The names of policy, baseline and judge lie in the files beside it."""
    if not path.is_file():
        raise ValueError(f"annotations: {path} does not exist; judge with stage=judge")
    rows = [
        _judgment_row(judgment, f"{path} row {index}") for index, judgment in enumerate(read_judgments(path), start=1)
    ]
    about = read_record(path.with_name("evaluation.json"))
    judge = read_record(path.with_name(RECORD), JUDGE_AGAIN)["judge"]
    return [_match((about["name"], about["baseline"], f"{judge['name']} ({judge['model']})"), rows, path)]


def _judgment_row(judgment: Judgment, origin: str) -> _Row:
    pair, share = judgment.pair, judgment.preference
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"{origin}: preference={share} is not in [0, 1]; judge again with stage=judge")
    text = pair.prompt[0]["content"] if len(pair.prompt) == 1 else json.dumps(pair.prompt, ensure_ascii=False)
    return _Row(text, pair.output, pair.baseline_output, math.nan if share is None else float(share))


def _answers(match: Match) -> dict[str, set[str]]:
    answers: dict[str, set[str]] = defaultdict(set)
    for prompt, answer in zip(match.prompts, match.baseline_answers, strict=True):
        answers[prompt].add(answer)
    return answers


def distinct_baselines(matches: Sequence[Match]) -> list[Match]:
    """The matches, with baselines of one name that gave other answers to the same prompt named apart: they are
    different models (as the initial policies of two runs are), and nothing connects who was compared with them."""
    sharing: dict[tuple[str, str], list[Match]] = defaultdict(list)
    for match in matches:
        sharing[match.judge, match.baseline].append(match)
    apart = set()
    for key, group in sharing.items():
        answers = [_answers(match) for match in group]
        if any(a[p] != b[p] for a, b in combinations(answers, 2) for p in a.keys() & b.keys()):
            apart.add(key)
            say(f"{key[1]} is not the same model everywhere: its answers to the same prompts differ between files")
    return [
        replace(match, baseline=f"{match.baseline} of {match.model}")
        if (match.judge, match.baseline) in apart
        else match
        for match in matches
    ]


# --- what they come to


@dataclass(frozen=True, slots=True)
class ModelWinRate:
    """One model against one baseline: the names of `comparisons.preference_metrics`, AlpacaEval's counts and
    standard error, mean lengths in characters, and, where it may be called so, AlpacaEval's length-controlled win
    rate with the coefficients of its regression. Rates are shares."""

    model: str
    baseline: str
    judge: str
    metrics: dict[str, float]
    fitted: LengthControlled | None = None

    @property
    def name(self) -> str:
        """The model, and whom it was compared with."""
        return f"{self.model} against {self.baseline}"

    def get(self, key: str) -> float:
        """A metric, nan where it was not measured."""
        return self.metrics.get(key, math.nan)


@dataclass(frozen=True, slots=True)
class Versus:
    """Two models that were compared with the same baseline: how far their win rates lie apart on the prompts that both
    answered, and the first's predicted length-controlled win rate against the second."""

    model: str
    other: str
    baseline: str
    judge: str
    difference: PairedDifference
    length_controlled: float | None


@dataclass(frozen=True, slots=True)
class WinRates:
    """Everything, best win rate first. `strengths` by judge, of models that comparisons connect, more than two."""

    rates: list[ModelWinRate]
    versus: list[Versus]
    strengths: dict[str, list[BradleyTerry]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As strict JSON: what could not be measured is null."""
        content = asdict(self)
        for rate, row in zip(self.rates, content["rates"], strict=True):
            row["fitted"] = rate.fitted and rate.fitted._asdict()
        for versus, row in zip(self.versus, content["versus"], strict=True):
            row["difference"] = versus.difference._asdict()
        return _finite(content)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fit(match: Match, control: LengthControl, seed: int) -> tuple[LengthControlled, dict[str, float]]:
    """AlpacaEval's length-controlled win rate of a match, its rows brought into AlpacaEval's order by their text."""
    order = np.argsort([control.places[prompt] for prompt in match.prompts])
    indices = np.array([control.places[prompt] for prompt in match.prompts])[order]
    rows = (
        match.preferences[order],
        match.lengths[order],
        match.baseline_lengths[order],
        control.difficulties[indices],
    )
    fitted = length_controlled(*rows, control.gamed)
    low, high = refit_interval(fitted, *rows, control.gamed, seed)
    estimates = {"": fitted.win_rate, "_se": fitted.standard_error, "_low": low, "_high": high}
    return fitted, {f"length_controlled{part}": value for part, value in estimates.items()}


def _rate(match: Match, control: LengthControl | None, seed: int) -> ModelWinRate:
    plain = alpaca_win_rate(match.preferences)
    metrics = preference_metrics(match.preferences, match.lengths, match.baseline_lengths, match.prompts, seed)
    metrics |= {"length": float(match.lengths.mean()), "baseline_length": float(match.baseline_lengths.mean())}
    counts = {"n_wins": plain.n_wins, "n_wins_base": plain.n_wins_base, "n_draws": plain.n_draws}
    metrics |= {"standard_error": plain.standard_error} | {name: float(count) for name, count in counts.items()}
    if control is None:
        return ModelWinRate(match.model, match.baseline, match.judge, metrics)
    fitted, controlled = _fit(match, control, seed)
    return ModelWinRate(match.model, match.baseline, match.judge, metrics | controlled, fitted)


def _by_prompt(match: Match) -> dict[str, float]:
    """The mean preference on each prompt that has one."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for prompt, preference in zip(match.prompts, match.preferences.tolist(), strict=True):
        if not math.isnan(preference):
            by_prompt[prompt].append(preference)
    return {prompt: float(np.mean(values)) for prompt, values in by_prompt.items()}


def _versus(a: Match, b: Match, rates: Mapping[int, ModelWinRate], control: LengthControl | None, seed: int) -> Versus:
    ours, theirs = _by_prompt(a), _by_prompt(b)
    shared = [prompt for prompt in ours if prompt in theirs]
    a_shares, b_shares = (np.array([side[prompt] for prompt in shared]) for side in (ours, theirs))
    first, second = rates[id(a)].fitted, rates[id(b)].fitted
    predicted = predict(first, second, control.difficulties) if control and first and second else None
    difference = paired_difference(a_shares, b_shares, shared, seed)
    return Versus(a.model, b.model, a.baseline, a.judge, difference, predicted)


def _connected_parts(matches: Sequence[Match]) -> list[list[Match]]:
    """The matches, split where no comparison leads from one to the other."""
    parts: list[tuple[set[str], list[Match]]] = []
    for match in matches:
        names, joined = {match.model, match.baseline}, [match]
        for part in [part for part in parts if part[0] & names]:
            parts.remove(part)
            names, joined = names | part[0], part[1] + joined
        parts.append((names, joined))
    return [joined for names, joined in parts if len(names) > 2]


def _strengths(matches: Sequence[Match], seed: int) -> BradleyTerry:
    """Strengths relative to the baseline if there is one alone. Every prompt of a match weighs the same."""
    judged = [(match, prompt, share) for match in matches for prompt, share in _by_prompt(match).items()]
    baselines = {match.baseline for match in matches}
    return bradley_terry(
        [match.model for match, _, _ in judged],
        [match.baseline for match, _, _ in judged],
        np.array([share for _, _, share in judged]),
        [prompt for _, prompt, _ in judged],
        seed,
        anchor=baselines.pop() if len(baselines) == 1 else None,
    )


def win_rates(matches: Sequence[Match], control: LengthControl | None, seed: int, progress: Progress) -> WinRates:
    """All of it. A model that is its own baseline is left out of strengths and differences, of which it says nothing.

    Raises ValueError where `control` is given and a match is not AlpacaEval's, before anything is computed.
    """
    for match in matches:
        if control is not None:
            control.check(match.model, match.baseline, match.prompts)
    rates = {id(match): _rate(match, control, seed) for match in progress(matches, "win rates", len(matches))}
    order = sorted(matches, key=lambda match: -np.nan_to_num(rates[id(match)].get("win_rate"), nan=-1.0))
    compared = [match for match in order if match.model != match.baseline and _by_prompt(match)]
    pairs = [(a, b) for a, b in combinations(compared, 2) if (a.baseline, a.judge) == (b.baseline, b.judge)]
    versus = [_versus(a, b, rates, control, seed) for a, b in pairs if _by_prompt(a).keys() & _by_prompt(b).keys()]
    by_judge: dict[str, list[Match]] = defaultdict(list)
    for match in compared:
        by_judge[match.judge].append(match)
    strengths = {
        judge: [_strengths(part, seed) for part in _connected_parts(group)] for judge, group in by_judge.items()
    }
    return WinRates(
        [rates[id(match)] for match in order], versus, {j: parts for j, parts in strengths.items() if parts}
    )
