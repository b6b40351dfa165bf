"""What a run costs before it is run: the speed of its steps, measured on the first of them or estimated by counting
operations, and seconds by part.

Useful operations of a step over G groups of prompt length P and response lengths r, with N_body the parameters of the
layers that a token passes, and a head of H x V, are those that `benchmarks/gpu.py` counts:

    3 sum_g [ 2 N_body (P + sum r) + 2 H V sum r + 4 L H (sum of causal context lengths) ]

that is, the prompt once and nothing for the reference, padding or recomputation. Without a gradient it is a third.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from dpo_ref.data.packing import Pack, collate, share_of
from dpo_ref.distributed import ranks
from dpo_ref.generation.sampling import generate
from dpo_ref.models.loading import TrainedModel
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference
from dpo_ref.training.optim import Optimisation
from dpo_ref.training.trainer import backward, update
from dpo_ref.types import Asked, TokenGroup

# --- measured


class StepTime(NamedTuple):
    """What one optimiser step, or one of fewer groups, took."""

    num_groups: int
    num_tokens: int  # packed
    gradient_seconds: float  # forward and backward passes
    update_seconds: float


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a run's steps are: packed tokens of forward and backward passes a second, and what every update takes
    besides; `how` says where the numbers are from."""

    tokens_per_second: float
    update_seconds: float
    how: str

    def step_seconds(self, num_tokens: float) -> float:
        """An optimiser step of so many packed tokens."""
        return num_tokens / self.tokens_per_second + self.update_seconds


def now(device: torch.device) -> float:
    """The clock once the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_steps(
    policy: TrainedModel,
    reference: Reference,
    objective: Objective,
    optim: Optimisation,
    batches: Sequence[Sequence[TokenGroup]],
    pack: Pack,
) -> Iterator[StepTime]:
    """Optimiser steps as `train` makes them, on these batches; they change the policy."""
    objective.running.clear()
    made = torch.ones((), dtype=torch.bool, device=policy.device)
    policy.model.train()
    for step, groups in enumerate(batches):
        started = now(policy.device)
        _, routing = backward(policy, reference, objective, share_of(groups, pack))
        between = now(policy.device)
        _, made = update(policy, optim, step, made)
        yield StepTime(len(groups), routing.num_tokens, between - started, now(policy.device) - between)


def within(groups: Sequence[TokenGroup], num_tokens: float) -> list[TokenGroup]:
    """The first groups, as long as they have no more than so many tokens together; at least one."""
    taken, total = [groups[0]], groups[0].num_tokens
    for group in groups[1:]:
        total += group.num_tokens
        if total > num_tokens:
            break
        taken.append(group)
    return taken


@torch.no_grad()
def forward_speed(policy: TrainedModel, groups: Sequence[TokenGroup], pack: Pack) -> float:
    """Packed tokens a second of forward passes without gradient, on these groups; the first warms up."""
    policy.model.eval()
    policy.outputs(collate(groups[:1]).to(policy.device))
    started = now(policy.device)
    for some in pack(groups):
        policy.outputs(collate(some).to(policy.device))
    return sum(group.num_tokens for group in groups) / (now(policy.device) - started)


NUM_ANSWERS, NUM_DECODED = 2, 8  # answers, and tokens of each, by which decoding is timed
AS_FAST_ON_CUDA = 64  # sequences that a card decodes in the time of one


def decoding_seconds(policy: TrainedModel, prompts: Sequence[Asked], seed: int) -> float:
    """Seconds of one more token of `NUM_ANSWERS` answers, to as many prompts, that are written together."""
    ends = []
    for size in (1, 1 + NUM_DECODED):  # the first reads the prompts
        started = now(policy.device)
        answers = generate(policy.model, policy.tokenizer, prompts, seed, max_new_tokens=size)
        ends.append((now(policy.device) - started, max(len(answer.token_ids) for answer in answers)))
    (short, first), (long, last) = ends
    return max(long - short, 0.1 * long / last) / max(last - first, 1)


def answers_seconds(a_token: float, num_answers: int, batch_size: int, num_tokens: int, device: torch.device) -> float:
    """Seconds of answers of so many tokens each, where one more token of `NUM_ANSWERS` answers takes `a_token`: a CPU
    takes as much longer as there are more of them. Ranks take turns with the batches."""
    together = min(num_answers, batch_size)
    wider = together / (AS_FAST_ON_CUDA if device.type == "cuda" else NUM_ANSWERS)
    return -(-num_answers // (batch_size * ranks().size)) * num_tokens * a_token * max(1.0, wider)


def speed_of(times: Sequence[StepTime], batch_size: int) -> Speed:
    """The speed of a run whose first steps took these times, a warm-up left out."""
    tokens, seconds = sum(t.num_tokens for t in times), sum(t.gradient_seconds for t in times)
    sizes = [t.num_groups for t in times]
    groups = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    part = (
        f" of {batch_size} groups" if min(sizes) >= batch_size else f", of {groups} of a batch's {batch_size} groups"
    )
    how = f"measured on {len(times)} steps{part}"
    return Speed(tokens / seconds, sum(t.update_seconds for t in times) / len(times), how)


# --- counted


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What operations are counted by: the width of hidden states, decoder layers, rows of the head, and parameters of
    the layers that one token passes (of a mixture of experts those that are chosen)."""

    hidden: int
    layers: int
    vocabulary: int
    body: int

    @classmethod
    def of(cls, model: nn.Module) -> "ModelShape":
        """A causal language model of transformers, its weights on any device, the meta device too."""
        causal_lm: Any = model
        config = causal_lm.config.get_text_config()
        tables = {id(head.weight) for head in _tables(causal_lm) if head is not None}
        body = sum(
            round(p.numel() * _share_used(name, config))
            for name, p in model.named_parameters()
            if id(p) not in tables and ".lora_" not in name
        )
        return cls(config.hidden_size, config.num_hidden_layers, config.vocab_size, body)

    def forward_flops(self, group: TokenGroup) -> float:
        """Floating-point operations of a group's forward pass, the head on response tokens."""
        prompt, sizes = len(group.prompt_ids), list(map(len, group.response_ids))
        context = prompt * (prompt + 1) / 2 + sum(prompt * r + r * (r + 1) / 2 for r in sizes)
        head = self.hidden * self.vocabulary * sum(sizes)
        return 2 * self.body * group.num_tokens + 2 * head + 4 * self.layers * self.hidden * context


