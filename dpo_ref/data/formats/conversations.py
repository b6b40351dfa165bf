"""Turns of a conversation, however they are written down, and the groups made of them.

Written as {role, content}, as ShareGPT's {from, value}, as the text of either, or as one text with markers in it.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from dpo_ref.data.formats.checks import (
    BadRow,
    json_text,
    json_value,
    says_nothing,
    several,
    shown,
    text,
    written_out,
)
from dpo_ref.types import THOUGHTS, Message, PromptGroup, Response, turns_of

# --- one turn


ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {  # ShareGPT's names of them
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
_OTHER_NAMES = {"developer": "system", "function": "tool"}  # OpenAI's later and earlier names of roles
# Keys of a turn that say nothing to a model. All others go into the chat template, and must come out of it.
_HARMLESS = {"id", "index", "message_id", "timestamp", "created", "created_at", "model", "token_count", "num_tokens"}
_TEXT_PARTS = {"text", "input_text", "output_text"}  # types of a part of content that are words


def turn(value: Any, name: str) -> Message:
    """One turn: a known role, text, and whatever else it says, for the chat template."""
    if not isinstance(value, dict) or (value.get("role") is None and value.get("from") is None):
        raise BadRow(f"has a {name} with a turn that is not {{role: {'|'.join(ROLES)}, content: text}}")
    if value.get("role") is None:
        value = _of_speaker(value, name)
    role, content = _role(value["role"]), value.get("content")
    if role not in ROLES:
        raise BadRow(f"has the unknown role {shown(role)} in {name}; known are {', '.join(ROLES)}")
    where = f"{name} ({role} turn)"
    words = content if content is None or isinstance(content, str) else _joined_parts(content, where)
    if len(value) == 2 and words is not None:
        return Message(role=role, content=text(words, where))
    extra = {
        key: json_value(inner, f"{name}.{key}")
        for key, inner in value.items()
        if key not in ("role", "content") and key not in _HARMLESS and not _is_absent(key, inner)
    }
    if "function_call" in extra and "tool_calls" not in extra:  # before there were several
        extra["tool_calls"] = [extra.pop("function_call")]
    if "tool_calls" in extra:
        extra["tool_calls"] = [_call(call, name) for call in _calls(extra["tool_calls"], name)]
    if words is None and extra.keys() & {"tool_calls", *THOUGHTS}:
        words = ""
    return Message(role=role, content=text(words, where), **extra)


def _role(value: Any) -> Any:
    return _OTHER_NAMES.get(value, value) if isinstance(value, str) else value


def _is_absent(key: str, value: Any) -> bool:
    """Whether a key of a turn is as good as absent; an empty thought is not: a template may write its marks."""
    return value is None or (value in ("", [], {}) and key not in THOUGHTS)


def _joined_parts(content: Any, where: str) -> str:
    """The text of content given as [{type: text, text: ...}]."""
    if not isinstance(content, list | tuple):
        raise BadRow(f"has a {type(content).__name__} in {where}, where text is expected")
    for part in content:
        kind = part.get("type") or "text" if isinstance(part, dict) else type(part).__name__
        others = [key for key, value in part.items() if not says_nothing(value)] if isinstance(part, dict) else []
        others = [key for key in others if key not in ("type", "text", "cache_control")]
        if kind not in _TEXT_PARTS or others:
            wrong = f"content of type {kind}" if kind not in _TEXT_PARTS else f"content with {', '.join(others)}"
            raise BadRow(f"has {wrong} in {where}; only parts {{type: text, text: ...}} are read")
    return "".join(text(part.get("text"), where) for part in content)


def _calls(value: Any, name: str) -> list[Any]:
    """A turn's calls, which may come as JSON text."""
    calls = json_text(value, f"{name}.tool_calls")
    if not isinstance(calls, list):
        raise BadRow(f"has tool_calls in {name} that are not a list of objects")
    return calls


def _call(call: Any, name: str) -> dict[str, Any]:
    """A tool call as {function: {name, arguments}, ...}, the arguments an object however they were written."""
    if not isinstance(call, dict):
        raise BadRow(f"has tool_calls in {name} that are not a list of objects")
    function = call.get("function")
    if function is None:
        function = {key: call[key] for key in ("name", "arguments") if key in call}
        call = {key: inner for key, inner in call.items() if key not in function}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"has a call in {name}.tool_calls without a name; it is {{function: {{name, arguments}}}}")
    given = function.get("arguments")
    arguments = {} if given in (None, "") else json_text(given, f"the arguments of {function['name']} in {name}")
    if not isinstance(arguments, dict):
        raise BadRow(f"has {shown(given)} as the arguments of {function['name']} in {name}; they are an object")
    return {"type": "function"} | call | {"function": {**function, "arguments": arguments}}


