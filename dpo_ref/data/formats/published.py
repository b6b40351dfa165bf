"""Rows of published preference data sets, in the columns they were published with."""

from typing import Any

from dpo_ref.data.formats.checks import BadRow, Row, column, group, number, several, text, turns
from dpo_ref.data.formats.conversations import instructed
from dpo_ref.types import Message, PromptGroup


def hh(row: Row, origin: str) -> PromptGroup:
    """Anthropic's hh-rlhf: two dialogues as text, turns opened by "\\n\\nHuman:" and "\\n\\nAssistant:", that share
    everything up to their last assistant turn."""
    chosen, rejected = (_dialogue(text(column(row, name), name)) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("has dialogues that differ before their last assistant turn")
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    return group(chosen[:-1], answers, origin, names=("chosen", "rejected"), pairs=((0, 1),))


def _dialogue(written: str) -> list[Message]:
    """Turns of an hh dialogue. A turn marker inside a turn's first line cannot be told from a real one."""
    found: list[Message] = []
    for part in written.split("\n\nHuman:")[1:]:
        human, *assistants = part.split("\n\nAssistant:")
        found.append(Message(role="user", content=human.strip()))
        found += [Message(role="assistant", content=assistant.strip()) for assistant in assistants]
    if not found or found[-1]["role"] != "assistant":
        raise BadRow("has a dialogue that does not end with an assistant turn")
    return found


def ultrafeedback(row: Row, origin: str, *, rating: str | None = None) -> PromptGroup:
    """openbmb/UltraFeedback: an `instruction` and `completions`, each with a `response` and ratings.

    Scores are the mean of the rated aspects, as in the cleaned and binarized sets; `overall_score` is known to be
    wrong in rows where a 1 became a 10. `rating` names another: an aspect, `overall_score` or `fine-grained_score`.
    """
    completions = several(column(row, "completions"), "completions")
    if not all(isinstance(one, dict) for one in completions):
        raise BadRow("has completions that are not objects with response and ratings")
    prompt = [Message(role="user", content=text(column(row, "instruction"), "instruction"))]
    responses = [text(column(one, "response"), "response") for one in completions]
    return group(prompt, responses, origin, rewards=[_rating(one, rating) for one in completions])


def _rating(one: Row, rating: str | None) -> float:
    aspects = one.get("annotations") or {}
    if rating in one:
        return number(one[rating], rating or "")
    if rating is not None and rating not in aspects:
        raise BadRow(f"has no rating {rating}; a completion has {', '.join((*one, *aspects))}")
    chosen = aspects.values() if rating is None else [aspects[rating]]
    found = [aspect["Rating"] for aspect in chosen if aspect.get("Rating") not in (None, "N/A")]
    if not found:
        raise BadRow("has a completion without ratings")
    return sum(number(value, "Rating") for value in found) / len(found)


def shp(row: Row, origin: str) -> PromptGroup:
    """stanfordnlp/SHP: `history`, two comments, and how often each was voted up; `labels` 1: A is preferred."""
    prompt = [Message(role="user", content=text(column(row, "history"), "history"))]
    responses = [text(column(row, f"human_ref_{side}"), f"human_ref_{side}") for side in "AB"]
    scores = [number(column(row, f"score_{side}"), f"score_{side}") for side in "AB"]
    label = column(row, "labels")
    if label not in (0, 1):
        raise BadRow(f"has {label!r} in labels, where 1 (A is preferred) or 0 is expected")
    order = slice(None) if label == 1 else slice(None, None, -1)
    return group(prompt, responses[order], origin, pairs=((0, 1),), rewards=scores[order])


def stack_exchange(row: Row, origin: str) -> PromptGroup:
    """HuggingFaceH4/stack-exchange-preferences: a `question` and its `answers`, scored by votes, all as HTML."""
    answers = several(column(row, "answers"), "answers")
    prompt = [Message(role="user", content=_words(column(row, "question"), "question"))]
    responses = [_words(column(one, "text"), "answers.text") for one in answers]
    return group(prompt, responses, origin, rewards=[number(column(one, "pm_score"), "pm_score") for one in answers])


def _words(html: Any, name: str) -> str:
    from bs4 import BeautifulSoup

    return BeautifulSoup(text(html, name), "html.parser").get_text().strip()


def tldr(row: Row, origin: str) -> PromptGroup:
    """openai/summarize_from_feedback, comparisons: a post in `info`, two `summaries`, and the `choice` of one."""
    info, summaries = column(row, "info"), several(column(row, "summaries"), "summaries")
    if not isinstance(info, dict) or len(summaries) != 2:
        raise BadRow("is no comparison of two summaries of one post (info, summaries, choice)")
    if info.get("post"):
        heads = {
            "SUBREDDIT": f"r/{info.get('subreddit')}",
            "TITLE": info.get("title"),
            "POST": text(info["post"], "post"),
        }
        asked = "\n\n".join(f"{name}: {value}" for name, value in heads.items())
    else:
        asked = f"ARTICLE: {text(column(info, 'article'), 'article')}"
    prompt = [Message(role="user", content=f"{asked}\n\nTL;DR:")]
    responses = [text(column(one, "text"), "summaries.text").strip() for one in summaries]
    return group(prompt, responses, origin, pairs=(_order(column(row, "choice"), "choice", (0, 1)),))


def _order(value: Any, name: str, first_or_second: tuple[int, int]) -> tuple[int, int]:
    if value not in first_or_second:
        raise BadRow(f"has {value!r} in {name}, where {first_or_second[0]} or {first_or_second[1]} is expected")
    return (0, 1) if value == first_or_second[0] else (1, 0)


def annotated(row: Row, origin: str) -> PromptGroup:
    """AlpacaFarm, AlpacaEval and LLMBar: an instruction, `output_1` and `output_2`, and which is better.

    `preference` runs from 1 (the first) to 2 (the second), 1.5 being a tie, as the weighted annotators write it;
    `label` is 1 or 2.
    """
    name = "preference" if "preference" in row else "label"
    value = number(column(row, name), name)
    if not 1 <= value <= 2:
        raise BadRow(f"has {value:g} in {name}, which runs from 1 (the first is better) to 2")
    prompt = [Message(role="user", content=instructed(row))]
    responses = [text(column(row, f"output_{side}"), f"output_{side}") for side in (1, 2)]
    return group(prompt, responses, origin, rewards=[2 - value, value - 1])


def helpsteer(row: Row, origin: str, *, rating: str | None = None) -> PromptGroup:
    """nvidia/HelpSteer and HelpSteer2: one response a row with ratings; rows of one prompt follow each other.

    Scores are `helpfulness` unless `rating` names another column.
    """
    prompt = turns(column(row, "prompt"), "prompt", "user")
    name = rating or "helpfulness"
    response = text(column(row, "response"), "response")
    return group(prompt, [response], origin, names=("response",), rewards=[number(column(row, name), name)])


def helpsteer3(row: Row, origin: str) -> PromptGroup:
    """nvidia/HelpSteer3: a `context`, two responses, and `overall_preference` from -3 (the first) to 3."""
    preference = number(column(row, "overall_preference"), "overall_preference")
    responses = [text(column(row, f"response{side}"), f"response{side}") for side in (1, 2)]
    return group(
        turns(column(row, "context"), "context", "user"), responses, origin, rewards=[-preference, preference]
    )


def ranked(row: Row, origin: str) -> PromptGroup:
    """A `prompt` and k `responses` with `scores`, or with `ranks` (1 is best), or, without both, the best first."""
    prompt = turns(column(row, "prompt"), "prompt", "user")
    responses = [text(one, "responses") for one in several(column(row, "responses"), "responses")]
    values = row.get("scores") or [-number(rank, "ranks") for rank in row.get("ranks") or range(len(responses))]
    if len(values) != len(responses):
        raise BadRow(f"has {len(responses)} responses and {len(values)} scores or ranks")
    return group(prompt, responses, origin, rewards=[number(value, "scores") for value in values])