def _tables(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _share_used(name: str, config: Any) -> float:
    """The part of a weight that one token passes: of experts, those that it is sent to."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if ".experts." in name and experts and chosen else 1.0


class Card(NamedTuple):
    """A graphics card: its memory, and what it computes in bfloat16 at most."""

    name: str
    gib: float
    tflops: float  # dense, as its maker says


CARDS = (
    Card("RTX 4090 24 GB", 24.0, 165.0),
    Card("L40S 48 GB", 44.7, 362.0),
    Card("A100 80 GB", 79.3, 312.0),
    Card("H100 80 GB", 79.6, 989.0),
    Card("H200 141 GB", 139.8, 989.0),
)
UTILISATION = 0.37  # of a card, by a model of 1 B; 0.52 by one of 8 B (benchmarks/results/gpu_h200.json)


def estimated_speed(shape: ModelShape, groups: Sequence[TokenGroup], card: Card) -> Speed:
    """The speed on a card that is not here, by the operations of these groups and the share of its peak that the
    benchmarks reach."""
    flops, tokens = 3 * sum(map(shape.forward_flops, groups)), sum(group.num_tokens for group in groups)
    seconds = flops / (UTILISATION * card.tflops * 1e12)
    return Speed(
        tokens / seconds, 0.0, f"estimated: {UTILISATION:.0%} of the {card.tflops:g} TFLOP/s of one {card.name}"
    )


# --- seconds by part


class Spent(NamedTuple):
    """A part of a run, what it consists of, and its seconds."""

    part: str
    of: str
    seconds: float


def times_due(num_steps: int, every: int | None) -> int:
    """How often what happens before the first step, after the last and every so many between them happens."""
    return 2 + (0 if every is None else (num_steps - 1) // every)


class Stopwatch:
    """A `Progress` that keeps the seconds of what was in progress, by its description."""

    def __init__(self, shown: Callable[..., Iterator[Any]]) -> None:
        self.seconds: dict[str, float] = {}
        self._shown = shown

    def __call__(self, items: Any, description: str, total: int | None = None) -> Iterator[Any]:
        """The items, shown as they were."""
        started = time.perf_counter()
        try:
            yield from self._shown(items, description, total)
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[description] = self.seconds.get(description, 0.0) + elapsed