def _of_speaker(value: dict[str, Any], name: str) -> dict[str, Any]:
    """ShareGPT's turn {from, value} as {role, content}; the value of a function_call is JSON, {name, arguments}."""
    speaker = value["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise BadRow(f"has the unknown speaker {shown(speaker)} in {name}; known are {', '.join(_SPEAKERS)}")
    said = [key for key in ("value", "content") if value.get(key) is not None]
    if len(said) > 1:
        raise BadRow(f"has a turn with both value and content in {name}; one of them says the words")
    content = value[said[0]] if said else None
    rest = {key: inner for key, inner in value.items() if key not in ("from", "role", "value", "content")}
    if speaker != "function_call":
        return {"role": _SPEAKERS[speaker], "content": content, **rest}
    calls = json_text(content, f"a function_call in {name}, which is {{name, arguments}}")
    return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


# --- several turns


_HAS_SPEAKERS = re.compile(r"""["'](role|from)["']\s*:""")
_BEGINS_AS_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROUND = re.compile(r"\n?<extra_id_[01]>(System|User|Assistant)\n")


def turns(value: Any, name: str, role: str) -> list[Message]:
    """A conversation: a list of turns, one turn alone, the text of either, or words, which are one turn of `role`."""
    if isinstance(value, str):
        messages = messages_written_out(value, name)
        if messages is None:
            return spoken(text(value, f"{name} ({role} turn)"), name, role)
        value = messages
    if isinstance(value, dict):
        value = _of_lists(value) or [value]
    if value is None:
        raise BadRow(f"has null in {name}, where text is expected")
    if not isinstance(value, list | tuple):
        raise BadRow(f"has a {name} that is neither text nor a list of messages")
    return [turn(entry, name) for entry in several(value, name)]


def _of_lists(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of {role: [...], content: [...]}, as `datasets` writes sequences of objects; none for one turn."""
    columns = {key: inner for key, inner in value.items() if inner is not None}
    speakers = columns.get("role", columns.get("from"))
    if not isinstance(speakers, list | tuple):
        return []
    if any(not isinstance(inner, list | tuple) or len(inner) != len(speakers) for inner in columns.values()):
        raise BadRow(f"has lists of different lengths in {', '.join(columns)}, which together are turns")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def messages_written_out(value: str, name: str) -> list[Any] | None:
    """The messages that a text is, as JSON or as Python writes them; None for a text that is none. Raises BadRow for
    one that was cut or printed on the way."""
    if value[:32].lstrip()[:1] not in ("[", "{") or not _HAS_SPEAKERS.search(value):
        return None
    content = written_out(value)
    entries = [content] if isinstance(content, dict) else content
    if isinstance(entries, list) and all(map(_is_turn, entries)) and any(map(_is_known, entries)):
        return entries
    if content is None and _BEGINS_AS_MESSAGES.match(value) and not _begins_with_json(value):
        raise BadRow(f"has messages as text in {name} that is neither JSON nor Python: {shown(value)}")
    return None


def _is_turn(entry: Any) -> bool:
    keys = entry.keys() if isinstance(entry, dict) else set[str]()
    return keys >= {"role", "content"} or keys >= {"role", "tool_calls"} or keys >= {"from", "value"}


def _is_known(entry: dict[str, Any]) -> bool:
    speaker = entry.get("role", entry.get("from"))
    return isinstance(speaker, str) and (_role(speaker) in ROLES or speaker in _SPEAKERS)


def _begins_with_json(value: str) -> bool:
    """Whether a text is about JSON: a whole value, and words behind it."""
    try:
        json.JSONDecoder().raw_decode(value.lstrip())
    except (ValueError, RecursionError):
        return False
    return True


def spoken(words: str, name: str, role: str) -> list[Message]:
    """What one text says: a turn of `role`, or as many as markers open in it, of hh-rlhf ("\\n\\nHuman:") or, in
    prompts, of HelpSteer ("<extra_id_1>User")."""
    if "<extra_id_1>" in words and role == "user":
        return _rounds(words, name)
    if words.startswith(_HUMAN) or (words.startswith("Human:") and words.rstrip().endswith(_ASSISTANT)):
        return answerable(dialogue("\n\n" + words.lstrip()))
    return [Message(role=role, content=words)]


def _rounds(words: str, name: str) -> list[Message]:
    """HelpSteer's rounds: what stands before the first marker is the user's."""
    first, *rest = _ROUND.split(words)
    messages = [Message(role="user", content=first)] if first.strip() else []
    messages += [
        Message(role=speaker.lower(), content=said) for speaker, said in zip(rest[::2], rest[1::2], strict=True)
    ]
    if any("<extra_id_" in message["content"] for message in messages):
        raise BadRow(f"has markers <extra_id_...> in {name} that open no line of System, User or Assistant")
    return answerable(messages)


def dialogue(transcript: str) -> list[Message]:
    """Turns of an hh dialogue. A turn marker inside a turn's first line cannot be told from a real one."""
    messages: list[Message] = []
    for part in transcript.split(_HUMAN)[1:]:
        human, *assistants = part.split(_ASSISTANT)
        messages.append(Message(role="user", content=human.strip()))
        messages += [Message(role="assistant", content=assistant.strip()) for assistant in assistants]
    return messages


def answerable(messages: list[Message]) -> list[Message]:
    """Without the marker at the end that opens the answer."""
    opened = messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip()
    messages = messages[:-1] if opened else messages
    if not messages:
        raise BadRow("has an empty prompt")
    return messages


def answered(value: Any, name: str) -> list[Message]:
    """A conversation, or its end, whose last turn is the assistant's; a text is that turn."""
    conversation = turns(value, name, "assistant")
    if conversation[-1]["role"] != "assistant":
        raise BadRow(
            f"has a {name} that ends with a turn of {conversation[-1]['role']}; it must end with the assistant"
        )
    return conversation


def response(turns: Sequence[Message], name: str) -> Response:
    """What an assistant answers: its words where they are all, else the turns as they are."""
    if not turns or turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
        wrong = "nothing" if not turns else next(t["role"] for t in (turns[0], turns[-1]) if t["role"] != "assistant")
        raise BadRow(f"has a {name} that begins or ends with {wrong}; it must begin and end with the assistant")
    if len(turns) == 1 and turns[0].keys() == {"role", "content"}:
        return turns[0]["content"]
    return tuple(turns)


# --- what turns must be together


_FOLLOWS = {  # which turns may come after which ("" is the beginning), and how to mend it
    "system": (("",), "it must be the first, and the only one"),
    "user": (("", "system", "assistant"), "join what one speaker says into one turn"),
    "assistant": (("user", "tool"), "it must answer a user or a tool's result"),
    "tool": (("assistant", "tool"), "it must follow the assistant's call"),
}
_CALL_IN_WORDS = re.compile(r"<\|?/?(tool|function)_calls?")  # of data whose calls are written into the text


def in_order(messages: Sequence[Message], name: str) -> None:
    """Refuse turns out of order: a system turn first or nowhere, then user and assistant in turns, tools' results
    behind the calls that they answer."""
    before, caller = "", Message(role="", content="")
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        after, remedy = _FOLLOWS[role]
        if before not in after:
            where = f"after a turn of {before}" if before else "at the beginning"
            raise BadRow(f"has roles out of order in {name}: turn {number} is {role} {where}; {remedy}")
        if role == "tool":
            _check_answers(message, caller, f"{name}: turn {number}")
        caller = message if role == "assistant" else caller
        before = role


def _check_answers(result: Message, caller: Message, where: str) -> None:
    """Refuse a tool's result whose call is not in the turn that it answers; without ids, in their order."""
    calls = caller.get("tool_calls")
    if not calls:
        if _CALL_IN_WORDS.search(caller["content"]):
            return
        raise BadRow(f"has a tool's result without its call in {where}; the assistant's tool_calls must hold it")
    ids = [str(call["id"]) for call in calls if call.get("id") is not None]
    given = result.get("tool_call_id")
    if given is not None and len(ids) == len(calls) and str(given) not in ids:
        raise BadRow(
            f"has a tool's result without its call in {where} answers {shown(given)}, while the calls before it are "
            f"{', '.join(ids)}"
        )


def group(
    prompt: Sequence[Message],
    responses: Sequence[Response],
    origin: str,
    *,
    names: Sequence[str] = (),
    pairs: tuple[tuple[int, int], ...] = (),
    rewards: Sequence[float] | None = None,
    labels: tuple[bool, ...] | None = None,
    tools: tuple[dict[str, Any], ...] | None = None,
    template_options: dict[str, Any] | None = None,
) -> PromptGroup:
    """A group whose prompt ends with a turn that the assistant answers and whose responses are not empty."""
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        ending = f"ends with a turn of {prompt[-1]['role']}" if prompt else "is empty"
        raise BadRow(f"has a prompt that {ending}; it must end with a user turn")
    if prompt[-1]["role"] == "user" and not prompt[-1]["content"].strip():
        raise BadRow("has an empty prompt")
    in_order(prompt, "prompt")
    for index, response in enumerate(responses):
        _check_response(prompt, response, names[index] if names else f"response {index + 1}")
    for better, worse in pairs:
        if responses[better] == responses[worse]:
            raise BadRow("has chosen equal to rejected")
    scores = None if rewards is None else tuple(rewards)
    return PromptGroup(
        tuple(prompt), tuple(responses), pairs, scores, origin, labels, tools, template_options=template_options
    )


def _check_response(prompt: Sequence[Message], response: Response, name: str) -> None:
    if isinstance(response, str):
        if not response.strip():
            raise BadRow(f"has an empty {name}")
        return
    in_order([*prompt, *turns_of(response)], f"prompt and {name}")
    for number, message in enumerate(response, start=1):
        says_otherwise = message.keys() - {"role", "content"}  # what it is the template writes, or the row is refused
        if message["role"] == "assistant" and not says_otherwise and not message["content"].strip():
            raise BadRow(f"has an empty {name}: its turn {number} has neither words nor calls")
