"""The engine that runs a transformers model here, on CPU or CUDA.

A library's loop draws from one generator for the whole batch, so its samples change with the batch size. Here every
row has its own stream of random numbers (`engine.py`).
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpo_ref.component import LEFT_OPEN, component
from dpo_ref.data.tokenise import end_of_turn_ids
from dpo_ref.distributed import ranks
from dpo_ref.generation.engine import (
    Answer,
    Engine,
    Request,
    Sampling,
    answer,
    check_positive,
    check_temperatures,
    gumbel,
    held_out,
)
from dpo_ref.generation.records import Generation
from dpo_ref.models.folders import positions_of
from dpo_ref.models.loading import Policy
from dpo_ref.models.logps import head_of
from dpo_ref.models.sharding import asked_whole
from dpo_ref.types import Asked, Progress, ProgressIn, silent


def never_sampled(tokenizer: Any, vocab_size: int) -> Int[Tensor, " B"]:
    """Vocabulary entries that are no text, whose logits no training ever touched: the padding token (unless it also
    ends a turn) and rows of the embedding beyond the tokenizer's vocabulary. After drift a policy does reach them.
    """
    ids = set(range(len(tokenizer), vocab_size))
    if tokenizer.pad_token_id is not None:
        ids.add(tokenizer.pad_token_id)
    return torch.tensor(sorted(ids - end_of_turn_ids(tokenizer)), dtype=torch.int64)


def _check_room(requests: Sequence[Request], model: Any, max_new_tokens: int) -> None:
    """Raise ValueError for a prompt to which the model's positions leave no answer."""
    positions = positions_of(model.config)
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    size, which = len(longest.prompt_ids), f"prompt {longest.place.prompt_index}"
    if positions is None or size + max_new_tokens <= positions:
        return
    if size >= positions:
        raise ValueError(
            f"{which} has {size:,} tokens and the model {positions:,} positions, which leave no answer any room: "
            "choose other questions with prompts=... (prompts=jsonl reads them from a file)"
        )
    raise ValueError(
        f"{which} has {size:,} tokens and the model {positions:,} positions, fewer than it takes with "
        f"generation.max_new_tokens={max_new_tokens}; {positions - size} and less fit"
    )


def _batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Indices of requests, each batch of one temperature and of prompts of about one length."""
    batches: list[list[int]] = []
    for temperature in dict.fromkeys(request.temperature for request in requests):
        alike = [index for index, request in enumerate(requests) if request.temperature == temperature]
        alike.sort(key=lambda index: len(requests[index].prompt_ids))
        batches += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return batches


def text_of(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """An answer's text. Special tokens are kept: a policy that writes them in mid-answer should be seen to."""
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def answer_of(tokenizer: Any, token_ids: Sequence[int], ends: Collection[int]) -> Answer:
    """What the tokens that were drawn say."""
    finished = token_ids[-1] in ends
    output = text_of(tokenizer, token_ids[:-1] if finished else token_ids)
    return Answer(tuple(token_ids), output, "stop" if finished else "length")


