"""Evaluation while a policy is trained (`evaluation.every`): the pieces of `evaluate.py`, on few prompts.

Every evaluation draws answers to the same prompts with the same random numbers, so what differs between two of them is
the policy. Win rates are against the initial policy's answers, drawn once with other random numbers; its weights are
kept for KL. Nothing here touches the training's random numbers, gradients or weights.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch import nn

from dpo_ref.component import LEFT_OPEN, MemberOf, component
from dpo_ref.data.tokenise import encode_prompts, end_of_turn_ids
from dpo_ref.evaluation.heldout import PairEvaluation, displacement, score_pairs
from dpo_ref.evaluation.kl import sample_kl
from dpo_ref.evaluation.results import DEGENERATE, SECONDS, Evaluated, Evaluation, Thresholds, degeneration
from dpo_ref.evaluation.stages import BASELINE_SEED, compare_metrics, generate_stage, generation_key, score_metrics
from dpo_ref.generation.engine import held_out
from dpo_ref.generation.records import Generation, Scores, scored_together, write_generations
from dpo_ref.generation.sampling import generate, never_sampled
from dpo_ref.models.asked import Workspace
from dpo_ref.models.loading import TrainedModel
from dpo_ref.models.sharding import Holding
from dpo_ref.references.interface import Reference
from dpo_ref.types import Asked, TokenGroup

# --- the policy as it was before training, beside the one that is trained, at the least cost in memory


def in_memory(reference: Reference, policy: TrainedModel, weights: str) -> nn.Module | None:
    """The loss reference's own model where that is the initial policy, whose weights have the digest `weights`, on the
    policy's device; else None."""
    model, moves = reference.model, bool(reference.state_dict())
    if model is None or moves or reference.own_text or reference.weights != weights:
        return None
    return model if next(model.parameters()).device == policy.device else None


class InitialPolicy:
    """The policy as it was before training: the reference's model if that is the same, else a copy of the weights that
    are trained (those that stay as they are, as below an adapter, are shared).

    The copy lies in host memory and goes to the policy's device while it is asked: on a GPU it then stands where the
    gradients do during a step.
    """

    def __init__(self, policy: nn.Module, standing: nn.Module | None, weights: str, holding: Holding) -> None:
        self.weights = weights  # digest
        shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
        self._device = next(policy.parameters()).device
        if standing is None and holding.sharded:  # a part of it on every rank, where it stays
            self._model, own = holding.copy(policy).eval().requires_grad_(False), []
        elif standing is None:
            self._model = copy.deepcopy(policy, dict(shared)).eval().requires_grad_(False)
            own = [p for p in self._model.parameters() if id(p) not in shared]
        else:
            self._model, own = standing, []
        self._stored = [(parameter, parameter.data.cpu()) for parameter in own]
        self._put_away()

    @property
    def num_copied(self) -> int:
        """Weights that exist twice because of it."""
        return sum(values.numel() for _, values in self._stored)

    @contextmanager
    def here(self) -> Iterator[nn.Module]:
        """The model, on the policy's device."""
        for parameter, values in self._stored:
            parameter.data = values.to(self._device)
        try:
            yield self._model
        finally:
            self._put_away()

    def _put_away(self) -> None:
        for parameter, values in self._stored:
            parameter.data = values


# --- the evaluation


FOLDER = "training_evaluation"  # in the run's folder


