"""A reference with a tokenizer or template of its own scores the same text, from messages.

The response's characters are those the policy is scored on, between what each template writes around them; the token
that ends the turn counts once on each side unless `terminator=skip`. Where the policy's response was cut, the
reference scores the characters that were left and no end. A cut prompt is read whole: what the reference conditions on
is its own.

Its log-probs are sums over responses. Where tokens do not correspond they are carried to the policy's tokens byte by
byte, for looking at: a token's log-prob is spread evenly over the bytes it writes. That keeps the sum of every stretch
that begins and ends at a border of both tokenizers exact, and it keeps the token that ends the turn apart: it writes
no byte of the response. Between common borders it is a convention, not a log-prob of the model.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from dpo_ref.data.chat_templates import text_identity
from dpo_ref.data.encoding import Encoder, Ids
from dpo_ref.data.groups import TokenGroups, from_groups
from dpo_ref.data.render_check import Offer, RenderCheck, says
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.references.table import PrecomputedReference, Rows, Scorer, digest_of_arrays, row_key, rows_of
from dpo_ref.tracking.terminal import say
from dpo_ref.types import (
    Message,
    PackedBatch,
    PromptGroup,
    Response,
    ResponseLogps,
    TokenGroup,
    digest,
    turns_of,
    words_of,
)

# --- the policy's groups as the reference reads them


CHUNK = 1024  # groups written at once
EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class ReferenceText:
    """How a reference reads: in which tokens and template, under which system prompt, with or without the token that
    ends the turn; and which share of responses may come back changed."""

    tokenizer: Any
    system_prompt: str | None
    terminator: Literal["count", "skip"]
    max_altered: float

    def differs(self, context: ReferenceContext) -> bool:
        """Whether that is another text than the policy's."""
        same = text_identity(self.tokenizer) == context.policy.text_identity
        return not same or self.terminator == "skip" or self.system_prompt is not None


@dataclass
class TextAudit:
    """What became of the responses on their way through the reference's template and tokenizer."""

    num_responses: int = 0
    altered: int = 0  # responses that do not come back byte for byte
    unknown: int = 0  # tokens that stand for what the tokenizer cannot write
    cut: int = 0
    policy_tokens: int = 0
    reference_tokens: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of responses that were altered."""
        return self.altered / max(1, self.num_responses)

    @property
    def note(self) -> str:
        """The audit as the user is told of it."""
        return f"reference text: {self.line()}"

    def refusal(self, max_altered: float) -> str | None:
        """Why the reference cannot be used, if more than a share of `max_altered` was altered."""
        if self.share <= max_altered:
            return None
        return (
            f"{self.share:.1%} of the responses are not what they were after the reference's template and "
            f"tokenizer (reference.max_altered={max_altered:g}), such as {'; '.join(self.examples)}"
        )

    def line(self) -> str:
        """The audit in a line."""
        ratio = self.reference_tokens / max(1, self.policy_tokens)
        return (
            f"{1 - self.share:.2%} of {self.num_responses:,} responses survive its tokenizer and template byte for "
            f"byte; {ratio:.2f} of its tokens for one of the policy's; {self.unknown:,} unknown tokens; {self.cut:,} "
            "responses were cut"
        )


class NotChecked(RenderCheck):
    """Lets every text pass: the audit says what became of it, and how much of that is too much."""

    def check(self, text: str, turns: Sequence[Message], first: int, offer: Offer) -> None:
        """Nothing is refused."""

    def check_words(self, refuse: Callable[[Any, Any], None], group: PromptGroup) -> None:
        """The policy's template has looked at them."""