@dataclass(frozen=True, slots=True)
class Local:
    """A model on this machine, with a KV cache, in batches of prompts of about one length.

    Each sample has random numbers of its own, so that a batch's company changes nothing, up to rounding that turns a
    near-tie. Batches are the same however many of their answers are known: a batch of which any is lacking is decoded
    whole, so that going on after a crash gives the same bits.
    """

    tokenizer: Any
    sampling: Sampling
    batch_size: int
    model: Callable[[], Any]
    weights: Callable[[], str] = str
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    draws: int = field(default=1, init=False)

    def chosen(self, generations: Sequence[Generation]) -> list[Generation]:
        """Every sample."""
        return list(generations)

    def answers(
        self, requests: Sequence[Request], skip: Set[int], progress: Progress
    ) -> Generator[Mapping[int, Answer], None, None]:
        """A batch's answers at a time; of several ranks each decodes its batches, and has the answers of all."""
        batches = [batch for batch in _batches(requests, self.batch_size) if not skip >= set(batch)]
        if not batches:
            return
        own = batches[ranks().index :: ranks().size]
        model, ends = self.model(), end_of_turn_ids(self.tokenizer)
        device = next(model.parameters()).device
        _check_room(requests, model, self.sampling.max_new_tokens)
        never = never_sampled(self.tokenizer, model.get_output_embeddings().weight.shape[0]).to(device)
        end_ids = torch.tensor(sorted(ends), device=device)
        shown = ProgressIn(progress, "generating", sum(map(len, own)))  # a batch of a large model takes minutes
        with self.precision(), decoding_mode(model), asked_whole(model):
            for turn in range(-(-len(batches) // ranks().size)):
                members = [requests[index] for index in (own[turn] if turn < len(own) else ())]
                drawn = self._drawn(model, members, end_ids, never, shown) if members else []
                decoded = batches[turn * ranks().size : (turn + 1) * ranks().size]
                yield {
                    index: answer_of(self.tokenizer, ids, ends)
                    for batch, outputs in zip(decoded, ranks().gather(drawn), strict=False)
                    for index, ids in zip(batch, outputs, strict=True)
                }

    def _drawn(
        self,
        model: Any,
        members: Sequence[Request],
        end_ids: Int[Tensor, " E"],
        never: Int[Tensor, " B"],
        shown: ProgressIn,
    ) -> list[list[int]]:
        """The tokens of the answers of one batch."""
        streams = torch.tensor([member.stream for member in members], dtype=torch.int64)
        rule = Rule(members[0].temperature, self.sampling.top_p, self.sampling.max_new_tokens, end_ids, never)
        return decode(model, [member.prompt_ids for member in members], streams, rule, shown.advance)


@component(check=check_temperatures)
def transformers(
    policy: Policy,
    *,
    temperature: float | list[float] = 1.0,
    top_p: float = 1.0,
    max_new_tokens: Annotated[int, LEFT_OPEN] = 128,
    samples_per_prompt: int = 1,
    batch_size: int = 128,
) -> Engine:
    """The policy answers here, run by transformers.

    The same seed gives the same answers whatever the batch size, the other prompts and the device, up to rounding
    that turns a near-tie. Temperature 0 is greedy; of several `temperature` each is an evaluation of its own, and the
    engine is made for one of them. `max_new_tokens` counts the end token; `batch_size` counts sequences. Raises
    ValueError for options out of range, and when it answers for a tokenizer without end token or chat template and
    for prompts to which the model has no positions left.
    """
    check_positive(batch_size=batch_size)
    assert not isinstance(temperature, list)
    sampling = Sampling(temperature, top_p, max_new_tokens, samples_per_prompt)
    answering = (lambda: policy.model, lambda: policy.weights, policy.precision)
    return Local(policy.tokenizer, sampling, batch_size, *answering)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Asked],
    seed: int,
    progress: Progress = silent,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    samples_per_prompt: int = 1,
    batch_size: int = 128,
) -> list[Generation]:
    """`samples_per_prompt` answers of a model at hand to every prompt, ordered by prompt and sample; the options are
    those of `transformers`. The model's mode and attention are as before afterwards."""
    check_positive(batch_size=batch_size)
    sampling = Sampling(temperature, top_p, max_new_tokens, samples_per_prompt)
    check_temperatures(temperature, samples_per_prompt)
    return answer(Local(tokenizer, sampling, batch_size, lambda: model), held_out(prompts), seed, progress)


# --- the decoding loop: a batch of prompts goes in, each row leaves when it has ended


@dataclass(frozen=True, slots=True)
class Rule:
    """How the next token is chosen: temperature 0 is greedy; `end_ids` end an answer; `never` are never chosen."""

    temperature: float
    top_p: float
    max_new_tokens: int
    end_ids: Int[Tensor, " E"]
    never: Int[Tensor, " B"]


@contextmanager
def decoding_mode(model: Any) -> Iterator[None]:
    """Evaluation mode and transformers' own attention, which knows KV caches and padding; restored afterwards."""
    training, attention = model.training, model.config._attn_implementation
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    plain = "sdpa" if getattr(model, "_supports_sdpa", True) and softcap is None else "eager"
    model.eval()
    model.set_attn_implementation(plain)
    # Layers compiled for training would be compiled again for a cache that grows by one position a step.
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        model.set_attn_implementation(attention)
        model.train(training)


def _nucleus(logits: Float[Tensor, "S V"], top_p: float) -> Bool[Tensor, "S V"]:
    """The smallest set of likeliest tokens whose probabilities sum to at least `top_p` (Holtzman et al. 2020)."""
    probs, order = logits.double().softmax(dim=-1).sort(dim=-1, descending=True)
    inside = probs.cumsum(dim=-1) - probs < top_p
    return torch.zeros_like(inside).scatter(-1, order, inside)


