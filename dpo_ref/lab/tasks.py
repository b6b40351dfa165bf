"""What a task is: a family's name and the words that fill its wordings. Its right answer is a list of items.

Every word of the world belongs to one table only, and no sentence of the writers (`preferences.py`) contains one of
them: what a response answers can therefore be read off its text.
"""

import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from dpo_ref.types import Message

# --- the words of the world


CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": ("cat", "dog", "fox", "cow", "hen", "owl", "bee", "goat"),
    "fruits": ("fig", "pear", "plum", "lime", "kiwi", "mango", "apple", "grape"),
    "tools": ("saw", "axe", "rake", "drill", "spade", "clamp", "chisel", "hammer"),
    "trees": ("oak", "elm", "ash", "fir", "yew", "pine", "cedar", "birch"),
    "instruments": ("drum", "harp", "lute", "horn", "flute", "viola", "piano", "cello"),
}
WORDS: tuple[str, ...] = tuple(word for members in CATEGORIES.values() for word in members)
THINGS: tuple[str, ...] = ("hat", "cup", "pen", "bag", "box", "ball", "coat", "lamp")
COLOURS: tuple[str, ...] = ("red", "blue", "green", "black", "white", "pink", "gray", "brown")
NUMBERS: tuple[str, ...] = tuple(str(number) for number in range(20))
COUNT_WORDS: dict[str, int] = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
MARKS: dict[str, str] = {"dashes": "-", "slashes": "/", "stars": "*", "pluses": "+"}


# --- tasks and families


Split = Literal["train", "validation", "test"]
Slots = dict[str, str]
Prompt = tuple[Message, ...]

PARTIAL_CREDIT = 0.4
"""The most that an answer which is not right can be worth."""


@dataclass(frozen=True)
class ItemKind:
    """A class of items and how they are found in free text (in lower case)."""

    pattern: re.Pattern[str]

    def find(self, text: str) -> list[str]:
        """All items in `text`, in order."""
        return self.pattern.findall(text.lower())


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(words)})\b")


NUMBER = ItemKind(re.compile(r"\d+"))
WORD = ItemKind(_any_of(WORDS))
THING = ItemKind(_any_of((*THINGS, *COLOURS)))  # its name and its colour
SPELLING = ItemKind(re.compile(r"\b[a-z](?:[-/*+][a-z])+\b"))


@dataclass(frozen=True)
class Task:
    """One task, apart from how it is worded: equal tasks have equal right answers."""

    family: str
    slots: tuple[tuple[str, str], ...]

    @property
    def split(self) -> Split:
        """Where prompts with this task belong. It depends on the content alone, so the splits never overlap."""
        digest = hashlib.sha256(json.dumps([self.family, self.slots]).encode()).digest()
        percentile = int.from_bytes(digest[:8], "big") % 100
        return "train" if percentile < 80 else "validation" if percentile < 90 else "test"


class Family(ABC):
    """A kind of instruction. `wordings` have slots; `slot_patterns` say what may stand in them when read back."""

    name: ClassVar[str]
    wordings: ClassVar[tuple[str, ...]]
    slot_patterns: ClassVar[dict[str, str]]
    _readers: tuple[re.Pattern[str], ...]

    def __init__(self) -> None:
        self._readers = tuple(_reader(wording, self.slot_patterns) for wording in self.wordings)

    @abstractmethod
    def draw_slots(self, rng: random.Random) -> Slots:
        """A random task of the family."""

    @abstractmethod
    def kind(self, slots: Slots) -> ItemKind:
        """Which items answer the task."""

    @abstractmethod
    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        """A right answer (where there are several, one at random)."""

    @abstractmethod
    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        """A plausible answer that is not right."""

    def correctness(self, slots: Slots, items: list[str]) -> float:
        """1 for the right items in order; else at most 0.4, by the share of positions that agree."""
        right = self.right(slots, random.Random(0))
        return grade(items, right)

    def draw(self, rng: random.Random) -> tuple[Task, Prompt]:
        """A random task and a prompt that asks for it."""
        slots = self.draw_slots(rng)
        text = rng.choice(self.wordings).format(**slots)
        return self.task(slots), (Message(role="user", content=text),)

    def read(self, prompt: Sequence[Message]) -> Task | None:
        """The task that `prompt` asks for, None where it is of another family. The inverse of `draw`."""
        return self.read_text(prompt[0]["content"]) if len(prompt) == 1 else None

    def read_text(self, text: str) -> Task | None:
        """The task that one instruction asks for, None where no wording fits."""
        matches = (reader.fullmatch(text.strip()) for reader in self._readers)
        return next((self.task(match.groupdict()) for match in matches if match), None)

    def task(self, slots: Slots) -> Task:
        """The task with these slots, in an order that does not depend on the wording."""
        return Task(self.name, tuple(sorted(slots.items())))


def grade(items: Sequence[str], right: Sequence[str]) -> float:
    """1 where the two agree; else 0.4 times the share of positions that agree, out of the longer of the two."""
    if list(items) == list(right):
        return 1.0
    agreeing = sum(item == expected for item, expected in zip(items, right, strict=False))
    return PARTIAL_CREDIT * agreeing / max(len(items), len(right))


def unlike(right: list[str], draw: Callable[[], list[str]]) -> list[str]:
    """The first drawn answer that differs from the right one."""
    return next(items for items in iter(draw, None) if items != right)


def shuffle(items: list[str], rng: random.Random) -> list[str]:
    """The items in another order."""
    return unlike(items, lambda: rng.sample(items, len(items)))


def enumeration(items: Sequence[str]) -> str:
    """Items as they are written in running text: each is one token, and nothing stands between two of them."""
    return " ".join(items)


def items_of(text: str) -> list[str]:
    """The inverse of `enumeration`."""
    return text.split()


def enumeration_pattern(item_pattern: str) -> str:
    """The pattern of an enumeration of at least one item."""
    return f"(?:{item_pattern})(?: (?:{item_pattern}))*"


def _reader(wording: str, slot_patterns: dict[str, str]) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", wording)
    texts = (re.escape(piece) for piece in pieces[0::2])
    slots = [f"(?P<{name}>{slot_patterns[name]})" for name in pieces[1::2]] + [""]
    return re.compile("".join(text + slot for text, slot in zip(texts, slots, strict=True)))
