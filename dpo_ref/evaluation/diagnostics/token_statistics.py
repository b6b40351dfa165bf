"""What models say at each response token: the token's log-probability, and what of the whole next-token distribution
is needed afterwards, read from the head a chunk of tokens at a time; the scored tokens of a set of responses as flat
arrays, with what policy, initial policy and loss reference say at each of them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dpo_ref.data.groups import Groups, TokenGroups
from dpo_ref.data.packing import collate, pack
from dpo_ref.data.tokenise import end_of_turn_ids
from dpo_ref.evaluation.statistics.estimates import Estimate, clustered_mean
from dpo_ref.generation.records import Generation
from dpo_ref.generation.sampling import never_sampled
from dpo_ref.models.asked import Workspace
from dpo_ref.models.loading import Policy
from dpo_ref.models.logps import CHUNK_LOGITS, Head, head_of, response_hidden, token_logps
from dpo_ref.references.interface import Reference
from dpo_ref.types import PackedBatch, Progress, PromptGroup, TokenGroup, silent

# --- read from a model


LIVE_TENSORS = 4  # [tokens, vocabulary] tensors alive in one chunk
NEVER = -1e30  # logit of tokens that are never sampled; finite, so that 0 * logit is 0 and not nan


class TokenStatistics(NamedTuple):
    """One model at each of R response tokens, whose prefixes it is shown."""

    logps: Float[np.ndarray, " R"]  # of the token, nats
    end_logps: Float[np.ndarray, " R"]  # that the answer ends here, by any token that ends a turn, nats
    entropy: Float[np.ndarray, " R"]  # of the next token, nats
    ranks: Float[np.ndarray, " R"]  # of the token among all, 1 the likeliest


def _distribution(
    hidden: Float[Tensor, "C H"], head: Head, targets: Int[Tensor, " C"], ends: Int[Tensor, " E"], never: Tensor
) -> Float[Tensor, "4 C"]:
    """Log-mass of the tokens that can be sampled, end log-prob, entropy and rank, for one chunk."""
    whole = head.logits(hidden)
    logits = whole.index_fill(1, never, NEVER)
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    mass = log_total.squeeze(1) - whole.logsumexp(dim=-1)
    ranks = 1 + (logits > logits.gather(1, targets[:, None])).sum(dim=-1)
    logps = logits - log_total
    entropy = -(logps.exp() * logps).sum(dim=-1, dtype=torch.float64)
    return torch.stack([mass.double(), logps[:, ends].logsumexp(dim=-1).double(), entropy, ranks.double()])


@torch.no_grad()
def read_tokens(
    model: nn.Module, batch: PackedBatch, ends: Int[Tensor, " E"], never: Int[Tensor, " X"]
) -> Float[Tensor, "4 R"]:
    """The four rows of `TokenStatistics` for a pack, under a model with packed attention.

    The token's log-prob is that of `logps.token_logps`, the function policy and references share. `never` are tokens
    that sampling excludes: on sampled answers every number is that of the distribution without them.
    """
    head, hidden = head_of(model), response_hidden(model, batch)
    rows = max(1, CHUNK_LOGITS // LIVE_TENSORS // head.weight.shape[0])
    chunks = zip(hidden.split(rows), batch.target_ids.split(rows), strict=True)
    readings = torch.cat([_distribution(part, head, targets, ends, never) for part, targets in chunks], dim=1)
    return torch.cat([token_logps(hidden, head, batch.target_ids)[None] - readings[:1], readings[1:]])


def per_token(
    groups: Sequence[TokenGroup],
    measure: Callable[[PackedBatch], Float[Tensor, "K R"]],
    device: torch.device,
    progress: Progress = silent,
    description: str = "tokens",
    *,
    tokens_per_batch: int = 8192,
) -> Float[np.ndarray, "K R"]:
    """`measure` of every scored token of `groups`, in the groups' order whatever the packs, in float64."""
    packs = pack(groups, tokens_per_batch=tokens_per_batch)
    by_group: dict[int, np.ndarray] = {}
    for members in progress(packs, description, len(packs)):
        batch = collate(members).to(device)
        values = measure(batch).double().cpu().numpy()
        parts = np.split(values, np.cumsum(batch.scored_per_group)[:-1], axis=1)
        by_group |= {group.group_index: part for group, part in zip(members, parts, strict=True)}
    return np.concatenate([by_group[group.group_index] for group in groups], axis=1)


def readings_of(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    ends: Sequence[int],
    never: Int[Tensor, " X"],
    progress: Progress = silent,
    description: str = "tokens",
    *,
    tokens_per_batch: int = 8192,
) -> TokenStatistics:
    """What `model` says at every scored token of `groups`; `ends` end a turn, `never` is as in `read_tokens`."""
    device = next(model.parameters()).device
    end_ids, excluded = torch.tensor(sorted(ends), device=device), never.to(device)

    def measure(batch: PackedBatch) -> Float[Tensor, "4 R"]:
        return read_tokens(model, batch, end_ids, excluded)

    return TokenStatistics(
        *per_token(groups, measure, device, progress, description, tokens_per_batch=tokens_per_batch)
    )


