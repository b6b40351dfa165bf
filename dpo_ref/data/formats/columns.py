"""Which columns of a row were read, and what is to be said about the others.

A row remembers what a format reads of it. What is left is nothing (null, blank), known to be harmless by its name,
said before (its texts are those that were read), or it is named: refused where the name says that it changes what the
row means, reported once where it does not.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

from dpo_ref.data.formats.checks import BadRow, Row, column, record, says_nothing, several
from dpo_ref.data.formats.conversations import messages_written_out, turns
from dpo_ref.types import PromptGroup, turns_of, words_of

# --- rows that know what was read of them


class ReadRow(dict[str, Any]):
    """A row that remembers which of its columns were read; so do the objects in them, its `parts`."""

    __slots__ = ("parts", "read")

    def __init__(self, content: Row) -> None:
        super().__init__(content)
        self.read: set[str] = set()
        self.parts: dict[str, list[ReadRow]] = {}

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.read.add(name)
        return super().get(name, default)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """The columns that say something and were not read, those of objects as column.key."""
        for name, value in self.items():
            if name not in self.read and not says_nothing(value):
                yield name, value
        for name, entries in self.parts.items():
            for entry in entries:
                yield from ((f"{name}.{key}", value) for key, value in entry.unread())


def peek(row: Row, name: str) -> Any:
    """A column's value, without reading it."""
    return dict.get(row, name)


def part(row: ReadRow, name: str) -> ReadRow:
    """The object in a column."""
    content = ReadRow(record(column(row, name), name))
    row.parts[name] = [content]
    return content


def parts(row: ReadRow, name: str) -> list[ReadRow]:
    """The objects in a column that is a list of them."""
    row.parts[name] = [ReadRow(record(entry, name)) for entry in several(column(row, name), name)]
    return row.parts[name]


# --- what a name says


Kind = Literal["harmless", "about", "unknown", "media", "label", "setting", "words"]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def _words(names: str) -> frozenset[str]:
    return frozenset(map(_singular, names.split()))


_ASPECTS = _words(
    "helpfulness correctness coherence complexity verbosity honesty truthfulness harmlessness following relevance"
)
# A name that ends so is about the row or about a part of it, whatever it begins with: prompt_id, chosen_model.
_POINTERS = _words("id qid uid uuid guid hash md5 sha key index idx name model generator policy engine checkpoint")
_HARMLESS = _POINTERS | _ASPECTS | _words(
    "source dataset origin domain subset category type kind topic lang language locale country version revision "
    "url uri link license licence timestamp time date datetime created updated at utc year length len size count "
    "token char byte meta metadata embedding vector fingerprint"
)  # fmt: skip
_PROVENANCE = _words("source origin topic")  # or, in translation and summaries, what was asked
_COUNTS = _words("num n nb number total len count")  # at the beginning
# About how the row was judged: numbers where a name ends so, words of judges wherever they stand in it.
_MEASURES = _words(
    "score rating reward logprob logp margin probability prob confidence agreement vote upvote downvote elo "
    "perplexity ppl cost price temperature seed status ratio difference weight"
)
_JUDGING = _words(
    "annotator annotation annotated judge judgement judgment critique rationale feedback explanation labelling "
    "labeling labeller labeler labelled labeled"
)
_MEDIA = _words(
    "image img picture pic photo photograph video audio speech voice sound waveform pixel attachment screenshot media "
    "multimodal figure"
)
_LABELS = _words(
    "label preference prefer winner winning loser choice better worse best worst verdict rank ranking wanted "
    "desirable selected correct tie"
)
_SETTINGS = _words("kwargs mask thinking thought reasoning think cot scratchpad")
# Whose words a column holds, by the name under which they are read here.
_SPOKEN = {
    "tools": _words("tool function plugin api"),
    "system": _words("system sys persona"),
    "rejected": _words("rejected reject dispreferred lose losing negative"),
    "chosen": _words("chosen preferred accepted win positive"),
    "responses": _words("response reply answer completion output generation candidate trajectory assistant gpt bot"),
    "prompt": _words(
        "prompt question query instruction input context history message conversation dialogue dialog document doc "
        "passage article post text paragraph snippet evidence knowledge background premise request turn chat story "
        "problem option user human"
    ),
}
_LONG = sorted(
    (word for words in (_MEDIA, _LABELS, *_SPOKEN.values()) for word in words if len(word) > 4), key=len, reverse=True
)


def _split(name: str) -> list[str]:
    """The words of a column's name, without letters and digits that number it at the end."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)
    while len(words) > 1 and (words[-1].isdigit() or len(words[-1]) == 1):
        words.pop()
    return [_joined(_singular(word.lower())) for word in words]


def _joined(word: str) -> str:
    """A word, or the known one that it begins or ends with where two are written together: systemprompt."""
    known = word in _HARMLESS or word in _JUDGING or word in _MEASURES
    return word if known else next((long for long in _LONG if word.startswith(long) or word.endswith(long)), word)


def _has_label(words: list[str]) -> bool:
    """Whether a name is that of a label, or of a label's position; its source and its type are none."""
    last = words[-1]
    if last in _HARMLESS - _POINTERS:
        return False
    points = last in ("index", "idx", "number") and not _SPOKEN["chosen"].isdisjoint(words)
    return words[0] == "is" or points or not _LABELS.isdisjoint(words)


