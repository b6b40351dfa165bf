"""Rows of published preference data sets, in the columns they were published with."""

from typing import Any

from dpo_ref.data.formats.checks import BadRow, Row, column, flag, number, record, several, text
from dpo_ref.data.formats.columns import ReadRow, kind_of, part, parts, peek
from dpo_ref.data.formats.conversations import answered, dialogue, group, response, turns
from dpo_ref.data.formats.standard import asked, prompt_of, repeated
from dpo_ref.types import Message, PromptGroup


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
    `label` is 1 or 2.
    """
    name = "preference" if "preference" in row else "label"
    value = number(column(row, name), name)
    if not 1 <= value <= 2:
        raise BadRow(f"has {value:g} in {name}, which runs from 1 (the first is better) to 2")
    responses = [text(column(row, f"output_{side}"), f"output_{side}") for side in (1, 2)]
    return asked(row, prompt_of(row), responses, origin, rewards=[2 - value, value - 1])


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
_SCORED_BY = {"score": 1, "reward": 1, "rating": 1, "rank": -1}  # and which way is up; in lists of their own plural


def ranked(row: ReadRow, origin: str) -> PromptGroup:
    """A prompt and k `responses`, `trajectories` of several turns, or `answers` (berkeley-nest/Nectar), with their
    `scores`, `rewards` or `ranks` (1 is best) in a list or in each of them; without any, the best response first."""
    name = next((name for name in RESPONSES if peek(row, name) is not None), RESPONSES[0])
    prompt = prompt_of(row)
    entries = several(column(row, name), name)
    objects = all(isinstance(entry, dict) and entry.keys().isdisjoint(("role", "from")) for entry in entries)
    conversations = _of_objects(parts(row, name), name) if objects else [answered(entry, name) for entry in entries]
    responses = [response(turns[repeated(prompt, turns, name) :], name) for turns in conversations]
    values = (_scores_in(row.parts[name]) if objects else None) or _scores_beside(row, len(responses), name)
    if len(values) != len(responses):
        raise BadRow(f"has {len(responses)} {name} and {len(values)} scores or ranks")
    return asked(row, prompt, responses, origin, rewards=values)


def _of_objects(entries: list[ReadRow], name: str) -> list[list[Message]]:
    """What each entry of a list says."""
    keys = [next((key for key in _SAID if peek(entry, key) is not None), _SAID[0]) for entry in entries]
    return [answered(column(entry, key), f"{name}.{key}") for entry, key in zip(entries, keys, strict=True)]


def _scores_in(entries: list[ReadRow]) -> list[float] | None:
    """What scores the entries of a list, if all have it."""
    for key, sign in _SCORED_BY.items():
        if all(peek(entry, key) is not None for entry in entries):
            return [sign * number(entry[key], key) for entry in entries]
    return None


def _scores_beside(row: ReadRow, size: int, name: str) -> list[float]:
    """What the row's list of scores or ranks says; without one the first is the best."""
    key = next((key for key in _SCORED_BY if peek(row, f"{key}s") is not None), None)
    if key is not None:
        return [_SCORED_BY[key] * number(value, f"{key}s") for value in several(row[f"{key}s"], f"{key}s")]
    unread = next((other for other, value in row.items() if other != name and _could_score(other, value, size)), None)
    if unread is not None:
        raise BadRow(
            f"has {unread}, which may score its {name}: data.columns={{scores: {unread}}} reads it so, "
            f"data.ignore=[{unread}] takes the first for the best"
        )
    if name != RESPONSES[0]:
        raise BadRow(f"has {name} without scores; a list of {', '.join(f'{key}s' for key in _SCORED_BY)} orders them")
    return [-float(index) for index in range(size)]


def _could_score(name: str, value: Any, size: int) -> bool:
    """Whether a column that nobody reads has a number for each response; log-probs are not scores."""
    numbers = isinstance(value, list | tuple) and len(value) == size and all(isinstance(v, int | float) for v in value)
    return numbers and kind_of(name) != "harmless" and "logp" not in name
