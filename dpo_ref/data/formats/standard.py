"""Preference pairs and demonstrations as trainers and most hubs write them: texts or messages in named columns."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpo_ref.data.formats.checks import (
    BadRow,
    Row,
    column,
    columns_of,
    flag,
    json_value,
    number,
    says_nothing,
    shown,
    text,
    written_out,
)
from dpo_ref.data.formats.columns import ReadRow, part, peek
from dpo_ref.data.formats.conversations import answered, group, response, turns
from dpo_ref.data.formats.names import could_be_prompt, is_missing, prompt_inside
from dpo_ref.types import Message, PromptGroup

# --- what any row may say: its prompt, the turns before it, tools


CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", *CONVERSATIONS, "instruction", "question", "query", "input")  # the first that a row has
ABOVE_OR_BELOW = {"instruction": ((), ("input",)), "question": (("context",), ())}  # text that belongs to its text
_SYSTEM = ("system", "system_prompt", "system_message")
BESIDE_PROMPT = (*_SYSTEM, "history", "tools", "chat_template_kwargs")  # what any row may bring


def prompt_column(row: Row) -> str | None:
    """The column that holds the prompt; `prompt` itself even where it is null or empty, which is a mistake."""
    if peek(row, "prompt") is not None:
        return "prompt"
    name = next((name for name in PROMPTS if not is_missing(peek(row, name))), None)
    return name or ("prompt" if "prompt" in row else None)


def prompt_of(row: Row) -> list[Message]:
    """What was asked: the turns of the first of `PROMPTS` that the row has."""
    name = prompt_column(row)
    if name is None:
        empty = [name for name in PROMPTS if name in row]
        raise BadRow(f"has nothing in {' or '.join(empty)}" if empty else f"has no prompt in {columns_of(row)}")
    value = column(row, name)
    if is_missing(value) and not says_nothing(value):
        raise BadRow(
            f"has {shown(value)} in {name}, which is what became of a missing cell: fill it, or leave it empty"
        )
    if isinstance(value, str) and name in ABOVE_OR_BELOW:
        above, below = ABOVE_OR_BELOW[name]
        value = "\n\n".join([*_beside(row, above), value, *_beside(row, below)])
    return turns(value, name, "user")


def _beside(row: Row, names: Sequence[str]) -> list[str]:
    return [text(row[name], name) for name in names if not is_missing(peek(row, name))]


def asked(row: Row, prompt: list[Message], responses: Sequence[Any], origin: str, **more: Any) -> PromptGroup:
    """The group of a row that may also bring a system turn, earlier turns, tools and options of the template."""
    tools = _tools(row) if "tools" in row else None
    options = _template_options(row) if "chat_template_kwargs" in row else None
    return group(_framed(row, prompt), responses, origin, tools=tools, template_options=options, **more)


def _framed(row: Row, prompt: list[Message]) -> list[Message]:
    """The prompt behind the earlier turns and the system turn that have columns of their own."""
    if "history" in row and len(prompt) == 1:
        prompt = [*_history(row), *prompt]
    if row.keys().isdisjoint(_SYSTEM):
        return prompt
    name = next((name for name in _SYSTEM if not is_missing(peek(row, name))), None)
    if name is None:
        return prompt
    system = Message(role="system", content=text(row[name], name))
    if prompt and prompt[0]["role"] == "system":
        if prompt[0] != system:
            raise BadRow(f"has a system turn in the prompt and a column {name}; data.ignore=[{name}] keeps the turn")
        return prompt
    return [system, *prompt]


def _history(row: Row) -> list[Message]:
    """Earlier turns: a list of [question, answer], or messages."""
    value = peek(row, "history")
    history = written_out(value) if isinstance(value, str) else value
    if says_nothing(history) or not isinstance(history, list | tuple):
        return []  # words, which nobody reads
    row.get("history")  # now it is read
    if isinstance(history[0], dict):
        return turns(history, "history", "user")
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow(f"has {shown(value)} in history, where a list of [question, answer] is expected")
    return [
        Message(role=role, content=text(words, "history"))
        for pair in history
        for role, words in zip(("user", "assistant"), pair, strict=True)
    ]


def _tools(row: Row) -> tuple[dict[str, Any], ...] | None:
    """What `tools` offers: a list of JSON schemas, any part of it as JSON text."""
    if is_missing(peek(row, "tools")):
        return None
    try:
        tools = _decoded(row["tools"])
        tools = [_decoded(tool) for tool in tools] if isinstance(tools, list) else tools
    except ValueError as error:
        raise BadRow("has tools that are not JSON; they are a list of JSON schemas, or its text") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("has tools that are not a list of JSON schemas")
    return tuple(json_value(tools, "tools")) or None


def _template_options(row: Row) -> dict[str, Any] | None:
    """What `chat_template_kwargs` says to the chat template."""
    if is_missing(peek(row, "chat_template_kwargs")):
        return None
    try:
        options = _decoded(row["chat_template_kwargs"])
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise BadRow(
            f"has {shown(row['chat_template_kwargs'])} in chat_template_kwargs, where an object such as "
            "{enable_thinking: false} is expected"
        )
    _refuse_written_truth(options)
    return json_value(options, "chat_template_kwargs")


def _refuse_written_truth(options: dict[str, Any]) -> None:
    """Refuse a text "false", which templates take for true."""
    for key, value in options.items():
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            raise BadRow(
                f"has the text {shown(value)} in chat_template_kwargs.{key}, which templates take for true; "
                f"{value.strip().lower()} without quotes is meant"
            )


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


# --- pairs


SIDES = (  # columns of the better and the worse response
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
    ("response_j", "response_k"),
    ("response", "rejected_response"),
)
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_rating", "rejected_rating"),
)
WORSE = ("rejected_response", "rejected_messages", "rejected")


def preference(row: Row, origin: str) -> PromptGroup:
    """A better and a worse response, texts or messages, to a prompt (see `PROMPTS` and `SIDES`).

    Without a prompt, messages are whole conversations whose common beginning is the prompt; of two texts it is the
    words they share. `system` is a system turn before it, `history` earlier turns, `tools` what the template offers,
    `score_chosen` and `score_rejected` (`chosen_score`, `chosen-rating`) the responses' scores.
    """
    names = _side_names(row)
    sides = [column(row, name) for name in names]
    return _pair(row, *_prompt_and_answers(row, sides, names), names, origin)


def rejected_response(row: Row, origin: str) -> PromptGroup:
    """A demonstration with a worse answer beside it, as ms-swift has it: the last turn of `messages` (`conversations`,
    `prompt`) against `rejected_response` (`rejected`), or the whole of it against `rejected_messages`."""
    name, better = _conversation(row, (*CONVERSATIONS, "prompt"), "its last turn is the better answer")
    worse_name = next((name for name in WORSE if not says_nothing(peek(row, name))), WORSE[0])
    worse = answered(column(row, worse_name), worse_name)
    names = (f"last turn of {name}", worse_name)
    if worse[0]["role"] == "assistant":
        return _pair(row, better[:-1], [better[-1:], worse], names, origin)
    return _pair(row, *_common_turns(better, worse, (name, worse_name)), names, origin)


def openai_preference(row: ReadRow, origin: str) -> PromptGroup:
    """OpenAI's preference data: `input` holds messages and tools, `preferred_output` and `non_preferred_output` the
    assistant's turns."""
    names = _side_names(row)
    request = part(row, "input")
    prompt = turns(column(request, "messages"), "input.messages", "user")
    answers = _after_prompt(prompt, [answered(column(row, name), name) for name in names], names)
    return _pair(request, *answers, names, origin)


