"""The values that flow through a run. Imports nothing of ours.

Axes
    B  ordered pairs          N  responses            G  prompt groups
    T  packed tokens          R  response tokens      V  vocabulary      H  hidden
Log-probabilities are in nats. Per-token values are float32; sums over a response are float64, because a float32 sum
of 2,000 nats is wrong in its fourth decimal and margins are differences of such sums.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar, get_args, get_origin

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def digest(content: object) -> str:
    """128 bits of SHA-256 over the JSON form of `content`, as 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool. All its keys reach the chat template as
    they are, and must come out of it (`data/render_check.py`)."""

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    thinking: NotRequired[str]


# The assistant's words; or turns, where more than words is said: calls, thoughts, tools' results, several turns. One
# turn of words alone is always a text, so that equal responses are equal.
Response = str | tuple[Message, ...]
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn that hold what was thought before its words


def turns_of(response: Response) -> tuple[Message, ...]:
    """The response as turns."""
    return (Message(role="assistant", content=response),) if isinstance(response, str) else response


def thoughts_of(turn: Mapping[str, Any]) -> list[str]:
    """What was thought before the words of a turn, as far as it has a key of its own."""
    return [str(turn[key]) for key in THOUGHTS if turn.get(key)]


def words_of(response: Response) -> str:
    """What the assistant says in a response, as one text: thoughts, words and calls, a line each."""
    if isinstance(response, str):
        return response
    said: list[str] = []
    for turn in response:
        if turn["role"] == "assistant":
            calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in turn.get("tool_calls", [])]
            said += [*thoughts_of(turn), turn["content"], *calls]
    return "\n".join(filter(None, said))


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """One prompt and the k responses that answer it, before any tokenizer has seen them.

    A preference pair is a group of two with `pairs == ((0, 1),)`, an SFT example a group of one without pairs, a
    ranked list a group of k. `pairs` holds (better, worse) positions in `responses`, `rewards` their scores, `labels`
    whether each is wanted (unpaired data). `tools` are the functions that the chat template offers to the assistant,
    `template_options` other settings that it looks at (`chat_template_kwargs` of a row).
    `logps` are log-probs of the responses that came with the row, in nats, NaN where the row's is missing or no
    number; the digests leave them out. Without a prompt it is plain text. `origin` names the source row in messages to
    the user ("pairs.jsonl row 7").
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    rewards: tuple[float, ...] | None = None
    origin: str = ""
    labels: tuple[bool, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    logps: tuple[float, ...] | None = None
    template_options: dict[str, Any] | None = None

    @property
    def group_id(self) -> str:
        """Digest of all that is said: equal for equal content, whatever file, order or limit it came with."""
        more = [self.tools] if self.tools or self.template_options else []
        return digest([self.prompt, self.responses, *more, *filter(None, [self.template_options])])

    @property
    def asked(self) -> "Asked":
        """What a policy is asked that answers the prompt anew."""
        settings = {"tools": self.tools, "template_options": self.template_options}
        return PromptGroup(self.prompt, (), origin=self.origin, **settings) if any(settings.values()) else self.prompt

    @property
    def asked_id(self) -> str:
        """Digest of what is asked."""
        return digest([self.prompt_id, self.tools, self.template_options])

    @property
    def prompt_id(self) -> str:
        """Digest of the prompt alone (of the text where there is none): rows with the same one belong on the same
        side of a split."""
        return digest(self.prompt or self.responses)


# What is asked: messages, or a group without responses where the row brings tools or template options.
Asked = Sequence[Message] | PromptGroup


def asked(prompt: Asked, origin: str = "") -> PromptGroup:
    """A prompt as a group without responses."""
    return prompt if isinstance(prompt, PromptGroup) else PromptGroup(tuple(prompt), (), origin=origin)


class Reading(NamedTuple):
    """What became of a source's rows: how many were read, how many went which way, the first few left out, what was
    not read at all, and which columns were read and which said nothing more."""

    num_rows: int = 0
    dropped: Mapping[str, int] = MappingProxyType({})
    examples: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


class PreferenceData(NamedTuple):
    """What a `data` source yields: groups to train on, held-out groups, and conversations to generate answers for.

    `reading` says what became of the source's rows; empty where nothing was read.
    """

    train: Sequence[PromptGroup]
    eval: Sequence[PromptGroup]
    test_prompts: Sequence[Asked]
    reading: Reading = Reading()


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A prompt group as token ids. Each response ends with its end-of-turn token unless it was cut.

    `scored` says which tokens of every response count; None: all of them. `labels` says which responses are wanted,
    `advantages` by how much they are better than expected, `rewards` what they were scored. `mismatched` holds
    another prompt's responses behind this prompt, for objectives that measure a KL on them.
    """

    group_index: int
    group_id: str
    prompt_ids: list[int]
    response_ids: tuple[list[int], ...]
    num_bytes: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    scored: tuple[list[bool], ...] | None = None
    labels: tuple[bool, ...] | None = None
    advantages: tuple[float, ...] | None = None
    rewards: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None  # of pairs: what their losses are multiplied with
    mismatched: "TokenGroup | None" = None

    @property
    def num_scored(self) -> int:
        """Response tokens that count."""
        return sum(map(sum, self.scored)) if self.scored else sum(map(len, self.response_ids))

    @property
    def num_tokens(self) -> int:
        """Tokens the group occupies in a pack: the prompt once, every response once."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))


# --- a pack, what models say about it, and parts of both


Span = Mapping[str, slice]  # a run of whole groups of a pack: their slice of each axis (G T R N B)
POSITIONS_ON = "positions on"  # a field's mark: the axis that its entries are positions on
Whole = TypeVar("Whole")


@cache
def axes_of(kind: type) -> tuple[tuple[str, str, str | None], ...]:
    """Of every field its name, its axis (R of `Float[Tensor, " R"]`, G of a tuple), and the axis that its entries are
    positions on. Raises TypeError for a field without an axis, which could not be cut."""
    axes = []
    for f in fields(kind):
        kinds = [f.type, *get_args(f.type)]
        shapes = [hint.dim_str for hint in kinds if hasattr(hint, "dim_str")]
        shapes += ["G" for hint in kinds if get_origin(hint) is tuple]
        if not shapes:
            raise TypeError(f"{kind.__name__}.{f.name} has no axis; annotate it with its shape")
        axes.append((f.name, shapes[0], f.metadata.get(POSITIONS_ON)))
    return tuple(axes)


class HasParts:
    """A dataclass of values along axes, which can be cut to those of a run of groups."""

    __slots__ = ()

    def part(self: Whole, span: Span) -> Whole:
        """What it holds of these groups: every field cut along its axis, positions counted from where it begins."""
        values: dict[str, Any] = {}
        for name, axis, target in axes_of(type(self)):
            value = getattr(self, name)
            if value is not None:
                cut = value[span[axis]]
                values[name] = cut if target is None else cut - span[target].start
        return replace(self, **values)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class PackedBatch(HasParts):
    """Groups laid end to end, each as [prompt | y1 | ... | yk], without padding.

    R counts the response tokens that are scored: all of them, unless a group says otherwise. Token r of the R is
    predicted from packed position `head_index[r]`: the last prompt token for the first token of every response (so
    that position occurs k times), the token before it otherwise.
    """

    input_ids: Int[Tensor, " T"]
    position_ids: Int[Tensor, " T"]  # restart after the prompt for every response
    layout: tuple[tuple[int, tuple[int, ...]], ...]  # per group: prompt length, response lengths
    head_index: Int[Tensor, " R"] = field(metadata={POSITIONS_ON: "T"})
    target_ids: Int[Tensor, " R"]
    response_index: Int[Tensor, " R"] = field(metadata={POSITIONS_ON: "N"})  # whose token r is, ascending
    lengths: Int[Tensor, " N"]  # scored tokens
    num_bytes: Int[Tensor, " N"]
    scored_per_group: tuple[int, ...]  # scored tokens, on the host
    group_index: tuple[int, ...]  # per group; on the host, where cached rows are looked up
    pairs_per_group: tuple[int, ...]
    chosen: Int[Tensor, " B"] = field(metadata={POSITIONS_ON: "N"})
    rejected: Int[Tensor, " B"] = field(metadata={POSITIONS_ON: "N"})
    labels: Bool[Tensor, " N"] | None = None  # whether each is wanted
    advantages: Float[Tensor, " N"] | None = None
    rewards: Float[Tensor, " N"] | None = None  # the rows' scores
    weights: Float[Tensor, " B"] | None = None  # what the pairs' losses are multiplied with

    @property
    def num_pairs(self) -> int:
        return len(self.chosen)

    @property
    def num_groups(self) -> int:
        return len(self.layout)

    def spans(self, max_tokens: int) -> Iterator[Span]:
        """Runs of whole groups with at most `max_tokens` response tokens each (a larger group alone)."""
        sizes = {
            "G": [1] * self.num_groups,
            "T": [prompt + sum(responses) for prompt, responses in self.layout],
            "R": self.scored_per_group,
            "N": [len(responses) for _, responses in self.layout],
            "B": self.pairs_per_group,
        }
        ends = {axis: [0, *accumulate(counts)] for axis, counts in sizes.items()}
        first, tokens = 0, ends["R"]
        while first < self.num_groups:
            last = max(first + 1, bisect_right(tokens, tokens[first] + max_tokens) - 1)
            yield {axis: slice(at[first], at[last]) for axis, at in ends.items()}
            first = last

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if device.type == "cuda":  # from pinned memory the copy overlaps with what the device is doing
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What one model says about B ordered pairs: log-probabilities summed over each response, in nats."""

    chosen: Float[Tensor, " B"]
    rejected: Float[Tensor, " B"]
    chosen_lengths: Int[Tensor, " B"]  # scored tokens of the policy's
    rejected_lengths: Int[Tensor, " B"]
    chosen_bytes: Int[Tensor, " B"]  # of the response's text, in UTF-8
    rejected_bytes: Int[Tensor, " B"]

    @classmethod
    def of(cls, logps: "ResponseLogps", batch: PackedBatch) -> "PairLogps":
        """The pairs of a pack."""
        return logps.pairs(batch.chosen, batch.rejected)


@dataclass(frozen=True, slots=True)
class ResponseLogps(HasParts):
    """What one model says about N responses.

    `token_logps` holds the R per-token values in the order of the batch's `target_ids`; it is None where the model's
    tokens do not correspond to the policy's (a reference with another tokenizer). `aligned` is then what its tokens
    say about the same bytes, for looking at, not for objectives; nan where that is not known. `span_ends` says which
    of the policy's tokens end a span of text at whose ends both have a token's end, and `span_logps` has, at these,
    the spans' log-probs, which sum to the responses' (0 elsewhere); None where nobody asked for them.
    """

    sums: Float[Tensor, " N"]
    lengths: Int[Tensor, " N"]
    num_bytes: Int[Tensor, " N"]
    token_logps: Float[Tensor, " R"] | None
    aligned: Float[Tensor, " R"] | None = None
    span_logps: Float[Tensor, " R"] | None = None
    span_ends: Bool[Tensor, " R"] | None = None

    @classmethod
    def of(cls, logps: "ResponseLogps", batch: PackedBatch) -> "ResponseLogps":
        """The responses of a pack."""
        return logps

    def tokens(self) -> Float[Tensor, " R"]:
        """The per-token values; ValueError where there are none."""
        if self.token_logps is None:
            raise ValueError("this reference has no per-token log-probs: its tokens do not correspond to the policy's")
        return self.token_logps

    def pairs(self, chosen: Int[Tensor, " B"], rejected: Int[Tensor, " B"]) -> PairLogps:
        """The view on B ordered pairs given as positions among the N responses."""
        both = (values[index] for values in (self.sums, self.lengths, self.num_bytes) for index in (chosen, rejected))
        return PairLogps(*both)


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scalar scores of the responses of B ordered pairs."""

    chosen: Float[Tensor, " B"]
    rejected: Float[Tensor, " B"]

    @classmethod
    def of(cls, scores: "ResponseScores", batch: PackedBatch) -> "PairScores":
        """The pairs of a pack."""
        return scores.pairs(batch.chosen, batch.rejected)


@dataclass(frozen=True, slots=True)
class ResponseScores(HasParts):
    """What a reward model says about N responses: one score each, in its own unit."""

    scores: Float[Tensor, " N"]

    def pairs(self, chosen: Int[Tensor, " B"], rejected: Int[Tensor, " B"]) -> PairScores:
        """The view on B ordered pairs given as positions among the N responses."""
        return PairScores(self.scores[chosen], self.scores[rejected])


def conversation(prompt: Sequence[Message], response: Response) -> list[Message]:
    """The prompt's messages followed by the response's turns."""
    return [*prompt, *turns_of(response)]


# --- how long passes say how far they are


# items, what is being done, how many items there are (None: not known) -> the same items
Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]


def silent(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
    """No progress bar."""
    return items


class ProgressIn:
    """Progress in items that are done several at a time, shown before the first of them is."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._rest = iter(progress(range(total), description, total))
        next(self._rest, None)

    def advance(self, count: int) -> None:
        """So many more are done."""
        for _ in range(count):
            next(self._rest, None)