class ReferenceEncoder:
    """Writes the policy's groups as the reference reads them."""

    def __init__(self, context: ReferenceContext, own: ReferenceText) -> None:
        self.context, self.skip, self.system_prompt = context, own.terminator == "skip", own.system_prompt
        tokenizer = own.tokenizer
        self.policy, self.reference = Encoder(context.policy.tokenizer), Encoder(tokenizer, NotChecked)
        self.unknown = tokenizer.unk_token_id
        self.ends = {context.policy.tokenizer.eos_token_id, *self.policy.chat.end_ids}
        self.audit = TextAudit()

    def groups(self) -> Iterator[TokenGroup]:
        """Every group of the context in the reference's tokens."""
        starts, scoring = range(0, len(self.context.groups), CHUNK), self.context.scoring
        for start in self.context.work.progress(starts, "text for the reference", len(starts)):
            indices = range(start, min(start + CHUNK, len(self.context.groups)))
            chunk, texts = [self.context.groups[index] for index in indices], [self.text(index) for index in indices]
            for group, text, ids in zip(chunk, texts, self.reference.named(texts, scoring), strict=True):
                yield self._written(group, text, ids)

    def text(self, index: int) -> PromptGroup:
        """The texts of a group of the context as the reference reads them."""
        text = self._kept_text(index)
        if self.system_prompt is None:
            return text
        turns = text.prompt[1:] if text.prompt and text.prompt[0]["role"] == "system" else text.prompt
        return replace(text, prompt=(Message(role="system", content=self.system_prompt), *turns))

    def _kept_text(self, index: int) -> PromptGroup:
        """The group's texts, cut responses as far as the policy is scored on them."""
        group, text = self.context.groups[index], self.context.groups.text(index)
        cut = [ids[-1] not in self.ends for ids in group.response_ids]
        if not any(cut):
            return text
        words = [response for response in text.responses if isinstance(response, str)]
        if group.scored is not None or len(words) < len(cut):
            raise ValueError(
                f"{text.origin} was cut, and more than one turn of words is scored: what a reference with another "
                "tokenizer is to read cannot be said; use data.over_length=drop"
            )
        bodies = self.policy.chat.render(text.prompt, words, text.tools, text.template_options).bodies
        before = self.policy.decode(group.prompt_ids)
        responses = list(words)
        for at in (at for at, short in enumerate(cut) if short):
            scored = self.policy.decode([*group.prompt_ids, *group.response_ids[at]])[len(before) :]
            lead = max(0, bodies[at].find(words[at].strip()))
            responses[at] = scored[lead:].rstrip("\N{REPLACEMENT CHARACTER}")
        return replace(text, responses=tuple(responses))

    def _written(self, group: TokenGroup, text: PromptGroup, ids: Ids) -> TokenGroup:
        responses = []
        before = self.reference.decode(ids.prompt)
        for policy_ids, response, own_ids in zip(group.response_ids, text.responses, ids.responses, strict=True):
            cut = policy_ids[-1] not in self.ends
            self._look(before, text, response, ids.prompt, own_ids, cut)
            responses.append(own_ids[:-1] if cut or self.skip else own_ids)
            self.audit.policy_tokens += len(policy_ids)
        if not all(responses):
            raise ValueError(f"{text.origin} leaves the reference nothing to score: a response is empty in its tokens")
        masks = ids.scored and tuple(
            mask[: len(response)] for mask, response in zip(ids.scored, responses, strict=True)
        )
        return replace(group, prompt_ids=ids.prompt, response_ids=tuple(responses), scored=masks or None)

    def _look(
        self, before: str, text: PromptGroup, response: Response, prompt: list[int], ids: list[int], cut: bool
    ) -> None:
        audit = self.audit
        audit.num_responses += 1
        audit.cut += cut
        audit.reference_tokens += len(ids)
        audit.unknown += 0 if self.unknown is None else ids.count(self.unknown) + prompt.count(self.unknown)
        back = self.reference.decode([*prompt, *ids])[len(before) :]
        survives = all(turn["content"] in back and says(back, turn) for turn in turns_of(response))
        if not survives or not all(says(before + back, turn) for turn in text.prompt):
            audit.altered += 1
            if len(audit.examples) < EXAMPLES:
                lost = (
                    "a turn of the prompt is missing"
                    if survives
                    else f"{words_of(response)[:60]!r} became {back[:60]!r}"
                )
                audit.examples.append(f"{text.origin}: {lost}")