@dataclass(frozen=True, slots=True)
class EvaluationContext:
    """What an evaluation in training is made from at run time."""

    work: Workspace
    policy: TrainedModel
    initial: InitialPolicy
    prompts: Sequence[Asked]  # held out
    pairs: Sequence[TokenGroup]  # held out
    max_length: int  # tokens of prompt and answer
    thresholds: Thresholds


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How answers are drawn: from the policy itself, temperature 1 and the whole vocabulary, as KL needs it."""

    samples_per_prompt: int
    max_new_tokens: int
    batch_size: int


class TrainingEvaluation:
    """Evaluations of the policy of one run. `notes` is what the user is told of how they are done."""

    def __init__(
        self,
        context: EvaluationContext,
        scorer: Callable[[Sequence[Generation]], Scores],
        num_prompts: int,
        sampling: SampleOptions,
    ) -> None:
        self._context, self._scorer, self._sampling = context, scorer, sampling
        self._prompts, self.notes = drawn_prompts(context, num_prompts, sampling.max_new_tokens)
        self._pairs = [context.pairs[index] for index in _drawn(len(context.pairs), num_prompts, context.work.seed)]

    @property
    def num_prompts(self) -> int:
        """How many prompts are answered."""
        return len(self._prompts)

    def measure(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Metrics of the policy as it is after `step`, under the names `evaluation.json` has for them, whether it is
        degenerate, and the seconds it took; what could not be measured is left out. And why it is degenerate; empty
        if it is not.

        The answers are kept in the run's folder.
        """
        started, context, model = time.perf_counter(), self._context, self._context.policy.model
        training = model.training
        model.eval()
        generations = self._answers(model, context.work.seed)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_generations(self._folder / f"step_{step:08d}.jsonl", generations)
        metrics = self._answer_metrics(generations) | self._drift(generations)
        model.train(training)
        degenerate = degeneration(metrics, self._initial.evaluation.metrics, context.thresholds)
        measured = {name: value for name, value in metrics.items() if value == value}
        seconds = time.perf_counter() - started
        return measured | {DEGENERATE.key: float(bool(degenerate)), SECONDS.key: seconds}, degenerate

    @property
    def _folder(self) -> Path:
        return self._context.work.directory / FOLDER

    def _answers(self, model: Any, seed: int) -> list[Generation]:
        context, options = self._context, asdict(self._sampling)
        return generate(model, context.policy.tokenizer, self._prompts, seed, context.work.progress, **options)

    @cached_property
    def _initial(self) -> Evaluated:
        """The initial policy's answers and their scores; drawn once, then read from the run's folder."""
        context, seed = self._context, self._context.work.seed + BASELINE_SEED
        options = asdict(self._sampling)
        weights, text = context.initial.weights, context.policy.text_identity
        key = generation_key(weights, text, held_out(self._prompts), seed, options)
        with context.initial.here() as model:
            generations = generate_stage(self._folder / "initial", key, lambda kept: self._answers(model, seed))
        scores = scored_together(self._scorer, generations)
        metrics = score_metrics(scores.name, generations, scores.values)
        return Evaluated(Evaluation("initial", scores.name, metrics), generations, list(scores.values))

    @cached_property
    def _initial_pairs(self) -> PairEvaluation:
        with self._context.initial.here() as model:
            return self._score_pairs(model)

    def _score_pairs(self, model: Any) -> PairEvaluation:
        return score_pairs(
            model, self._pairs, end_of_turn_ids(self._context.policy.tokenizer), self._context.work.progress
        )

    def _answer_metrics(self, generations: Sequence[Generation]) -> dict[str, float]:
        """What answers alone say, and their win rate."""
        scores = scored_together(self._scorer, generations)
        metrics = score_metrics(scores.name, generations, scores.values)
        return metrics | compare_metrics(generations, scores.values, self._initial, self._context.work.seed)

    def _drift(self, generations: Sequence[Generation]) -> dict[str, float]:
        """How far the policy is from the initial one: KL on its own answers, log-ratios on held-out pairs."""
        context, policy = self._context, self._context.policy
        never = never_sampled(policy.tokenizer, policy.model.get_output_embeddings().weight.shape[0])
        with context.initial.here() as model:
            kl = sample_kl(policy.model, model, generations, never, context.work.progress)
        metrics = kl.metrics("initial") | kl.end_metrics()
        if self._pairs:
            metrics |= displacement(self._score_pairs(policy.model), self._initial_pairs)
        return metrics


def _drawn(total: int, count: int, seed: int) -> list[int]:
    """`count` of `total` places, in their order."""
    return sorted(np.random.default_rng([seed, 4]).permutation(total)[:count].tolist())


def drawn_prompts(context: EvaluationContext, count: int, max_new_tokens: int) -> tuple[list[Asked], tuple[str, ...]]:
    """`count` of the held-out prompts, drawn by the seed; all, where there are no more.

    Prompts that leave no room for an answer are left out, and counted in a note. Raises ValueError where none is held
    out, or none left.
    """
    if not context.prompts:
        raise ValueError(
            "evaluation.every: the data has no held-out prompts to answer: hold some out with data.eval_fraction or "
            "data.eval_path, or leave evaluation.every out"
        )
    room = context.max_length - max_new_tokens
    sizes = map(len, encode_prompts(context.policy.tokenizer, context.prompts))
    fitting = [prompt for prompt, size in zip(context.prompts, sizes, strict=True) if size <= room]
    if not fitting:
        raise ValueError(
            f"no held-out prompt leaves room for evaluation.max_new_tokens={max_new_tokens} in {context.max_length} "
            "tokens; lower it, or raise data.max_length"
        )
    left_out = len(context.prompts) - len(fitting)
    note = f"  {left_out} held-out prompts left out: with an answer they exceed {context.max_length} tokens"
    prompts = [fitting[index] for index in _drawn(len(fitting), count, context.work.seed)]
    return prompts, (note,) if left_out else ()


def _check_options(**options: Any) -> None:
    """Refuse values out of range. Raises ValueError naming the key."""
    for name in ("every", "num_prompts", "samples_per_prompt", "max_new_tokens", "batch_size"):
        if options[name] is not None and options[name] < 1:
            hint = "; null leaves it out" if name == "every" else ""
            raise ValueError(f"evaluation.{name}={options[name]} must be at least 1{hint}")


@component(check=_check_options)
def samples(
    context: EvaluationContext,
    *,
    scorer: Annotated[Any, MemberOf("scorer")],
    every: int | None = None,
    num_prompts: int = 64,
    samples_per_prompt: int = 1,
    max_new_tokens: Annotated[int, LEFT_OPEN] = 128,
    batch_size: int = 128,
) -> TrainingEvaluation:
    """The policy's answers to `num_prompts` held-out prompts, before training, every `every` optimiser steps, and
    after the last: scored by `scorer`, compared with the initial policy's.

    `max_new_tokens` counts the end token; an answer that has none by then counts as one that does not end.
    `batch_size` is that of sampling and changes no sample. Raises ValueError without held-out prompts.
    """
    assert every is not None
    sampling = SampleOptions(samples_per_prompt, max_new_tokens, batch_size)
    evaluation = TrainingEvaluation(context, scorer, num_prompts, sampling)
    copied = context.initial.num_copied
    initial = f"a copy of its {copied:,} trained weights" if copied else "the reference in memory"
    evaluation.notes += (
        f"evaluation: every {every} steps, {evaluation.num_prompts} held-out prompts, answers per prompt: "
        f"{samples_per_prompt}; the initial policy is {initial}",
    )
    return evaluation