def _side_names(row: Row) -> tuple[str, str]:
    complete = (pair for pair in SIDES if peek(row, pair[0]) is not None and peek(row, pair[1]) is not None)
    return next(complete, next((pair for pair in SIDES if row.keys() >= set(pair)), SIDES[0]))


def _pair(
    row: Row, prompt: list[Message], answers: Sequence[list[Message]], names: Sequence[str], origin: str
) -> PromptGroup:
    responses = [response(answer, name) for answer, name in zip(answers, names, strict=True)]
    return asked(row, prompt, responses, origin, names=names, pairs=((0, 1),), rewards=_scores(row))


Answers = tuple[list[Message], list[list[Message]]]  # a prompt and what is answered on each side


def _prompt_and_answers(row: Row, sides: list[Any], names: Sequence[str]) -> Answers:
    conversations = [answered(side, name) for side, name in zip(sides, names, strict=True)]
    source = prompt_column(row)
    if source == "prompt":
        return _after_prompt(prompt_of(row), conversations, names)
    if all(conversation[0]["role"] != "assistant" for conversation in conversations):
        return _common_turns(conversations[0], conversations[1], names)
    if source is not None:
        prompt = prompt_of(row)
        ends_with_better = prompt[-1] == conversations[0][0]  # messages that hold the chosen answer, too
        return _after_prompt(prompt[:-1] if ends_with_better else prompt, conversations, names)
    if [conversation[0]["content"] for conversation in conversations] != sides:
        raise BadRow(
            f"has no prompt, and {names[0]} or {names[1]} begins with the assistant; its columns are {columns_of(row)}"
        )
    _refuse_other_prompts(row, names)
    return _common_words(*sides)


