"""What becomes of groups that are too long: one policy for all responses of a group alike, everything counted."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dpo_ref.data.encoding import Encoder, Ids
from dpo_ref.data.render_check import TemplateRefuses
from dpo_ref.data.scoring import Scoring
from dpo_ref.types import Message, PromptGroup, Response

_SHORTEST_PROMPT = 2  # tokens that a cut leaves at least


class Limits:
    """Limits in tokens. Raises ValueError for one that is not positive."""

    def __init__(self, total: int, prompt: int | None, response: int | None, bos: int | None) -> None:
        for name, value in (("max_length", total), ("max_prompt_length", prompt), ("max_response_length", response)):
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1 token")
        self.total, self.bos = total, bos
        self.prompt = total if prompt is None else prompt
        self.response = total if response is None else response

    def hold(self, ids: Ids) -> bool:
        """Whether the group is within all limits."""
        short = len(ids.prompt) <= self.prompt and ids.longest <= self.response
        return short and len(ids.prompt) + ids.longest <= self.total


Fit = Callable[[PromptGroup, Ids], Ids | None]


def _drop(limits: Limits, encoder: Encoder, scoring: Scoring) -> Fit:
    """Groups over a limit are left out."""

    def fit(group: PromptGroup, ids: Ids) -> Ids | None:
        if limits.hold(ids):
            return ids
        encoder.counts["dropped: too long"] += 1
        return None

    return fit


def _cut_prompts(cut: Callable[[PromptGroup, list[int], int], list[int] | None]) -> Any:
    """The policy that cuts prompts with `cut(group, prompt, room)`, which gives None where it cannot."""

    def policy(limits: Limits, encoder: Encoder, scoring: Scoring) -> Fit:
        def fit(group: PromptGroup, ids: Ids) -> Ids | None:
            if limits.hold(ids):
                return ids
            room = min(limits.prompt, limits.total - ids.longest)
            if ids.longest > limits.response or room < _SHORTEST_PROMPT:
                encoder.counts["dropped: response too long"] += 1
                return None
            prompt = cut(group, ids.prompt, room)
            if prompt is None:
                encoder.counts["dropped: too little of the prompt would be left"] += 1
                return None
            encoder.counts["prompts cut"] += 1
            return ids._replace(prompt=prompt)

        return fit

    return policy


def _prompt_start(limits: Limits, encoder: Encoder, scoring: Scoring) -> Fit:
    """The prompt's beginning is cut; a leading BOS stays."""

    def cut(group: PromptGroup, ids: list[int], room: int) -> list[int] | None:
        bos = ids[:1] if ids[0] == limits.bos else []
        return [*bos, *ids[len(ids) - room + len(bos) :]]

    return _cut_prompts(cut)(limits, encoder, scoring)


def _prompt_end(limits: Limits, encoder: Encoder, scoring: Scoring) -> Fit:
    """The end of the prompt's last turn is cut; what the template writes behind it stays."""

    def cut(group: PromptGroup, ids: list[int], room: int) -> list[int] | None:
        after = encoder.closing(group)
        if ids[len(ids) - len(after) :] != after or room - len(after) < _SHORTEST_PROMPT:
            return None
        return [*ids[: room - len(after)], *after]

    return _cut_prompts(cut)(limits, encoder, scoring)


def _turns(limits: Limits, encoder: Encoder, scoring: Scoring) -> Fit:
    """Whole turns of the prompt go, from the front up to a turn of the user; a system turn stays."""

    def fit(group: PromptGroup, ids: Ids) -> Ids | None:
        if limits.hold(ids):
            return ids
        system = group.prompt[:1] if group.prompt and group.prompt[0]["role"] == "system" else ()
        starts = [i for i, turn in enumerate(group.prompt) if turn["role"] == "user" and i > len(system)]
        shorter = [replace(group, prompt=(*system, *group.prompt[start:])) for start in starts]
        found = _first_that_holds(limits, encoder, scoring, shorter)
        if found is None:
            encoder.counts["dropped: too long even with the last question alone"] += 1
        else:
            encoder.counts["prompts without their first turns"] += 1
        return found

    return fit


def _tool_results(limits: Limits, encoder: Encoder, scoring: Scoring) -> Fit:
    """What tools gave is cut, the longest first, on all sides to the same length; then whole turns go."""
    turns = _turns(limits, encoder, scoring)

    def fit(group: PromptGroup, ids: Ids) -> Ids | None:
        said = (*group.prompt, *(turn for r in group.responses if not isinstance(r, str) for turn in r))
        longest = max((len(turn["content"]) for turn in said if turn["role"] == "tool"), default=0)
        if limits.hold(ids) or not longest:
            return turns(group, ids)
        sizes = range(longest - 1, _SHORTEST_RESULT - 1, -max(1, longest // _STEPS))
        found = _first_that_holds(limits, encoder, scoring, [_with_results(group, size) for size in sizes])
        if found is None:
            return turns(group, ids)
        encoder.counts["groups with tools' results cut"] += 1
        return found

    return fit


_SHORTEST_RESULT, _STEPS = 32, 64  # characters that are left of a tool's result; lengths that are tried


def _with_results(group: PromptGroup, size: int) -> PromptGroup:
    """The group with at most so many characters of every result."""

    def cut(turns: Sequence[Message]) -> tuple[Any, ...]:
        return tuple(turn | {"content": turn["content"][:size]} if turn["role"] == "tool" else turn for turn in turns)

    responses: list[Response] = [r if isinstance(r, str) else cut(r) for r in group.responses]
    return replace(group, prompt=cut(group.prompt), responses=tuple(responses))


def _first_that_holds(limits: Limits, encoder: Encoder, scoring: Scoring, groups: Sequence[PromptGroup]) -> Ids | None:
    """Ids of the first of ever shorter groups that is within the limits, found by halving; None if none is."""
    low, high, found, counts = 0, len(groups), None, encoder.counts.copy()
    while low < high:
        middle = (low + high) // 2
        (ids,) = encoder.outcomes([groups[middle]], scoring)
        if not isinstance(ids, TemplateRefuses) and limits.hold(ids):
            high, found = middle, ids
        else:
            low = middle + 1
    encoder.counts.clear()
    encoder.counts.update(counts)  # what was unusual in a trial is no row's
    return found


def _response(limits: Limits, encoder: Encoder, scoring: Scoring) -> Fit:
    """All responses are cut to the same room; a cut one gets no end token."""

    def fit(group: PromptGroup, ids: Ids) -> Ids | None:
        room = min(limits.response, limits.total - len(ids.prompt))
        if len(ids.prompt) > limits.prompt or room < 1:
            encoder.counts["dropped: prompt too long"] += 1
            return None
        encoder.counts["responses cut"] += sum(len(response) > room for response in ids.responses)
        masks = None if ids.scored is None else [mask[:room] for mask in ids.scored]
        return Ids(ids.prompt, [response[:room] for response in ids.responses], masks)

    return fit


POLICIES = {
    "drop": _drop,
    "truncate_turns": _turns,
    "truncate_tool_results": _tool_results,
    "truncate_prompt_start": _prompt_start,
    "truncate_prompt_end": _prompt_end,
    "truncate_response": _response,
}