@lru_cache(4096)
def kind_of(name: str) -> Kind:
    """What a column's name says about what it holds; of column.key the key."""
    name = name.rpartition(".")[2]
    words = _split(name)
    if not words:
        return "unknown"
    first, last = words[0], words[-1]
    if not _MEDIA.isdisjoint(words) or (last == "file" and "source" not in words):
        return "media"
    if _has_label(words):
        return "label"
    names_tools = last == "name" and not _SPOKEN["tools"].isdisjoint(words)
    counts = first in _COUNTS and len(words) > 1
    if (last in _HARMLESS and not names_tools) or counts or name == "parallel_tool_calls":
        return "harmless"
    if last in _MEASURES or not _JUDGING.isdisjoint(words):
        return "about"
    if not _SETTINGS.isdisjoint(words):
        return "setting"
    return "unknown" if spoken_as(name) is None else "words"


@lru_cache(4096)
def spoken_as(name: str) -> str | None:
    """Under which of our names the words of a column are read."""
    words = _split(name.rpartition(".")[2])
    return next((ours for ours, known in _SPOKEN.items() if not known.isdisjoint(words)), None)


def could_be_prompt(name: str, value: Any) -> bool:
    """Whether a column that nobody reads may be what was asked."""
    if name.lower() in _PROVENANCE:
        return isinstance(value, str) and " " in value.strip()
    return kind_of(name) in ("words", "unknown") and not _is_number(value) and bool(_content(value, name).texts)


def _is_number(value: Any) -> bool:
    """Whether a value is a number or a text that spells one, as CSV has them."""
    if not isinstance(value, str):
        return isinstance(value, int | float)
    with suppress(ValueError):
        float(value)
        return True
    return False


# --- what is done about columns that were not read


_REPORTED = ("about", "unknown")


def unread_columns(row: ReadRow, group: PromptGroup, known: Collection[str], format: str) -> list[str]:
    """The names to report. Raises BadRow for a column that changes what the row means; `known` are those of the format
    that do not."""
    if row.keys() <= row.read and not row.parts:
        return []
    said = _Said(group)
    names: dict[str, None] = {}
    for name, value in row.unread():
        kind = kind_of(name)
        if kind == "harmless" or name.rpartition(".")[2] in known:
            continue
        if kind == "words" and _was_read(row, value):
            continue
        if kind not in _REPORTED or not isinstance(value, str | int | float):
            content = _content(value, name)
            kind = _kind_of_value(name, value, content)
            if kind == "words" and said.repeats(name, value, content.texts):
                continue
        if kind not in _REPORTED:
            raise BadRow(_refusal(name, kind, row, group, format))
        names[name] = None
    return list(names)


def _was_read(row: ReadRow, value: Any) -> bool:
    """Whether a column that was read holds the same, as messages that are the chosen ones."""
    return not _is_number(value) and any(value == row[other] for other in row.read & row.keys())


def _kind_of_value(name: str, value: Any, content: "_Content") -> Kind:
    """What a column is, seen in its name and value: bytes are media, and words are texts."""
    kind = kind_of(name)
    if content.has_bytes:
        return "media"
    if kind == "media" and value in (0, False):
        return "about"  # has_image: false
    if kind == "words" and (_is_number(value) or not content.texts):
        return "label" if spoken_as(name) in ("chosen", "rejected") else "about"  # chosen: 1
    return kind


def _refusal(name: str, kind: Kind, row: Row, group: PromptGroup, format: str) -> str:
    """Why a row is refused because of a column, and what to do."""
    ignore = f"data.ignore=[{name}] passes over it"
    if kind == "media":
        return f"has {name}, and only text is read; {ignore}"
    ours = "label" if kind == "label" else spoken_as(name) or ""
    fits = ours in ("prompt", "system", "tools") or (ours == "label" and not group.pairs and not group.rewards)
    free = group.prompt and "." not in name and says_nothing(peek(row, ours))
    reads = f"data.columns={{{ours}: {name}}} reads it as {ours}, " if fits and free else ""
    return f"has a column {name} that format {format} does not read; {reads}{ignore}"


