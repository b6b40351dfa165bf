"""What a row must hold, checked value by value; what it does not raises BadRow with the column's name."""

from collections.abc import Sequence
from typing import Any

from dpo_ref.types import Message, PromptGroup

Row = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MAX_CHARS = 2**20  # of one text; a longer one is a mistake in the file
_SHOWN = 8  # column names in a message
_FOLLOWS = {  # which turns may come after which; "" is the beginning
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class BadRow(ValueError):
    """A row that cannot be used; the message says why and what a good one looks like."""


def columns_of(row: Row) -> str:
    """The row's columns, for messages."""
    names = list(row)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") or "none"


def column(row: Row, name: str) -> Any:
    """The value of a column that must be there and not null."""
    if name not in row:
        raise BadRow(f"has no {name}; its columns are {columns_of(row)}")
    if row[name] is None:
        raise BadRow(f"has null in {name}")
    return row[name]


def shown(value: Any) -> str:
    """A value in a message, short."""
    full = repr(value)
    return full if len(full) <= 60 else f"{full[:57]}..."


def record(value: Any, name: str) -> Row:
    """A value that is an object with columns of its own."""
    if not isinstance(value, dict):
        raise BadRow(f"has {shown(value)} in {name}, where an object is expected")
    return value


def flag(value: Any, name: str) -> bool:
    """True or false, 1 or 0, also spelt as text, as CSV has them."""
    truth = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if truth is None:
        raise BadRow(f"has {shown(value)} in {name}, where true or false (1 or 0) is expected")
    return truth


def json_value(value: Any, name: str) -> Any:
    """A nested value without the nulls that Parquet writes into absent fields; its texts can be encoded."""
    if isinstance(value, dict):
        return {key: json_value(inner, name) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [json_value(inner, name) for inner in value]
    return text(value, name) if isinstance(value, str) else value


def text(value: Any, name: str) -> str:
    """A text that can be encoded, of bounded size."""
    if not isinstance(value, str):
        raise BadRow(
            f"has {'null' if value is None else 'a ' + type(value).__name__} in {name}, where text is expected"
        )
    if len(value) > MAX_CHARS:
        raise BadRow(f"has {len(value):,} characters in {name}; at most {MAX_CHARS:,} are taken for one text")
    if "\0" in value:
        raise BadRow(f"has a NUL character in {name}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"has half a surrogate pair in {name} (character {error.start}): the file was cut or mis-decoded"
        ) from error
    return value


def number(value: Any, name: str) -> float:
    """A finite number; texts that spell one are taken, as ratings often come so."""
    try:
        as_float = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        as_float = float("nan")
    if as_float - as_float != 0:
        raise BadRow(f"has {shown(value)} in {name}, where a finite number is expected")
    return as_float


def several(value: Any, name: str) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list | tuple):
        raise BadRow(f"has a {type(value).__name__} in {name}, where a list is expected")
    if not value:
        raise BadRow(f"has an empty list in {name}")
    return list(value)


def turn(value: Any, name: str) -> Message:
    """One turn: a known role and text, and what belongs to tool calls."""
    if not isinstance(value, dict) or "role" not in value:
        raise BadRow(f"has a {name} with a turn that is not {{role: {'|'.join(ROLES)}, content: text}}")
    role, content = value["role"], value.get("content")
    if role not in ROLES:
        raise BadRow(f"has the unknown role {shown(role)} in {name}; known are {', '.join(ROLES)}")
    extra = {key: json_value(value[key], name) for key in ("name", "tool_calls", "tool_call_id") if value.get(key)}
    if not all(isinstance(call, dict) for call in extra.get("tool_calls", [])):
        raise BadRow(f"has tool_calls in {name} that are not a list of objects")
    if content is None and "tool_calls" in extra:
        content = ""
    return Message(role=role, content=text(content, f"{name} ({role} turn)"), **extra)


def turns(value: Any, name: str, role: str) -> list[Message]:
    """A conversation: a list of turns in an order that makes sense, or text, which is one turn of `role`."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list | tuple):
        raise BadRow(f"has a {name} that is neither text nor a list of messages")
    return [turn(entry, name) for entry in several(value, name)]


def in_order(messages: Sequence[Message], name: str) -> None:
    """Refuse roles out of order: a system turn first or nowhere, then user and assistant in turns."""
    before = ""
    for index, message in enumerate(messages):
        if before not in _FOLLOWS[message["role"]]:
            where = f"after a turn of {before}" if before else "at the beginning"
            raise BadRow(f"has roles out of order in {name}: turn {index + 1} is {message['role']} {where}")
        before = message["role"]


def group(
    prompt: Sequence[Message],
    responses: Sequence[str],
    origin: str,
    *,
    names: Sequence[str] = (),
    pairs: tuple[tuple[int, int], ...] = (),
    rewards: Sequence[float] | None = None,
    labels: tuple[bool, ...] | None = None,
    tools: tuple[dict[str, Any], ...] | None = None,
) -> PromptGroup:
    """A group whose prompt ends with a turn that the assistant answers and whose responses are not empty."""
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        ending = f"ends with a turn of {prompt[-1]['role']}" if prompt else "is empty"
        raise BadRow(f"has a prompt that {ending}; it must end with a user turn")
    if prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise BadRow("has an empty prompt")
    in_order(prompt, "prompt")
    for index, response in enumerate(responses):
        if not response.strip():
            raise BadRow(f"has an empty {names[index] if names else f'response {index + 1}'}")
    for better, worse in pairs:
        if responses[better] == responses[worse]:
            raise BadRow("has chosen equal to rejected")
    scores = None if rewards is None else tuple(rewards)
    return PromptGroup(tuple(prompt), tuple(responses), pairs, scores, origin, labels, tools)