# --- the reference


class PrecomputedSums(Reference):
    """A reference whose response log-probs were computed beforehand from text.

    `sums` are log-probs of responses by `group_index`. `aligned` are those carried to the policy's tokens, `spans` the
    log-probs of spans of text at whose last token of the policy's they stand, nan elsewhere; where there are any.
    """

    own_text, live = True, False
    aligned: dict[int, np.ndarray] | None = None
    spans: dict[int, np.ndarray] | None = None

    def __init__(
        self,
        name: str,
        identity: str,
        weights: str,
        sums: dict[int, np.ndarray],
        device: torch.device,
        audit: TextAudit | None = None,
    ) -> None:
        self.name, self.identity, self.weights, self.audit = name, identity, weights, audit
        self.notes = () if audit is None else (audit.note,)
        self._sums, self._device = sums, device
        self.values_digest = digest_of_arrays(sums.values())

    def digest_of(self, indices: Sequence[int]) -> str:
        """Of the log-probs of their responses, in this order."""
        return digest_of_arrays(self._sums[index] for index in indices)

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """Look the pack's responses up; there are no values of tokens."""
        sums, aligned, spans = (self._look_up(values, batch) for values in (self._sums, self.aligned, self.spans))
        assert sums is not None
        ends = None if spans is None else ~spans.isnan()
        values = None if spans is None else spans.nan_to_num(0.0)
        return ResponseLogps(sums, batch.lengths, batch.num_bytes, None, aligned, span_logps=values, span_ends=ends)

    def _look_up(self, values: dict[int, np.ndarray] | None, batch: PackedBatch) -> torch.Tensor | None:
        if values is None:
            return None
        return torch.from_numpy(np.concatenate([values[index] for index in batch.group_index])).to(self._device)


def _sums(groups: TokenGroups, rows: Rows) -> dict[int, np.ndarray]:
    """Log-probs of every group's responses, summed in float64."""
    sums = {}
    for group in groups:
        values = rows[row_key(group)].astype(np.float64)
        sums[group.group_index] = np.add.reduceat(values, [0, *_ends(group)[:-1]])
    return sums


def _ends(group: TokenGroup) -> list[int]:
    """Where each response's scored tokens end among all of the group's."""
    counts = map(sum, group.scored) if group.scored else map(len, group.response_ids)
    return list(accumulate(counts))


def from_text(
    name: str,
    scorer: Scorer,
    own: ReferenceText,
    identity: str,
    weights: str,
    context: ReferenceContext,
    cache: Literal["auto", "off"],
) -> PrecomputedSums | PrecomputedReference:
    """The reference's log-probs of the context's responses under its own template and tokenizer.

    A table of tokens where its response tokens turn out to be the policy's. Raises ValueError if more than
    `own.max_altered` of the responses come back changed, and for an objective that needs values of tokens; the user
    is then told of the audit here, as there is no reference to carry it.
    """
    writer = ReferenceEncoder(context, own)
    groups = from_groups(writer.groups())
    same = all(ours.response_ids == theirs.response_ids for ours, theirs in zip(context.groups, groups, strict=True))
    refusal = writer.audit.refusal(own.max_altered)
    masked = any(group.scored for group in context.groups)
    if refusal is None and context.needs_tokens and not same and (masked or not context.spans_serve):
        where = "where only parts of responses are scored"
        if not context.spans_serve:
            where = "as a part of a mixture, nor for next-token distributions"
        refusal = (
            f"the objective looks at single tokens of the reference, and the tokens of reference={name} are not the "
            f"policy's; spans of text stand for them, but not {where}: use an objective on sums such as dpo"
        )
    if refusal is not None:
        say(writer.audit.note)
        raise ValueError(refusal)
    scorer.check(groups)
    rows, table = ROWS[cache](scorer, groups, identity, context), identity
    identity = digest([identity, own.terminator, own.system_prompt])
    if same:
        reference = PrecomputedReference(name, identity, weights, groups, rows, context.work.device)
        reference.own_text, reference.notes, reference.table = True, (writer.audit.note,), table
        return reference
    reference = PrecomputedSums(name, identity, weights, _sums(groups, rows), context.work.device, writer.audit)
    reference.table = table
    if not any(group.scored for group in groups):
        aligner = _Aligner(writer, own.tokenizer)
        reference.aligned = aligner.aligned(groups, rows)
        reference.spans = aligner.spans(groups, rows) if context.needs_tokens else None
    return reference


