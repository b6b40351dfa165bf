"""Formats of rows, by name; what a row looks like decides which it is unless it is named.

Log-probs of responses may come with a row. They never make it bad: what is missing or no number is NaN, and only
`reference=columns` looks at it.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dpo_ref.data.formats import published, standard
from dpo_ref.data.formats.checks import BadRow, Row, columns_of
from dpo_ref.types import PromptGroup

# --- log-probs that came with a row: the columns by which they are known, and how they are read


Columns = tuple[str, ...]  # a name for each response, or one name alone: of a list with a value for each

PAIRS: tuple[Columns, ...] = (
    ("chosen_logprob", "rejected_logprob"),  # yale-nlp/RefDPO
    ("ref_chosen_logps", "ref_rejected_logps"),  # TRL
    ("reference_chosen_logps", "reference_rejected_logps"),  # TRL, as it was before
)
LISTS: tuple[Columns, ...] = (("logprobs",),)


def named_logps(row: Row, columns: Columns, num_responses: int) -> tuple[float, ...]:
    """What these columns say, in nats, a value for each response."""
    values = row.get(columns[0]) if len(columns) == 1 else [row.get(name) for name in columns]
    if not isinstance(values, list | tuple) or len(values) != num_responses:
        return (math.nan,) * num_responses
    return tuple(map(_value, values))


def known_logps(row: Row, layouts: Sequence[Columns], num_responses: int) -> tuple[float, ...] | None:
    """What the first of the well-known columns say that the row has; None where it has none of them.

    A row with two sets of them gives NaN: which is meant has to be said (`data.logps_columns`).
    """
    present = [columns for columns in layouts if any(row.get(name) is not None for name in columns)]
    if not present:
        return None
    return named_logps(row, present[0], num_responses) if len(present) == 1 else (math.nan,) * num_responses


def _value(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


# --- the formats


class Format(NamedTuple):
    """A layout of rows: the columns by which it is known, and how a row becomes a group.

    `rows_of_one_prompt`: consecutive rows with the same prompt are one group. `logps`: columns that may bring
    log-probs of the responses, none where the format has no place for them.
    """

    name: str
    columns: frozenset[str]
    convert: Callable[..., PromptGroup]
    rows_of_one_prompt: bool = False
    logps: tuple[Columns, ...] = ()

    @property
    def options(self) -> set[str]:
        """What else can be said about reading it: the keyword-only parameters of `convert`."""
        parameters = inspect.signature(self.convert).parameters.values()
        return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _format(name: str, columns: str, convert: Callable[..., PromptGroup], **more: Any) -> Format:
    return Format(name, frozenset(columns.split()), convert, **more)


# The first whose columns a row has is taken: the more particular come first.
FORMATS = {
    format.name: format
    for format in (
        _format("shp", "history human_ref_A human_ref_B labels", published.shp),
        _format("stack_exchange", "question answers", published.stack_exchange),
        _format("tldr", "info summaries choice", published.tldr),
        _format("ultrafeedback", "instruction completions", published.ultrafeedback),
        _format("helpsteer3", "context response1 response2 overall_preference", published.helpsteer3),
        _format("helpsteer", "prompt response helpfulness", published.helpsteer, rows_of_one_prompt=True),
        _format("annotated", "output_1 output_2", published.annotated),
        _format("hh", "chosen rejected", published.hh, logps=PAIRS),
        _format("preference", "chosen rejected", standard.preference, logps=PAIRS),
        _format("ranked", "prompt responses", published.ranked, logps=LISTS),
        _format("unpaired", "prompt completion label", standard.unpaired),
        _format("completion", "prompt completion", standard.completion),
        _format("messages", "messages", standard.messages),
        _format("instruction", "instruction output", standard.instruction),
        _format("text", "text", standard.plain_text),
    )
}


def matching_format(row: Row) -> Format | None:
    """The format whose columns the row has."""
    for format in FORMATS.values():
        if format.columns <= row.keys() and (format.name != "hh" or _is_dialogue(row)):
            return format
    return None


def _is_dialogue(row: Row) -> bool:
    sides = (row["chosen"], row["rejected"])
    return row.get("prompt") is None and all(isinstance(s, str) and s.startswith("\n\nHuman:") for s in sides)


def format_of(name: str, row: Row) -> Format:
    """The format called `name`, or what `auto` makes of the row. Raises BadRow for columns that fit none."""
    if name != "auto":
        return FORMATS[name]
    format = matching_format(row)
    if format is None:
        nearest = max(FORMATS.values(), key=lambda f: (len(f.columns & row.keys()) / len(f.columns), f.name != "hh"))
        raise BadRow(
            f"fits no known format; its columns are {columns_of(row)}. The nearest is data.format={nearest.name}, "
            f"which needs {', '.join(sorted(nearest.columns))}"
        )
    return format


def convert(row: Row, origin: str, expected: Format, options: dict[str, Any], is_named: bool) -> PromptGroup:
    """The row as a group. Raises BadRow; for a row of another format than the rows before (unless `named`) it says
    which."""
    format = matching_format(row)
    lacks_columns = not expected.columns <= row.keys()
    if format is not None and format is not expected and (lacks_columns or not is_named):
        raise BadRow(f"looks like format {format.name}, while the rows before are {expected.name}")
    try:
        return expected.convert(row, origin, **options)
    except BadRow as error:
        if lacks_columns:
            expects = ", ".join(sorted(expected.columns))
            raise BadRow(f"{error}; data.format={expected.name} expects {expects}") from error
        raise


def check_format(name: str) -> None:
    """Raise ValueError for a name that is no format."""
    if name != "auto" and name not in FORMATS:
        matches = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {matches[0]}?" if matches else f"known: auto, {', '.join(FORMATS)}"
        raise ValueError(f"data.format={name} is not a format; {hint}")
