"""The stages of an evaluation. Each leaves a file behind, and is skipped when that file already answers its question.

generate   generations.jsonl (+ generations.key.json: digest of everything that determines them; while
           under way, generations-<key>.partial.jsonl, from which it goes on after a crash)
measure    measurements.json: what needs the models: KL, held-out pairs
diagnose   diagnostics.json, and token_examples.json with single responses to look at
score      scores.json, evaluation.json: what needs only the answers
judge      judgments.jsonl, every pair with all that was said of it, and judge.json, what they come to
report     report.html, from the files alone

The judge's numbers join those of `evaluation.json`. They stay there when answers are scored again, as long as they are
about the same answers of policy and baseline.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ref.evaluation import results
from dpo_ref.evaluation.diagnostics.diagnose import Diagnosed, Diagnosis, restore
from dpo_ref.evaluation.diagnostics.examples import TokenExample
from dpo_ref.evaluation.judging.judge import Judge, Pair, answer_pairs, judge_metrics, judge_pairs, write_judgments
from dpo_ref.evaluation.results import (
    Evaluated,
    Evaluation,
    Metric,
    Thresholds,
    degeneration,
    read_evaluation,
    read_record,
    read_scores,
    stored_record,
    write_evaluation,
    write_record,
    write_scores,
)
from dpo_ref.evaluation.statistics.comparisons import win_rate
from dpo_ref.evaluation.statistics.estimates import clustered_mean
from dpo_ref.files.digests import Damaged
from dpo_ref.files.writing import plain
from dpo_ref.generation.engine import Kept, KeptInFile, PromptSet
from dpo_ref.generation.records import SAMPLE_AGAIN, Generation, read_generations, write_generations
from dpo_ref.tracking.terminal import say
from dpo_ref.types import Progress, digest

CHANGES_NO_SAMPLE = ("batch_size", "concurrency", "retries", "timeout", "url")
BASELINE_SEED = 1_000_003  # added to the seed: answers that are compared share no random numbers


def generation_key(
    weights: str,
    text_identity: str,
    prompts: PromptSet,
    seed: int,
    options: Mapping[str, Any],
) -> str:
    """Digest of what determines generations: weights, tokenizer and template, prompts, seed, options."""
    return digest([weights, text_identity, prompts.content(), seed, deciding(options)])


def deciding(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of generation on which samples depend."""
    return {name: value for name, value in options.items() if name not in CHANGES_NO_SAMPLE}


ANSWERS, KEY = "generations.jsonl", "generations.key.json"


def stored_generations(folder: Path) -> list[Generation]:
    """What `generate_stage` left in `folder`. Raises ValueError where there is nothing, and Damaged."""
    path, marker = folder / ANSWERS, folder / KEY
    generations = read_generations(path)
    expected = read_record(marker, SAMPLE_AGAIN).get("rows") if marker.is_file() else None
    if expected not in (None, len(generations)):
        raise Damaged(f"{path} is damaged: it has {len(generations)} rows of {expected}", SAMPLE_AGAIN)
    return generations


def answers_key(folder: Path) -> str:
    """Digest of what determines the answers in `folder`."""
    return read_record(folder / KEY)["key"]


def generate_stage(folder: Path, key: str, make: Callable[[Kept], list[Generation]]) -> list[Generation]:
    """The generations stored under `key` in `folder`, else made and stored.

    What `make` puts into the `Kept` it is handed is on disk at once: after a crash it is handed what there is.
    """
    marker, path = folder / KEY, folder / ANSWERS
    if path.is_file() and stored_record(marker).get("key") == key:
        try:
            return stored_generations(folder)
        except Damaged as damage:
            say(f"{damage.what}: all are sampled again")
    store = KeptInFile(folder, key)
    generations = make(store)
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)  # a crash between the two files must not leave a key beside other generations
    write_generations(path, generations)
    write_record(marker, {"key": key, "rows": len(generations)})
    store.remove()
    return generations


