"""The protocol of engines that answer prompts, and how one answers questions: several samples each, and turn by turn
where there are further turns.

Random numbers depend on what they are for and on nothing else. Each sampled sequence has a stream of its own, named by
(seed, prompt, sample). The number used for vocabulary entry v at step t is a function of (stream, t, v), a counter put
through the finaliser of SplitMix64 (Steele, Lea, Flood 2014, OOPSLA). So batch size, batch order and device change
nothing.
"""

import os
from collections import Counter
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_ref.data.tokenise import encode_prompts
from dpo_ref.generation.records import Generation, line_of, record_of
from dpo_ref.types import Message, Progress, digest, silent

# --- the protocol


class Place(NamedTuple):
    """Which answer of an evaluation: the question's number, the sample's, and the turn, counted from 1."""

    prompt_index: int
    sample_index: int
    turn: int


class Request(NamedTuple):
    """One answer to sample. `stream` names its random numbers, whatever else is sampled."""

    place: Place
    prompt: tuple[Message, ...]
    prompt_ids: list[int]
    temperature: float
    stream: int


class Answer(NamedTuple):
    """What came of a request: `token_ids` with the end token if it was drawn, `output` without it."""

    token_ids: tuple[int, ...]
    output: str
    finish_reason: Literal["stop", "length"]
    tokens: Literal["drawn", "text"] = "drawn"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn. `temperature` 0 takes the likeliest token; `max_new_tokens` counts the end token.
    Raises ValueError for an option out of range."""

    temperature: float
    top_p: float
    max_new_tokens: int
    samples_per_prompt: int

    def __post_init__(self) -> None:
        check_temperatures(self.temperature)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generation.top_p={self.top_p} must be above 0 and at most 1 (1 keeps every token)")
        check_positive(max_new_tokens=self.max_new_tokens, samples_per_prompt=self.samples_per_prompt)


def check_positive(**counts: int) -> None:
    """Raise ValueError for an option of `generation` below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"generation.{name}={count} must be at least 1")


def check_temperatures(temperature: float | list[float], samples_per_prompt: int = 1, **others: Any) -> None:
    """Raise ValueError for a temperature out of range or given twice, for none, and where all samples are alike."""
    found = temperature if isinstance(temperature, list) else [temperature]
    for one in found:
        if not 0 <= one < float("inf"):
            raise ValueError(f"generation.temperature={one} must be 0 (greedy) or positive")
    if not found or len(set(found)) < len(found):
        raise ValueError(f"generation.temperature={found} must be one temperature or several, each once")
    if set(found) == {0} and samples_per_prompt > 1:
        raise ValueError("generation.temperature=0 gives every sample of a prompt alike; use samples_per_prompt=1")


@runtime_checkable
class Engine(Protocol):
    """Lets one policy answer."""

    @property
    def tokenizer(self) -> Any:
        """The policy's."""
        ...

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        ...

    @property
    def draws(self) -> int:
        """How many samples are drawn for each that is kept."""
        ...

    def chosen(self, drawn: Sequence[Generation]) -> list[Generation]:
        """The samples that are kept, of `draws` in a row one each, numbered anew."""
        ...

    def weights(self) -> str:
        """Digest of the weights that answer."""
        ...

    def answers(
        self, requests: Sequence[Request], known: Set[int], progress: Progress
    ) -> Generator[Mapping[int, Answer], None, None]:
        """Answers by the number of their request, as they come; `known` are requests that need none."""
        ...


class Kept:
    """The answers so far, by place."""

    def __init__(self) -> None:
        self.found: dict[Place, Generation] = {}

    def add(self, generations: Sequence[Generation]) -> None:
        """Take over what has been sampled."""
        self.found |= {Place(g.prompt_index, g.sample_index, g.turn): g for g in generations}


# --- questions, and their answers


