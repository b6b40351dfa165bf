"""The protocol of engines that answer prompts, and how one answers questions: several samples each, and turn by turn
where there are further turns.

Random numbers depend on what they are for and on nothing else. Each sampled sequence has a stream of its own, named by
(seed, prompt, sample). The number used for vocabulary entry v at step t is a function of (stream, t, v), a counter put
through the finaliser of SplitMix64 (Steele, Lea, Flood 2014, OOPSLA). So batch size, batch order and device change
nothing.
"""

import errno
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
from dpo_ref.files.digests import Damaged
from dpo_ref.files.writing import needing_room
from dpo_ref.generation.parsing import Drawn, Said, parsed
from dpo_ref.generation.records import Generation, line_of, record_of
from dpo_ref.tracking.terminal import say
from dpo_ref.types import Asked, Message, Progress, PromptGroup, asked, digest, silent

# --- the protocol


class Place(NamedTuple):
    """Which answer of an evaluation: the question's index, the sample's, and the turn, counted from 1."""

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
    """What came of a request: `token_ids` with the end token if it was drawn, `output` without it; `logps` are the
    first tokens' log-probs, in nats, where who drew them says so."""

    token_ids: tuple[int, ...]
    output: str
    finish_reason: Literal["stop", "length"]
    tokens: Literal["drawn", "text"] = "drawn"
    logps: tuple[float, ...] | None = None


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
    temperatures = temperature if isinstance(temperature, list) else [temperature]
    for value in temperatures:
        if not 0 <= value < float("inf"):
            raise ValueError(f"generation.temperature={value} must be 0 (greedy) or positive")
    if not temperatures or len(set(temperatures)) < len(temperatures):
        raise ValueError(f"generation.temperature={temperatures} must be one temperature or several, each once")
    if set(temperatures) == {0} and samples_per_prompt > 1:
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

    def chosen(self, generations: Sequence[Generation]) -> list[Generation]:
        """The samples that are kept, of `draws` in a row one each, numbered anew."""
        ...

    def weights(self) -> str:
        """Digest of the weights that answer."""
        ...

    def answers(
        self, requests: Sequence[Request], skip: Set[int], progress: Progress
    ) -> Generator[Mapping[int, Answer], None, None]:
        """Answers by the index of their request, as they come; `skip` are requests that need none."""
        ...


@runtime_checkable
class SampledPolicy(Protocol):
    """The policy that is trained, as rounds of training sample from it."""

    def hand_over(self, index: int) -> Mapping[str, float]:
        """What answers from here on is the policy as it is now, before the round with this 0-based index. Returns
        metrics of it."""
        ...

    def answer(self, prompts: Sequence[Asked], seed: int, folder: Path) -> list[Generation]:
        """Answers to every prompt, ordered by prompt and sample; `folder` is the round's own."""
        ...

    def close(self) -> None:
        """No further round is sampled."""
        ...


class Kept:
    """The answers so far, by place."""

    def __init__(self) -> None:
        self.generations: dict[Place, Generation] = {}

    def add(self, generations: Sequence[Generation]) -> None:
        """Take over what has been sampled."""
        self.generations |= {Place(g.prompt_index, g.sample_index, g.turn): g for g in generations}


# --- questions, and their answers


class Question(NamedTuple):
    """A conversation up to the first answer, and what the user says after each answer but the last. `id` and
    `category` are its file's."""

    prompt: tuple[Message, ...]
    then: tuple[str, ...] = ()
    id: int | str | None = None
    category: str = ""
    tools: tuple[dict[str, Any], ...] | None = None
    template_options: dict[str, Any] | None = None

    def asked(self, prompt: tuple[Message, ...]) -> PromptGroup:
        """A turn of this conversation."""
        return PromptGroup(prompt, (), tools=self.tools, template_options=self.template_options)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The questions of an evaluation. `temperatures` are those of categories, instead of the engine's."""

    name: str
    questions: tuple[Question, ...]
    temperatures: Mapping[str, float] | None = None

    def content(self) -> Sequence[object]:
        """What determines answers, as JSON values."""
        conversations = [[list(question.prompt), list(question.then)] for question in self.questions]
        temperatures = [self._temperature(question, None) for question in self.questions] if self.temperatures else []
        offered = [[question.tools, question.template_options] for question in self.questions]
        more = [offered] if any(any(settings) for settings in offered) else []
        return [self.name, conversations, temperatures, *more]

    def temperature(self, question: Question, otherwise: float) -> float:
        """At which temperature a question is answered."""
        value = self._temperature(question, otherwise)
        assert value is not None
        return value

    def _temperature(self, question: Question, otherwise: float | None) -> float | None:
        return otherwise if self.temperatures is None else self.temperatures[question.category]


