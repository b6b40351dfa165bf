"""Preference pairs and demonstrations as TRL and most hubs write them: texts or messages in named columns."""

import json
from typing import Any

from dpo_ref.data.formats.checks import BadRow, Row, column, flag, group, json_value, number, text, turns
from dpo_ref.types import Message, PromptGroup


def preference(row: Row, origin: str) -> PromptGroup:
    """`chosen` and `rejected`, with a `prompt` or without; texts or messages.

    Without `prompt`, messages are whole conversations whose common beginning is the prompt; of two texts it is the
    words they share. `system` is a system turn before the prompt, `tools` what the template offers, `score_chosen` and
    `score_rejected` (`chosen_score`, `chosen-rating`) the responses' scores.
    """
    sides = [column(row, name) for name in ("chosen", "rejected")]
    if "prompt" in row:
        prompt, answers = _after_prompt(turns(column(row, "prompt"), "prompt", "user"), sides)
    elif all(isinstance(side, str) for side in sides):
        prompt, answers = _common_words(text(sides[0], "chosen"), text(sides[1], "rejected"))
    else:
        prompt, answers = _common_turns(
            _answered_conversation(sides[0], "chosen"), _answered_conversation(sides[1], "rejected")
        )
    return group(
        _with_system(row, prompt),
        [_answer(answers[0], "chosen"), _answer(answers[1], "rejected")],
        origin,
        names=("chosen", "rejected"),
        pairs=((0, 1),),
        rewards=_scores(row),
        tools=_tools(row),
    )


def _answered_conversation(value: Any, name: str) -> list[Message]:
    conversation = turns(value, name, "assistant")
    if conversation[-1]["role"] != "assistant":
        raise BadRow(
            f"has a {name} that ends with a turn of {conversation[-1]['role']}; it must end with the assistant"
        )
    return conversation


def _after_prompt(prompt: list[Message], sides: list[Any]) -> tuple[list[Message], list[list[Message]]]:
    """What comes after the prompt on each side; a side may repeat the prompt or its last turns."""
    answers = []
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        conversation = _answered_conversation(side, name)
        users = [index for index, turn in enumerate(conversation) if turn["role"] != "assistant"]
        begin = users[-1] + 1 if users else 0
        if begin and conversation[:begin] not in (prompt, prompt[len(prompt) - begin :]):
            raise BadRow(f"has a {name} whose conversation begins with another prompt than the column prompt")
        answers.append(conversation[begin:])
    return prompt, answers


def _common_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The turns both conversations share, up to where the last answer of each begins."""
    size = 0
    while size < min(len(chosen), len(rejected)) and chosen[size] == rejected[size]:
        size += 1
    while size and chosen[size - 1]["role"] not in ("user", "tool"):  # answers begin at an assistant's turn
        size -= 1
    answers = [side[size:] for side in (chosen, rejected)]
    if any(turn["role"] == "user" for side in answers for turn in side):
        raise BadRow("has conversations in chosen and rejected that differ before their last answer: two prompts")
    return chosen[:size], answers


def _common_words(chosen: str, rejected: str) -> tuple[list[Message], list[list[Message]]]:
    """The words both texts begin with; where a language has no blanks, the characters."""
    differ = (index for index, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    size = next(differ, min(len(chosen), len(rejected)))
    common = chosen[:size]
    whole_word = all(side[size : size + 1].isspace() for side in (chosen, rejected))
    if not whole_word and any(character.isspace() for character in common):
        size = max(index for index, character in enumerate(common) if character.isspace()) + 1
    prompt = [Message(role="user", content=chosen[:size].strip())]
    return prompt, [[Message(role="assistant", content=side[size:].strip())] for side in (chosen, rejected)]


def _answer(messages: list[Message], name: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "nothing"
        raise BadRow(f"has a {name} that is not one assistant turn after the prompt (it ends with {last})")
    return messages[0]["content"]


def _with_system(row: Row, prompt: list[Message]) -> list[Message]:
    system = row.get("system")
    if not system:
        return prompt
    if prompt and prompt[0]["role"] == "system":
        raise BadRow("has a system turn in the prompt and a column system")
    return [Message(role="system", content=text(system, "system")), *prompt]


def _scores(row: Row) -> tuple[float, float] | None:
    for names in (
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
    ):
        if all(row.get(name) is not None for name in names):
            return number(row[names[0]], names[0]), number(row[names[1]], names[1])
    return None


def _tools(row: Row) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if not tools:
        return None
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise BadRow("has tools that are not JSON") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("has tools that are not a list of JSON schemas")
    return tuple(json_value(tools, "tools"))


def messages(row: Row, origin: str) -> PromptGroup:
    """A demonstration: `messages`, a conversation that ends with the assistant."""
    conversation = turns(column(row, "messages"), "messages", "user")
    if conversation[-1]["role"] != "assistant":
        raise BadRow(
            f"has messages that end with a turn of {conversation[-1]['role']}; a demonstration ends with the assistant"
        )
    return group(_with_system(row, conversation[:-1]), [conversation[-1]["content"]], origin, tools=_tools(row))


def completion(row: Row, origin: str) -> PromptGroup:
    """A demonstration: `prompt` and `completion`, texts or messages."""
    prompt = _with_system(row, turns(column(row, "prompt"), "prompt", "user"))
    answer = _answer(turns(column(row, "completion"), "completion", "assistant"), "completion")
    return group(prompt, [answer], origin, names=("completion",), tools=_tools(row))


def unpaired(row: Row, origin: str) -> PromptGroup:
    """KTO's rows: `prompt`, `completion`, and a `label` that says whether the completion is wanted."""
    demonstration = completion(row, origin)
    label = flag(column(row, "label"), "label")
    return PromptGroup(demonstration.prompt, demonstration.responses, (), None, origin, (label,), demonstration.tools)


def instruction(row: Row, origin: str) -> PromptGroup:
    """Alpaca's demonstrations: `instruction`, `input`, `output`."""
    prompt = [Message(role="user", content=instruction_text(row))]
    return group(prompt, [text(column(row, "output"), "output")], origin, names=("output",))


def instruction_text(row: Row) -> str:
    """Alpaca's instruction with its input below."""
    parts = [text(row[name], name) for name in ("instruction", "input") if row.get(name)]
    if not parts:
        raise BadRow(f"has no instruction; its columns are {', '.join(row)}")
    return "\n\n".join(parts)


def plain_text(row: Row, origin: str) -> PromptGroup:
    """`text` alone: fitted from its beginning, without a template."""
    content = text(column(row, "text"), "text")
    if not content.strip():
        raise BadRow("has an empty text")
    return PromptGroup((), (content,), origin=origin)
