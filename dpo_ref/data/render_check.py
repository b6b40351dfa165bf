"""Nothing that was said is lost on its way through a chat template.

A template is a program that may pass over what it does not know: calls, thoughts, tools, a role, a key of its author's
own. Two things are looked at. Does the template write such a key at all: the conversation is written once more with a
sentinel in its place, once for each role, key, and position before or behind the user's last turn. And does the text
have the words of this row: a template may cut what it finds in them.
"""

import json
import secrets
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dpo_ref.data.thoughts import thinks
from dpo_ref.types import THOUGHTS, Message, PromptGroup

# Drawn anew in each process, so that no row is made to hold it; short, as a template may cut what it finds; the same
# in JSON and as Python writes texts.
SENTINEL = f"q{''.join(secrets.choice(string.ascii_letters + string.digits) for _ in range(4))}D"
# What links a tool's result to its call, which templates say by position.
_LINKS = {"tool": {"tool_call_id", "name"}}
_PLAIN = {"role", "content"}

Write = Callable[[Sequence[Message], "Offer"], str]  # the template's text of turns


class TemplateRefuses(ValueError):
    """A conversation that a chat template cannot write; the message says why. `cause` is the reason as rows share
    it."""

    def __init__(self, message: str, cause: str = "the chat template cannot write it") -> None:
        super().__init__(message)
        self.cause = cause


class Lost(TemplateRefuses):
    """Something said that the template leaves out."""

    def __init__(self, what: str, key: str, remedy: str = "") -> None:
        hint = "" if key in ("content", "role") else f", or data.ignore=[{key}] to do without"
        super().__init__(
            f"would lose words: the chat template leaves out {what}; {remedy}choose a template that writes it{hint}",
            f"the chat template leaves out {key}",
        )


class Offer(NamedTuple):
    """What goes into a template beside the turns."""

    tools: Any = None
    options: Any = None


class RenderCheck:
    """Looks for what was said in the texts of one template."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._written: set[tuple[Any, ...]] = set()  # kinds of turns and keys that are

    def check_words(self, refuse: Callable[[Any, Any], None], group: PromptGroup) -> None:
        """Raise what `refuse` raises of a prompt and its responses, which a template may have written already."""
        refuse(group.prompt, group.responses)

    def check(self, text: str, turns: Sequence[Message], first: int, offer: Offer) -> None:
        """Raise Lost unless `text` says all that the turns from `first` on say.

        `turns` is a whole conversation, of which `text` is the part from that turn on; with its beginning come the
        tools.
        """
        place, called, options = 0, 0, json.dumps(offer.options, sort_keys=True) if offer.options else ""
        for number, turn in enumerate(turns[first:], first):
            words, role, begin = turn["content"].strip(), turn["role"], place
            if role == "system":
                begin = 0  # some templates write it behind other turns
            at = text.find(words, begin)
            if role == "tool":  # some templates write results before the words beside their call
                begin = called
                at = _first_of(text, words, begin)
            elif role == "assistant":
                called = place
            if at < 0 and not has_words(text[begin:], words):
                thought = _EARLIER if thinks(turn) and not _is_behind(turns, number) else ""
                raise Lost(f"part of what turn {number + 1} says ({role}: {_short(words)})", "content", thought)
            keys = frozenset(turn) if len(turn) > len(_PLAIN) else None
            kind = (role, keys, number == len(turns) - 1, options)
            if words and kind not in self._written:
                self._probe(turns, number, "content", offer, options)
                self._written.add(kind)
            if role == "tool":
                self._check_role(turns, number, offer)
            if len(turn) > len(_PLAIN):
                self._check_keys(text[begin:], turns, number, offer, options)
            if at >= 0 and role != "system":
                place = at + len(words)
        if offer.tools and not first:
            self._check_tools(text, turns, offer, options)

    def _check_tools(self, text: str, turns: Sequence[Message], offer: Offer, options: str) -> None:
        kind = ("tools", len(offer.tools), options)
        if kind not in self._written:
            probe = offer._replace(tools=list(map(_nameless, offer.tools)))
            if not self._says(turns, len(offer.tools), probe):
                raise Lost(f"tools ({_short(_named(offer.tools[0]))})", "tools")
            self._written.add(kind)
        for tool in offer.tools:
            if json.dumps(tool, ensure_ascii=False) not in text:
                missing = [words for words in _described(tool.get("function", tool)) if not _has_value(text, words)]
                if missing:
                    raise Lost(f"tools: of {_named(tool)} it does not write {_short(missing[0])}", "tools")

    def _check_keys(self, text: str, turns: Sequence[Message], number: int, offer: Offer, options: str) -> None:
        turn = turns[number]
        for key in _own_keys(turn):
            if key in THOUGHTS and not str(turn[key]).strip():  # pyright: ignore
                continue  # an empty thought says nothing: a template may write its marks, or not
            self._probe(turns, number, key, offer, options)
            if not _says_key(text, turn, key):
                raise Lost(f"part of {key} of turn {number + 1} ({turn['role']}: {_short(turn[key])})", key)

    def _probe(self, turns: Sequence[Message], number: int, key: str, offer: Offer, options: str) -> None:
        """Raise Lost if the template does not write a key of turns like this."""
        turn, behind = turns[number], _is_behind(turns, number)
        count = len(turn.get(key, ())) if key == "tool_calls" else 1
        kind = (turn["role"], key, count, behind, number == len(turns) - 1, frozenset(turn), options)
        if kind in self._written:
            return
        probe: Any = [dict(turn) for turn in turns]
        probe[number][key] = _sentinel(key, turn[key])
        if not self._says(probe, count, offer):
            where = "" if behind else " before the user's last"
            thought = _EARLIER if key in THOUGHTS and not behind else ""
            raise Lost(f"{key} of a turn of {turn['role']}{where} ({_short(turn[key])})", key, thought)
        self._written.add(kind)

    def _check_role(self, turns: Sequence[Message], number: int, offer: Offer) -> None:
        """Raise Lost if a tool's result is written as what the assistant or the user says."""
        kind = ("tool", "role", number == len(turns) - 1)
        if kind in self._written:
            return
        own = self._write(turns[: number + 1], offer)
        for role in ("assistant", "user"):
            other = Message(role=role, content=turns[number]["content"])
            if self._as_others(turns[:number], other, offer) == own:
                raise Lost(f"the role of turn {number + 1} and writes a tool's result as the {role}'s words", "role")
        self._written.add(kind)

    def _as_others(self, before: Sequence[Message], turn: Message, offer: Offer) -> str:
        try:
            return self._write([*before, turn], offer)
        except TemplateRefuses:
            return ""

    def _says(self, probe: Sequence[Message], count: int, offer: Offer) -> bool:
        """Whether the sentinel comes out so often."""
        try:
            return self._write(probe, offer).count(SENTINEL) >= count
        except TemplateRefuses:
            return True  # the template stumbles over the sentinel, not over the row: then the words have to be there