class Question(NamedTuple):
    """A conversation up to the first answer, and what the user says after each answer but the last. `id` and
    `category` are its file's."""

    prompt: tuple[Message, ...]
    then: tuple[str, ...] = ()
    id: int | str | None = None
    category: str = ""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The questions of an evaluation. `temperatures` are those of categories, instead of the engine's."""

    name: str
    questions: tuple[Question, ...]
    temperatures: Mapping[str, float] | None = None

    def content(self) -> Sequence[object]:
        """What determines answers, as JSON values."""
        asked = [[list(question.prompt), list(question.then)] for question in self.questions]
        warmth = [self._temperature(question, None) for question in self.questions] if self.temperatures else []
        return [self.name, asked, warmth]

    def temperature(self, question: Question, otherwise: float) -> float:
        """At which temperature a question is answered."""
        found = self._temperature(question, otherwise)
        assert found is not None
        return found

    def _temperature(self, question: Question, otherwise: float | None) -> float | None:
        return otherwise if self.temperatures is None else self.temperatures[question.category]


def held_out(prompts: Sequence[Sequence[Message]], name: str = "") -> PromptSet:
    """Prompts of the data as questions."""
    return PromptSet(name, tuple(Question(tuple(prompt)) for prompt in prompts))


class _Asked(NamedTuple):
    """A sample that is to be drawn now: whose, and the conversation up to here."""

    place: Place
    prompt: tuple[Message, ...]


def _conversations(engine: Engine, asked: PromptSet) -> list[_Asked]:
    """The first turn of every sample; where the likeliest tokens are taken all samples are alike, and one is drawn."""
    found = []
    for index, question in enumerate(asked.questions):
        samples = 1 if _greedy(engine, asked, index) else engine.sampling.samples_per_prompt
        for sample in range(samples):
            found += _draws(engine, asked, Place(index, sample, 1), question.prompt)
    return found


def _greedy(engine: Engine, asked: PromptSet, index: int) -> bool:
    return asked.temperature(asked.questions[index], engine.sampling.temperature) == 0


def _draws(engine: Engine, asked: PromptSet, place: Place, prompt: tuple[Message, ...]) -> list[_Asked]:
    """What is drawn for one sample that is kept."""
    count = 1 if _greedy(engine, asked, place.prompt_index) else engine.draws
    numbers = range(place.sample_index * count, (place.sample_index + 1) * count)
    return [_Asked(place._replace(sample_index=number), prompt) for number in numbers]


def _next(engine: Engine, asked: PromptSet, made: Sequence[Generation]) -> list[_Asked]:
    """The turn after `made`, of the questions that have one."""
    found = []
    for generation in made:
        then = asked.questions[generation.prompt_index].then
        if generation.turn <= len(then):
            answer = Message(role="assistant", content=generation.output)
            user = Message(role="user", content=then[generation.turn - 1])
            place = Place(generation.prompt_index, generation.sample_index, generation.turn + 1)
            found += _draws(engine, asked, place, (*generation.prompt, answer, user))
    return found


def _streams(waiting: Sequence[_Asked], seed: int) -> list[int]:
    """A name for the random numbers of each sample; a prompt that occurs twice gets different samples."""
    seen: Counter[tuple[str, int]] = Counter()
    names = []
    for place, prompt in waiting:
        known = str(list(prompt)), place.sample_index
        names.append(stream_name(seed, prompt, seen[known], place.sample_index))
        seen[known] += 1
    return names


def _requests(engine: Engine, asked: PromptSet, waiting: Sequence[_Asked], seed: int) -> list[Request]:
    distinct = {id(one.prompt): one.prompt for one in waiting}  # samples of one question share their prompt
    ids = dict(zip(distinct, encode_prompts(engine.tokenizer, list(distinct.values())), strict=True))
    return [
        Request(
            place=one.place,
            prompt=one.prompt,
            prompt_ids=ids[id(one.prompt)],
            temperature=asked.temperature(asked.questions[one.place.prompt_index], engine.sampling.temperature),
            stream=stream,
        )
        for one, stream in zip(waiting, _streams(waiting, seed), strict=True)
    ]


def _record(engine: Engine, asked: PromptSet, seed: int, request: Request, answer: Answer) -> Generation:
    question = asked.questions[request.place.prompt_index]
    return Generation(
        prompt=request.prompt,
        prompt_index=request.place.prompt_index,
        sample_index=request.place.sample_index,
        output=answer.output,
        prompt_ids=tuple(request.prompt_ids),
        token_ids=answer.token_ids,
        finish_reason=answer.finish_reason,
        num_tokens=len(answer.token_ids),
        num_chars=len(answer.output),
        seed=seed,
        temperature=request.temperature,
        top_p=engine.sampling.top_p,
        turn=request.place.turn,
        prompt_set=asked.name,
        question_id=question.id,
        category=question.category,
        tokens=answer.tokens,
    )


