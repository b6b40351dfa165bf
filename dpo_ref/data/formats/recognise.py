"""Formats of rows, by name; what a row looks like decides which it is unless it is named.

Log-probs of responses may come with a row. They never make it bad: what is missing or no number is NaN, and only
`reference=columns` looks at it.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from dpo_ref.data.formats import published, standard
from dpo_ref.data.formats.checks import BadRow, Row, columns_of, written_out
from dpo_ref.data.formats.columns import peek
from dpo_ref.data.formats.conversations import is_dialogue
from dpo_ref.data.formats.names import kind_of, spoken_as
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
    """What the well-known columns say that the row has; None where it has none of them.

    A row with two sets of them that differ gives NaN: which is meant has to be said (`data.logps_columns`).
    """
    beside = (columns for columns in layouts if not row.keys().isdisjoint(columns))
    present = [columns for columns in beside if any(row.get(name) is not None for name in columns)]
    said = {named_logps(row, columns, num_responses) for columns in present}
    if len(said) > 1:
        return (math.nan,) * num_responses
    return next(iter(said), None)


def _value(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


# --- the formats


Layout = tuple[frozenset[str], ...]  # of each set a row has one column


class Format(NamedTuple):
    """A layout of rows: the columns by which it is known, and how a row becomes a group.

    `accepts` looks at values where columns do not decide. `known` are columns, also of objects in them, that are
    published with it and change nothing. `rows_of_one_prompt`: consecutive rows with the same prompt are one group.
    `logps`: columns that may bring log-probs of the responses, none where the format has no place for them.
    """

    name: str
    layouts: tuple[Layout, ...]
    convert: Callable[..., PromptGroup]
    accepts: Callable[[Row], bool]
    known: frozenset[str]
    rows_of_one_prompt: bool
    logps: tuple[Columns, ...]
    needs: str  # the columns of its first layout, for messages

    @property
    def options(self) -> set[str]:
        """What else can be said about reading it: the keyword-only parameters of `convert`."""
        parameters = inspect.signature(self.convert).parameters.values()
        return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}

    @property
    def columns(self) -> frozenset[str]:
        """Those of all its layouts."""
        return frozenset().union(*(any_of for layout in self.layouts for any_of in layout))

    def share(self, columns: Collection[str]) -> float:
        """Of the columns that the nearest of its layouts needs, the share that is there."""
        return max(sum(not any_of.isdisjoint(columns) for any_of in layout) / len(layout) for layout in self.layouts)


def _format(
    name: str,
    layouts: str,
    convert: Callable[..., PromptGroup],
    *,
    accepts: Callable[[Row], bool] = lambda row: True,
    known: str = "",
    rows_of_one_prompt: bool = False,
    logps: tuple[Columns, ...] = (),
) -> Format:
    """`layouts` are divided by commas, a layout's columns by blanks, those of which one is enough by strokes."""
    split = [[column.split("|") for column in layout.split()] for layout in layouts.split(",")]
    needs = ", ".join(sorted(first for first, *_ in split[0]))
    sets = tuple(tuple(map(frozenset, layout)) for layout in split)
    return Format(name, sets, convert, accepts, frozenset(known.split()), rows_of_one_prompt, logps, needs)


def _is_dialogue(row: Row) -> bool:
    sides = (peek(row, "chosen"), peek(row, "rejected"))
    return peek(row, "prompt") is None and all(isinstance(s, str) and is_dialogue(s) for s in sides)


def _answers_are_objects(row: Row) -> bool:
    """Texts are those of `ranked`."""
    answers = peek(row, "answers")
    return not (isinstance(answers, list | tuple) and answers and all(isinstance(each, str) for each in answers))


def _is_request(row: Row) -> bool:
    request = peek(row, "input")
    if not isinstance(request, str):
        return isinstance(request, dict)
    content = written_out(request)
    return isinstance(content, dict) and "messages" in content


_TURNS = "|".join(standard.CONVERSATIONS)
_PROMPT = "|".join(standard.PROMPTS)
_SIDES = ",".join(map(" ".join, standard.SIDES))