_EARLIER = "data.earlier_thoughts=drop leaves out all thoughts before the prompt's last question, or "


def _is_behind(turns: Sequence[Message], number: int) -> bool:
    """Whether no question follows the turn."""
    return not any(turn["role"] == "user" for turn in turns[number + 1 :])


def _sentinel(key: str, value: Any) -> Any:
    if key != "tool_calls":
        return SENTINEL
    return [call | {"function": call["function"] | {"arguments": {"key": SENTINEL}}} for call in value]


def says(text: str, turn: Message) -> bool:
    """Whether the text says all that a turn says."""
    return has_words(text, turn["content"]) and all(_says_key(text, turn, key) for key in _own_keys(turn))


def _own_keys(turn: Message) -> set[str]:
    """Keys beside its words that say something."""
    return set(turn) - _PLAIN - _LINKS.get(turn["role"], set())


def _says_key(text: str, turn: Message, key: str) -> bool:
    """Of calls the functions' names and arguments must come out, not their ids."""
    said: Any = turn[key]  # pyright: ignore
    if key == "tool_calls":
        said = [[call["function"]["name"], call["function"]["arguments"]] for call in said]
    return all(_has_value(text, value) for value in _leaves(said))


def _nameless(tool: Any) -> Any:
    """The tool with the sentinel for its name."""
    if isinstance(tool.get("function"), dict):
        return tool | {"function": tool["function"] | {"name": SENTINEL}}
    return tool | {"name": SENTINEL}


def _named(tool: Any) -> str:
    function = tool.get("function", tool)
    return str(function.get("name") if isinstance(function, dict) else function)


def _described(schema: Any) -> Iterator[Any]:
    """What a schema says in words of its own: names, descriptions, choices, defaults; formats write the rest of it in
    their ways."""
    if isinstance(schema, list):
        for entry in schema:
            yield from _described(entry)
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in ("name", "description") and isinstance(value, str):
            yield value
        elif key in ("enum", "default"):
            yield from _leaves(value)
        elif key == "properties" and isinstance(value, dict):
            yield from value
            yield from _described(list(value.values()))
        else:
            yield from _described(value)


def _leaves(value: Any) -> Iterator[Any]:
    """Keys and values of a nested value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _has_value(text: str, value: Any) -> bool:
    """Whether a text, a number, true, false or null is written, as JSON or as Python has it."""
    if isinstance(value, str):
        return has_words(text, value)
    return json.dumps(value) in text or str(value) in text


def _forms(words: str) -> Iterator[str]:
    """Words as they are, as JSON has them, and as Python writes them."""
    yield words
    yield json.dumps(words, ensure_ascii=False)[1:-1]
    yield json.dumps(words)[1:-1]
    yield repr(words)[1:-1]


def _first_of(text: str, words: str, begin: int) -> int:
    """Where a tool's result is written first, as it is or as JSON has it: a later turn may quote it."""
    return min((at for form in _forms(words) if (at := text.find(form, begin)) >= 0), default=-1)


def has_words(text: str, words: str) -> bool:
    """Whether words are written: as they are, as JSON has them, or with other blanks between them."""
    words = words.strip()
    if any(form in text for form in _forms(words)):
        return True
    return "".join(words.split()) in "".join(text.split())


def _short(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(shown if len(shown) <= 60 else f"{shown[:57]}...")