# --- the scored tokens of a set of responses


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """R scored tokens of N responses, the responses one after the other."""

    ids: Int[np.ndarray, " R"]
    response: Int[np.ndarray, " R"]  # which of the N each belongs to, ascending
    position: Int[np.ndarray, " R"]  # 0-based, among the scored tokens of its response
    ends: Bool[np.ndarray, " R"]  # whether it is a token that ends a turn
    prompts: Int[np.ndarray, " N"]  # equal for responses to the same prompt
    policy: TokenStatistics
    initial: TokenStatistics
    reference: Float[np.ndarray, " R"] | None = None  # log-probs of the loss reference, if it knows tokens

    @property
    def num_responses(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Scored tokens of each response."""
        return np.bincount(self.response, minlength=self.num_responses)

    @property
    def last(self) -> Bool[np.ndarray, " R"]:
        """Whether a token is its response's last."""
        return self.position == self.lengths[self.response] - 1

    @property
    def logratios(self) -> Float[np.ndarray, " R"]:
        """log pi - log initial of each token, nats."""
        return self.policy.logps - self.initial.logps

    def sums(self, values: Float[np.ndarray, " R"]) -> Float[np.ndarray, " N"]:
        """Per-token values summed over each response."""
        return np.bincount(self.response, weights=values, minlength=self.num_responses)

    def per_token(self, values: Float[np.ndarray, " R"]) -> Estimate:
        """Mean over all tokens, with the error of a ratio (delta method), clustered by prompt; nan for no tokens."""
        if not len(values):
            return Estimate(float("nan"), float("nan"))
        mean, lengths = float(values.mean()), self.lengths
        error = clustered_mean(self.sums(values) - mean * lengths, self.prompts.tolist()).se / float(lengths.mean())
        return Estimate(mean, error)

    def of(self, responses: Int[np.ndarray, " M"]) -> "ScoredTokens":
        """The tokens of these responses, ascending and each once."""
        mask = np.isin(self.response, responses)
        reference = None if self.reference is None else self.reference[mask]
        policy, initial = (
            TokenStatistics(*(values[mask] for values in readings)) for readings in (self.policy, self.initial)
        )
        return replace(
            self,
            ids=self.ids[mask], position=self.position[mask], ends=self.ends[mask],
            response=np.searchsorted(responses, self.response[mask]), prompts=self.prompts[responses],
            policy=policy, initial=initial, reference=reference,
        )  # fmt: skip


def _scored_tokens(group: TokenGroup) -> list[list[int]]:
    """Each response's scored tokens."""
    if group.scored is None:
        return list(group.response_ids)
    return [list(compress(ids, mask)) for ids, mask in zip(group.response_ids, group.scored, strict=True)]


def tokens_of(
    groups: Sequence[TokenGroup], ends: Collection[int], policy: TokenStatistics, initial: TokenStatistics
) -> ScoredTokens:
    """Tokens of `groups`, with the readings of both models on them."""
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(tuple(g.prompt_ids) for g in groups))}
    responses = [response for group in groups for response in _scored_tokens(group)]
    sizes = [len(response) for response in responses]
    ids = np.array([token for response in responses for token in response], dtype=np.int64)
    return ScoredTokens(
        ids=ids,
        response=np.repeat(np.arange(len(sizes)), sizes),
        position=np.array([index for size in sizes for index in range(size)], dtype=np.int64),
        ends=np.isin(ids, sorted(ends)),
        prompts=np.array([prompts[tuple(g.prompt_ids)] for g in groups for _ in g.response_ids], dtype=np.int64),
        policy=policy,
        initial=initial,
    )


@dataclass(frozen=True, slots=True)
class PairPlaces:
    """B ordered pairs, as positions among the N responses of `tokens_of`."""

    chosen: Int[np.ndarray, " B"]
    rejected: Int[np.ndarray, " B"]


def pair_places(groups: Sequence[TokenGroup]) -> PairPlaces:
    """Every pair of `groups`, in their order."""
    firsts = np.cumsum([0, *(len(group.response_ids) for group in groups)])
    pairs: list[Any] = [
        (first + better, first + worse)
        for first, group in zip(firsts.tolist(), groups, strict=False)
        for better, worse in group.pairs
    ]
    chosen, rejected = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return PairPlaces(chosen, rejected)


# --- what a diagnosis is made from: two models, texts, and how to ask the loss reference about them


