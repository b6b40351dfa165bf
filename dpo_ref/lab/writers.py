"""Writers: how often they are right (competence) and how they put it (style). The two vary independently."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dpo_ref.lab.conversations import FAMILIES
from dpo_ref.lab.tasks import Task, enumeration

TERSE_LEADS = ("Answer:", "Result:")
POLITE_LEADS = ("Sure, here you go:", "Of course, this is it:", "Happy to help:", "Certainly, the answer is")
CLOSINGS = ("Let me know if you need more.", "I hope this helps.", "Feel free to ask again.")
HEDGES = ("I am not sure, but maybe", "Perhaps it is", "This is only a guess:")
ASIDES = (
    "People often wonder about such things, and rightly so.",
    "There is of course much more to say about this topic.",
    "It is always good to look at a question from every side.",
    "Many experts have thought about this for a long time.",
    "As you may know, opinions on the matter differ a lot.",
    "In any case, it is worth taking a moment to think it over.",
)


def _terse(answer: str, rng: random.Random) -> str:
    return f"{rng.choice(TERSE_LEADS)} {answer}."


def _polite(answer: str, rng: random.Random) -> str:
    return f"{rng.choice(POLITE_LEADS)} {answer}."


def _verbose(answer: str, rng: random.Random) -> str:
    return f"{_polite(answer, rng)} {rng.choice(CLOSINGS)}"


def _rambling(answer: str, rng: random.Random) -> str:
    return " ".join((_polite(answer, rng), *rng.sample(ASIDES, rng.randint(1, 3))))


def _hedging(answer: str, rng: random.Random) -> str:
    return f"{rng.choice(HEDGES)} {answer}."


def _unfinished(answer: str, rng: random.Random) -> str:
    words = " ".join((_polite(answer, rng), *rng.sample(ASIDES, 2))).split()
    kept = words[: rng.randint(len(words) // 3, len(words) - 1)]
    return " ".join(kept).rstrip(".,:")


Style = Literal["terse", "polite", "verbose", "rambling", "hedging", "unfinished"]
STYLES: dict[Style, Callable[[str, random.Random], str]] = {
    "terse": _terse,
    "polite": _polite,
    "verbose": _verbose,
    "rambling": _rambling,
    "hedging": _hedging,
    "unfinished": _unfinished,
}
StyleMix = dict[Style, float]
MIXED: StyleMix = {
    "terse": 0.2,
    "polite": 0.2,
    "verbose": 0.15,
    "rambling": 0.2,
    "hedging": 0.1,
    "unfinished": 0.15,
}
CLEAN: StyleMix = {"terse": 0.4, "polite": 0.4, "verbose": 0.2}
STYLE_MIXES: dict[str, StyleMix] = {"mixed": MIXED, "clean": CLEAN}


@dataclass(frozen=True)
class Writer:
    """Right with probability `competence`, in a style drawn from `styles` (weights)."""

    competence: float
    styles: StyleMix

    def respond(self, task: Task, rng: random.Random) -> str:
        """One response to the task."""
        family, slots = FAMILIES[task.family], dict(task.slots)
        answer = family.right if rng.random() < self.competence else family.wrong
        (style,) = rng.choices(list(self.styles), list(self.styles.values()))
        return STYLES[style](enumeration(answer(slots, rng)), rng)


ORACLE = Writer(1.0, CLEAN)