def measure_stage(folder: Path, key: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The measurements stored under `key` in `folder`, else made and stored."""
    path = folder / "measurements.json"
    stored = stored_record(path)
    if stored.get("key") == key:
        return stored["metrics"]
    metrics = {name: value for name, value in make().items() if value == value}
    write_record(path, {"key": key, "metrics": metrics})
    return metrics


def score_metrics(scorer: str, generations: Sequence[Generation], scores: Sequence[float]) -> dict[str, float]:
    """The scorer's mean with its standard error, and what text alone says."""
    key, mean = results.SCORE.of(scorer=scorer), clustered_mean(scores, [g.prompt_index for g in generations])
    return {key: mean.mean, f"{key}_se": mean.se} | text_metrics(generations)


def compare_metrics(
    generations: Sequence[Generation], scores: Sequence[float], baseline: Evaluated, seed: int
) -> dict[str, float]:
    """The win rate against a baseline, under the baseline's name; none where nobody scored the answers."""
    if any(math.isnan(score) for score in (*scores, *baseline.scores)):
        return {}
    rate = win_rate(generations, scores, baseline.generations, baseline.scores, seed)
    values = {"": rate.mean, "_low": rate.low, "_high": rate.high, "_ties": rate.ties}
    key = results.WIN_RATE.of(baseline=baseline.evaluation.name)
    return {f"{key}{part}": value for part, value in values.items()}


def score_stage(
    folder: Path,
    about: Evaluation,
    generations: Sequence[Generation],
    scores: Sequence[float],
    baseline: Evaluated | None,
    seed: int,
    thresholds: Thresholds | None = None,
) -> Evaluated:
    """Join scores, comparison and measurements, and store them.

    `about` says what is evaluated; its metrics are the measurements. `baseline` is the initial policy (or another
    run), already evaluated on the same prompts, or None for the baseline itself. `seed` drives the bootstrap.
    """
    metrics, limits = about.metrics | score_metrics(about.scorer, generations, scores), thresholds or Thresholds()
    compared = compare_metrics(generations, scores, baseline, seed) if baseline else {}
    evaluation = replace(
        about,
        metrics=metrics | compared,
        num_prompts=len({g.prompt_index for g in generations}),
        num_generations=len(generations),
        baseline=baseline.evaluation.name if baseline else None,
        degenerate=degeneration(metrics, baseline.evaluation.metrics if baseline else metrics, limits),
        thresholds=asdict(limits),
    )
    write_scores(folder, about.scorer, generations, scores)
    write_evaluation(folder, evaluation)
    return Evaluated(evaluation, list(generations), list(scores))


def read_evaluated(folder: Path) -> Evaluated:
    """What the earlier stages left in `folder`. Raises ValueError naming the stage that is missing."""
    generations = stored_generations(folder)
    return Evaluated(read_evaluation(folder), generations, read_scores(folder, generations))


# --- the judge's stage


RECORD, JUDGMENTS = "judge.json", "judgments.jsonl"
JUDGE_AGAIN = f"judge again with stage=judge, or delete {RECORD} and {JUDGMENTS}"
OF_JUDGE = ("judge/", results.JUDGE_WIN_RATE.of(baseline=""))  # keys of its metrics, against whatever baseline


def judge_stage(
    folder: Path, judge: Judge, evaluated: Evaluated, baseline: Evaluated, seed: int, progress: Progress
) -> Evaluated:
    """The evaluation with the judge's numbers on policy against baseline, stored. Questions that were asked before
    cost nothing. `seed` drives the bootstrap. Raises JudgeLost, with the evaluation as it was, where the judge stops
    answering."""
    pairs, name = answer_pairs(evaluated.generations, baseline.generations, judge.shows), baseline.evaluation.name
    judged = judge_pairs(judge, pairs, progress)
    metrics = judge_metrics(judge, judged.judgments, name, seed)
    say(f"judge={judge.name}: {len(pairs)} pairs judged, {judged.num_asked} questions asked, the others known")
    (folder / RECORD).unlink(missing_ok=True)  # a crash between the two files must not join numbers to other pairs
    write_judgments(folder / JUDGMENTS, judged.judgments)
    write_record(
        folder / RECORD, {"pairs": _key(pairs, name), "baseline": name, "judge": judge.identity, "metrics": metrics}
    )
    return _join(folder, evaluated, judge.identity, metrics)


def with_judgments(folder: Path, evaluated: Evaluated, baseline: Evaluated | None) -> Evaluated:
    """The evaluation with the judge's numbers that lie in `folder`, if they are about the same answers."""
    if baseline is None or not (folder / RECORD).is_file():
        return evaluated
    stored = read_record(folder / RECORD, JUDGE_AGAIN)
    pairs = answer_pairs(evaluated.generations, baseline.generations, stored["judge"].get("shows", "answer"))
    if stored["pairs"] != _key(pairs, baseline.evaluation.name):
        return evaluated
    return _join(folder, evaluated, stored["judge"], stored["metrics"])


def without_judge(folder: Path, evaluated: Evaluated, why: str) -> Evaluated:
    """The evaluation, stored, saying that the judge's numbers are missing; as it is where it has them from before."""
    if evaluated.evaluation.judge:
        return evaluated
    evaluation = replace(evaluated.evaluation, missing=[why])
    write_evaluation(folder, evaluation)
    return replace(evaluated, evaluation=evaluation)


def _key(pairs: Sequence[Pair], baseline: str) -> str:
    return digest([[(p.prompt, p.sample_index, p.output, p.baseline_output) for p in pairs], baseline])


def _join(folder: Path, evaluated: Evaluated, judge: dict[str, Any], metrics: dict[str, float]) -> Evaluated:
    others = {key: value for key, value in evaluated.evaluation.metrics.items() if not key.startswith(OF_JUDGE)}
    evaluation = replace(evaluated.evaluation, metrics=others | metrics, judge=judge, missing=[])
    write_evaluation(folder, evaluation)
    return replace(evaluated, evaluation=evaluation)


# --- the files of a diagnosis


DIAGNOSIS, EXAMPLES = "diagnostics.json", "token_examples.json"
DIAGNOSE_AGAIN = "make it again with stage=diagnose"


def diagnose_stage(folder: Path, key: str, make: Callable[[], Diagnosed | None]) -> Diagnosis | None:
    """The diagnosis stored under `key` in `folder`, else made and stored; None where none was asked for, and then
    none is left there."""
    path, examples = folder / DIAGNOSIS, folder / EXAMPLES
    if stored_record(path).get("key") == key == stored_record(examples).get("key"):
        return read_diagnosis(folder)
    result = make()
    path.unlink(missing_ok=True)  # a crash between the two files must not leave one beside another diagnosis
    if result is None:
        examples.unlink(missing_ok=True)
        return None
    write_record(examples, {"key": key, "examples": plain(result.examples)})
    write_record(path, {"key": key, "diagnosis": plain(result.diagnosis)})
    return result.diagnosis


def read_diagnosis(folder: Path) -> Diagnosis | None:
    """What `diagnose_stage` stored; None where there is none. Raises ValueError for other content."""
    path = folder / DIAGNOSIS
    return restored_from(path, "diagnosis", Diagnosis) if path.is_file() else None


def read_examples(folder: Path) -> tuple[TokenExample, ...]:
    """The responses to look at that were stored with the diagnosis."""
    return restored_from(folder / EXAMPLES, "examples", tuple[TokenExample, ...])


def restored_from(path: Path, name: str, hint: Any) -> Any:
    """One entry of a JSON file as the values it was written from. Raises ValueError for other content."""
    try:
        return restore(hint, read_record(path, DIAGNOSE_AGAIN)[name])
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is no diagnosis ({error!r})", DIAGNOSE_AGAIN) from error


# --- what can be said about answers without a judge
# How long they are, whether they end, whether they repeat.


ORDER = 4


def seq_rep_4(token_ids: Sequence[int]) -> float:
    """1 - distinct 4-grams / 4-grams of one answer (Welleck et al. 2020, arXiv:1908.04319); 0 for answers of
    fewer than four tokens."""
    grams = [tuple(token_ids[start : start + ORDER]) for start in range(len(token_ids) - ORDER + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


OF_ANSWERS: dict[Metric, Callable[[Generation], float]] = {
    results.LENGTH: lambda answer: float(answer.num_tokens),
    results.LENGTH_CHARS: lambda answer: float(answer.num_chars),
    results.ENDED: lambda answer: float(answer.finished),
    results.REPETITION: lambda answer: seq_rep_4(answer.content_ids),
}


def text_metrics(generations: Sequence[Generation]) -> dict[str, float]:
    """Length in tokens (the end token counted) and characters, share that ended by itself, seq-rep-4.

    Standard errors (`_se`) are clustered by prompt. Raises ValueError for no generations.
    """
    if not generations:
        raise ValueError("there are no generations to describe; sample some with stage=generate")
    clusters = [g.prompt_index for g in generations]
    estimates = {
        metric.key: clustered_mean([measure(answer) for answer in generations], clusters)
        for metric, measure in OF_ANSWERS.items()
    }
    metrics = {key: estimate.mean for key, estimate in estimates.items()}
    metrics |= {f"{key}_se": estimate.se for key, estimate in estimates.items()}
    median, p95 = np.quantile([answer.num_tokens for answer in generations], [0.5, 0.95])
    return metrics | {f"{results.LENGTH.key}_median": float(median), f"{results.LENGTH.key}_p95": float(p95)}