class _Said:
    """The texts of a group."""

    def __init__(self, group: PromptGroup) -> None:
        self._group = group
        self._turns = [*group.prompt, *(turn for response in group.responses for turn in turns_of(response))]
        self._prompt = [turn["content"] for turn in group.prompt] or list(map(words_of, group.responses))

    @cached_property
    def _texts(self) -> set[str]:
        """Whole, without the blanks around them."""
        group = self._group
        return set(_content([group.prompt, group.responses, group.tools, group.template_options], "a group").texts)

    def repeats(self, name: str, value: Any, texts: list[str]) -> bool:
        """Whether all that a column says was said: as turns, or as one of the texts, or inside of the prompt. What is
        offered was not said by calling it."""
        if spoken_as(name) == "tools" and _has_schema(value):
            return False
        with suppress(BadRow):
            if all(turn in self._turns for turn in turns(value, name, "user")):
                return True
        whole = spoken_as(name) in ("chosen", "rejected", "responses")
        return all(
            words in self._texts or (not whole and any(words in said for said in self._prompt)) for words in texts
        )


def _has_schema(value: Any) -> bool:
    """Whether a value describes functions."""
    written = json.dumps(value, default=str) if not isinstance(value, str) else value
    return '"parameters"' in written or '"description"' in written


_NOT_SAID = ("role", "from", "type")  # keys whose texts are names of parts


class _Content(NamedTuple):
    texts: list[str]  # without the blanks around them
    has_bytes: bool


def _content(value: Any, name: str) -> _Content:
    """All that is in a value, at any depth; messages may be written out in a text."""
    texts: list[str] = []
    left, has_bytes = [value], False
    while left:
        inner = left.pop()
        if isinstance(inner, str):
            messages = messages_written_out(inner, name)
            left += messages or ()
            texts += [inner.strip()] if messages is None and not says_nothing(inner) else ()
        elif isinstance(inner, dict):
            left += [said for key, said in inner.items() if key not in _NOT_SAID]
        elif isinstance(inner, list | tuple):
            left += inner
        else:
            has_bytes = has_bytes or isinstance(inner, bytes | bytearray | memoryview)
    return _Content(texts, has_bytes)


# --- what data.columns and data.ignore say


class GivenColumns:
    """Rows as data.columns and data.ignore make them, and the names among these that no row has had."""

    def __init__(self, renamed: Mapping[str, str], ignored: Iterable[str]) -> None:
        self.renamed, self.ignored = dict(renamed), set(ignored)
        self.missing = {"data.columns": set(self.renamed.values()), "data.ignore": set(self.ignored)}

    def row(self, content: Row) -> ReadRow:
        """The row with our names, without what is ignored."""
        row = self._without_ignored(content) if self.ignored else content
        return ReadRow(self._renamed(row) if self.renamed else row)

    def _renamed(self, row: Row) -> Row:
        self.missing["data.columns"].difference_update(row)
        theirs = {name: ours for ours, name in self.renamed.items() if name in row}
        for name, ours in theirs.items():
            if ours not in theirs and not says_nothing(row.get(ours)):
                raise BadRow(
                    f"has {ours} beside {name}, which data.columns calls {ours}; data.ignore=[{ours}] passes over it"
                )
        rest = {name: value for name, value in row.items() if name not in theirs and name not in theirs.values()}
        return rest | {ours: row[name] for name, ours in theirs.items()}

    def check_used(self, row: ReadRow, format: str) -> None:
        """Raise ValueError for a column that was given our name in vain."""
        for ours, name in self.renamed.items():
            if ours not in row.read and not says_nothing(peek(row, ours)):
                raise ValueError(
                    f"data.columns={{{ours}: {name}}} has no effect: format {format} reads no {ours} beside "
                    f"{', '.join(sorted(row.read & row.keys()))}"
                )

    def _without_ignored(self, row: Row) -> Row:
        missing = self.missing["data.ignore"]
        missing.difference_update(row)
        kept = {
            name: value if name == "tools" else self._without_keys(value, name)
            for name, value in row.items()
            if name not in self.ignored
        }
        for path in [name for name in self.ignored if "." in name]:
            name, _, key = path.partition(".")
            without, dropped = _without_key(kept.get(name), key)
            if dropped:
                kept[name] = without
                missing.discard(path)
        return kept

    def _without_keys(self, value: Any, name: str) -> Any:
        """A column's value without the ignored keys of the turns in it."""
        if isinstance(value, str):
            messages = messages_written_out(value, name)
            return value if messages is None else self._without_keys(messages, name)
        if isinstance(value, list | tuple):
            return [self._without_keys(inner, name) for inner in value]
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("role", value.get("from")), str):
            return {key: self._without_keys(inner, name) for key, inner in value.items()}
        self.missing["data.ignore"].difference_update(value)
        return {key: inner for key, inner in value.items() if key not in self.ignored}


def _without_key(value: Any, key: str) -> tuple[Any, bool]:
    """An object, or a list of them, without a key, and whether one had it."""
    if isinstance(value, list | tuple):
        without = [_without_key(entry, key) for entry in value]
        return [entry for entry, _ in without], any(dropped for _, dropped in without)
    if not isinstance(value, dict) or key not in value:
        return value, False
    return {name: inner for name, inner in value.items() if name != key}, True
