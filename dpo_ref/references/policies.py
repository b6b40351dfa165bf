"""References that are models of the policy's tokens and stay as they are, or none: the initial policy, another
checkpoint, the model below an adapter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from dpo_ref.component import RunPlan, component, configuration
from dpo_ref.data.chat_templates import install_template, text_identity
from dpo_ref.data.groups import Groups, MappedGroups
from dpo_ref.models.adapters import adapter_off, changes_something
from dpo_ref.models.asked import ModelSource, on_base_of
from dpo_ref.models.checkpoint import base_digest, weights_digest
from dpo_ref.models.folders import check_vocabulary
from dpo_ref.models.loading import TrainedModel, check_revision
from dpo_ref.models.logps import response_logps
from dpo_ref.models.next_token import NextTokens, next_tokens, vocabulary_of
from dpo_ref.models.shards import whole
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
        reference = LiveReference("initial", context.policy.holding.copy(context.policy.model), identity, weights)
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


def _check_other(*, path: str | None, adapter: str | None, **options: Any) -> None:
    """Refuse a reference that names no model, and options about a model that is not loaded."""
    if path is not None:
        check_revision(path, options["revision"], "reference")
        return
    if adapter is None:
        raise ValueError(
            "reference=other needs reference.path=<model>, or reference.adapter=<adapter> alone, which then goes on "
            "the policy's own base"
        )
    for name, value in options.items():
        option = configuration(other).get(name)
        if option is not None and name != "cache" and value != option.default:
            raise ValueError(
                f"reference.{name}={value} has no effect without reference.path: the adapter goes on the policy's own "
                "base, and reads as the policy does; leave one of them out, or name the base"
            )


def _check_base_stays(objective: Objective, plan: RunPlan) -> None:
    """Refuse an adapter that is asked at every step on weights that are trained."""
    reference, model = plan.components["reference"].options, plan.components["model"].options
    trained = model["adapter"] is None and model["lora_rank"] is None
    if reference["path"] is None and reference["cache"] == "off" and trained:
        raise ValueError(
            "reference.adapter without reference.path goes on the policy's own weights, and these are trained while "
            "it is asked at every step; train an adapter (model.lora_rank=...), or name the base: reference.path=..."
        )


@component(check=_check_other, check_run=_check_base_stays)
def other(
    context: ReferenceContext,
    *,
    path: str | None = None,
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
    name); without `path` that goes on the model below the policy's own adapter, or on the policy as it is before
    training, which it shares the weights with: no second model is loaded.
    `dtype=bfloat16` and `quantisation` (bitsandbytes) hold the weights in less memory, `device` puts them elsewhere
    than the policy (cpu, cuda:1; spread: over all GPUs). `template` and `template_options` are the reference's, as for
    the model; `system_prompt` is the system turn it reads, in place of the data's. `terminator=skip` leaves its
    end-of-turn token out. `max_altered` is the share of responses that may fail to survive its tokenizer and template
    byte for byte; above it the run stops.
    """
    if path is None:
        return model_reference("other", on_base_of(context.policy, str(adapter)), context, cache)
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
    return LiveReference("other", context.policy.holding.spread(model), identity, weights)


def model_reference(kind: str, model: nn.Module, context: ReferenceContext, cache: Cache) -> Reference:
    """A model that reads the policy's text: its table, or the model itself where it is asked at every step."""
    weights = weights_digest(model)
    identity = identity_of(model, weights, context.policy.text_identity)
    if cache == "auto":
        return precompute(kind, model, identity, weights, context)
    scorer_of(model).check(context.groups)
    return LiveReference(kind, context.policy.holding.spread(model), identity, weights)


def prior(context: ReferenceContext, *, cache: Literal["auto"] = "auto") -> Reference:
    """log p(y) of the policy before training, without any prompt: the response behind BOS alone (EOS where there is
    none). With the objective dpo this is the likelihood reward of arXiv:2407.13709."""
    begin, groups = begin_of(context.policy.tokenizer), without_prompts(context)
    weights = context.policy.weights
    identity = identity_of(context.policy.model, weights, context.policy.text_identity)
    rows = rows_of(scorer_of(context.policy.model), groups, identity, context)
    name, device = digest([identity, "prior", begin]), context.work.device
    reference = PrecomputedReference("prior", name, "", groups, rows, device)
    reference.table = identity  # rows are named by what is scored, the prompt included
    return reference


def begin_of(tokenizer: Any) -> int:
    """The token that a text without a prompt begins with: BOS, or EOS where there is none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def without_prompts(context: ReferenceContext) -> Groups:
    """The context's groups as `prior` reads them."""
    begin = begin_of(context.policy.tokenizer)
    return MappedGroups(context.groups, lambda group: replace(group, prompt_ids=[begin]))


def _check_revision(*, path: str, revision: str | None, **rest: Any) -> None:
    check_revision(path, revision, "reference")


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
    model.load_state_dict({name: torch.lerp(whole(ours[name]), theirs[name], share) for name in ours})
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
