"""KL(policy || reference) over whole answers, from the policy's own samples.

An answer y drawn from the policy visits prefixes y_<t. At each of them the KL between the two next-token distributions
is exact, over the whole vocabulary; their sum is the Rao-Blackwellised estimator (Amini, Vieira, Cotterell 2025,
arXiv:2504.10637):

    KL_hat = mean over answers of  sum_t  sum_v  pi(v | x, y_<t) (log pi(v | x, y_<t) - log ref(v | x, y_<t))

It is unbiased, never negative, and varies less than the plain estimate k1 = mean of sum_t (log pi - log ref)(y_t),
which is reported beside it as a check. Answers that were cut contribute the KL of their prefix: a lower bound.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_ref.data.groups import TokenGroups, from_groups
from dpo_ref.data.packing import collate, pack, share_of
from dpo_ref.distributed import ranks
from dpo_ref.evaluation.results import END_OWN, KL
from dpo_ref.evaluation.statistics.estimates import Estimate, clustered_mean
from dpo_ref.generation.records import Generation
from dpo_ref.generation.sampling import never_sampled
from dpo_ref.models.logps import CHUNK_LOGITS, Head, head_of, response_hidden, response_logps, sum_by_response
from dpo_ref.references.interface import Reference
from dpo_ref.types import Asked, PackedBatch, Progress, PromptGroup, TokenGroup, asked, silent, words_of

LIVE_TENSORS = 8  # [tokens, vocab] tensors alive in one chunk: two models' logits, log-probs and their products
NEVER = -1e30  # log-weight of tokens that are never sampled; finite, so that 0 * (difference) is 0 and not nan


class TokenComparison(NamedTuple):
    """Policy against reference at each response token: exact next-token KL at its prefix, log-ratio of the token."""

    kl: Float[Tensor, " R"]
    logratio: Float[Tensor, " R"]


class SampleKl(NamedTuple):
    """One value per answer, in nats: estimator, plain estimate, and log-ratio of the end token (nan where cut)."""

    kl: Float[np.ndarray, " N"]
    k1: Float[np.ndarray, " N"]
    end_logratio: Float[np.ndarray, " N"]
    num_tokens: Int[np.ndarray, " N"]
    prompt_index: Int[np.ndarray, " N"]

    def estimate(self, values: Float[np.ndarray, " N"]) -> Estimate:
        """Mean and standard error, clustered by prompt, over the answers that have a value."""
        present = ~np.isnan(values)
        return clustered_mean(values[present], self.prompt_index[present].tolist())

    def metrics(self, name: str) -> dict[str, float]:
        """KL to the model of this name, with what stands beside it."""
        key, kl, k1 = KL.of(model=name), self.estimate(self.kl), self.estimate(self.k1)
        return {
            key: kl.mean,
            f"{key}_se": kl.se,
            f"{key}_k1": k1.mean,
            f"{key}_k1_se": k1.se,
            f"{key}_per_token": float(self.kl.sum() / self.num_tokens.sum()),
            f"{key}_share_cut": float(np.isnan(self.end_logratio).mean()),
        }

    def end_metrics(self) -> dict[str, float]:
        """The shift of the end token on the policy's own answers."""
        end = self.estimate(self.end_logratio)
        return {END_OWN.key: end.mean, f"{END_OWN.key}_se": end.se}


class SequenceK1(NamedTuple):
    """log pi(y) - log ref(y) of every answer that ended by itself, in nats: one draw each of the KL's mean."""

    values: Float[np.ndarray, " N"]
    num_bytes: Int[np.ndarray, " N"]
    prompt_index: Int[np.ndarray, " N"]
    share_cut: float  # of all answers: those left out

    def metrics(self, name: str) -> dict[str, float]:
        """KL to the model of this name; per byte where tokens of two tokenizers cannot be counted alike."""
        k1 = clustered_mean(self.values, self.prompt_index.tolist())
        per_byte = float(self.values.sum() / self.num_bytes.sum()) if self.num_bytes.any() else float("nan")
        values = {"": k1.mean, "_se": k1.se, "_per_byte": per_byte, "_share_cut": self.share_cut}
        return {f"{KL.of(model=name)}{part}": value for part, value in values.items()}