def _after_prompt(prompt: list[Message], conversations: list[list[Message]], names: Sequence[str]) -> Answers:
    """What comes after the prompt on each side; a side may repeat the prompt or its last turns, behind a system turn
    that all sides have."""
    systems = [side[0] for side in conversations if side[0]["role"] == "system"]
    if len(systems) == len(conversations) and prompt and prompt[0]["role"] != "system":
        prompt = [systems[0], *prompt] if systems.count(systems[0]) == len(systems) else prompt
    return prompt, [side[repeated(prompt, side, name) :] for side, name in zip(conversations, names, strict=True)]


def repeated(prompt: list[Message], conversation: list[Message], name: str) -> int:
    """How many first turns of a side repeat the prompt, or its last ones."""
    begin = next(index for index, turn in enumerate(conversation) if turn["role"] == "assistant")
    sizes = [size for size in range(len(prompt), 0, -1) if conversation[:size] == prompt[len(prompt) - size :]]
    if begin and (not sizes or sizes[0] < begin):
        raise BadRow(
            f"has a {name} whose conversation begins with another prompt than the prompt's column; without it "
            "(data.ignore) the turns that both sides share are the prompt"
        )
    return sizes[0] if begin else 0


def _common_turns(chosen: list[Message], rejected: list[Message], names: Sequence[str]) -> Answers:
    """The turns both conversations share, up to where the last answer of each begins."""
    size = 0
    while size < min(len(chosen), len(rejected)) and chosen[size] == rejected[size]:
        size += 1
    if any(turn["role"] in ("system", "user") for side in (chosen, rejected) for turn in side[size : size + 1]):
        raise BadRow(
            f"has conversations in {' and '.join(names)} that part at a turn of the user: two prompts, where one is "
            "expected"
        )
    while size and chosen[size - 1]["role"] not in ("user", "tool"):  # answers begin at an assistant's turn
        size -= 1
    if not size:
        raise BadRow(f"has conversations in {' and '.join(names)} that begin with different turns: two prompts")
    return chosen[:size], [chosen[size:], rejected[size:]]


def _refuse_other_prompts(row: Row, names: Sequence[str]) -> None:
    """Refuse to guess at a prompt where the row has a column for it, or one that nobody reads may be it."""
    empty = [name for name in PROMPTS if name in row]
    if empty:
        raise BadRow(
            f"has nothing in {' or '.join(empty)}; data.ignore=[{', '.join(empty)}] takes the words that both sides "
            "share"
        )
    read = {*names, *_SYSTEM, "tools", "chat_template_kwargs"}
    for name, value in row.items():
        inside = None if name in read else prompt_inside(name, value)
        if inside is not None:
            raise BadRow(
                f"has no column prompt, and {inside} may be it: it has to be a column of its own, "
                f"data.ignore=[{name}] passes over it"
            )
        if name not in read and could_be_prompt(name, value):
            raise BadRow(
                f"has no column prompt, and {name} may be it: data.columns={{prompt: {name}}} reads it so, "
                f"data.ignore=[{name}] passes over it"
            )


