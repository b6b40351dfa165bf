"""Which columns of a row were read, and what is to be said about the others.

A row remembers what a format reads of it. What is left is nothing (null, blank), known to be harmless by its name,
said before (its texts are those that were read, where such words belong), or it is named: refused where the name says
that it changes what the row means, reported once where it does not.
"""

import json
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

from dpo_ref.data.formats.checks import BadRow, Row, column, record, says_nothing, several, written_out
from dpo_ref.data.formats.conversations import messages_written_out, turns
from dpo_ref.data.formats.names import (
    CONVERSATIONS,
    ONCE,
    TRUTH,
    TURNED,
    Content,
    Kind,
    content_of,
    disapproves,
    is_missing,
    is_number,
    is_spoken_at_length,
    kind_of,
    spoken_as,
    verdict_of,
    words_of_name,
)
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
            if name not in self.read and not _says_nothing_in(name, value):
                yield name, value
        for name, entries in self.parts.items():
            for entry in entries:
                yield from ((f"{name}.{key}", value) for key, value in entry.unread())


def peek(row: Row, name: str) -> Any:
    """A column's value, without reading it."""
    return dict.get(row, name)


def part(row: ReadRow, name: str) -> ReadRow:
    """The object in a column, which may come as JSON text."""
    value = column(row, name)
    content = ReadRow(record((written_out(value) or value) if isinstance(value, str) else value, name))
    row.parts[name] = [content]
    return content


def parts(row: ReadRow, name: str) -> list[ReadRow]:
    """The objects in a column that is a list of them."""
    row.parts[name] = [ReadRow(record(entry, name)) for entry in several(column(row, name), name)]
    return row.parts[name]


def _says_nothing_in(name: str, value: Any) -> bool:
    """Whether a column says nothing; a label "None" may say that no response is better."""
    says_none = isinstance(value, str) and value.strip().lower() in ("null", "none") and kind_of(name) == "label"
    return is_missing(value) and not says_none


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
        if kind == "words" and _was_read(row, name, value):
            continue
        if kind not in _REPORTED or not isinstance(value, str | int | float):
            content = content_of(value, name)
            kind = _kind_of_value(name, value, content)
            if kind == "words" and said.repeats(name, value, content.texts):
                continue
        if kind in _REPORTED and _is_label(name, value, group):
            kind = "label"
        if kind not in _REPORTED:
            raise BadRow(_refusal(name, kind, row, group, format))
        names[name] = None
    return list(names)


def _was_read(row: ReadRow, name: str, value: Any) -> bool:
    """Whether a column that was read holds the same: one of the same kind, as a context that is the answer says more;
    messages may be the chosen ones."""
    if is_number(value):
        return False
    ours = spoken_as(name)
    any_kind = ours == "responses" or (ours == "prompt" and not isinstance(value, str))
    return any(value == row[other] for other in row.read & row.keys() if any_kind or spoken_as(other) == ours)


def _is_label(name: str, value: Any, group: PromptGroup) -> bool:
    """Whether a column says if a demonstration is good, and its label does not say the same."""
    if group.pairs or group.rewards:
        return False
    good = verdict_of(name, value)
    return good is not None and (group.labels is None or good != group.labels[0])


def _kind_of_value(name: str, value: Any, content: "Content") -> Kind:
    """What a column is, seen in its name and value: bytes are media, and words are texts."""
    kind = kind_of(name)
    if content.has_bytes:
        return "media"
    if kind == "media" and value in (0, False):
        return "about"  # has_image: false
    if kind == "words" and (is_number(value) or not content.texts):
        return "label" if spoken_as(name) in ("chosen", "rejected") else "about"  # chosen: 1
    if kind == "words" and is_spoken_at_length(name) and not any(" " in words for words in content.texts):
        return "about"  # role: user
    if kind == "label" and words_of_name(name)[-1] in TURNED and TRUTH.get(str(value).lower()) is False:
        return "about"  # swapped: false
    return kind


