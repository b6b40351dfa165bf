"""What a value of a row must be, checked one by one; what it is not raises BadRow with the column's name."""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any
from warnings import catch_warnings, simplefilter

Row = dict[str, Any]

MAX_CHARS = 2**20  # of one text; a longer one is a mistake in the file
_DEEPEST = 64  # lists and objects inside each other
_SHOWN = 8  # column names in a message


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
    value = row[name]
    if value is None:
        raise BadRow(f"has null in {name}")
    return value


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
    truth = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(str(value).lower())
    if truth is None:
        raise BadRow(f"has {shown(value)} in {name}, where true or false (1 or 0) is expected")
    return truth


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
    if not value.isascii():
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
    except (TypeError, ValueError, OverflowError):
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


# --- values in values


def says_nothing(value: Any) -> bool:
    """Whether a value is as good as absent: null, blank or empty, also all that is inside of it."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, dict):
        return all(map(says_nothing, value.values()))
    if isinstance(value, list | tuple):
        return all(map(says_nothing, value))
    return value is None


def json_value(value: Any, name: str, depth: int = 0) -> Any:
    """A nested value as JSON has it, whose texts can be encoded."""
    if depth > _DEEPEST:
        raise BadRow(f"has more than {_DEEPEST} lists and objects inside each other in {name}")
    if isinstance(value, dict):
        return {text(key, name): json_value(inner, name, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner, name, depth + 1) for inner in value]
    if isinstance(value, str):
        return text(value, name)
    if value is not None and not isinstance(value, bool | int | float):
        raise BadRow(f"has a {type(value).__name__} in {name}, which JSON cannot hold")
    return value


# --- values written out as text


class UnusableKey(Exception):
    """An object in a text has a key twice, of which Python would keep the last; or one that no message could name."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def bad_row(self, place: str = "") -> BadRow:
        return BadRow(f"has {self.what}{place}{self.remedy}")


_HALF_PAIR = re.compile("[\ud800-\udfff]")


def _refuse_unusable(keys: Sequence[Any]) -> None:
    if len(set(keys)) != len(keys):
        raise UnusableKey(f"the key {shown(most_frequent(keys))} twice in one object", "; remove one of them")
    half = next((key for key in keys if isinstance(key, str) and _HALF_PAIR.search(key)), None)
    if half is not None:
        raise UnusableKey(f"half a surrogate pair in the key {shown(half)}", ": the file was cut or mis-decoded")


def most_frequent(names: Iterable[Any]) -> Any:
    """The first of the names that are there most often."""
    return Counter(names).most_common(1)[0][0]


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """An object of JSON. Every one comes by here: what can be unusable is found out by lengths and by one flag."""
    content = dict(pairs)
    if len(content) != len(pairs) or not "".join(content).isascii():
        _refuse_unusable([key for key, _ in pairs])
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(object_pairs_hook=_object)  # raises UnusableKey
_STRICTER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def json_text(value: Any, name: str) -> Any:
    """A nested value that may come as JSON text, decoded."""
    if isinstance(value, str):
        try:
            value = _STRICTER.decode(value)
        except UnusableKey as error:
            raise error.bad_row(f" in {name}") from error
        except (ValueError, RecursionError) as error:
            raise BadRow(f"has text that is not JSON in {name}: {shown(value)}") from error
    return json_value(value, name)


def written_out(value: str) -> Any:
    """The list or object that a text is, as JSON or as Python writes it; None for any other text. Texts that are too
    long for a row anyway are not looked at. Raises BadRow for turns with a key that is there twice, or is none."""
    if len(value) > MAX_CHARS or value.lstrip()[:1] not in ("[", "{"):
        return None
    content = _decoded(value)
    if _are_turns(content):  # other texts may be about such keys
        _refuse_unusable_in(value)
    return content


_NO_PYTHON = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)


def _decoded(value: str) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(value)
    with suppress(*_NO_PYTHON), catch_warnings():
        simplefilter("ignore")  # about escapes in the text
        return ast.literal_eval(value.strip())
    return None


def _are_turns(content: Any) -> bool:
    entries = [content] if isinstance(content, dict) else content
    return isinstance(entries, list) and all(
        isinstance(entry, dict) and not entry.keys().isdisjoint(("role", "from")) for entry in entries
    )


def _refuse_unusable_in(value: str) -> None:
    """Raise BadRow for a key in the text of a conversation, of JSON or of Python."""
    try:
        with suppress(ValueError):
            STRICT.decode(value)
            return
        _refuse_unusable_in_python(value)
    except UnusableKey as error:
        raise error.bad_row(" in a conversation that is written as text") from error


def _refuse_unusable_in_python(value: str) -> None:
    with catch_warnings():
        simplefilter("ignore")
        nodes = ast.walk(ast.parse(value.strip(), mode="eval"))
    for node in nodes:
        if isinstance(node, ast.Dict):
            _refuse_unusable([key.value for key in node.keys if isinstance(key, ast.Constant)])
