"""References that are models of the policy's tokens, or none: the initial policy, another checkpoint, the model below
an adapter, one that follows the policy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dpo_ref.component import RunPlan, component, configuration
from dpo_ref.data.chat_templates import install_template, text_identity
from dpo_ref.data.groups import MappedGroups
from dpo_ref.models.adapters import adapter_off, changes_something, copy_of_trained
from dpo_ref.models.asked import ModelSource
from dpo_ref.models.checkpoint import base_digest, weights_digest
from dpo_ref.models.folders import check_vocabulary
from dpo_ref.models.loading import TrainedModel, check_revision
from dpo_ref.models.logps import response_logps
from dpo_ref.models.next_token import NextTokens, next_tokens, vocabulary_of
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.references.other_tokenizer import ReferenceText, from_text
from dpo_ref.references.table import PrecomputedReference, Rows, Scorer, precompute, rows_of, scorer_of
from dpo_ref.types import PackedBatch, ResponseLogps, TokenGroup, digest

Cache = Literal["auto", "off"]


@torch.no_grad()
def logps_on_device(model: nn.Module, batch: PackedBatch) -> ResponseLogps:
    """A model's log-probs of a batch, on the batch's device, which may be another than the model's."""
    here, there = batch.input_ids.device, next(model.parameters()).device
    if here == there:
        return response_logps(model, batch)
    logps = response_logps(model, batch.to(there))
    values = (logps.sums, logps.lengths, logps.num_bytes, logps.tokens())
    return ResponseLogps(*(value.to(here) for value in values))


class LiveReference(Reference):
    """A model that is asked at every step (`reference.cache=off`)."""

    def __init__(self, name: str, model: nn.Module, identity: str, weights: str) -> None:
        self.name, self.identity, self.weights = name, identity, weights
        self._model = model.eval().requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model that is asked."""
        return self._model

    @property
    def vocabulary(self) -> int:
        """Rows of its head."""
        return vocabulary_of(self._model)

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """A forward pass of the model, wherever it is."""
        return logps_on_device(self._model, batch)

    def next_tokens(self, batch: PackedBatch) -> NextTokens:
        """A forward pass of its trunk."""
        return next_tokens(self._model, batch)


class UniformReference(Reference):
    """Every token equally likely: log p(y) = -tokens ln V, V the tokenizer's vocabulary.

    It differs from `none` by a reward for length alone, which is what it is there to show.
    """

    name = "uniform_token"

    def __init__(self, vocabulary: int) -> None:
        self.identity = f"uniform over {vocabulary} tokens"
        self._value = -math.log(vocabulary)

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """The same value for every scored token."""
        tokens = torch.full((len(batch.target_ids),), self._value, device=batch.target_ids.device)
        return ResponseLogps(batch.lengths.double() * self._value, batch.lengths, batch.num_bytes, tokens)


class NoReference(Reference):
    """No reference: log-probability 0 for every response, at no cost.

    The reward is then beta log pi itself, the convention of arXiv:2407.13709 (posterior probability).
    """

    name, identity, normalised = "none", "none", False

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """Zeros of the pack's shape."""
        device = batch.target_ids.device
        sums = torch.zeros(len(batch.lengths), dtype=torch.float64, device=device)
        return ResponseLogps(sums, batch.lengths, batch.num_bytes, torch.zeros(len(batch.target_ids), device=device))


def identity_of(model: nn.Module, weights: str, text: str) -> str:
    """Digest of weights, of the text they are used with, and of the dtype they compute in."""
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return digest({"weights": weights, "text": text, "dtype": str(dtype)})


def initial(context: ReferenceContext, *, cache: Cache = "auto") -> Reference:
    """The policy as it is before training (standard DPO).

    With `cache=auto` its log-probabilities are computed by the policy itself before the first step and no second copy
    exists; with `off` a copy is asked at every step, which shares with the policy what is not trained. A policy that
    goes on from an adapter (`model.adapter`) is the model with that adapter.
    """
    weights = context.policy.weights
    identity = identity_of(context.policy.model, weights, context.policy.text_identity)
    if cache == "auto":
        reference = precompute("initial", context.policy.model, identity, weights, context)
    else:
        reference = LiveReference("initial", copy_of_trained(context.policy.model), identity, weights)
    reference.notes = (*reference.notes, *_goes_on(context.policy))
    return reference


def _goes_on(policy: TrainedModel) -> tuple[str, ...]:
    """What the reference is where the policy goes on from a saved adapter."""
    if policy.adapter is None or not changes_something(policy.model):
        return ()
    return (
        "reference: the model with its adapter, as both are before training; reference=adapter_base is the model "
        "below the adapter",
    )


