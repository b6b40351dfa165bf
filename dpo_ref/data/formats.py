"""Rows of known formats -> PromptGroups. A row that does not fit raises BadRow."""

from typing import Any

from dpo_ref.data.rows import BadRow
from dpo_ref.types import Message, PromptGroup

ROLES = ("system", "user", "assistant")


def _messages(value: Any, column: str) -> list[Message]:
    """A column as messages: a list of them, or text, which is one turn: the user's in prompt, else the assistant's."""
    if isinstance(value, str):
        role = "user" if column == "prompt" else "assistant"
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRow(f"has a {column} that is neither text nor a list of messages")
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise BadRow(f"has a {column} with a turn that is not {{role: system|user|assistant, content: text}}")
    return [Message(role=turn["role"], content=turn["content"]) for turn in value]


def preference(row: dict[str, Any], origin: str) -> PromptGroup:
    """`prompt`, `chosen`, `rejected`, each text or a list of messages.

    Without `prompt`, chosen and rejected are whole conversations and their common beginning is the prompt.
    """
    missing = [column for column in ("chosen", "rejected") if row.get(column) is None]
    if missing:
        raise BadRow(f"has no {missing[0]}; its columns are {', '.join(row) or 'none'}")
    chosen, rejected = (_messages(row[column], column) for column in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        prompt = _messages(row["prompt"], "prompt")
        chosen, rejected = (
            side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in (chosen, rejected)
        )
    else:
        prompt = _common(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return pair(prompt, chosen, rejected, origin)


def _common(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    size = 0
    while size < min(len(chosen), len(rejected)) and chosen[size] == rejected[size]:
        size += 1
    while size and chosen[size - 1]["role"] != "user":  # the answers must begin at an assistant's turn
        size -= 1
    return chosen[:size]


def pair(prompt: list[Message], chosen: list[Message], rejected: list[Message], origin: str) -> PromptGroup:
    """A group of two from a prompt and two answers of one assistant turn each; BadRow for what cannot be compared."""
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise BadRow("has no prompt that ends with a non-empty user turn")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) != 1 or side[0]["role"] != "assistant":
            raise BadRow(f"has a {name} that is not one assistant turn after the prompt")
        if not side[0]["content"].strip():
            raise BadRow(f"has an empty {name}")
    answers = (chosen[0]["content"], rejected[0]["content"])
    if answers[0] == answers[1]:
        raise BadRow("has chosen equal to rejected")
    return PromptGroup(prompt=tuple(prompt), responses=answers, pairs=((0, 1),), origin=origin)


def hh(row: dict[str, Any], origin: str) -> PromptGroup:
    """Anthropic's hh-rlhf: two dialogues as text, turns opened by "\\n\\nHuman:" and "\\n\\nAssistant:", that share
    everything up to their last assistant turn."""
    missing = [column for column in ("chosen", "rejected") if not isinstance(row.get(column), str)]
    if missing:
        raise BadRow(f"has no text in {missing[0]}; its columns are {', '.join(row) or 'none'}")
    chosen, rejected = _dialogue(row["chosen"]), _dialogue(row["rejected"])
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("has dialogues that differ before their last assistant turn")
    return pair(chosen[:-1], chosen[-1:], rejected[-1:], origin)


def _dialogue(text: str) -> list[Message]:
    """Turns of an hh dialogue. A turn marker inside a turn's first line cannot be told from a real one."""
    turns: list[Message] = []
    for part in text.split("\n\nHuman:")[1:]:
        human, *assistants = part.split("\n\nAssistant:")
        turns.append(Message(role="user", content=human.strip()))
        turns += [Message(role="assistant", content=assistant.strip()) for assistant in assistants]
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("has a dialogue that does not end with an assistant turn")
    return turns