def held_out(prompts: Sequence[Asked], name: str = "") -> PromptSet:
    """Prompts of the data as questions."""
    groups = list(map(asked, prompts))
    questions = (Question(g.prompt, tools=g.tools, template_options=g.template_options) for g in groups)
    return PromptSet(name, tuple(questions))


class _PendingSample(NamedTuple):
    """A sample that is to be drawn now: whose, and the conversation up to here."""

    place: Place
    prompt: tuple[Message, ...]


def _conversations(engine: Engine, prompt_set: PromptSet) -> list[_PendingSample]:
    """The first turn of every sample; where the likeliest tokens are taken all samples are alike, and one is drawn."""
    pending = []
    for index, question in enumerate(prompt_set.questions):
        num_samples = 1 if _is_greedy(engine, prompt_set, index) else engine.sampling.samples_per_prompt
        for sample in range(num_samples):
            pending += _draws(engine, prompt_set, Place(index, sample, 1), question.prompt)
    return pending


def _is_greedy(engine: Engine, prompt_set: PromptSet, index: int) -> bool:
    return prompt_set.temperature(prompt_set.questions[index], engine.sampling.temperature) == 0


def _draws(engine: Engine, prompt_set: PromptSet, place: Place, prompt: tuple[Message, ...]) -> list[_PendingSample]:
    """What is drawn for one sample that is kept."""
    count = 1 if _is_greedy(engine, prompt_set, place.prompt_index) else engine.draws
    indices = range(place.sample_index * count, (place.sample_index + 1) * count)
    return [_PendingSample(place._replace(sample_index=index), prompt) for index in indices]


def _next_turns(engine: Engine, prompt_set: PromptSet, generations: Sequence[Generation]) -> list[_PendingSample]:
    """The turn after these, of the questions that have one."""
    pending = []
    for generation in generations:
        then = prompt_set.questions[generation.prompt_index].then
        if generation.turn <= len(then):
            answer = Message(role="assistant", content=generation.output)
            user = Message(role="user", content=then[generation.turn - 1])
            place = Place(generation.prompt_index, generation.sample_index, generation.turn + 1)
            pending += _draws(engine, prompt_set, place, (*generation.prompt, answer, user))
    return pending


def _streams(pending: Sequence[_PendingSample], seed: int) -> list[int]:
    """A name for the random numbers of each sample; a prompt that occurs twice gets different samples."""
    occurrences: Counter[tuple[str, int]] = Counter()
    names = []
    for place, prompt in pending:
        key = str(list(prompt)), place.sample_index
        names.append(stream_name(seed, prompt, occurrences[key], place.sample_index))
        occurrences[key] += 1
    return names


def _requests(engine: Engine, prompt_set: PromptSet, pending: Sequence[_PendingSample], seed: int) -> list[Request]:
    questions = prompt_set.questions
    distinct = {  # samples of one question share their prompt
        id(sample.prompt): questions[sample.place.prompt_index].asked(sample.prompt) for sample in pending
    }
    ids = dict(zip(distinct, encode_prompts(engine.tokenizer, list(distinct.values())), strict=True))
    return [
        Request(
            place=sample.place,
            prompt=sample.prompt,
            prompt_ids=ids[id(sample.prompt)],
            temperature=prompt_set.temperature(questions[sample.place.prompt_index], engine.sampling.temperature),
            stream=stream,
        )
        for sample, stream in zip(pending, _streams(pending, seed), strict=True)
    ]


def _records(
    engine: Engine, prompt_set: PromptSet, seed: int, answers: Sequence[tuple[Request, Answer]]
) -> list[Generation]:
    said = parsed(engine.tokenizer, [Drawn(r.prompt_ids, a.token_ids, a.output) for r, a in answers])
    return [
        _record(engine, prompt_set, seed, request, answer, message)
        for (request, answer), message in zip(answers, said, strict=True)
    ]