def sample_groups(generations: Sequence[Generation]) -> tuple[TokenGroups, list[list[int]]]:
    """One group per prompt, its samples side by side, and which generations they are. A later turn of a conversation
    has a prompt of its own for every sample.

    The tokens are those that were drawn, never the answer's text tokenised again.
    """
    by_prompt: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for index, generation in enumerate(generations):
        by_prompt[generation.prompt_index, generation.prompt_ids].append(index)
    indices = list(by_prompt.values())
    texts = [
        replace(generations[members[0]].texts, responses=tuple(generations[i].output for i in members))
        for members in indices
    ]
    groups = (
        TokenGroup(
            group_index=index,
            group_id=f"{index:032x}",
            prompt_ids=list(generations[members[0]].prompt_ids),
            response_ids=tuple(list(generations[i].token_ids) for i in members),
            num_bytes=tuple(len(generations[i].output.encode()) for i in members),
            pairs=(),
        )
        for index, members in enumerate(indices)
    )
    return from_groups(groups, texts), indices


@torch.no_grad()
def sequence_k1(
    policy: nn.Module, reference: Reference, generations: Sequence[Generation], *, tokens_per_batch: int = 8192
) -> SequenceK1:
    """The plain estimate of KL(policy || reference) for a reference of any kind, built for these samples' groups.

    Answers that were cut are left out: a reference with another tokenizer gives the probability of texts that end.
    """
    groups, indices = sample_groups(generations)
    device = next(policy.parameters()).device
    values = np.empty(len(generations))
    for members in pack(groups, tokens_per_batch=tokens_per_batch):
        batch = collate(members).to(device)
        difference = response_logps(policy, batch).sums - reference.logps(batch).sums
        values[[index for group in members for index in indices[group.group_index]]] = difference.cpu().numpy()
    ended = np.array([g.finished for g in generations])
    sizes, prompts = np.array([(len(g.output.encode()), g.prompt_index) for g in generations]).T
    return SequenceK1(values[ended], sizes[ended], prompts[ended], float(1 - ended.mean()))


def _next_token_logps(head: Head, hidden: Tensor, never: Tensor) -> Float[Tensor, "C V"]:
    return head.logits(hidden).index_fill_(1, never, NEVER).log_softmax(dim=-1)


@torch.no_grad()
def compare_tokens(
    policy: nn.Module, reference: nn.Module, batch: PackedBatch, never: Int[Tensor, " B"]
) -> TokenComparison:
    """Compare two models, packed attention installed in both, on a pack's response tokens, a chunk at a time.

    `never` are the tokens that sampling excludes; both distributions are compared without them. Log-softmax in
    float32, sums over the vocabulary in float64.
    """
    heads = head_of(policy), head_of(reference)
    hidden = response_hidden(policy, batch), response_hidden(reference, batch)
    rows = max(1, CHUNK_LOGITS // LIVE_TENSORS // heads[0].weight.shape[0])
    kls, ratios = [], []
    for policy_c, reference_c, target_c in zip(*(x.split(rows) for x in (*hidden, batch.target_ids)), strict=True):
        ours, theirs = _next_token_logps(heads[0], policy_c, never), _next_token_logps(heads[1], reference_c, never)
        difference = ours - theirs
        kls.append((ours.exp() * difference).sum(dim=-1, dtype=torch.float64))
        ratios.append(difference.gather(1, target_c[:, None]).squeeze(1).double())
    return TokenComparison(torch.cat(kls), torch.cat(ratios))


def _per_answer(
    policy: nn.Module, reference: nn.Module, batch: PackedBatch, never: Int[Tensor, " B"]
) -> Float[Tensor, "3 N"]:
    """KL, k1 and the last token's log-ratio of the answers of a pack."""
    compared = compare_tokens(policy, reference, batch, never)
    last = compared.logratio[batch.lengths.cumsum(0) - 1]
    return torch.stack([*(sum_by_response(values, batch) for values in compared), last])


def _check(policy: Any, reference: Any, generations: Sequence[Generation]) -> None:
    if not generations:
        raise ValueError("there are no generations to measure a KL on; sample some with stage=generate")
    for g in generations:
        if g.tokens != "drawn":
            raise ValueError(
                "KL is measured on the tokens that were drawn, but the server gave texts alone; serve the policy with "
                "vLLM, which gives them"
            )
        if (g.temperature, g.top_p) != (1.0, 1.0):
            raise ValueError(
                "KL is measured on samples of the policy itself, but these were drawn with temperature "
                f"{g.temperature} and top_p {g.top_p}, from another distribution; use generation.temperature=1 "
                "generation.top_p=1"
            )
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"KL over the vocabulary needs one vocabulary, but the models' have {sizes[0]} and {sizes[1]} entries"
        )


