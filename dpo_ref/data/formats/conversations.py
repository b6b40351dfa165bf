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


_ARGUMENTS = (
    "arguments",
    "args",
    "parameters",
    "input",
)  # OpenAI's, LangChain's, Llama's and Anthropic's name of them
_OF_CALL = {"id", "type", "index", "function"}
_OF_FUNCTION = {"name", "description", "strict", *_ARGUMENTS}


def _call(call: Any, name: str) -> dict[str, Any]:
    """A tool call as {function: {name, arguments}, ...}, the arguments an object however they were written."""
    if not isinstance(call, dict):
        raise BadRow(f"has tool_calls in {name} that are not a list of objects")
    function = {} if call.get("function") is None else call["function"]
    if isinstance(function, str):  # {function: name, arguments}
        function = {"name": function}
    if not isinstance(function, dict):
        raise BadRow(f"has {shown(function)} as a call's function in {name}; it is {{name, arguments}}")
    beside = {key: inner for key, inner in call.items() if key not in _OF_CALL and not says_nothing(inner)}
    twice = next((key for key in beside if function.get(key) not in (None, beside[key])), None)
    function = {**function, **beside}
    unknown = [key for key, inner in function.items() if key not in _OF_FUNCTION and not says_nothing(inner)]
    if unknown or twice:
        what = f"{', '.join(unknown)}, which is not read" if unknown else f"two {twice}, beside function and in it"
        raise BadRow(f"has a call in {name}.tool_calls with {what}; it is {{id, function: {{name, arguments}}}}")
    if not isinstance(function.get("name"), str):
        raise BadRow(f"has a call in {name}.tool_calls without a name; it is {{function: {{name, arguments}}}}")
    rest = {key: inner for key, inner in function.items() if key not in _ARGUMENTS}
    kept = {key: inner for key, inner in call.items() if key in _OF_CALL and inner != "tool_use"}  # Anthropic's type
    return {"type": "function"} | kept | {"function": {**rest, "arguments": _arguments(function, name)}}


def _arguments(function: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments of a call, an object; none are an empty one."""
    given = [function[key] for key in _ARGUMENTS if function.get(key) not in (None, "")]
    if len(given) > 1:
        raise BadRow(f"has the arguments of {function['name']} in {name} under two names: {', '.join(function)}")
    arguments = json_text(given[0], f"the arguments of {function['name']} in {name}") if given else {}
    if not isinstance(arguments, dict):
        raise BadRow(f"has {shown(given[0])} as the arguments of {function['name']} in {name}; they are an object")
    return arguments


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
_PRINTED = re.compile(
    r"""\s*(array\(|\()\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:"""
)  # by numpy, or a tuple
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_CRLF = re.compile(r"\r\n\r\n(?=Human:|Assistant:)")
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
    if not value.lstrip().startswith(("[", "{", "(", "array(")) or not _HAS_SPEAKERS.search(value):
        return None
    if _PRINTED.match(value):
        raise BadRow(f"has messages as text in {name} that is neither JSON nor Python: {shown(value)}")
    content = written_out(value)
    entries = [content] if isinstance(content, dict) else content
    if isinstance(entries, list) and any(_is_turn(entry) and _is_known(entry) for entry in entries):
        return entries
    if content is None and _BEGINS_AS_MESSAGES.match(value) and not _begins_with_json(value):
        raise BadRow(f"has messages as text in {name} that is neither JSON nor Python: {shown(value)}")
    return None


def _is_turn(entry: Any) -> bool:
    keys = entry.keys() if isinstance(entry, dict) else set[str]()
    says = {"content", "tool_calls", "value", "text", "function_call", *THOUGHTS}
    return bool(keys & {"role", "from"} and keys & says)


def _is_known(entry: dict[str, Any]) -> bool:
    speaker = entry.get("role", entry.get("from"))
    return isinstance(speaker, str) and (_role(speaker.lower()) in ROLES or speaker.lower() in _SPEAKERS)


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
    if is_dialogue(words):
        return answerable(dialogue(words))
    if words.lstrip().startswith(_ASSISTANT.strip()) and role == "assistant":
        raise BadRow(f"has the marker {_ASSISTANT.strip()!r} at the beginning of {name}; give the words alone")
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


def is_dialogue(words: str) -> bool:
    """Whether a text is a dialogue of hh-rlhf, whatever blanks or line breaks it has before its first marker."""
    begins = words.lstrip().startswith(_HUMAN.strip())
    return words.startswith(_HUMAN) or (begins and _ASSISTANT in _CRLF.sub("\n\n", words))


def dialogue(transcript: str) -> list[Message]:
    """Turns of an hh dialogue. A turn marker inside a turn's first line cannot be told from a real one."""
    messages: list[Message] = []
    text = "\n\n" + _CRLF.sub("\n\n", transcript.lstrip())
    for part in text.split(_HUMAN)[1:]:
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
    results: list[Message] = []
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        after, remedy = _FOLLOWS[role]
        if before not in after:
            where = f"after a turn of {before}" if before else "at the beginning"
            raise BadRow(f"has roles out of order in {name}: turn {number} is {role} {where}; {remedy}")
        if role == "tool":
            results.append(message)
        elif results:
            _check_answers(results, caller, f"{name}: turn {number - 1}")
            results = []
        caller = message if role == "assistant" else caller
        before = role
    if results:
        _check_answers(results, caller, f"{name}: turn {len(messages)}")


def _check_answers(results: Sequence[Message], caller: Message, where: str) -> None:
    """Refuse results of tools that are not one for each call, in the calls' order: templates tell by that which is
    which."""
    calls = caller.get("tool_calls")
    if not calls:
        if _CALL_IN_WORDS.search(caller["content"]):
            return
        raise BadRow(f"has a tool's result without its call in {where}; the assistant's tool_calls must hold it")
    _check_links([call.get("id") for call in calls], [result.get("tool_call_id") for result in results], where)
    _check_links([call["function"]["name"] for call in calls], [result.get("name") for result in results], where)
    is_of_all = len(results) == 1 and results[0].get("tool_call_id") is None  # one text for several calls
    if len(results) != len(calls) and not is_of_all:
        raise BadRow(
            f"has {len(results)} results for {len(calls)} calls in {where}; each call has one, in the same order"
        )


def _check_links(said: Sequence[Any], given: Sequence[Any], where: str) -> None:
    """Refuse results that name other calls than those that stand in their places; as far as both are named."""
    if None in said or None in given:
        return
    calls, results = list(map(str, said)), list(map(str, given))
    unknown = next((result for result in results if result not in calls), None)
    if unknown is not None:
        raise BadRow(
            f"has a tool's result without its call in {where} answers {shown(unknown)}, while the calls before it are "
            f"{', '.join(calls)}"
        )
    if results != calls[: len(results)]:
        raise BadRow(
            f"has results in {where} that answer {', '.join(results)}, while the calls are {', '.join(calls)}; each "
            "call has one result, in the same order"
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
