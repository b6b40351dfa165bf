"""Which pairs to make of scored responses, and which groups the filters leave."""

import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

from dpo_ref.types import Message, PromptGroup, Response, digest, words_of

Scores = tuple[float, ...]


def _best_and_worst(group: PromptGroup, scores: Scores) -> list[int]:
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [order[0], order[-1]]


def _best_and_random(group: PromptGroup, scores: Scores) -> list[int]:
    """The best and one of the others that scored less, drawn by the group's content: the same in every run."""
    best = max(range(len(scores)), key=scores.__getitem__)
    worse = [index for index in range(len(scores)) if scores[index] < scores[best]] or [best]
    return [best, random.Random(group.group_id).choice(worse)]


def _every(group: PromptGroup, scores: Scores) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])


PAIRINGS: dict[str, Callable[[PromptGroup, Scores], list[int]]] = {
    "best_vs_worst": _best_and_worst,
    "best_vs_random": _best_and_random,
    "all": _every,
}


@dataclass(frozen=True)
class Filters:
    """What a group must be like to be kept; None asks nothing. Raises ValueError for what nothing could be like."""

    min_margin: float | None = None  # between the scores of chosen and rejected
    min_score_ratio: float | None = None  # of chosen's score to rejected's
    min_chars: int | None = None  # of every response
    max_chars: int | None = None
    deduplicate: Literal["off", "exact", "normalised"] = "off"

    def __post_init__(self) -> None:
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(f"data.min_chars={self.min_chars} is above data.max_chars={self.max_chars}: nothing fits")

    def too_close(self, better: float, worse: float) -> str | None:
        """Why two scores do not make a pair."""
        if self.min_margin is not None and better - worse < self.min_margin:
            return "score margin too small"
        if self.min_score_ratio is not None and better < self.min_score_ratio * worse:
            return "score ratio too small"
        return None

    def refusal(self, group: PromptGroup) -> str | None:
        """Why a group is left out."""
        sizes = [len(words_of(response)) for response in group.responses]
        if self.min_chars is not None and min(sizes) < self.min_chars:
            return "a response under data.min_chars"
        if self.max_chars is not None and max(sizes) > self.max_chars:
            return "a response over data.max_chars"
        if self.min_margin is None and self.min_score_ratio is None:
            return None
        if group.rewards is None or not group.pairs:
            key = "min_margin" if self.min_margin is not None else "min_score_ratio"
            raise ValueError(f"data.{key} has no effect: {group.origin} has no scores")
        better, worse = group.pairs[0]
        return self.too_close(group.rewards[better], group.rewards[worse])


def add_pairs(group: PromptGroup, pairing: str, filters: Filters) -> PromptGroup | str:
    """A scored group with its pairs, the better response of each first; or why there are none.

    `best_vs_worst` and `best_vs_random` keep two responses, `all` keeps every one and pairs those whose scores differ
    as far as the filters ask.
    """
    assert group.rewards is not None
    indices = PAIRINGS[pairing](group, group.rewards)
    scores = [group.rewards[index] for index in indices]
    responses = [group.responses[index] for index in indices]
    logps = None if group.logps is None else tuple(group.logps[index] for index in indices)
    reasons = {
        (a, b): "scores tied"
        if scores[a] == scores[b]
        else ("equal responses" if responses[a] == responses[b] else filters.too_close(scores[a], scores[b]))
        for a, b in combinations(range(len(indices)), 2)
    }
    pairs = tuple(pair for pair, reason in reasons.items() if reason is None)
    if not pairs:
        return next(reason for reason in reversed(reasons.values()) if reason is not None)
    return replace(group, responses=tuple(responses), rewards=tuple(scores), pairs=pairs, logps=logps)


class Seen:
    """Notices groups that were there before: the same texts, or the same but for case, blanks and Unicode forms."""

    def __init__(self, mode: str) -> None:
        self._text = {"exact": str, "normalised": normalise}.get(mode)
        self._keys: set[bytes] = set()

    def before(self, group: PromptGroup) -> bool:
        """Whether an equal group was seen; remembers this one."""
        if self._text is None:
            return False
        responses = [self._said(response) for response in group.responses]
        content = [self._turns(group.prompt), responses, group.labels, group.tools]
        key = bytes.fromhex(digest(content))
        repeated = key in self._keys
        self._keys.add(key)
        return repeated

    def _said(self, response: Response) -> Any:
        assert self._text is not None
        return self._text(response) if isinstance(response, str) else self._turns(response)

    def _turns(self, turns: Sequence[Message]) -> list[Any]:
        assert self._text is not None
        return [turn | {"content": self._text(turn["content"])} for turn in turns]


def normalise(text: str) -> str:
    """The text without differences of Unicode form, case and blanks, in any language."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def set_id(group: PromptGroup) -> str:
    """Digest of the prompt and the set of responses, whatever their order: equal for pairs that contradict."""
    return digest([group.prompt, sorted(group.responses, key=_sorted_as)])


def _sorted_as(response: Response) -> tuple[bool, str]:
    return (False, response) if isinstance(response, str) else (True, digest(response))