# The first whose columns a row has is taken: the more particular come first.
FORMATS = {
    format.name: format
    for format in (
        _format(
            "shp", "history human_ref_A human_ref_B labels", published.shp,
            known="seconds_difference score_ratio upvote_ratio",
        ),
        _format(
            "stack_exchange", "question answers", published.stack_exchange, accepts=_answers_are_objects,
            known="author author_profile selected",
        ),
        _format(
            "tldr", "info summaries choice", published.tldr,
            known="worker batch extra site note policy title",
        ),
        _format(
            "ultrafeedback", "instruction completions", published.ultrafeedback,
            known="models correct_answers incorrect_answers custom_system_prompt principle critique overall_score "
            "fine-grained_score",
        ),
        _format(
            "helpsteer3",
            "context|prompt response1 response2 overall_preference,context|prompt response_1 response_2 "
            "preference_strength",
            published.compared,
            known="individual_preference preference_statement preference_elaboration "
            "three_most_similar_preferences all_preferences_unprocessed",
        ),
        _format("helpsteer", "prompt response helpfulness", published.helpsteer, rows_of_one_prompt=True),
        _format(
            "safe_rlhf", "prompt response_0 response_1 better_response_id", published.safe_rlhf,
            known="safer_response_id better_response_id is_response_0_safe is_response_1_safe "
            "response_0_severity_level response_1_severity_level",
        ),
        _format(
            "annotated", f"output_1 output_2,{_PROMPT} response_a response_b winner", published.annotated,
            known="raw_preference raw_completion annotator time_per_example price_per_example",
        ),
        _format(
            "openai_preference",
            "input preferred_output non_preferred_output,input preferred_completion non_preferred_completion",
            standard.openai_preference, accepts=_is_request, logps=PAIRS,
        ),
        _format("hh", "chosen rejected", published.hh, accepts=_is_dialogue, logps=PAIRS),
        _format("preference", _SIDES, standard.preference, logps=PAIRS),
        _format(
            "rejected_response",
            f"{_TURNS} rejected_response|rejected_messages|rejected,prompt rejected_response|rejected_messages",
            standard.rejected_response, logps=PAIRS,
        ),
        _format("ranked", f"{_PROMPT} responses|trajectories,prompt|question answers", published.ranked, logps=LISTS),
        _format(
            "unpaired",
            f"{_PROMPT} completion label|kto_tag,{_TURNS} label|kto_tag,instruction output label|kto_tag",
            standard.unpaired,
        ),
        _format("completion", f"{_PROMPT} completion", standard.completion),
        _format("messages", _TURNS, standard.messages),
        _format("instruction", "instruction output", standard.instruction, known="text"),
        _format("text", "text", standard.plain_text),
    )
}  # fmt: skip


@lru_cache(1024)
def _formats_with(columns: tuple[str, ...]) -> tuple[Format, ...]:
    return tuple(format for format in FORMATS.values() if format.share(columns) == 1)


def matching_format(row: Row) -> Format | None:
    """The format whose columns the row has, nulls aside."""
    return _accepting(row, tuple([name for name, value in row.items() if value is not None]))


def _accepting(row: Row, columns: Columns) -> Format | None:
    return next((format for format in _formats_with(columns) if format.accepts(row)), None)


def format_of(name: str, row: Row) -> Format:
    """The format called `name`, or what `auto` makes of the row. Raises BadRow for columns that fit none."""
    if name != "auto":
        return FORMATS[name]
    format = matching_format(row)
    if format is None:
        _refuse_null(row)
        nearest = max(FORMATS.values(), key=lambda f: (f.share(row.keys()), f.name == "preference"))
        raise BadRow(
            f"fits no known format; its columns are {columns_of(row)}. The nearest is data.format={nearest.name}, "
            f"which needs {nearest.needs}; {_renaming(row)}"
        )
    return format


def _refuse_null(row: Row) -> None:
    """Say which null it is that keeps a row from a format."""
    format = _accepting(row, tuple(row))
    nulls = [name for name, value in row.items() if format and value is None and name in format.columns]
    if format and nulls:
        raise BadRow(
            f"has null in {', '.join(nulls)}, which format {format.name} needs; fill it, or leave the row out"
        )


def _renaming(row: Row) -> str:
    """How the row's columns could be called, as far as their names say it."""
    answers = [name for name in row if spoken_as(name) == "responses" and kind_of(name) == "words"]
    if len(answers) > 1:
        return (
            f"{' and '.join(answers[:2])} are read as chosen and rejected, or as one list, responses, with another, "
            "scores, beside it: write them so"
        )
    lists = [name for name in answers if isinstance(peek(row, name), list | tuple)]
    theirs = {spoken_as(name): name for name in reversed(row)}
    sides = {"chosen": "chosen", "rejected": "rejected"} if "rejected" in theirs else {"completion": "responses"}
    sides = {"responses": "responses"} if lists else sides
    names = {ours: theirs.get(spoken, "...") for ours, spoken in ({"prompt": "prompt"} | sides).items()}
    renamed = ", ".join(f"{ours}: {name}" for ours, name in names.items() if ours != name)
    return f"data.columns={{{renamed}}} gives columns the names that formats know"


def convert(row: Row, origin: str, expected: Format, options: dict[str, Any], is_named: bool) -> PromptGroup:
    """The row as a group. Raises BadRow; for a row of another format than the rows before (unless `named`) it says
    which."""
    format = matching_format(row)
    if format not in (None, expected) and (not is_named or expected.share(row.keys()) < 1):
        nulls = [name for name, value in row.items() if value is None and name in expected.columns]
        because = f"has null in {', '.join(nulls)}, so it " if nulls else ""
        raise BadRow(f"{because}looks like format {format.name}, while the rows before are {expected.name}")
    try:
        return expected.convert(row, origin, **options)
    except BadRow as error:
        if expected.share(row.keys()) < 1:
            raise BadRow(f"{error}; data.format={expected.name} expects {expected.needs}") from error
        raise


def check_format(name: str) -> None:
    """Raise ValueError for a name that is no format."""
    if name != "auto" and name not in FORMATS:
        matches = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {matches[0]}?" if matches else f"known: auto, {', '.join(FORMATS)}"
        raise ValueError(f"data.format={name} is not a format; {hint}")