def sample_kl(
    policy: nn.Module,
    reference: nn.Module,
    generations: Sequence[Generation],
    never: Int[Tensor, " B"],
    progress: Progress = silent,
    *,
    tokens_per_batch: int = 8192,
) -> SampleKl:
    """KL(policy || reference) per answer of `generations`, which `policy` drew at temperature 1 and top-p 1.

    Both models have packed attention installed (as `loading.load_model` leaves them). `never` is
    `generation.sampling.never_sampled`. Raises ValueError for samples of another distribution, for no samples, and
    for models of different vocabularies.
    """
    _check(policy, reference, generations)
    groups, indices = sample_groups(generations)
    device = next(policy.parameters()).device
    share = share_of(groups, partial(pack, tokens_per_batch=tokens_per_batch))
    answers: list[int] = []
    measured = [torch.empty(3, 0, dtype=torch.float64)]
    for members, counts in progress(share.passes, "KL on samples", len(share.passes)):
        values = _per_answer(policy, reference, collate(members).to(device), never.to(device))
        if counts:
            answers += [index for group in members for index in indices[group.group_index]]
            measured.append(values.cpu())
    kl, k1, end = torch.cat(measured, dim=1)
    of_all = ranks().columns({"answer": torch.tensor(answers, dtype=torch.long), "kl": kl, "k1": k1, "end": end})
    places = of_all.pop("answer").numpy()
    table = np.full((3, len(generations)), np.nan)  # KL, k1, log-ratio of the last token
    table[:, places] = torch.stack(list(of_all.values())).numpy()
    table[2, [not g.finished for g in generations]] = np.nan
    kl, k1, end_logratio = table
    num_tokens, prompt_index = np.array([(g.num_tokens, g.prompt_index) for g in generations]).T
    return SampleKl(kl, k1, end_logratio, num_tokens, prompt_index)


# --- in both directions, by what the reference can be asked
# Where it is a model of the policy's tokens: the exact next-token KL along samples. Where it scores text, or is no
# single model: the mean log-ratio of finished answers (k1), their text scored by both. Where it is no distribution, or
# there is nothing to draw from, nothing; the reason is kept.


BY_TOKEN = "Rao-Blackwellised"
BY_TEXT = "k1 of finished answers' text"
NOT_NORMALISED = "it is no distribution: its probabilities do not sum to 1"
NOTHING_TO_DRAW_FROM = "there is no model to draw answers from"

