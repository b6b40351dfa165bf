"""Chat templates: a tokenizer's own, or one of these by name, and what they write for a conversation."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jinja2 import TemplateError

from dpo_ref.data.bounded import OverLimit, bounded
from dpo_ref.data.continuation import ThoughtMissing, written_behind
from dpo_ref.data.render_check import SENTINEL, Offer, RenderCheck, TemplateRefuses
from dpo_ref.data.templated import Marks
from dpo_ref.data.thoughts import begun_thought
from dpo_ref.types import Message, Response, conversation, digest

FOLDER = Path(__file__).with_name("templates")
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))
_SPECIAL = re.compile(r"<\|[a-z_]+\|>")
_ANSWERS = ("⟦b⟧", "⟦c⟧")  # stand for any words: nothing that a template writes itself
TIMES, MORE = 10, 2**18  # a conversation's characters may be written so often, and so many characters more
OWN = frozenset((FOLDER / f"{name}.jinja").read_text().strip("\n") for name in NAMES)
_ASKED = Message(role="user", content="a")
_CALL = {"id": "callabcde", "type": "function", "function": {"name": "f", "arguments": {}}}
_CALLED = (_ASKED, Message(role="assistant", content="", tool_calls=[_CALL]))
_BEFORE = {  # what comes before a turn of a role
    "system": (_ASKED,),
    "tool": _CALLED,
}
# Options by which templates begin with a thought or not; no keys of turns.
_THINKS = re.compile(r"""(?<![\w.'"])(?:enable_thinking|thinking)(?![\w'"])""")
_APART: list[bool] = []  # holds something in the process where strangers' templates run
_FIRST: dict[tuple[str, str], tuple[str, list[str], str]] = {}  # what templates wrote of the first conversations
_CALLS: dict[tuple[str, str, str], str] = {}  # and what they write of an assistant's call
_PINNED = re.compile(r"(?:\{%- set \w+ = .*? -%\})*", re.DOTALL)  # options of a run, at the template's beginning
Item = TypeVar("Item")


def install_template(tokenizer: Any, name: str, options: Mapping[str, Any] | None = None, key: str = "model") -> None:
    """Give the tokenizer the chat template `name`; `auto` keeps its own.

    `options` (such as `enable_thinking`) become part of the template's text, and so of everything that is saved with
    it. Raises ValueError for a name that is none, for `auto` where the tokenizer has no template, for a template whose
    special tokens the tokenizer does not know, and for an option that the template does not look at.
    """
    _install(tokenizer, name, key)
    for option, value in (options or {}).items():
        if not re.search(rf"\b{re.escape(option)}\b", template_text(tokenizer)):
            raise ValueError(f"{key}.template_options.{option} has no effect: the chat template does not look at it")
        pin = f"{{%- set {option} = {json.dumps(value)} -%}}"
        own = tokenizer.chat_template
        tokenizer.chat_template = (
            {name: pin + text for name, text in own.items()} if isinstance(own, dict) else pin + own
        )


def template_text(tokenizer: Any) -> str:
    """A tokenizer's chat template, or all of several, of which transformers takes one for rows with tools."""
    own = tokenizer.chat_template
    return "\n".join(own.values()) if isinstance(own, dict) else str(own)


def _text_of(name: str) -> str:
    """One of our templates."""
    return (FOLDER / f"{name}.jinja").read_text().strip("\n")


def _install(tokenizer: Any, name: str, key: str) -> None:
    if name == "auto":
        if not tokenizer.chat_template:
            where = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
            raise ValueError(f"{where}: no chat template; choose one with {key}.template={'|'.join(NAMES)}")
        return
    if name not in NAMES:
        raise ValueError(f"{key}.template={name} is none of auto, {', '.join(NAMES)}")
    text = _text_of(name)
    ends_turns = "eos_token" not in text
    missing = (None, tokenizer.unk_token_id)
    unknown = [t for t in dict.fromkeys(_SPECIAL.findall(text)) if tokenizer.convert_tokens_to_ids(t) in missing]
    if ends_turns and unknown:
        raise ValueError(
            f"{key}.template={name} needs the special tokens {', '.join(unknown)}, which this tokenizer lacks; "
            "zephyr, tulu, alpaca and plain end turns with EOS and suit any tokenizer"
        )
    tokenizer.chat_template = text


def written_date(tokenizer: Any) -> str:
    """What a template that writes the date writes today; nothing for others."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return ""
    chat = ChatText(tokenizer)
    return chat.write([[Message(role="user", content="a")]], start=True)[0]


def date_note(tokenizer: Any) -> list[str]:
    """What to know of a template that writes the date, in a line."""
    if not written_date(tokenizer):
        return []
    pin = "date_string" in template_text(tokenizer)
    remedy = "model.template_options.date_string pins it" if pin else "another template does not"
    return [f"  the chat template writes today's date: a run of another day has other prompts; {remedy}"]


def template_notes(tokenizer: Any) -> list[str]:
    """What to know of a chat template before anything is trained with it, in a line each."""
    chat, notes = ChatText(tokenizer), []
    if chat.leaves_out_bos:
        notes.append("  the chat template writes no BOS, which the tokenizer adds by itself; see model.template")
    if header := chat.scored_header:
        marks = set(_SPECIAL.findall(header))
        alike = [name for name in NAMES if marks and marks <= set(_SPECIAL.findall(_text_of(name)))]
        notes.append(
            f"  warning: the chat template ignores add_generation_prompt, so {header!r} is scored as part of every "
            f"response, and answers begin with it; model.template={alike[0] if alike else '|'.join(NAMES)} writes it "
            "before them"
        )
    return notes + date_note(tokenizer)


def text_identity(tokenizer: Any) -> str:
    """Digest of everything that turns a conversation into token ids."""
    return digest([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.all_special_tokens])


class Rendered(NamedTuple):
    """What a template writes: the prompt up to where the assistant begins, and for each response everything that is
    scored, from there through the token that ends the turn."""

    start: str
    bodies: list[str]


def _check_size(text: str, turns: Sequence[Message], tools: Any) -> None:
    """Raise TemplateRefuses for a text out of all proportion to its conversation."""
    if len(text) <= MORE:
        return
    most = MORE + TIMES * len(json.dumps([tools, *turns], ensure_ascii=False))
    if len(text) > most:
        raise TemplateRefuses(
            f"cannot be written by the chat template: it makes {len(text):,} characters, and at most {most:,} of "
            "such a conversation are taken"
        )


def _with_arguments(turn: Message, arguments: Any) -> Any:
    """The turn with these arguments in all its calls."""
    if "tool_calls" not in turn:
        return turn
    calls = [call | {"function": call["function"] | {"arguments": arguments}} for call in turn["tool_calls"]]
    return turn | {"tool_calls": calls}


def _with_arguments_as_text(turn: Message) -> Any:
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": text}})
    return turn | {"tool_calls": calls}


class ChatText:
    """How one tokenizer writes conversations. Raises ValueError for a tokenizer without EOS or chat template, and for
    a template that does not end the assistant's turn with a token of its own. `check` looks whether all that is said
    comes out."""

    def __init__(self, tokenizer: Any, check: type[RenderCheck] = RenderCheck) -> None:
        where = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{where}: no EOS token, so responses could not end; set eos_token in tokenizer_config.json"
            )
        install_template(tokenizer, "auto")
        self.tokenizer = tokenizer
        texts = sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
        self.added_tokens = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        specials += [token for token in tokenizer.all_special_tokens if token not in specials]
        self.special_tokens = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))))
        self._calls_as_text: bool | None = None  # None: no call was written so far
        self.lost = check(self._as_generated)
        try:
            self.ending, self.tail, self.end_id = self._turn_end()
        except TemplateRefuses as error:
            raise ValueError(f"{where}: a question and its answer {error}") from error

    @property
    def leaves_out_bos(self) -> bool:
        """Whether the tokenizer begins texts with BOS by itself, and the template does not."""
        bos = self.tokenizer.bos_token_id
        adds_it = bos is not None and self.tokenizer("a").input_ids[:1] == [bos]
        (start,) = self.write([[Message(role="user", content="a")]], start=True)
        return adds_it and self.tokenizer.bos_token not in start

    @property
    def scored_header(self) -> str:
        """What a template that ignores `add_generation_prompt` leaves to the response besides its words: the header of
        the assistant's turn; nothing for a template that writes it."""
        question = [Message(role="user", content="a")]
        (without,) = self.write([question], start=False)
        start, rests, _ = self._first_texts()
        written = rests[0].partition(_ANSWERS[0])[0]
        return written.removeprefix(start).strip() if start == without and written.startswith(start) else ""

    def apart(self, write: Callable[[Item], Any], items: Sequence[Item]) -> Iterator[Any]:
        """`write`, which may use the template, of every item, where that neither takes for ever nor fills the memory.
        What comes back may have become lists, as in JSON. Raises TemplateRefuses in place of an item's text."""
        if self._is_safe:
            yield from map(write, items)
            return

        def written(item: Item) -> Any:
            _APART[:] = [True]
            return write(item)

        try:
            yield from bounded(written, items, TemplateRefuses)
        except OverLimit as error:
            raise TemplateRefuses(f"cannot be written by the chat template: {error}") from None

    @property
    def _is_safe(self) -> bool:
        """Whether the template is one of ours, or runs apart already."""
        return bool(_APART) or str(self.tokenizer.chat_template) in OWN

    def write(
        self, conversations: Sequence[Sequence[Message]], *, start: bool, tools: Any = None, options: Any = None
    ) -> list[str]:
        """The template's text of every conversation; with `start` it goes on to where the assistant begins."""
        if self._is_safe:
            return self._texts(conversations, start, tools, options)
        return list(self.apart(lambda turns: self._texts([turns], start, tools, options)[0], conversations))

    def _texts(
        self, conversations: Sequence[Sequence[Message]], start: bool, tools: Any, options: Any = None
    ) -> list[str]:
        if not conversations:
            return []
        conversations = [self._with_calls(turns, start, tools, options) for turns in conversations]
        texts = self._applied(conversations, start, tools, options)
        for text, turns in zip(texts, conversations, strict=True):
            _check_size(text, turns, tools)
        return texts

    def _applied(self, conversations: Sequence[Any], start: bool, tools: Any, options: Any = None) -> list[str]:
        try:
            return self.tokenizer.apply_chat_template(
                list(map(list, conversations)),
                tokenize=False, add_generation_prompt=start, tools=list(tools) if tools else None, **options or {},
            )  # fmt: skip
        except TemplateError as error:
            raise TemplateRefuses(
                f"cannot be written by the chat template: {error.message}; fold such turns into others, or choose "
                "another template",
                f"the chat template refuses: {error.message}",
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # whatever a program may raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise TemplateRefuses(f"cannot be written by the chat template: {reason}") from error

    # Templates take the arguments of a call as an object or as JSON text; transformers leaves that open.

    def _with_calls(self, turns: Sequence[Message], start: bool, tools: Any, options: Any) -> Sequence[Message]:
        """The turns, the arguments of their calls as this template takes them."""
        if not any("tool_calls" in turn for turn in turns):
            return turns
        if self._calls_as_text is None:
            self._calls_as_text = self._takes_text(turns, start, tools, options)
        if not self._calls_as_text:
            return turns
        return [_with_arguments_as_text(turn) for turn in turns]

    def _takes_text(self, turns: Sequence[Message], start: bool, tools: Any, options: Any) -> bool | None:
        """Whether the arguments of these turns come out as JSON if they go in as text; None if they never do."""
        as_text = json.dumps({"key": SENTINEL}, ensure_ascii=False)
        written = self._attempt([_with_arguments(turn, {"key": SENTINEL}) for turn in turns], start, tools, options)
        if SENTINEL in written and f"'{SENTINEL}'" not in written:
            return False
        written = self._attempt([_with_arguments(turn, as_text) for turn in turns], start, tools, options)
        return True if f'"{SENTINEL}"' in written else None

    def _attempt(self, turns: Sequence[Any], start: bool, tools: Any, options: Any) -> str:
        try:
            return self._applied([turns], start, tools, options)[0]
        except TemplateRefuses:
            return ""

    def check_options(self, options: Mapping[str, Any] | None) -> None:
        """Refuse a row's template options that the template does not look at, or that are the run's."""
        if not options:
            return
        reserved = inspect.signature(self.tokenizer.apply_chat_template).parameters
        text = template_text(self.tokenizer)
        pinned = set(re.findall(r"\{%- set (\w+) = ", _PINNED.match(text)[0]))  # pyright: ignore
        for name in options:
            if name in reserved or name == "messages" or not re.search(rf"\b{re.escape(name)}\b", text):
                raise TemplateRefuses(
                    f"has chat_template_kwargs.{name}, which the chat template does not look at; "
                    "data.ignore=[chat_template_kwargs] does without"
                )
            if name in pinned:
                raise TemplateRefuses(
                    f"has chat_template_kwargs.{name}, and model.template_options sets it for all rows; give one"
                )

    def render(
        self, prompt: Sequence[Message], responses: Sequence[Response], tools: Any = None, options: Any = None
    ) -> Rendered:
        """One prompt and its responses. Raises TemplateRefuses where the response has no definite beginning or end, or
        something that is said does not come out."""
        if not prompt:  # plain text: what begins it is BOS, or EOS where there is none
            begin = self.tokenizer.bos_token or self.tokenizer.eos_token
            return Rendered(begin, [str(response) + self.tokenizer.eos_token for response in responses])
        self.check_options(options)
        (start,) = self.write([prompt], start=True, tools=tools, options=options)
        whole = [conversation(prompt, response) for response in responses]
        fulls = self.write(whole, start=False, tools=tools, options=options)
        bodies = [self.body(start, full, turns[-1]) for full, turns in zip(fulls, whole, strict=True)]
        offer, begun = Offer(tools, options), begun_thought(start)
        self.lost.check(start, prompt, 0, offer)
        for turns, body in zip(whole, bodies, strict=True):
            self.lost.check(begun + body, turns, len(prompt), offer)
        return Rendered(start, bodies)

    @cached_property
    def marks(self) -> Marks:
        """What the template writes around turns."""
        _, _, again = self._first_texts()
        between = again.partition(_ANSWERS[0])[2].rpartition("a")[0]  # an answer and a question more, which is "a"
        header = between if self._ends_by_next else between.removeprefix(self.ending).removeprefix(self.tail)
        own = (self.tokenizer.bos_token or "", self.tokenizer.eos_token)
        return Marks(header, self.closing("user"), self.ending, *own)

    def body(self, start: str, full: str, turn: Message) -> str:
        """What the assistant writes of its turn, the last of the answered conversation `full`: from `start`, where
        generation begins, through the token that ends the turn. Calls may end with another one than words."""
        if self._ends_by_next:
            full += self._mark_behind_calls if "tool_calls" in turn else self.ending
        written = written_behind(start, full, turn, self._thinks_otherwise).removesuffix(self.tail)
        if written.endswith(self.ending):
            return written
        ends = list(self.special_tokens.finditer(written)) if "tool_calls" in turn else []
        usual = self.tokenizer.convert_ids_to_tokens(self.end_id)
        if not ends or written[ends[-1].end() :].strip() or usual in [end.group() for end in ends[:-1]]:
            raise TemplateRefuses(
                f"cannot be written by the chat template: its turn does not end with {self.ending!r} but "
                f"with {written[-40:]!r}"
            )
        return written[: ends[-1].end()]

    def last_turns(
        self, conversations: Sequence[Sequence[Message]], tools: Any = None, options: Any = None
    ) -> list[tuple[str, str]]:
        """Of each conversation what generation sees before its last turn, the assistant's, and what the assistant
        writes of that."""
        starts = self.write([turns[:-1] for turns in conversations], start=True, tools=tools, options=options)
        fulls = self.write(conversations, start=False, tools=tools, options=options)
        texts = zip(starts, fulls, conversations, strict=True)
        return [(start, self.body(start, full, turns[-1])) for start, full, turns in texts]

    @cached_property
    def _mark_behind_calls(self) -> str:
        """The special token with which a template that ends no turn begins a tool's."""
        result = Message(role="tool", content="a", tool_call_id=_CALL["id"])
        full, more = self.write([_CALLED, [*_CALLED, result]], start=False)
        match = self.added_tokens.match(more, len(full)) if more.startswith(full) else None
        return match.group() if match else self.ending

    @property
    def _thinks_otherwise(self) -> str:
        """How to get a prompt that fits a response with, or without, a thought."""
        switch = _THINKS.search(template_text(self.tokenizer))
        option = (
            f"model.template_options.{switch[0]} or a row's chat_template_kwargs switch that, or " if switch else ""
        )
        return f"; {option}choose another template (model.template=...)"

    def _as_generated(self, turns: Sequence[Message], offer: Offer) -> str:
        """The template's text; of an answered conversation what the assistant writes behind where it begins."""
        (full,) = self._texts([turns], False, *offer)
        is_as_it_is = not self._begins_otherwise and not offer.options  # which may change where generation begins
        if is_as_it_is or turns[-1]["role"] != "assistant":
            return full
        (start,) = self._texts([turns[:-1]], True, *offer)
        return start + written_behind(start, full, turns[-1], "")

    @cached_property
    def end_ids(self) -> set[int]:
        """Tokens that may end the assistant's turn: what ends words, and what ends calls."""
        last = list(self.special_tokens.finditer(self._written_call()))[-1:]
        return {self.end_id, *(self.tokenizer.convert_tokens_to_ids(match.group()) for match in last)}

    def _written_call(self) -> str:
        """What the assistant writes of a call; nothing under a template without calls."""
        key = (*self._template, self.special_tokens.pattern)
        if key not in _CALLS:
            try:
                ((_, _CALLS[key]),) = self.last_turns([_CALLED])
            except TemplateRefuses:
                _CALLS[key] = ""
        return _CALLS[key]

    @cache  # noqa: B019 (one for a tokenizer, as long as it)
    def closing(self, role: str) -> str:
        """What the template writes between the words of a prompt's last turn and where the assistant begins."""
        (text,) = self.write([[*_BEFORE.get(role, ()), Message(role=role, content=_ANSWERS[0])]], start=True)
        return text.partition(_ANSWERS[0])[2]

    def _turn_end(self) -> tuple[str, str, int]:
        """What the template writes after an assistant's words: through the token that ends the turn, what follows it,
        and that token's id. Where it writes none, the turn ends with the token by which the user's next begins."""
        start, rests, again = self._first_texts()
        self._begins_otherwise = not all(rest.startswith(start) for rest in rests)
        for rest, answer in zip(rests, _ANSWERS, strict=True):
            with suppress(ThoughtMissing):  # a template that wants one
                written_behind(start, rest, Message(role="assistant", content=answer), "")
        if not all(answer in rest for rest, answer in zip(rests, _ANSWERS, strict=True)):
            raise ValueError("the chat template does not write an answer that is a text; it may want content in parts")
        after = [rest.partition(answer)[2] for rest, answer in zip(rests, _ANSWERS, strict=True)]
        marks = list(self.added_tokens.finditer(after[0]))
        # Several may close what was said, the last of them the turn; another may end the conversation alone.
        kept = [mark for mark in marks if _ANSWERS[0] + after[0][: mark.end()] in again]
        usual = [mark for mark in kept if mark.group() == self.tokenizer.eos_token]
        match = next(iter(usual or kept[-1:] or marks), None)
        self._ends_by_next = match is None
        if match is None:
            after = [again.partition(_ANSWERS[0])[2]] * 2
            match = self.added_tokens.match(after[0])
        if after[0] != after[1] or match is None:
            raise ValueError(
                "the chat template does not end the assistant's turn with a special token; EOS would never be learnt"
            )
        end_id = self.tokenizer.convert_tokens_to_ids(match.group())
        return after[0][: match.end()], "" if self._ends_by_next else after[0][match.end() :], end_id

    @property
    def sample(self) -> list[str]:
        """What the template writes of a question and its answer."""
        return self._first_texts()[1]

    @property
    def _template(self) -> tuple[str, str]:
        """What decides how the template writes."""
        return str(self.tokenizer.chat_template), str(self.tokenizer.special_tokens_map)

    def _first_texts(self) -> tuple[str, list[str], str]:
        """A question up to where the assistant begins, with each of the answers, and with one and a question more."""
        key = self._template
        if key not in _FIRST:
            question = [Message(role="user", content="a")]
            answered: list[Any] = [conversation(question, answer) for answer in _ANSWERS]
            answered.append([*answered[0], *question])
            texts = self.apart(lambda turns: self._texts([turns], turns is question, None)[0], [question, *answered])
            start, *rests, again = texts
            _FIRST[key] = (start, rests, again)
        return _FIRST[key]