def _common_words(chosen: str, rejected: str) -> Answers:
    """The words both texts begin with; where a language has no blanks, the characters."""
    differ = (index for index, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    size = next(differ, min(len(chosen), len(rejected)))
    common = chosen[:size]
    whole_word = all(side[size : size + 1].isspace() for side in (chosen, rejected))
    if not whole_word and any(character.isspace() for character in common):
        size = max(index for index, character in enumerate(common) if character.isspace()) + 1
    prompt = [Message(role="user", content=chosen[:size].strip())]
    return prompt, [[Message(role="assistant", content=side[size:].strip())] for side in (chosen, rejected)]


def _scores(row: Row) -> tuple[float, float] | None:
    """What the first of `_SCORES` says that the row has. Raises BadRow where another says that the other side is
    better."""
    present = [names for names in _SCORES if any(peek(row, name) is not None for name in names)]
    complete = [names for names in present if all(peek(row, name) is not None for name in names)]
    if not complete:
        _refuse_one_score(row, present)
        return None
    first, *others = complete
    better, worse = (number(row[name], name) for name in first)
    for names in others:
        other_better, other_worse = (number(peek(row, name), name) for name in names)
        if (better - worse) * (other_better - other_worse) < 0:
            raise BadRow(
                f"has scores that disagree, in {' and '.join(first)} and in {' and '.join(names)}; "
                f"data.ignore=[{', '.join(names)}] passes over the latter"
            )
    return better, worse


def _refuse_one_score(row: Row, present: Sequence[tuple[str, str]]) -> None:
    """Refuse a score beside a null; where the other has no column at all, scores are not what was meant."""
    for names in present:
        if row.keys() >= set(names):
            null, given = sorted(names, key=lambda name: peek(row, name) is not None)
            raise BadRow(f"has null in {null} beside {given}; data.ignore=[{', '.join(names)}] passes over both")


# --- demonstrations


def messages(row: Row, origin: str) -> PromptGroup:
    """A demonstration: `messages` (`conversations`, `conversation`), which end with the assistant."""
    name, conversation = _conversation(row, CONVERSATIONS, "a demonstration ends with the assistant")
    return asked(row, conversation[:-1], [response(conversation[-1:], name)], origin)


def _conversation(row: Row, names: Sequence[str], because: str) -> tuple[str, list[Message]]:
    """The first of these columns that the row has, whose turns end with the assistant's."""
    name = next((name for name in names if not says_nothing(peek(row, name))), names[0])
    conversation = turns(column(row, name), name, "user")
    if conversation[-1]["role"] != "assistant":
        raise BadRow(f"has {name} that end with a turn of {conversation[-1]['role']}; {because}")
    return name, conversation


def completion(row: Row, origin: str) -> PromptGroup:
    """A demonstration: `prompt` and `completion`, texts or messages."""
    answer = response(turns(column(row, "completion"), "completion", "assistant"), "completion")
    return asked(row, prompt_of(row), [answer], origin, names=("completion",))


def instruction(row: Row, origin: str) -> PromptGroup:
    """Alpaca's demonstrations: `instruction`, `input` below it, `output`; `history` and `system` if there are."""
    answer = text(column(row, "output"), "output")
    return asked(row, prompt_of(row), [answer], origin, names=("output",))


def unpaired(row: Row, origin: str) -> PromptGroup:
    """A demonstration with a `label` (`kto_tag`) that says whether it is wanted."""
    names = [name for name in ("label", "kto_tag") if peek(row, name) is not None] or ["label"]
    label, *others = [flag(column(row, name), name) for name in names]
    if label in [not other for other in others]:
        raise BadRow(f"has {' and '.join(names)} that contradict each other; data.ignore=[{names[1]}] passes over one")
    return replace(_demonstration(row, origin), labels=(label,))


def _demonstration(row: Row, origin: str) -> PromptGroup:
    if peek(row, "completion") is not None:
        return completion(row, origin)
    return messages(row, origin) if peek(row, "output") is None else instruction(row, origin)


def plain_text(row: Row, origin: str) -> PromptGroup:
    """`text` alone: fitted from its beginning, without a template."""
    content = text(column(row, "text"), "text")
    if not content.strip():
        raise BadRow("has an empty text")
    return PromptGroup((), (content,), origin=origin)