Scored = tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"], list[int]]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A KL in nats, per answer and per byte of text, or the reason why there is none. `num_cut` answers had not ended:
    by token they count as far as they go (a lower bound), by text they are left out."""

    reason: str | None = None
    estimator: str | None = None
    per_answer: Estimate | None = None
    per_byte: Estimate | None = None
    num_answers: int = 0
    num_cut: int = 0


def estimate_divergence(
    values: Float[np.ndarray, " N"], num_bytes: Float[np.ndarray, " N"], prompts: Sequence[int], estimator: str,
    num_cut: int,
) -> Divergence:  # fmt: skip
    """Mean per answer, and total per total bytes with the error of a ratio (delta method), clustered by prompt."""
    ratio = float(values.sum() / num_bytes.sum())
    error = clustered_mean(values - ratio * num_bytes, prompts).se / float(num_bytes.mean())
    per_answer = clustered_mean(values, prompts)
    return Divergence(None, estimator, per_answer, Estimate(ratio, error), len(values), num_cut)


def by_tokens(
    model: nn.Module, other: nn.Module, tokenizer: Any, samples: Sequence[Generation], progress: Progress = silent
) -> Divergence:
    """KL(model || other) along the model's own samples; both use `tokenizer`."""
    causal_lm: Any = model
    never = never_sampled(tokenizer, causal_lm.get_output_embeddings().weight.shape[0])
    values = sample_kl(model, other, samples, never, progress)
    num_bytes = np.array([len(sample.output.encode()) for sample in samples], dtype=np.float64)
    num_cut = sum(not sample.finished for sample in samples)
    if not num_bytes.sum():
        return Divergence(reason="all of its answers are empty")
    return estimate_divergence(values.kl, num_bytes, values.prompt_index.tolist(), BY_TOKEN, num_cut)


def finished_texts(samples: Sequence[Generation], prompts: Sequence[Asked]) -> list[PromptGroup]:
    """The answers that ended by themselves, as texts behind the prompts as the policy reads them."""
    return [
        replace(asked(prompts[sample.prompt_index]), responses=(sample.output,), origin=f"sampled answer {index}")
        for index, sample in enumerate(samples)
        if sample.finished
    ]


def by_text(
    samples: Sequence[Generation] | None, texts: Sequence[PromptGroup], scored: Scored, sign: int
) -> Divergence:
    """Mean of sign * (log policy - log reference) over `texts`, the finished ones of `samples`; `scored` holds the
    log-probs under policy and reference and which of the texts they are of. `samples` None: nothing was drawn."""
    if samples is None:
        return Divergence(reason=NOTHING_TO_DRAW_FROM)
    policy, reference, indices = scored
    num_bytes = np.array([len(words_of(texts[index].responses[0]).encode()) for index in indices], dtype=np.float64)
    if len(indices) < 2 or not num_bytes.sum():
        return Divergence(reason=f"only {len(indices)} of {len(samples)} answers ended within the token limit")
    return estimate_divergence(sign * (policy - reference), num_bytes, indices, BY_TEXT, len(samples) - len(texts))


def both_by_text(
    ours: Sequence[Generation],
    theirs: Sequence[Generation] | None,
    prompts: Sequence[Asked],
    score: Callable[[Sequence[PromptGroup]], Scored],
) -> tuple[Divergence, Divergence]:
    """KL(policy || reference) on the policy's samples and KL(reference || policy) on the reference's, by text.

    `score` gives both log-probs of texts and which of them could be scored; a ValueError of it (a reference that
    cannot score other texts) is the reason why there is no KL.
    """
    first, second = finished_texts(ours, prompts), finished_texts(theirs or (), prompts)
    try:
        policy, reference, indices = score([*first, *second])
    except ValueError as error:
        none = Divergence(reason=f"sampled answers cannot be scored: {error}")
        return none, none
    mine = np.array([index < len(first) for index in indices], dtype=bool)
    forward = policy[mine], reference[mine], [index for index in indices if index < len(first)]
    reverse = policy[~mine], reference[~mine], [index - len(first) for index in indices if index >= len(first)]
    return by_text(ours, first, forward, 1), by_text(theirs, second, reverse, -1)
