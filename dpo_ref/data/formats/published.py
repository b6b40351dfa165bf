"""Rows of published preference data sets, in the columns they were published with."""

from typing import Any

from dpo_ref.data.formats.checks import BadRow, Row, column, flag, group, number, record, several, text, turns
from dpo_ref.data.formats.standard import instruction_text
from dpo_ref.types import Message, PromptGroup


def hh(row: Row, origin: str) -> PromptGroup:
    """Anthropic's hh-rlhf: two dialogues as text, turns opened by "\\n\\nHuman:" and "\\n\\nAssistant:", that share
    everything up to their last assistant turn."""
    chosen, rejected = (_dialogue(text(column(row, name), name)) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("has dialogues that differ before their last assistant turn")
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    return group(chosen[:-1], answers, origin, names=("chosen", "rejected"), pairs=((0, 1),))


def _dialogue(transcript: str) -> list[Message]:
    """Turns of an hh dialogue. A turn marker inside a turn's first line cannot be told from a real one."""
    messages: list[Message] = []
    for part in transcript.split("\n\nHuman:")[1:]:
        human, *assistants = part.split("\n\nAssistant:")
        messages.append(Message(role="user", content=human.strip()))
        messages += [Message(role="assistant", content=assistant.strip()) for assistant in assistants]
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("has a dialogue that does not end with an assistant turn")
    return messages


def ultrafeedback(row: Row, origin: str, *, rating: str | None = None) -> PromptGroup:
    """openbmb/UltraFeedback: an `instruction` and `completions`, each with a `response` and ratings.

    Scores are the mean of the rated aspects, as in the cleaned and binarized sets; `overall_score` is known to be
    wrong in rows where a 1 became a 10. `rating` names another: an aspect, `overall_score` or `fine-grained_score`.
    """
    completions = [
        record(completion, "completions") for completion in several(column(row, "completions"), "completions")
    ]
    prompt = [Message(role="user", content=text(column(row, "instruction"), "instruction"))]
    responses = [text(column(completion, "response"), "response") for completion in completions]
    return group(prompt, responses, origin, rewards=[_rating(completion, rating) for completion in completions])


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


def stack_exchange(row: Row, origin: str) -> PromptGroup:
    """HuggingFaceH4/stack-exchange-preferences: a `question` and its `answers`, scored by votes, all as HTML."""
    answers = [record(answer, "answers") for answer in several(column(row, "answers"), "answers")]
    prompt = [Message(role="user", content=_words(column(row, "question"), "question"))]
    responses = [_words(column(answer, "text"), "answers.text") for answer in answers]
    return group(
        prompt, responses, origin, rewards=[number(column(answer, "pm_score"), "pm_score") for answer in answers]
    )


def _words(html: Any, name: str) -> str:
    from bs4 import BeautifulSoup

    return BeautifulSoup(text(html, name), "html.parser").get_text().strip()


def tldr(row: Row, origin: str) -> PromptGroup:
    """openai/summarize_from_feedback, comparisons: a post in `info`, two `summaries`, and the `choice` of one."""
    info = record(column(row, "info"), "info")
    summaries = [record(summary, "summaries") for summary in several(column(row, "summaries"), "summaries")]
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
    prompt = [Message(role="user", content=instruction_text(row))]
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
    responses = [text(response, "responses") for response in several(column(row, "responses"), "responses")]
    if row.get("scores") is not None:
        values = [number(score, "scores") for score in several(row["scores"], "scores")]
    elif row.get("ranks") is not None:
        values = [-number(rank, "ranks") for rank in several(row["ranks"], "ranks")]
    else:
        values = [-float(index) for index in range(len(responses))]
    if len(values) != len(responses):
        raise BadRow(f"has {len(responses)} responses and {len(values)} scores or ranks")
    return group(prompt, responses, origin, rewards=values)
