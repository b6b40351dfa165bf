"""Which pairs to make of scored responses, and which groups the filters leave."""

import hashlib
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from dpo_ref.types import PromptGroup, digest

Scores = tuple[float, ...]


def _best_and_worst(group: PromptGroup, scores: Scores) -> list[int]:
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    return [order[0], order[-1]]


def _best_and_random(group: PromptGroup, scores: Scores) -> list[int]:
    """The best and one of the others that scored less, drawn by the group's content: the same in every run."""
    best = max(range(len(scores)), key=scores.__getitem__)
    others = [place for place in range(len(scores)) if scores[place] < scores[best]] or [best]
    return [best, random.Random(group.group_id).choice(others)]


def _every(group: PromptGroup, scores: Scores) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: -scores[place])


PAIRINGS: dict[str, Callable[[PromptGroup, Scores], list[int]]] = {
    "best_vs_worst": _best_and_worst,
    "best_vs_random": _best_and_random,
    "all": _every,
}


def paired(group: PromptGroup, pairing: str, min_margin: float | None) -> PromptGroup | str:
    """A scored group with its pairs, the better response of each first; or why there are none.

    `best_vs_worst` and `best_vs_random` keep two responses, `all` keeps every one and pairs those whose scores differ,
    by at least `min_margin` where it is given.
    """
    assert group.rewards is not None
    kept = PAIRINGS[pairing](group, group.rewards)
    scores = [group.rewards[place] for place in kept]
    responses = [group.responses[place] for place in kept]
    least = 0.0 if min_margin is None else min_margin
    pairs = tuple(
        (a, b)
        for a, b in combinations(range(len(kept)), 2)
        if scores[a] > scores[b] and scores[a] - scores[b] >= least and responses[a] != responses[b]
    )
    if not pairs:
        return "scores tied" if scores[0] == scores[-1] else "score margin too small"
    return replace(group, responses=tuple(responses), rewards=tuple(scores), pairs=pairs)


@dataclass(frozen=True)
class Filters:
    """What a group must be like to be kept; None asks nothing."""

    min_margin: float | None = None  # between the scores of chosen and rejected
    min_score_ratio: float | None = None  # of chosen's score to rejected's
    min_chars: int | None = None  # of every response
    max_chars: int | None = None
    deduplicate: Literal["off", "exact", "normalised"] = "off"

    def refusal(self, group: PromptGroup) -> str | None:
        """Why a group is left out."""
        sizes = [len(response) for response in group.responses]
        if self.min_chars is not None and min(sizes) < self.min_chars:
            return "a response under data.min_chars"
        if self.max_chars is not None and max(sizes) > self.max_chars:
            return "a response over data.max_chars"
        if self.min_margin is None and self.min_score_ratio is None:
            return None
        if group.rewards is None or not group.pairs:
            key = "min_margin" if self.min_margin is not None else "min_score_ratio"
            raise ValueError(f"data.{key} has no effect: {group.origin} has no scores")
        better, worse = (group.rewards[place] for place in group.pairs[0])
        if self.min_margin is not None and better - worse < self.min_margin:
            return "score margin too small"
        if self.min_score_ratio is not None and better < self.min_score_ratio * worse:
            return "score ratio too small"
        return None


class Seen:
    """Notices groups that were there before: the same texts, or the same but for case, blanks and Unicode forms."""

    def __init__(self, how: str) -> None:
        self._text = {"exact": str, "normalised": normalised}.get(how)
        self._keys: set[bytes] = set()

    def before(self, group: PromptGroup) -> bool:
        """Whether an equal group was seen; remembers this one."""
        if self._text is None:
            return False
        texts = [self._text(text) for text in (*(turn["content"] for turn in group.prompt), *group.responses)]
        key = hashlib.sha256("\0".join(texts).encode()).digest()[:16]
        known = key in self._keys
        self._keys.add(key)
        return known


def normalised(text: str) -> str:
    """The text without differences of Unicode form, case and blanks, in any language."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def set_id(group: PromptGroup) -> str:
    """Digest of the prompt and the set of responses, whatever their order: equal for pairs that contradict."""
    return digest([group.prompt, sorted(group.responses)])