@dataclass(frozen=True, slots=True)
class DiagnosticContext:
    """Handed over at run time. `generations` are the policy's answers, `heldout` the groups held out from training,
    for which `reference` was built."""

    work: Workspace
    policy: Policy
    initial: Policy
    heldout: TokenGroups
    generations: Sequence[Generation]
    reference: Reference
    reference_on: Callable[[Groups], Reference]  # asked for what no table holds
    tokenise: Callable[[Sequence[PromptGroup]], TokenGroups]

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a turn."""
        return frozenset(end_of_turn_ids(self.policy.tokenizer))

    @property
    def never(self) -> Int[Tensor, " X"]:
        """Tokens that sampling excludes."""
        return never_sampled(self.policy.tokenizer, self.policy.model.get_output_embeddings().weight.shape[0])


# --- what the loss reference says about responses that policy and initial policy have read


SAME = "it is the initial policy"
NOT_NORMALISED = "it is no distribution over answers"
NO_TOKENS = "its tokens do not correspond to the policy's"


@dataclass(frozen=True, slots=True)
class ReferenceStatistics:
    """A loss reference on N responses: log-probs summed over each, and of their R tokens; None where it cannot say,
    and `why` not. `entropy` is its next-token entropy where it is a model of the policy's tokens."""

    sums: Float[np.ndarray, " N"] | None = None
    tokens: Float[np.ndarray, " R"] | None = None
    entropy: Float[np.ndarray, " R"] | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """Responses with what all three say about them."""

    groups: Sequence[TokenGroup]
    tokens: ScoredTokens
    beside: ReferenceStatistics


def ask(
    reference: Reference, groups: Sequence[TokenGroup], device: torch.device, *, tokens_per_batch: int = 8192
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " R"] | None]:
    """The reference's log-probs of every response and, where it knows them, of every token, in the groups' order."""
    sums: dict[int, np.ndarray] = {}
    tokens: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for members in pack(groups, tokens_per_batch=tokens_per_batch):
            batch = collate(members).to(device)
            logps, indices = reference.logps(batch), [group.group_index for group in members]
            bounds = np.cumsum([len(group.response_ids) for group in members])[:-1]
            sums |= dict(zip(indices, np.split(logps.sums.double().cpu().numpy(), bounds), strict=True))
            if logps.token_logps is not None:
                values = logps.token_logps.double().cpu().numpy()
                parts = np.split(values, np.cumsum(batch.scored_per_group)[:-1])
                tokens |= dict(zip(indices, parts, strict=True))
    order = [group.group_index for group in groups]
    whole = np.concatenate([sums[index] for index in order])
    return whole, np.concatenate([tokens[index] for index in order]) if tokens else None


def beside(
    context: DiagnosticContext, groups: Sequence[TokenGroup], tokens: ScoredTokens, build: Callable[[], Reference]
) -> ReferenceStatistics:
    """The loss reference on responses that were read; a ValueError of it is the reason why it says nothing."""
    if context.reference.equals(context.initial):
        return ReferenceStatistics(sums=tokens.sums(tokens.initial.logps), why=SAME)
    try:
        reference = build()
        sums, token_logps = ask(reference, groups, context.work.device)
    except ValueError as error:
        return ReferenceStatistics(why=str(error))
    if not reference.normalised:
        return ReferenceStatistics(sums=sums, why=NOT_NORMALISED)
    return (
        ReferenceStatistics(sums=sums, why=NO_TOKENS)
        if token_logps is None
        else ReferenceStatistics(sums, token_logps, _entropy(context, groups, reference))
    )


def _entropy(
    context: DiagnosticContext, groups: Sequence[TokenGroup], reference: Reference
) -> Float[np.ndarray, " R"] | None:
    if reference.model is None:
        return None
    return readings_of(reference.model, groups, sorted(context.ends), context.never[:0]).entropy


def read(
    context: DiagnosticContext,
    groups: Sequence[TokenGroup],
    never: Int[torch.Tensor, " X"],
    build: Callable[[], Reference],
    description: str,
) -> Read:
    """Policy, initial policy and loss reference on `groups`, at least one; `description` is of them, for progress."""
    readings = [
        readings_of(
            model, groups, sorted(context.ends), never, context.work.progress, f"{description}, {name}",
        )
        for name, model in (("policy", context.policy.model), ("initial policy", context.initial.model))
    ]  # fmt: skip
    tokens = tokens_of(groups, context.ends, *readings)
    theirs = beside(context, groups, tokens, build)
    return Read(groups, replace(tokens, reference=theirs.tokens), theirs)


def margins(readings: Read, pairs: PairPlaces) -> dict[str, Float[np.ndarray, " B"]]:
    """Chosen - rejected of every score that can rank the pairs: the implicit reward where the loss reference says
    something, the log-likelihood under the policy, that per token, and under initial policy and loss reference."""
    tokens = readings.tokens
    policy, initial = tokens.sums(tokens.policy.logps), tokens.sums(tokens.initial.logps)
    scores = {"likelihood": policy, "likelihood_per_token": policy / tokens.lengths, "initial": initial}
    theirs = readings.beside.sums
    if theirs is not None:
        scores |= {"implicit": policy - theirs}
        scores |= {"reference": theirs} if readings.beside.why not in (SAME, NOT_NORMALISED) else {}
    return {name: values[pairs.chosen] - values[pairs.rejected] for name, values in scores.items()}