def _record(
    engine: Engine, prompt_set: PromptSet, seed: int, request: Request, answer: Answer, said: Said | None
) -> Generation:
    question = prompt_set.questions[request.place.prompt_index]
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
        prompt_set=prompt_set.name,
        question_id=question.id,
        category=question.category,
        tokens=answer.tokens,
        logps=answer.logps,
        tools=question.tools,
        template_options=question.template_options,
        parsed=said,
    )


def _sample(
    engine: Engine, prompt_set: PromptSet, requests: Sequence[Request], seed: int, progress: Progress, kept: Kept
) -> list[Generation]:
    """An answer to every request, in their order; what comes is kept at once."""
    skip = {index for index, request in enumerate(requests) if request.place in kept.generations}
    with closing(engine.answers(requests, skip, progress)) as answers:
        for batch in answers:
            kept.add(_records(engine, prompt_set, seed, [(requests[i], answer) for i, answer in batch.items()]))
    return [kept.generations[request.place] for request in requests]


def answer(
    engine: Engine, prompt_set: PromptSet, seed: int, progress: Progress = silent, kept: Kept | None = None
) -> list[Generation]:
    """The engine's answers to a prompt set, ordered by question, sample and turn.

    A later turn is asked after the sample's own answers before it. `kept` holds the answers that are there already,
    and takes in every further one as it comes. Raises ValueError for what the engine refuses.
    """
    kept = Kept() if kept is None else kept
    generations: list[Generation] = []
    pending = _conversations(engine, prompt_set)
    while pending:
        requests = _requests(engine, prompt_set, pending, seed)
        answers = engine.chosen(_sample(engine, prompt_set, requests, seed, progress, kept))
        generations += answers
        pending = _next_turns(engine, prompt_set, answers)
    return sorted(generations, key=lambda g: (g.prompt_index, g.sample_index, g.turn))


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
            super().add(_readable_generations(self.path))
            self._append("\n")  # ends a torn line; empty lines are skipped

    def add(self, generations: Sequence[Generation]) -> None:
        """Take over what has been sampled; on disk when this returns."""
        super().add(generations)
        self._append("".join(map(line_of, generations)))

    def remove(self) -> None:
        """The answers have been stored for good."""
        self.path.unlink(missing_ok=True)

    def _append(self, text: str) -> None:
        with needing_room(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                content = text.encode()
                if file.write(content) < len(content):  # what a disk does that has room for a part
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())


def _readable_generations(path: Path) -> list[Generation]:
    generations, damages = [], []
    for row_number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            generations += [record_of(line, f"{path} row {row_number}")] if line else []
        except Damaged as damage:  # flipped, or torn by a kill
            damages.append(damage)
    if damages:
        say(f"{damages[0].what}: {len(damages)} rows are left out, and their answers sampled again")
    return generations


# --- random numbers


WEYL, MIX_1, MIX_2 = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed 64-bit integers; torch wraps around on overflow


def stream_name(seed: int, prompt: Sequence[Message], occurrence: int, sample_index: int) -> int:
    """A signed 64-bit name for one sequence's stream; `occurrence` counts equal prompts before this one."""
    return int(digest([seed, list(prompt), occurrence, sample_index])[:16], 16) - 2**63


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def random_bits(streams: Int[Tensor, " S"], step: int, size: int) -> Int[Tensor, "S size"]:
    """64 random bits for each stream and each of `size` entries at `step`."""
    counters = torch.arange(1, size + 1, device=streams.device) + step * size
    bits = streams[:, None] + (counters * WEYL)[None, :]
    bits = bits.bitwise_xor_(_shift_right(bits, 30)).mul_(MIX_1)
    bits = bits.bitwise_xor_(_shift_right(bits, 27)).mul_(MIX_2)
    return bits.bitwise_xor_(_shift_right(bits, 31))


def gumbel(streams: Int[Tensor, " S"], step: int, size: int) -> Float[Tensor, "S size"]:
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits) (Maddison et al. 2014, NeurIPS).

    It is -log(E) with E exponential. E = -log1p(-u) keeps its relative precision where it matters, for small u, so
    float32 suffices; u is at least 2^-54.
    """
    uniform = _shift_right(random_bits(streams, step, size), 11).float().add_(0.5).mul_(2.0**-53)
    return uniform.neg_().log1p_().neg_().log_().neg_()
