"""What becomes of groups that are too long: one policy for all responses of a group alike, everything counted."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_ref.types import PromptGroup

_SHORTEST_PROMPT = 2  # tokens that a cut leaves at least


class Ids(NamedTuple):
    """A group's token ids; `scored` marks the response tokens that count, None: all."""

    prompt: list[int]
    responses: list[list[int]]
    scored: list[list[bool]] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(map(len, self.responses), default=0)


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


def _drop(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
    """Groups over a limit are left out."""

    def fit(group: PromptGroup, ids: Ids) -> Ids | None:
        if limits.hold(ids):
            return ids
        counts["dropped: too long"] += 1
        return None

    return fit


def _cut_prompts(cut: Callable[[PromptGroup, list[int], int], list[int] | None]) -> Any:
    """The policy that cuts prompts with `cut(group, prompt, room)`, which gives None where it cannot."""

    def policy(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
        def fit(group: PromptGroup, ids: Ids) -> Ids | None:
            if limits.hold(ids):
                return ids
            room = min(limits.prompt, limits.total - ids.longest)
            if ids.longest > limits.response or room < _SHORTEST_PROMPT:
                counts["dropped: response too long"] += 1
                return None
            keep = cut(group, ids.prompt, room)
            if keep is None:
                counts["dropped: too little of the prompt would be left"] += 1
                return None
            counts["prompts cut"] += 1
            return ids._replace(prompt=keep)

        return fit

    return policy


def _prompt_start(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
    """The prompt's beginning is cut; a leading BOS stays."""

    def cut(group: PromptGroup, ids: list[int], room: int) -> list[int] | None:
        bos = ids[:1] if ids[0] == limits.bos else []
        return [*bos, *ids[len(ids) - room + len(bos) :]]

    return _cut_prompts(cut)(limits, counts, closing)


def _prompt_end(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
    """The end of the prompt's last turn is cut; what the template writes behind it stays."""

    def cut(group: PromptGroup, ids: list[int], room: int) -> list[int] | None:
        after = closing(group)
        if ids[len(ids) - len(after) :] != after or room - len(after) < _SHORTEST_PROMPT:
            return None
        return [*ids[: room - len(after)], *after]

    return _cut_prompts(cut)(limits, counts, closing)


def _response(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
    """All responses are cut to the same room; a cut one gets no end token."""

    def fit(group: PromptGroup, ids: Ids) -> Ids | None:
        room = min(limits.response, limits.total - len(ids.prompt))
        if len(ids.prompt) > limits.prompt or room < 1:
            counts["dropped: prompt too long"] += 1
            return None
        counts["responses cut"] += sum(len(response) > room for response in ids.responses)
        masks = None if ids.scored is None else [mask[:room] for mask in ids.scored]
        return Ids(ids.prompt, [response[:room] for response in ids.responses], masks)

    return fit


POLICIES = {
    "drop": _drop,
    "truncate_prompt_start": _prompt_start,
    "truncate_prompt_end": _prompt_end,
    "truncate_response": _response,
}