def _compute(scorer: Scorer, groups: TokenGroups, identity: str, context: ReferenceContext) -> Rows:
    """Rows that are not kept."""
    packs: Sequence[list[TokenGroup]] = context.pack(list(groups))
    return {key: row for pack in packs for key, row in scorer(pack).items()}


ROWS = {"auto": rows_of, "off": _compute}


class _Aligner:
    """Carries a reference's token log-probs to the policy's tokens, or to the spans of text that both end together."""

    def __init__(self, writer: ReferenceEncoder, tokenizer: Any) -> None:
        self.writer = writer
        self.policy, self.reference = ByteSizes(writer.context.policy.tokenizer), ByteSizes(tokenizer)

    def aligned(self, groups: TokenGroups, rows: Rows) -> dict[int, np.ndarray]:
        """For every group the values on the policy's response tokens; nan where a response does not come back."""
        return self._of_groups(groups, rows, _carried)

    def spans(self, groups: TokenGroups, rows: Rows) -> dict[int, np.ndarray]:
        """For every group the log-probs of spans, at the policy's tokens that end them, and nan elsewhere; a response
        that does not come back is one span."""
        return self._of_groups(groups, rows, spans_at_ends)

    def _of_groups(self, groups: TokenGroups, rows: Rows, values_of: "_OnOurTokens") -> dict[int, np.ndarray]:
        return {
            ours.group_index: np.concatenate(
                [
                    values_of(here, there, logps, size)
                    for here, there, logps, size in self._responses(index, ours, theirs, rows)
                ]
            )
            for index, (ours, theirs) in enumerate(zip(self.writer.context.groups, groups, strict=True))
        }

    def _responses(
        self, index: int, ours: TokenGroup, theirs: TokenGroup, rows: Rows
    ) -> "Iterator[tuple[Spans | None, Spans | None, np.ndarray, int]]":
        parts = np.split(rows[row_key(theirs)].astype(np.float64), _ends(theirs)[:-1])
        texts = map(words_of, self.writer.text(index).responses)
        for text, logps, here, there in zip(texts, parts, ours.response_ids, theirs.response_ids, strict=True):
            spans = (
                self.policy.spans(ours.prompt_ids, here, text),
                self.reference.spans(theirs.prompt_ids, there, text),
            )
            yield *spans, logps, len(here)


# --- one text in two tokenizers: where every token ends, in bytes, and log-probs carried from one to the other


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Spans(NamedTuple):
    """The bytes [begin, end) of a response that each of S tokens writes; beyond `size` stands what ends the turn."""

    begin: Int[np.ndarray, " S"]
    end: Int[np.ndarray, " S"]
    size: int