def _sampled(
    engine: Engine, asked: PromptSet, requests: Sequence[Request], seed: int, progress: Progress, kept: Kept
) -> list[Generation]:
    """An answer to every request, in their order; what comes is kept at once."""
    known = {number for number, request in enumerate(requests) if request.place in kept.found}
    with closing(engine.answers(requests, known, progress)) as answers:
        for batch in answers:
            kept.add([_record(engine, asked, seed, requests[number], answer) for number, answer in batch.items()])
    return [kept.found[request.place] for request in requests]


def answered(
    engine: Engine, asked: PromptSet, seed: int, progress: Progress = silent, kept: Kept | None = None
) -> list[Generation]:
    """The engine's answers to a prompt set, ordered by question, sample and turn.

    A later turn is asked after the sample's own answers before it. `kept` holds the answers that are there already,
    and takes in every further one as it comes. Raises ValueError for what the engine refuses.
    """
    kept = Kept() if kept is None else kept
    found: list[Generation] = []
    waiting = _conversations(engine, asked)
    while waiting:
        requests = _requests(engine, asked, waiting, seed)
        made = engine.chosen(_sampled(engine, asked, requests, seed, progress, kept))
        found += made
        waiting = _next(engine, asked, made)
    return sorted(found, key=lambda g: (g.prompt_index, g.sample_index, g.turn))


# --- answers of a generation that is under way, kept in a file as they come


class KeptInFile(Kept):
    """Answers in the order they came, one a line. What a crash tore is no answer and will be sampled again.

    Several processes may append: a batch is one write, and equal requests have equal answers. The file's name holds
    the digest of everything that determines them.
    """

    def __init__(self, folder: Path, key: str) -> None:
        super().__init__()
        self.path = folder / f"generations-{key[:16]}.partial.jsonl"
        if self.path.is_file():
            super().add(_readable(self.path))
            self._append("\n")  # ends a torn line; empty lines are skipped

    def add(self, generations: Sequence[Generation]) -> None:
        """Take over what has been sampled; on disk when this returns."""
        super().add(generations)
        self._append("".join(map(line_of, generations)))

    def remove(self) -> None:
        """The answers have been stored for good."""
        self.path.unlink(missing_ok=True)

    def _append(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(text.encode())
            os.fsync(file.fileno())


def _readable(path: Path) -> list[Generation]:
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            found.append(record_of(line.decode(), f"{path} row {number}"))
        except ValueError:  # torn, or empty
            continue
    return found


# --- random numbers


WEYL, MIX_1, MIX_2 = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed 64-bit integers; torch wraps around on overflow


def stream_name(seed: int, prompt: Sequence[Message], occurrence: int, sample_index: int) -> int:
    """A signed 64-bit name for one sequence's stream; `occurrence` counts equal prompts before this one."""
    return int(digest([seed, list(prompt), occurrence, sample_index])[:16], 16) - 2**63


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def random_bits(streams: Int[Tensor, " S"], step: int, size: int) -> Int[Tensor, "S size"]:
    """64 random bits for each stream and each of `size` entries at `step`."""
    counters = torch.arange(1, size + 1, device=streams.device) + step * size
    bits = streams[:, None] + (counters * WEYL)[None, :]
    bits = bits.bitwise_xor_(_shifted(bits, 30)).mul_(MIX_1)
    bits = bits.bitwise_xor_(_shifted(bits, 27)).mul_(MIX_2)
    return bits.bitwise_xor_(_shifted(bits, 31))


def gumbel(streams: Int[Tensor, " S"], step: int, size: int) -> Float[Tensor, "S size"]:
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits) (Maddison et al. 2014, NeurIPS).

    It is -log(E) with E exponential. E = -log1p(-u) keeps its relative precision where it matters, for small u, so
    float32 suffices; u is at least 2^-54.
    """
    uniform = _shifted(random_bits(streams, step, size), 11).float().add_(0.5).mul_(2.0**-53)
    return uniform.neg_().log1p_().neg_().log_().neg_()