def _refusal(name: str, kind: Kind, row: Row, group: PromptGroup, format: str) -> str:
    """Why a row is refused because of a column, and what to do."""
    ignore = f"data.ignore=[{name}] passes over it"
    if kind == "media":
        return f"has {name}, and only text is read; {ignore}"
    ours = "label" if kind == "label" else spoken_as(name) or ""
    fits = ours in ("prompt", "system", "tools") or (ours == "label" and not group.pairs and not group.rewards)
    if ours == "label":
        fits = fits and str(peek(row, name)).lower() in TRUTH.keys() - {"yes", "no"} and not disapproves(name)
    free = group.prompt and "." not in name and says_nothing(peek(row, ours))
    reads = f"data.columns={{{ours}: {name}}} reads it as {ours}, " if fits and free else ""
    return f"has a column {name} that format {format} does not read; {reads}{ignore}"


class _Said:
    """The texts of a group."""

    def __init__(self, group: PromptGroup) -> None:
        self._group = group
        self._turns = [*group.prompt, *(turn for response in group.responses for turn in turns_of(response))]

    @cached_property
    def _texts(self) -> set[str]:
        """Whole, without the blanks around them."""
        group = self._group
        return set(content_of([group.prompt, group.responses, group.tools, group.template_options], "a group").texts)

    def repeats(self, name: str, value: Any, texts: list[str]) -> bool:
        """Whether all that a column says was said where it belongs: as turns, or as whole texts; what is asked also
        inside of the prompt. What is offered was not said by calling it."""
        ours = spoken_as(name)
        if ours == "tools" and _has_schema(value):
            return False
        if ours in ("chosen", "rejected") and ONCE.isdisjoint(words_of_name(name)):
            return self._is_of_side(ours, name, value, texts)
        with suppress(BadRow):
            if all(turn in self._turns for turn in turns(value, name, "system" if ours == "system" else "user")):
                return True
        if ours not in ("system", "prompt"):
            return self._texts.issuperset(texts)
        answers_too = not isinstance(value, str) and not CONVERSATIONS.isdisjoint(words_of_name(name))
        return all(self._asks(words, ours) or (answers_too and words in self._texts) for words in texts)

    def _is_of_side(self, side: str, name: str, value: Any, texts: list[str]) -> bool:
        """Whether a column holds the better response, or a worse one, and nothing else but the prompt."""
        group = self._group
        responses = [group.responses[index] for index in _of_side(group, side)]
        allowed = [*group.prompt, *(turn for response in responses for turn in turns_of(response))]
        with suppress(BadRow):
            if all(turn in allowed for turn in turns(value, name, "assistant")):
                return True
        return set(content_of([group.prompt, responses], "a side").texts).issuperset(texts)

    def _asks(self, words: str, ours: str) -> bool:
        """Whether the prompt says this: as a turn, or in one, where it is long enough to be no accident."""
        group = self._group
        if any(turn["content"].strip() == words for turn in group.prompt if ours == "prompt" or turn["role"] == ours):
            return True
        said = [turn["content"] for turn in group.prompt] or list(map(words_of, group.responses))
        return any(
            words in turn
            and (len(words.encode()) >= _LONG_ENOUGH or (ours == "prompt" and 2 * len(words) >= len(turn)))
            and _has_whole(turn, words)
            for turn in said
        )


_LONG_ENOUGH = 12  # bytes, so that scripts whose signs are words need fewer of them


def _has_whole(said: str, words: str) -> bool:
    """Whether a text has these words, and not the end of one word or the beginning of another."""
    place = said.find(words)
    while place >= 0:
        around = (
            said[max(place - 1, 0) : place] + words[0],
            words[-1] + said[place + len(words) : place + len(words) + 1],
        )
        if not any(map(_goes_on, around)):
            return True
        place = said.find(words, place + 1)
    return False


def _goes_on(signs: str) -> bool:
    """Whether two signs beside each other are of one word, in scripts that divide words by blanks."""
    return len(signs) == 2 and all(s.isalnum() and unicodedata.east_asian_width(s) not in "WF" for s in signs)


def _of_side(group: PromptGroup, side: str) -> set[int]:
    """Which responses are better, or worse; of a demonstration all are better."""
    if group.pairs:
        return {pair[0] if side == "chosen" else pair[1] for pair in group.pairs}
    scores = group.rewards or [float(label) for label in group.labels or [True]]
    best = max(scores) if group.rewards else 1.0
    return {index for index, score in enumerate(scores) if (score == best) == (side == "chosen")}


def _has_schema(value: Any) -> bool:
    """Whether a value describes functions."""
    written = json.dumps(value, default=str) if not isinstance(value, str) else value
    return '"parameters"' in written or '"description"' in written


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
