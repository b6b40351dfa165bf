"""The group `prompts`: what an evaluation asks, where that is not the held-out prompts of the data. Question files are
read as their authors publish them, without change.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from dpo_ref.component import MemberOf
from dpo_ref.data.formats.checks import BadRow, Row
from dpo_ref.data.rows import Source, open_source
from dpo_ref.generation.engine import PromptSet, Question, held_out
from dpo_ref.types import Message, Progress

# --- question files


Read = Callable[[Row, int], Question]  # a row and its index


def _text(row: Row, key: str) -> str:
    """A text that must be there. Raises BadRow."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"needs a text under {key!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    return value


def _turns(row: Row) -> list[str]:
    """What the user says, turn by turn: texts, or objects whose `content` is one. Raises BadRow."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"needs a list of texts under 'turns'; it has {', '.join(map(repr, row)) or 'nothing'}")
    texts: list[Any] = [turn.get("content") if isinstance(turn, dict) else turn for turn in turns]
    for turn_number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise BadRow(f"has no text as turn {turn_number} of 'turns'")
    return texts


def _id(row: Row, key: str) -> int | str:
    value = row.get(key)
    if not isinstance(value, (int, str)) or isinstance(value, bool) or value == "":
        raise BadRow(f"needs {key!r}, a number or a text by which answers are matched; it has {value!r}")
    return value


def _question(turns: list[str], id: int | str, category: Any) -> Question:
    first = (Message(role="user", content=turns[0]),)
    return Question(first, tuple(turns[1:]), id, category if isinstance(category, str) else "")


def alpaca_eval_row(row: Row, index: int) -> Question:
    """AlpacaEval: {instruction, output, generator, dataset}; known by its index, as its own tools know it."""
    return _question([_text(row, "instruction")], index, row.get("dataset"))


def mt_bench_row(row: Row, index: int) -> Question:
    """FastChat: {question_id, category, turns, reference?}."""
    return _question(_turns(row), _id(row, "question_id"), row.get("category"))


def arena_hard_row(row: Row, index: int) -> Question:
    """Arena-Hard: {uid, category, prompt}; in version 0.1 {question_id, category, turns: [{content}]}."""
    id = _id(row, "uid" if "uid" in row else "question_id")
    return _question(_turns(row) if "turns" in row else [_text(row, "prompt")], id, row.get("category"))


def _conversation(messages: Any) -> tuple[Message, ...]:
    """Messages up to the user's last. Raises BadRow."""
    for message in messages:
        is_message = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not is_message:
            raise BadRow("needs messages of the form {'role': ..., 'content': ...}")
    if not messages or messages[-1]["role"] != "user":
        raise BadRow("must end with a message of the user: that is what is answered")
    return tuple(Message(role=message["role"], content=message["content"]) for message in messages)


PROMPT_KEYS = ("prompt", "instruction", "question", "messages", "turns")


def own_row(row: Row, index: int) -> Question:
    """One's own rows: a text or messages under `prompt` (or instruction, question, messages), or `turns` of the user;
    `id` and `category` if they have them."""
    keys = [key for key in PROMPT_KEYS if row.get(key)]
    if len(keys) != 1:
        raise BadRow(
            f"needs one of {', '.join(map(repr, PROMPT_KEYS))}; it has {', '.join(map(repr, keys)) or 'none'}"
        )
    id = _id(row, "id") if "id" in row else index
    if keys == ["turns"]:
        return _question(_turns(row), id, row.get("category"))
    if isinstance(row[keys[0]], list):
        category = row.get("category")
        return Question(_conversation(row[keys[0]]), (), id, category if isinstance(category, str) else "")
    return _question([_text(row, keys[0])], id, row.get("category"))


def read_questions(path: str, read: Read, remedy: str) -> tuple[Question, ...]:
    """The questions of a file, in its order. Raises ValueError, naming the row, for what is none; `remedy` says where
    the file is to be had."""
    if not Path(path).expanduser().is_file():
        raise ValueError(f"prompts.path={path} is no file; {remedy}")
    questions: dict[int | str | None, Question] = {}
    for index, (origin, row) in enumerate(open_source(Source(path), "prompts.path").rows):
        try:
            if isinstance(row, BadRow):
                raise row
            question = read(row, index)
            if question.id in questions:
                raise BadRow(f"has the id {question.id!r} of an earlier row")
        except BadRow as error:
            raise ValueError(f"{origin} {error}. {remedy[0].upper()}{remedy[1:]}") from error
        questions[question.id] = question
    if not questions:
        raise ValueError(f"prompts.path={path} holds no question; {remedy}")
    return tuple(questions.values())


# --- the components


def _first(questions: tuple[Question, ...], limit: int | None) -> tuple[Question, ...]:
    if limit is not None and limit < 1:
        raise ValueError(f"prompts.limit={limit} must be at least 1 question")
    return questions[:limit]


def _from_file(name: str, path: str, read: Read, limit: int | None, remedy: str) -> PromptSet:
    return PromptSet(name, _first(read_questions(path, read, remedy), limit))


def data(
    seed: int, progress: Progress, *, data: Annotated[Any, MemberOf("data")], limit: int | None = None
) -> PromptSet:
    """The held-out prompts of any data, beside the data of the run. Raises ValueError where none are held out."""
    prompts = data(seed, progress).test_prompts
    if not prompts:
        raise ValueError(
            "prompts=data: this data holds nothing out; give prompts.data.eval_split, prompts.data.eval_path or "
            "prompts.data.eval_fraction"
        )
    return PromptSet("data", _first(held_out(prompts, "data").questions, limit))


def alpaca_eval(seed: int, progress: Progress, *, path: str, limit: int | None = None) -> PromptSet:
    """AlpacaEval's 805 instructions (Li et al. 2023), from its `alpaca_eval.json`; `category` is a row's `dataset`."""
    remedy = "it is alpaca_eval.json of the data set tatsu-lab/alpaca_eval, a list of {instruction, dataset, ...}"
    return _from_file("alpaca_eval", path, alpaca_eval_row, limit, remedy)


def mt_bench(
    seed: int,
    progress: Progress,
    *,
    path: str,
    limit: int | None = None,
    temperatures: dict[str, float] | None = None,
) -> PromptSet:
    """MT-Bench's 80 questions of two turns (Zheng et al. 2023, arXiv:2306.05685), from FastChat's `question.jsonl`.
    The second turn is asked after the model's own first answer. `temperatures` gives every category its own, as
    FastChat does, instead of `generation.temperature`. Raises ValueError for a category that it lacks."""
    remedy = "it is fastchat/llm_judge/data/mt_bench/question.jsonl of FastChat, a row {question_id, category, turns}"
    prompt_set = _from_file("mt_bench", path, mt_bench_row, limit, remedy)
    lacking = {question.category for question in prompt_set.questions} - set(temperatures or {})
    if temperatures is not None and lacking:
        raise ValueError(f"prompts.temperatures has none for {', '.join(sorted(lacking))}; give every category one")
    return PromptSet(prompt_set.name, prompt_set.questions, temperatures)


def arena_hard(seed: int, progress: Progress, *, path: str, limit: int | None = None) -> PromptSet:
    """Arena-Hard's questions (Li et al. 2024, arXiv:2406.11939), from the `question.jsonl` of either version."""
    remedy = "it is data/arena-hard-v2.0/question.jsonl of arena-hard-auto, a row {uid, category, prompt}"
    return _from_file("arena_hard", path, arena_hard_row, limit, remedy)


def jsonl(seed: int, progress: Progress, *, path: str, limit: int | None = None) -> PromptSet:
    """One's own questions, a row each: `prompt` (text or messages) or `turns` of the user, and `id` and `category` if
    wanted. Also .json, .csv and .parquet."""
    remedy = "a row is {prompt: text or messages} or {turns: [texts]}, with id and category if wanted"
    return _from_file("jsonl", path, own_row, limit, remedy)
