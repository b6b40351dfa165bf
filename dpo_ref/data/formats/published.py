"""Rows of published preference data sets, in the columns they were published with."""

from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any, NamedTuple

from dpo_ref.data.formats.checks import BadRow, Row, column, flag, number, record, several, shown, text
from dpo_ref.data.formats.columns import ReadRow, part, parts, peek
from dpo_ref.data.formats.conversations import answered, dialogue, group, response, turns
from dpo_ref.data.formats.names import (
    could_grade,
    could_grade_turn,
    could_rank,
    is_missing,
    is_number,
    is_rank,
    kind_of,
    spoken_as,
    texts_in,
)
from dpo_ref.data.formats.standard import BESIDE_PROMPT, asked, prompt_of, repeated
from dpo_ref.types import Message, PromptGroup, Response, words_of


def hh(row: Row, origin: str) -> PromptGroup:
    """Anthropic's hh-rlhf: two dialogues as text, turns opened by "\\n\\nHuman:" and "\\n\\nAssistant:", that share
    everything up to their last assistant turn."""
    chosen, rejected = (_answered_dialogue(text(column(row, name), name)) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("has dialogues that differ before their last assistant turn")
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    return asked(row, chosen[:-1], answers, origin, names=("chosen", "rejected"), pairs=((0, 1),))


def _answered_dialogue(transcript: str) -> list[Message]:
    messages = dialogue(transcript)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("has a dialogue that does not end with an assistant turn")
    return messages


def ultrafeedback(row: ReadRow, origin: str, *, rating: str | None = None) -> PromptGroup:
    """openbmb/UltraFeedback: an `instruction` and `completions`, each with a `response` and ratings.

    Scores are the mean of the rated aspects, as in the cleaned and binarized sets; `overall_score` is known to be
    wrong in rows where a 1 became a 10. `rating` names another: an aspect, `overall_score` or `fine-grained_score`.
    """
    completions = parts(row, "completions")
    prompt = turns(column(row, "instruction"), "instruction", "user")
    responses = [text(column(completion, "response"), "response") for completion in completions]
    return asked(row, prompt, responses, origin, rewards=[_rating(completion, rating) for completion in completions])


def _rating(completion: Row, rating: str | None) -> float:
    annotations = record(completion.get("annotations") or {}, "annotations")
    aspects = {name: record(aspect, name) for name, aspect in annotations.items() if aspect is not None}
    if rating in completion:
        return number(completion[rating], rating or "")
    if rating is not None and rating not in aspects:
        raise BadRow(f"has no rating {rating}; a completion has {', '.join((*completion, *aspects))}")
    relevant = aspects.values() if rating is None else [aspects[rating]]
    values = [aspect["Rating"] for aspect in relevant if aspect.get("Rating") not in (None, "N/A")]
    if not values:
        raise BadRow("has a completion without ratings")
    return sum(number(value, "Rating") for value in values) / len(values)


def shp(row: Row, origin: str) -> PromptGroup:
    """stanfordnlp/SHP: `history`, two comments, and how often each was voted up; `labels` 1: A is preferred."""
    prompt = [Message(role="user", content=text(column(row, "history"), "history"))]
    responses = [text(column(row, f"human_ref_{side}"), f"human_ref_{side}") for side in "AB"]
    scores = [number(column(row, f"score_{side}"), f"score_{side}") for side in "AB"]
    order = slice(None) if flag(column(row, "labels"), "labels") else slice(None, None, -1)
    return group(prompt, responses[order], origin, pairs=((0, 1),), rewards=scores[order])


def stack_exchange(row: ReadRow, origin: str) -> PromptGroup:
    """HuggingFaceH4/stack-exchange-preferences: a `question` and its `answers`, scored by votes, all as HTML."""
    answers = parts(row, "answers")
    prompt = [Message(role="user", content=_words(column(row, "question"), "question"))]
    responses = [_words(column(answer, "text"), "answers.text") for answer in answers]
    return group(
        prompt, responses, origin, rewards=[number(column(answer, "pm_score"), "pm_score") for answer in answers]
    )


def _words(html: Any, name: str) -> str:
    from bs4 import BeautifulSoup

    return BeautifulSoup(text(html, name), "html.parser").get_text().strip()


def tldr(row: ReadRow, origin: str) -> PromptGroup:
    """openai/summarize_from_feedback, comparisons: a post in `info`, two `summaries`, and the `choice` of one."""
    info, summaries = part(row, "info"), parts(row, "summaries")
    if len(summaries) != 2:
        raise BadRow(f"has {len(summaries)} summaries, where two are compared")
    if info.get("post"):
        heads = {"SUBREDDIT": "subreddit", "TITLE": "title", "POST": "post"}
        fields = {head: text(info[name], name) for head, name in heads.items() if info.get(name)}
        document = "\n\n".join(f"{head}: {'r/' * (head == 'SUBREDDIT')}{value}" for head, value in fields.items())
    else:
        document = f"ARTICLE: {text(column(info, 'article'), 'article')}"
    prompt = [Message(role="user", content=f"{document}\n\nTL;DR:")]
    responses = [text(column(summary, "text"), "summaries.text").strip() for summary in summaries]
    order = slice(None, None, -1) if flag(column(row, "choice"), "choice") else slice(None)
    return group(prompt, responses[order], origin, pairs=((0, 1),))


def annotated(row: Row, origin: str) -> PromptGroup:
    """AlpacaFarm, AlpacaEval and LLMBar: an instruction, `output_1` and `output_2`, and which is better.

    `preference` runs from 1 (the first) to 2 (the second), 1.5 being a tie, as the weighted annotators write it;
    `label` is 1 or 2. Arenas have `response_a`, `response_b` and the `winner`: model_a, model_b or tie.
    """
    if "output_1" not in row and peek(row, "response_a") is not None:
        return _fought(row, origin)
    name = "preference" if "preference" in row else "label"
    value = number(column(row, name), name)
    if not 1 <= value <= 2:
        raise BadRow(f"has {value:g} in {name}, which runs from 1 (the first is better) to 2")
    responses = [text(column(row, f"output_{side}"), f"output_{side}") for side in (1, 2)]
    return asked(row, prompt_of(row), responses, origin, rewards=[2 - value, value - 1])


_WINNERS = {"model_a": 1.0, "response_a": 1.0, "a": 1.0, "model_b": 2.0, "response_b": 2.0, "b": 2.0}


def _fought(row: Row, origin: str) -> PromptGroup:
    winner = text(column(row, "winner"), "winner").strip().lower()
    value = 1.5 if winner.startswith("tie") else _WINNERS.get(winner)  # tie (bothbad)
    if value is None:
        raise BadRow(f"has {shown(row['winner'])} in winner, where model_a, model_b or tie is expected")
    sides = ("response_a", "response_b")
    responses = [response(answered(column(row, side), side), side) for side in sides]
    return asked(row, prompt_of(row), responses, origin, names=sides, rewards=[2 - value, value - 1])


def helpsteer(row: Row, origin: str, *, rating: str | None = None) -> PromptGroup:
    """nvidia/HelpSteer and HelpSteer2: one response a row with ratings; rows of one prompt follow each other.

    Scores are `helpfulness` unless `rating` names another column.
    """
    name = rating or "helpfulness"
    response = text(column(row, "response"), "response")
    score = number(column(row, name), name)
    return asked(row, prompt_of(row), [response], origin, names=("response",), rewards=[score])


def compared(row: Row, origin: str) -> PromptGroup:
    """nvidia/HelpSteer3 and the preferences of HelpSteer2: a `context` (`prompt`), two responses, and
    `overall_preference` (`preference_strength`) from -3 (the first) to 3."""
    name = "preference_strength" if "preference_strength" in row else "overall_preference"
    preference = number(column(row, name), name)
    if not -3 <= preference <= 3:
        raise BadRow(f"has {preference:g} in {name}, which runs from -3 (the first is better) to 3")
    sides = ("response_1", "response_2") if "response_1" in row else ("response1", "response2")
    responses = [response(answered(column(row, side), side), side) for side in sides]
    asks = "context" if "context" in row else "prompt"
    prompt = turns(column(row, asks), asks, "user")
    return asked(row, prompt, responses, origin, names=sides, rewards=[-preference, preference])


def safe_rlhf(row: Row, origin: str, *, rating: str | None = None) -> PromptGroup:
    """PKU-SafeRLHF: a `prompt`, `response_0` and `response_1`, and `better_response_id` says which is better.

    `rating` names another column that says it, such as `safer_response_id`.
    """
    name = rating or "better_response_id"
    responses = [text(column(row, f"response_{side}"), f"response_{side}") for side in (0, 1)]
    order = slice(None, None, -1) if flag(column(row, name), name) else slice(None)
    names = ("response_0", "response_1")[order]
    return asked(row, prompt_of(row), responses[order], origin, names=names, pairs=((0, 1),))


RESPONSES = ("responses", "trajectories", "answers")
_SAID = ("text", "response", "answer", "completion", "output", "content", "messages", "turns", "trajectory")
_SCORED_BY = ("score", "reward", "rating", "rank")  # in each response, or in lists of their own plural


class _Entries(NamedTuple):
    """The responses of a row, and the objects that they are, or the last turns: empty ones for texts."""

    name: str
    conversations: list[list[Message]]
    objects: list[ReadRow]


def ranked(row: ReadRow, origin: str, *, rating: str | None = None) -> PromptGroup:
    """A prompt and k `responses`, `trajectories` of several turns, or `answers` (berkeley-nest/Nectar), with their
    `scores`, `rewards`, `ratings` or `ranks` (1 is best) in a list or in each of them. `rating` names another list, or
    another key of them. Where nothing else could say which is better, the first of the `responses` is the best."""
    name = next((name for name in RESPONSES if peek(row, name) is not None), RESPONSES[0])
    prompt = prompt_of(row)
    entries = _entries(row, name, rating)
    responses = [response(turns[repeated(prompt, turns, name) :], name) for turns in entries.conversations]
    values = _scores(row, entries) if rating is None else _rated(row, entries, rating)
    values = _order(row, entries, responses) if values is None else values
    if len(values) != len(responses):
        raise BadRow(f"has {len(responses)} {name} and {len(values)} scores or ranks")
    return asked(row, prompt, responses, origin, rewards=values)


def _entries(row: ReadRow, name: str, rating: str | None) -> _Entries:
    entries = several(column(row, name), name)
    if all(isinstance(entry, dict) and entry.keys().isdisjoint(("role", "from")) for entry in entries):
        objects = parts(row, name)
        return _Entries(name, _of_objects(objects, name), objects)
    last = [entry[-1] if isinstance(entry, list) and entry else entry for entry in entries]
    objects = [ReadRow(turn if isinstance(turn, dict) else {}) for turn in last]
    scores = {key for key in (*_SCORED_BY, rating or "") if all(peek(turn, key) is not None for turn in objects)}
    return _Entries(name, [answered(_without(entry, scores), name) for entry in entries], objects)


def _without(entry: Any, keys: Collection[str]) -> Any:
    """A turn, or the last of several, without the keys that score it."""
    if isinstance(entry, list) and entry:
        return [*entry[:-1], _without(entry[-1], keys)]
    return {key: value for key, value in entry.items() if key not in keys} if isinstance(entry, dict) else entry


def _of_objects(entries: list[ReadRow], name: str) -> list[list[Message]]:
    """What each entry of a list says."""
    keys = [next((key for key in _SAID if peek(entry, key) is not None), _SAID[0]) for entry in entries]
    return [answered(column(entry, key), f"{name}.{key}") for entry, key in zip(entries, keys, strict=True)]


# --- what scores ranked responses


Scores = list[float]


def _scores(row: ReadRow, entries: _Entries) -> Scores | None:
    """What the first key that all responses have says, or else the row's first list; None where there is none. Raises
    BadRow where another says that others are better, and for a score that is missing."""
    found: dict[str, Scores] = {}
    for key in _SCORED_BY:
        if all(peek(entry, key) is not None for entry in entries.objects):
            found[f"{entries.name}.{key}"] = _values_in(entries, key)
    for name in (f"{key}s" for key in _SCORED_BY):
        if peek(row, name) is not None and (not found or _holds_numbers(peek(row, name))):
            found[name] = _values_beside(row, name)
    if not found:
        _refuse_missing(row, entries)
        return None
    (first, values), *others = found.items()
    for name, other in others:
        if _disagree(values, other):
            raise BadRow(
                f"has {first} and {name}, which disagree about which of its {entries.name} is better; "
                f"data.ignore=[{name}] passes over the latter"
            )
    return values


def are_scored(row: ReadRow) -> bool:
    """Whether scores were read of a row of ranked responses: the order may be the ranking of some rows, not of one
    among rows that have scores."""
    keys = {*_SCORED_BY, *(f"{key}s" for key in _SCORED_BY)}
    objects = chain.from_iterable(row.parts.values())
    return not keys.isdisjoint(row.read) or any(not keys.isdisjoint(each.read) for each in objects)


def _rated(row: ReadRow, entries: _Entries, rating: str) -> Scores:
    """What the key or list that data.rating names says."""
    if any(peek(entry, rating) is not None for entry in entries.objects):
        return _values_in(entries, rating)
    if peek(row, rating) is not None:
        return _values_beside(row, rating)
    raise BadRow(f"has no rating {rating}, neither a key of its {entries.name} nor a list beside them")


def _values_in(entries: _Entries, key: str) -> Scores:
    where = f"{entries.name}.{key}"
    _refuse_gap([peek(entry, key) for entry in entries.objects], where)
    return [_upwards(key, number(entry[key], where)) for entry in entries.objects]


def _values_beside(row: ReadRow, name: str) -> Scores:
    values = several(row[name], name)
    _refuse_gap(values, name)
    return [_upwards(name, number(value, name)) for value in values]


def _upwards(name: str, value: float) -> float:
    return -value if is_rank(name) else value


def _holds_numbers(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and bool(value)
    return is_list and all(is_number(each) and not isinstance(each, bool) for each in value)


def _disagree(first: Scores, second: Scores) -> bool:
    """Whether two responses are ordered one way by the first scores and the other way by the second."""
    both = list(zip(first, second, strict=False))
    return any((a - c) * (b - d) < 0 for index, (a, b) in enumerate(both) for c, d in both[:index])


def _refuse_gap(values: list[Any], name: str) -> None:
    missing = next((index for index, value in enumerate(values, start=1) if is_missing(value)), None)
    if missing is not None:
        raise BadRow(f"has no {name} for response {missing} of {len(values)}; each needs one, or the row is left out")


def _refuse_missing(row: ReadRow, entries: _Entries) -> None:
    """Refuse responses of which some have a score, and a list of scores that is null."""
    for key in _SCORED_BY:
        values = [peek(entry, key) for entry in entries.objects]
        if any(value is not None for value in values):
            _refuse_gap(values, f"{entries.name}.{key}")
        if f"{key}s" in row:
            raise BadRow(
                f"has null in {key}s, a number for each of its {entries.name}; data.ignore=[{key}s] passes over it"
            )


# --- where nothing scores them: the order


def _order(row: ReadRow, entries: _Entries, responses: list[Response]) -> Scores:
    """The first is the best, where nothing could say otherwise."""
    passed = "takes the first for the best" if entries.name == RESPONSES[0] else "passes over it"
    for name, remedy in (*_grades_in(entries), *_rankings_beside(row, entries, responses)):
        may = "score its" if "." in name or isinstance(peek(row, name), list | tuple | dict) else "choose one of its"
        raise BadRow(f"has {name}, which may {may} {entries.name}: {remedy}, data.ignore=[{name}] {passed}")
    if entries.name != RESPONSES[0]:
        lists = ", ".join(f"{key}s" for key in _SCORED_BY)
        raise BadRow(f"has {entries.name} without scores; a list of {lists} orders them")
    return [-float(index) for index in range(len(responses))]


def _grades_in(entries: _Entries) -> Iterator[tuple[str, str]]:
    """Keys of responses, or of their turns, that may say how good they are, and how to have them read."""
    said = [(key, value) for entry in entries.objects for key, value in entry.items() if key not in entry.read]
    is_object = any(entry.read for entry in entries.objects)  # what it says was read of it
    turns = [(key, value) for turn in chain(*entries.conversations) for key, value in turn.items() if key not in _TURN]
    graded = [key for key, value in said if could_grade(key, value)] if is_object else []
    for key in graded or [key for key, value in turns if could_grade_turn(key, value)]:
        numbers = _holds_numbers([peek(entry, key) for entry in entries.objects])
        yield f"{entries.name}.{key}", f"data.rating={key} reads it so" if numbers else _LISTED


_TURN = ("role", "content")
_LISTED = "a list of scores orders them"


def _rankings_beside(row: ReadRow, entries: _Entries, responses: list[Response]) -> Iterator[tuple[str, str]]:
    """Columns that may say which response is better, and how to have them read."""
    for name, value in row.items():
        if name in row.read or name in BESIDE_PROMPT:
            continue
        if could_rank(name, value, len(responses)) or _says_some(name, value, row[entries.name], responses):
            ours = "ranks" if is_rank(name) else "scores"
            yield name, f"data.columns={{{ours}: {name}}} reads it so" if _holds_numbers(value) else _LISTED


def _says_some(name: str, value: Any, all_of_them: Any, responses: list[Response]) -> bool:
    """Whether a column says some of the responses again, or one more of its own, as a column of the best would."""
    if kind_of(name) == "harmless" or is_missing(value) or value == all_of_them:
        return False
    if spoken_as(name) == "responses":
        return True
    again = {words_of(each).strip() for each in responses} & set(texts_in(value, name))
    return 0 < len(again) < len(set(map(words_of, responses)))