def _check_revision(*, path: str, revision: str | None, **rest: Any) -> None:
    check_revision(path, revision, "reference")


@component(check=_check_revision)
def other(
    context: ReferenceContext,
    *,
    path: str,
    revision: str | None = None,
    adapter: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    quantisation: Literal["none", "8bit", "4bit"] = "none",
    device: str = "auto",
    template: str = "auto",
    template_options: dict[str, Any] | None = None,
    system_prompt: str | None = None,
    terminator: Literal["count", "skip"] = "count",
    max_altered: float = 0.02,
    cache: Cache = "auto",
) -> Reference:
    """Another causal model: a local folder, a hub name, or a model of the lab.

    With the policy's tokenizer and template it scores the policy's token ids. With any other it scores the same text
    from messages, under its own template and tokenizer (`other_tokenizer.py`): its log-probs are then per response,
    not per token. `revision` is a branch, tag or commit on the hub, `adapter` a PEFT adapter on top (folder or hub
    name).
    `dtype=bfloat16` and `quantisation` (bitsandbytes) hold the weights in less memory, `device` puts them elsewhere
    than the policy (cpu, cuda:1; spread: over all GPUs). `template` and `template_options` are the reference's, as for
    the model; `system_prompt` is the system turn it reads, in place of the data's. `terminator=skip` leaves its
    end-of-turn token out. `max_altered` is the share of responses that may fail to survive its tokenizer and template
    byte for byte; above it the run stops.
    """
    tokenizer = context.work.loader.tokenizer(path, revision)
    install_template(tokenizer, template, template_options, "reference")
    model = context.work.loader.reference(ModelSource(path, revision, adapter, dtype, quantisation, device))
    check_vocabulary(tokenizer, model, f"reference.path={path}")
    weights = weights_digest(model)
    identity = identity_of(model, weights, text_identity(tokenizer))
    own = ReferenceText(tokenizer, system_prompt, terminator, max_altered)
    if own.differs(context):
        return from_text("other", scorer_of(model), own, identity, weights, context, cache)
    if cache == "auto":
        return precompute("other", model, identity, weights, context)
    scorer_of(model).check(context.groups)
    return LiveReference("other", model, identity, weights)


def model_reference(kind: str, model: nn.Module, context: ReferenceContext, cache: Cache) -> Reference:
    """A model that reads the policy's text: its table, or the model itself where it is asked at every step."""
    weights = weights_digest(model)
    identity = identity_of(model, weights, context.policy.text_identity)
    if cache == "auto":
        return precompute(kind, model, identity, weights, context)
    scorer_of(model).check(context.groups)
    return LiveReference(kind, model, identity, weights)


def prior(context: ReferenceContext, *, cache: Literal["auto"] = "auto") -> Reference:
    """log p(y) of the policy before training, without any prompt: the response behind BOS alone (EOS where there is
    none). With the objective dpo this is the likelihood reward of arXiv:2407.13709."""
    tokenizer = context.policy.tokenizer
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    groups = MappedGroups(context.groups, lambda group: replace(group, prompt_ids=[begin]))
    weights = context.policy.weights
    identity = identity_of(context.policy.model, weights, context.policy.text_identity)
    rows = rows_of(scorer_of(context.policy.model), groups, identity, context)
    name, device = digest([identity, "prior", begin]), context.work.device
    reference = PrecomputedReference("prior", name, "", groups, rows, device)
    reference.table = identity  # rows are named by what is scored, the prompt included
    return reference


@component(check=_check_revision)
def interpolate(
    context: ReferenceContext, *, path: str, share: float, revision: str | None = None, cache: Cache = "auto"
) -> Reference:
    """A model whose weights lie between the policy's before training (share 0) and those of another checkpoint of the
    same architecture and tokenizer (share 1); beyond either end is allowed. `revision` is a branch, tag or commit on
    the hub. Raises ValueError for other weights."""
    if not math.isfinite(share):
        raise ValueError(f"reference.share={share} must be finite")
    check_same_text("interpolate", path, context.work.loader.tokenizer(path, revision), context.policy)
    model = context.work.loader.fresh(ModelSource(path, revision))
    ours, theirs = context.policy.model.state_dict(), model.state_dict()
    differing = [name for name in ours.keys() | theirs.keys() if _shape(ours, name) != _shape(theirs, name)]
    if differing:
        raise ValueError(f"reference=interpolate: {path} has other weights than the policy, such as {differing[0]}")
    model.load_state_dict({name: torch.lerp(ours[name], theirs[name], share) for name in ours})
    return model_reference("interpolate", model, context, cache)