def choose(logits: Float[Tensor, "S V"], streams: Int[Tensor, " S"], step: int, rule: Rule) -> Int[Tensor, " S"]:
    """The next token of each row."""
    logits = logits.index_fill(-1, rule.never, -torch.inf)
    if rule.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / rule.temperature
    if rule.top_p < 1:
        logits = logits.masked_fill(~_nucleus(logits, rule.top_p), -torch.inf)
    return (logits + gumbel(streams, step, logits.shape[-1])).argmax(dim=-1)


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [S, longest]; what stands in the padding is masked and does not matter."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


CACHES = ("past_key_values", "cache_params")  # what models call what they keep of the tokens before; Mamba the latter


@dataclass
class _Rows:
    """The rows of a batch that are being decoded, M of S. Those that have ended stay for a while, as taking them out
    copies the cache."""

    index: Int[Tensor, " M"]  # among the S
    streams: Int[Tensor, " M"]
    mask: Int[Tensor, "M L"]  # of prompts and all tokens there can be
    positions: Int[Tensor, "M 1"]  # of the token before
    ended: Bool[Tensor, " M"]
    cache_name: str  # one of CACHES
    cache: Any

    def before(self, length: int) -> dict[str, Any]:
        """What a model is handed of the tokens before: those without attention take a mask for one of the new."""
        if self.cache_name == "cache_params":
            return {"cache_params": self.cache}
        return {"past_key_values": self.cache, "attention_mask": self.mask[:, :length]}

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Take all others out."""
        from dpo_ref.generation.kv_cache import keep_rows

        kept = (x.index_select(0, rows) for x in (self.index, self.streams, self.mask, self.positions, self.ended))
        self.index, self.streams, self.mask, self.positions, self.ended = kept
        keep_rows(self.cache, rows)


def _read_prompts(
    backbone: Any, prompts: Sequence[Sequence[int]], streams: Int[Tensor, " S"], max_new_tokens: int
) -> tuple[Float[Tensor, "S H"], _Rows]:
    """Hidden states from which the first token of each row is drawn. Prompts that are alike are read once."""
    from dpo_ref.generation.kv_cache import check_padding, keep_rows, with_room

    device = next(backbone.parameters()).device
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids, mask = _left_pad(list(distinct), device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1)
    whose = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
    name = next(name for name in CACHES if name in output)
    check_padding(output[name], mask)
    cache = with_room(output[name])
    keep_rows(cache, whose)
    index = torch.arange(len(prompts), device=device)
    none = torch.zeros_like(index).bool()
    rows = _Rows(index, streams.to(device), mask[whose], positions[whose, -1:], none, name, cache)
    return output[0][whose, -1], rows


CROWDED = 0.75  # rows that have ended are taken out once no more than this share goes on


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    streams: Int[Tensor, " S"],
    rule: Rule,
    ended: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """The tokens that follow each of S prompts, the end token included if it was reached.

    `model` is in `decoding_mode`; `streams` (on the CPU) names each row's random numbers; `ended` is told how many
    more rows have come to their end, after every token.
    """
    backbone, head = model.base_model, head_of(model)
    hidden, rows = _read_prompts(backbone, prompts, streams, rule.max_new_tokens)
    drawn_ids = torch.full((len(prompts), rule.max_new_tokens), -1, device=hidden.device)
    length, before = rows.mask.shape[1] - rule.max_new_tokens, len(prompts)
    for step in range(rule.max_new_tokens):
        tokens = choose(head.logits(hidden), rows.streams, step, rule)
        drawn_ids[rows.index, step] = tokens.masked_fill(rows.ended, -1)
        rows.ended |= torch.isin(tokens, rule.end_ids)
        going_on = (~rows.ended).nonzero().flatten()
        ended(before - len(going_on))
        before = len(going_on)
        if len(going_on) == 0 or step == rule.max_new_tokens - 1:
            break
        if len(going_on) <= CROWDED * len(tokens):
            rows.keep(going_on)
            tokens = tokens.index_select(0, going_on)
        rows.positions = rows.positions + 1
        output = backbone(
            input_ids=tokens[:, None],
            position_ids=rows.positions,
            use_cache=True,
            **rows.before(length + step + 1),
        )
        hidden = output[0][:, -1]
    ended(before)
    return [[token for token in row if token >= 0] for row in drawn_ids.tolist()]
