"""Quantile rewards (QRPO, arXiv:2507.08068): how good a response is among samples of the reference, in [0, 1].

The samples are drawn before training, once a prompt, and kept with their rewards beside the reference's table, where
every later run with the same settings finds them.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from dpo_ref.component import LEFT_OPEN, MemberOf, RunPlan, component
from dpo_ref.data.groups import Groups
from dpo_ref.distributed import ranks
from dpo_ref.files.cache import in_use, made_by_one
from dpo_ref.files.digests import bytes_digest, sealed, unsealed
from dpo_ref.files.writing import write_text
from dpo_ref.generation.records import Generation, Scores, scored_together
from dpo_ref.generation.sampling import generate
from dpo_ref.models.asked import Workspace
from dpo_ref.models.loading import TrainedModel
from dpo_ref.objectives.interface import KLStrength, Objective, Quantiles, Regressed, positive
from dpo_ref.references.interface import Reference
from dpo_ref.tracking.terminal import say
from dpo_ref.types import PackedBatch, PromptGroup, ResponseLogps, digest, words_of

WINDOW = 256  # prompts whose samples are drawn, scored and kept at once
AGAIN = "delete the folder; the samples are drawn again"
SAMPLED_FROM = ("auto", "initial", "other", "interpolate", "trajectory")  # models of the policy's tokens


# --- samples of the reference, and what they were found to be worth


@dataclass(frozen=True, slots=True)
class QuantileContext:
    """What quantiles are made from: the reference, what gives the model that it is, and the groups that are trained on
    or held out."""

    work: Workspace
    policy: TrainedModel
    reference: Reference
    model: Callable[[], nn.Module]
    groups: Groups


@dataclass(frozen=True, slots=True)
class RewardedSamples:
    """Rewards of the reference's samples by what was asked, kept in files of a folder, each named by its digest."""

    folder: Path

    def read(self) -> dict[str, list[float]]:
        """All that are kept. Raises Damaged for a file that is not as it was written."""
        return {row["asked"]: row["rewards"] for row in self._rows()}

    def _rows(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                yield unsealed(line, f"{path} row {number}", AGAIN)

    def add(self, generations: Sequence[Generation], rewards: Sequence[float]) -> None:
        """Keep answers, those to one prompt together, with their rewards."""
        rows: dict[str, dict[str, list[Any]]] = {}
        for generation, reward in zip(generations, rewards, strict=True):
            row = rows.setdefault(generation.texts.asked_id, {"outputs": [], "rewards": []})
            row["outputs"].append(generation.output)
            row["rewards"].append(reward)
        text = "".join(json.dumps(sealed({"asked": asked, **row})) + "\n" for asked, row in rows.items())
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / f"{bytes_digest(text.encode())}.jsonl", text)


class QuantileTable:
    """Quantiles of the responses of groups, looked up by their `group_index`."""

    def __init__(self, quantiles: Mapping[int, np.ndarray], device: torch.device) -> None:
        self._quantiles, self._device = quantiles, device

    def __call__(self, batch: PackedBatch) -> Quantiles:
        """Those of a pack's responses."""
        values = np.concatenate([self._quantiles[index] for index in batch.group_index])
        return Quantiles(torch.from_numpy(values).to(self._device))


def quantiles_of(rewards: Sequence[float], samples: Sequence[float]) -> Float[np.ndarray, " k"]:
    """The share of samples whose reward is no higher than each of these."""
    return (np.array(samples)[None, :] <= np.array(rewards)[:, None]).mean(axis=1)


def reference_quantiles(
    context: QuantileContext,
    *,
    scorer: Annotated[Any, MemberOf("scorer")],
    num_samples: int = 8,
    max_new_tokens: Annotated[int, LEFT_OPEN] = 128,
    generation_batch_size: int = 256,
) -> QuantileTable:
    """Quantiles of all responses of the context's groups among `num_samples` samples of the reference to their prompt,
    at temperature 1, by the rewards that `scorer` gives both.

    Raises ValueError for a row without a prompt, for prompts that leave no room for `max_new_tokens`, and where the
    scorer has no number for a text.
    """
    texts = {group.group_index: context.groups.text(index) for index, group in enumerate(context.groups)}
    settings = [num_samples, max_new_tokens, context.work.seed, scorer.name, scorer.plain(), _weights_of(scorer)]
    table = context.reference.table or context.reference.identity
    samples = RewardedSamples(context.work.cache / "reference" / table / f"samples-{digest(settings)}")
    in_use(samples.folder.parent)
    options = {"samples_per_prompt": num_samples, "max_new_tokens": max_new_tokens}
    options["batch_size"] = generation_batch_size
    _check_room(context, texts, max_new_tokens)
    with made_by_one(samples.folder) if ranks().is_first else nullcontext():
        lacking = set(ranks().first(lambda: [text.asked_id for text in _unanswered(texts, samples)]))
        asked = {text.asked_id: text for text in texts.values() if text.asked_id in lacking}
        _draw(context, samples, list(asked.values()), options, scorer)
    responses = [each for index, text in texts.items() for each in _as_generations(index, text)]
    kept, rewards = samples.read(), iter(_scored(scorer, responses))
    return QuantileTable(
        {
            index: quantiles_of([next(rewards) for _ in text.responses], kept[text.asked_id])
            for index, text in texts.items()
        },
        context.work.device,
    )