def check_same_text(kind: str, name: str, tokenizer: Any, policy: TrainedModel) -> None:
    """Raise ValueError for a model of the policy's tokens with another tokenizer or template."""
    if text_identity(tokenizer) != policy.text_identity:
        raise ValueError(f"reference={kind}: {name} has another tokenizer or template than the policy")


def _shape(weights: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def none(context: ReferenceContext) -> Reference:
    """No reference at all."""
    return NoReference()


def uniform_token(context: ReferenceContext) -> Reference:
    """Every token of the vocabulary equally likely."""
    return UniformReference(len(context.policy.tokenizer))


def auto(context: ReferenceContext, *, cache: Cache = "auto") -> Reference:
    """`initial` where the objective has a reference, else `none`."""
    return initial(context, cache=cache) if context.uses_reference else NoReference()


# --- the model below an adapter that is trained: no second copy of it is needed


class AdapterBase(Reference):
    """The policy with its adapter switched off, asked at every step (`reference.cache=off`)."""

    name = "adapter_base"

    def __init__(self, policy: nn.Module, identity: str, weights: str) -> None:
        self.policy, self.identity, self.weights = policy, identity, weights

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """A forward pass without the adapter."""
        with adapter_off(self.policy):
            return response_logps(self.policy, batch)

    @property
    def vocabulary(self) -> int:
        """The policy's."""
        return vocabulary_of(self.policy)

    def next_tokens(self, batch: PackedBatch) -> NextTokens:
        """A forward pass of the trunk without the adapter."""
        with adapter_off(self.policy):
            return next_tokens(self.policy, batch)


def _check_run(objective: Objective, plan: RunPlan) -> None:
    """Refuse a policy without an adapter."""
    model = plan.components["model"].options
    if model["adapter"] is None and model["lora_rank"] is None:
        raise ValueError(
            "reference=adapter_base: the policy has no adapter; train one with model.lora_rank=... or go on with one "
            "with model.adapter=..., or use reference=initial"
        )


@component(check_run=_check_run)
def adapter_base(context: ReferenceContext, *, cache: Cache = "auto") -> Reference:
    """The base model of a policy that trains an adapter, with the adapter off.

    For a fresh adapter that is the policy before training; for one that goes on from a saved adapter
    (`model.adapter`) it is the model below it, where `initial` is the model with that adapter.
    """
    policy = context.policy.model
    weights = base_digest(policy)
    identity = identity_of(policy, weights, context.policy.text_identity)
    if cache == "off":
        return AdapterBase(policy, identity, weights)
    whole = scorer_of(policy)

    def score(groups: Sequence[TokenGroup]) -> Rows:
        with adapter_off(policy):
            return whole(groups)

    rows = rows_of(Scorer(score, whole.tolerance), context.groups, identity, context)
    return PrecomputedReference("adapter_base", identity, weights, context.groups, rows, context.work.device)


# --- references that follow the policy: the trust-region methods of TR-DPO (arXiv:2404.09656)


class FollowingReference(Reference):
    """A copy of the policy that goes after it. It has weights of its own where they are trained: of an adapter's
    policy the adapter's, on the policy's base."""

    notes = ("reference: it moves, so it is asked at every step and nothing is cached",)

    def __init__(self, name: str, model: nn.Module, identity: str, weights: str) -> None:
        self.name, self.identity, self.weights = name, identity, weights
        self._own = {name for name, weight in model.named_parameters() if weight.requires_grad}
        self._model = model.eval().requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The copy as it is now."""
        return self._model

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """A forward pass of the copy as it is now."""
        return response_logps(self._model, batch)

    @property
    def vocabulary(self) -> int:
        """The policy's."""
        return vocabulary_of(self._model)

    def next_tokens(self, batch: PackedBatch) -> NextTokens:
        """A forward pass of the copy's trunk as it is now."""
        return next_tokens(self._model, batch)

    def own_weights(self) -> dict[str, Tensor]:
        """The weights that the copy does not share with the policy."""
        return {name: weight.detach() for name, weight in self._model.named_parameters() if name in self._own}

    def state_dict(self) -> dict[str, Tensor]:
        """The copy's own weights."""
        return self.own_weights()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the copy's weights from a checkpoint; what it shared until then it has for itself afterwards. Raises
        ValueError if they are another model's."""
        weights = dict(self._model.named_parameters())
        if not self._own <= state.keys() <= weights.keys() or not state:
            raise ValueError("the checkpoint's reference has other weights than this one, or none")
        for name in state.keys() - self._own:
            module, _, last = name.rpartition(".")
            own = nn.Parameter(weights[name].detach().clone(), requires_grad=False)
            self._model.get_submodule(module).register_parameter(last, own)
        self._own = set(state)
        for name, weight in self.own_weights().items():
            weight.copy_(state[name])


def due(step: int, every: int, burn_in: int) -> bool:
    """Whether a reference that moves every `every` optimiser steps once `burn_in` are done moves after step `step`."""
    return step > burn_in and (step - burn_in) % every == 0


class MovingReference(FollowingReference):
    """A copy of the policy that takes a step of `share` towards it every `every` optimiser steps after `burn_in`."""

    def __init__(
        self, model: nn.Module, identity: str, weights: str, share: float, every: int, burn_in: int = 0
    ) -> None:
        super().__init__("moving", model, identity, weights)
        self.share, self.every, self.burn_in = share, every, burn_in

    @torch.no_grad()
    def update(self, policy: nn.Module, step: int, made: Bool[Tensor, ""]) -> None:
        """reference <- share policy + (1 - share) reference, where the step is due and was made; that is decided on
        the device."""
        if not due(step, self.every, self.burn_in):
            return
        ours = dict(policy.named_parameters())
        for name, weight in self.own_weights().items():
            weight.copy_(torch.where(made, weight.lerp(ours[name], self.share), weight))


class RoundReference(FollowingReference):
    """The policy as it was when the round of training began."""

    notes = ("reference: the policy at the beginning of each round, asked at every step; nothing is cached",)

    @torch.no_grad()
    def begin_round(self, policy: nn.Module) -> None:
        """reference <- policy."""
        ours = dict(policy.named_parameters())
        for name, weight in self.own_weights().items():
            weight.copy_(ours[name])


def check_moving(kind: str, every: int, burn_in: int, cache: str) -> None:
    """Raise ValueError for a reference that moves with a table, or at no steps."""
    if cache != "off":
        raise ValueError(
            f"reference.cache={cache}: reference={kind} changes while the policy is trained, so its log-probs cannot "
            "be cached; leave reference.cache out"
        )
    if every < 1:
        raise ValueError(f"reference.every={every} must be at least 1 optimiser step")
    if burn_in < 0:
        raise ValueError(f"reference.burn_in={burn_in} must be at least 0 optimiser steps")


def _check_moving(share: float, every: int, burn_in: int, reset: str | None, cache: str, **_: Any) -> None:
    check_moving("moving", every, burn_in, cache)
    if not 0 < share <= 1:
        raise ValueError(f"reference.share={share} must lie in (0, 1]: 1 replaces the reference by the policy")
    for name, value in {"share": share, "every": every, "burn_in": burn_in}.items():
        if reset is not None and value != configuration(moving)[name].default:
            raise ValueError(
                f"reference.{name}={value} has no effect with reference.reset={reset}, which replaces the reference "
                "at the beginning of each round and leaves it as it is until the next; leave one of them out"
            )


def _check_rounds(objective: Objective, plan: RunPlan) -> None:
    """Refuse a reference that is replaced each round where there is one round."""
    reset, data = plan.components["reference"].options["reset"], plan.components["data"]
    if reset is not None and data.hooks.rounds is None:
        raise ValueError(
            f"reference.reset={reset} replaces the reference at the beginning of each round, and data={data.name} has "
            "one; use data=on_policy, or leave it out: reference.share and reference.every say how it moves"
        )


@component(check=_check_moving, check_run=_check_rounds)
def moving(
    context: ReferenceContext,
    *,
    share: float = 0.6,
    every: int = 512,
    burn_in: int = 0,
    reset: Literal["round"] | None = None,
    cache: str = "off",
) -> Reference:
    """The policy as it was, following it as it is trained (arXiv:2404.09656).

    Once `burn_in` optimiser steps are done, every `every` further ones reference <- share policy + (1 - share)
    reference: `share=1` is the paper's hard update, a share between its soft one; `every=1` with a small share is an
    exponential moving average. `reset=round` makes it the policy at the beginning of each round of data=on_policy
    instead, as in iterative DPO (SPPO, arXiv:2405.00675). Its log-probs are computed at every step: `cache` can only
    be off.
    """
    weights, model = context.policy.weights, copy_of_trained(context.policy.model)
    initially = identity_of(context.policy.model, weights, context.policy.text_identity)
    if reset is not None:
        return RoundReference("moving", model, digest([initially, "moving", reset]), weights)
    later = [burn_in] if burn_in else []  # without one the identity is that of runs from before it could be said
    return MovingReference(model, digest([initially, "moving", share, every, *later]), weights, share, every, burn_in)