class ByteSizes:
    """How many bytes of text each token of a tokenizer writes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
        measure = _bytes_of_characters if "ByteLevel" in decoder else _bytes_of_piece
        added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        sizes = [len(added[i].encode()) if i in added else measure(piece or "") for i, piece in enumerate(pieces)]
        self._sizes = np.array(sizes, dtype=np.int64)

    def spans(self, prompt_ids: Sequence[int], ids: Sequence[int], response: str) -> Spans | None:
        """Where each of `ids`, written after the prompt, stands in the response; None where it does not come back."""
        before = prompt_ids[-1:]
        text = self._text([*before, *ids])[len(self._text(before)) :]
        begin = text.find(response)
        if begin < 0:
            return None
        ends = self._sizes[np.asarray(ids, dtype=np.int64)].cumsum()
        if ends[-1] != len(text.encode()):  # a tokenizer that writes a token differently beside others
            ends = self._decode(before, ids)
        size = len(response.encode())
        borders = (np.concatenate([[0], ends]) - len(text[:begin].encode())).clip(0, size)
        return Spans(borders[:-1], borders[1:], size)

    def _decode(self, before: Sequence[int], ids: Sequence[int]) -> Int[np.ndarray, " S"]:
        texts = [self._text([*before, *ids[:count]]) for count in range(len(ids) + 1)]
        sizes = [len(text.rstrip(REPLACEMENT).encode()) for text in texts]
        return np.maximum.accumulate(np.array(sizes[1:]) - sizes[0])

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _bytes_of_characters(piece: str) -> int:
    """Byte-level vocabularies write one character for a byte."""
    return len(piece)


def _bytes_of_piece(piece: str) -> int:
    """SentencePiece vocabularies write U+2581 for a blank and <0x0A> for a byte that no piece holds."""
    if len(piece) == 6 and piece.startswith("<0x"):
        return 1
    return len(piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())


def byte_logps(tokens: Spans, logps: Float[np.ndarray, " S"]) -> Float[np.ndarray, " bytes"]:
    """Log-probs per byte of the response, and behind them one entry for what ends the turn; the sum is the tokens'."""
    wide = tokens.end > tokens.begin
    widths = np.where(wide, tokens.end - tokens.begin, 1)
    slopes = np.zeros(tokens.size + 2)
    ends = np.where(wide, tokens.end, tokens.begin + 1)
    np.add.at(slopes, tokens.begin, logps / widths)
    np.subtract.at(slopes, ends, logps / widths)
    return slopes.cumsum()[:-1]


def carry(theirs: Spans, logps: Float[np.ndarray, " R"], ours: Spans) -> Float[np.ndarray, " S"]:
    """The log-probs of their R tokens on our S tokens of the same response; the sum stays what it was where both end
    the turn. A token of ours that ends the turn where theirs is not scored has nan."""
    per_byte = byte_logps(theirs, logps)
    total = np.concatenate([[0.0], per_byte.cumsum()])
    values = total[ours.end] - total[ours.begin]
    if ours.begin[-1] >= ours.size:
        values[ours.begin >= ours.size] = 0.0  # what stands between the words and the end goes with the end
        values[-1] = per_byte[-1] if theirs.begin[-1] >= theirs.size else np.nan
    return values


_OnOurTokens = Callable[[Spans | None, Spans | None, np.ndarray, int], np.ndarray]


def _carried(ours: Spans | None, theirs: Spans | None, logps: np.ndarray, size: int) -> np.ndarray:
    values = np.full(size, np.nan) if ours is None or theirs is None else carry(theirs, logps, ours)
    return values.astype(np.float32)


def spans_at_ends(
    ours: Spans | None, theirs: Spans | None, logps: Float[np.ndarray, " R"], size: int
) -> Float[np.ndarray, " S"]:
    """Log-probs of the smallest spans of a response at whose ends both have a token's end (as in CTPD,
    arXiv:2601.11865), at the last of our `size` tokens of each, and nan elsewhere. They sum to the tokens'. What only
    one of both ends the turn with goes with the last span, as does all where a response does not come back."""
    values = np.full(size, np.nan)
    if ours is None or theirs is None:
        values[-1] = logps.sum()
        return values
    here, there = _token_ends(ours), _token_ends(theirs)
    common = np.intersect1d(here, there)
    last = max(0, len(common) - 1)
    sums = np.bincount(np.searchsorted(common, there).clip(max=last), weights=logps, minlength=last + 1)
    index = np.searchsorted(common, here).clip(max=last)
    values[np.flatnonzero(np.diff(index, append=last + 1))] = sums
    return values


def _token_ends(spans: Spans) -> Int[np.ndarray, " S"]:
    """Where each token ends, in bytes; what ends the turn does so one behind the response."""
    return np.where(spans.begin >= spans.size, spans.size + 1, spans.end)