def _weights_of(scorer: Any) -> str:
    """Digest of what the scorer's numbers mean beside its options, where it says so."""
    identity = scorer.hooks.identity
    return "" if identity is None else scorer.bound(identity)()


def _unanswered(texts: Mapping[int, PromptGroup], samples: RewardedSamples) -> list[PromptGroup]:
    """What no sample answers yet, each once."""
    kept = samples.read()
    asked = {text.asked_id: text for text in texts.values() if text.asked_id not in kept}
    if without := [text.origin for text in asked.values() if not text.prompt]:
        raise ValueError(f"objective=qrpo: {without[0] or 'a row'} has no prompt that the reference could answer")
    return list(asked.values())


def _check_room(context: QuantileContext, texts: Mapping[int, PromptGroup], max_new_tokens: int) -> None:
    positions = context.policy.positions
    longest = max((len(group.prompt_ids) for group in context.groups), default=0)
    if positions is not None and longest + max_new_tokens > positions:
        raise ValueError(
            f"objective.max_new_tokens={max_new_tokens}: the longest prompt has {longest:,} tokens, and the model "
            f"{positions:,} positions; lower it to {max(1, positions - longest)}, or data.max_prompt_length"
        )


def _draw(
    context: QuantileContext,
    samples: RewardedSamples,
    texts: Sequence[PromptGroup],
    options: Mapping[str, Any],
    scorer: Callable[[Sequence[Generation]], Scores],
) -> None:
    """Answer prompts, a window at a time, so that what ends the process loses no more than one."""
    if not texts:
        return
    model = context.model()
    for start in range(0, len(texts), WINDOW):
        prompts = [text.asked for text in texts[start : start + WINDOW]]
        seed = int(digest([context.work.seed, "quantiles", start])[:8], 16)
        tokenizer, show = context.policy.tokenizer, context.work.progress
        generations = generate(model, tokenizer, prompts, seed, show, **options)
        rewards = _scored(scorer, generations)
        if ranks().is_first:
            samples.add(generations, rewards)
    ranks().wait()
    each = options["samples_per_prompt"]
    say(f"{len(texts):,} prompts x {each} samples of the reference, kept in {samples.folder}")


def _as_generations(index: int, text: PromptGroup) -> list[Generation]:
    """The data's own responses as a scorer sees answers."""
    told = {"seed": 0, "temperature": 1.0, "top_p": 1.0, "prompt_ids": (), "token_ids": (), "num_tokens": 0}
    return [
        Generation(
            prompt=text.prompt, prompt_index=index, sample_index=number, output=words_of(response), num_chars=0,
            finish_reason="stop", tools=text.tools, template_options=text.template_options, **told,
        )
        for number, response in enumerate(text.responses)
    ]  # fmt: skip


def _scored(scorer: Callable[[Sequence[Generation]], Scores], generations: Sequence[Generation]) -> list[float]:
    scores = scored_together(scorer, generations)
    unscored = sum(not math.isfinite(value) for value in scores.values)
    if unscored:
        raise ValueError(
            f"scorer {scores.name} has no finite reward for {unscored} of {len(generations)} texts; choose another "
            "with scorer@objective.scorer=..."
        )
    return list(scores.values)


# --- the objective


def _check_run(objective: Objective, plan: RunPlan) -> None:
    """Refuse references that are no model to be sampled, and data whose prompts are not known before training."""
    reference = plan.components["reference"]
    if reference.name not in SAMPLED_FROM:
        raise ValueError(
            f"reference={reference.name} has no samples to be drawn before training, and objective=qrpo compares "
            f"rewards with theirs; use reference={', '.join(SAMPLED_FROM[1:])}"
        )
    if reference.options["strength"] != 1:
        raise ValueError("reference.strength: objective=qrpo draws samples of the reference as it is; leave it out")
    if plan.components["data"].hooks.rounds is not None:
        raise ValueError("data=on_policy answers its prompts as it goes on; use objective=reinforce or dpo there")
    if plan.components["objective"].options["scorer"].hooks.relative:
        raise ValueError("objective.scorer ranks answers among themselves; use one that gives each its own number")


@component(prepare=reference_quantiles, check_run=_check_run)
def qrpo(
    policy: ResponseLogps, reference: ResponseLogps, quantiles: Quantiles, *, beta: KLStrength = 0.1
) -> Regressed:
    """(q - beta log Z - R)^2, R = beta log(pi/pi_ref) summed over the response, beta log Z = beta log(beta
    (e^(1/beta) - 1)) (QRPO, arXiv:2507.08068, with its identity transform).

    q is the response's quantile reward: the share of the reference's samples to its prompt with no higher reward. As q
    of the reference's own samples is uniform, the optimum's normaliser Z is known, and the reward is fitted pointwise:
    pairs, lists and single responses alike. The authors' code replaces beta log Z by beta log beta + 1, which is equal
    below beta 0.1.
    """
    positive(beta=beta)
    log_z = beta * math.log(beta) + 1 + beta * math.log1p(-math.exp(-1 / beta))
    rewards, targets = beta * (policy.sums - reference.sums), quantiles.values - log_z
    return Regressed((targets - rewards) ** 2, rewards.detach(), targets)
