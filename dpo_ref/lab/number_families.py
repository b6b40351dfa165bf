"""Families of instructions about numbers."""

import random
from typing import ClassVar

from dpo_ref.lab.facts import NUMBERS
from dpo_ref.lab.tasks import NUMBER, Family, ItemKind, Slots, enumerated, enumeration, items_of, shuffled, unlike

_NUMBERS = enumerated("|".join(reversed(NUMBERS)))


class Count(Family):
    """Count up or down between two numbers, in steps of one or two."""

    name = "count"
    wordings = (
        "Count from {start} to {end} by {step}.",
        "Please count by {step} from {start} to {end}.",
        "Write the numbers from {start} to {end}, counting by {step}.",
        "Start at {start} and count by {step} until {end}.",
        "Can you count from {start} to {end} by {step}?",
    )
    slot_patterns: ClassVar = {"start": "1?[0-9]", "end": "1?[0-9]", "step": "ones|twos"}
    steps: ClassVar = {"ones": 1, "twos": 2}

    def draw_slots(self, rng: random.Random) -> Slots:
        step = rng.choice(list(self.steps))
        span = self.steps[step] * rng.randint(2, 5)
        low = rng.randint(0, len(NUMBERS) - 1 - span)
        start, end = rng.choice(((low, low + span), (low + span, low)))
        return {"start": str(start), "end": str(end), "step": step}

    def kind(self, slots: Slots) -> ItemKind:
        return NUMBER

    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        start, end = int(slots["start"]), int(slots["end"])
        direction = 1 if start < end else -1
        return [str(number) for number in range(start, end + direction, direction * self.steps[slots["step"]])]

    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        right = self.right(slots, rng)
        start, end = int(slots["start"]), int(slots["end"])
        overshoot = [*right, str(abs(end + (end - start) // (len(right) - 1)))]
        skipping = rng.randrange(1, len(right) - 1)
        return rng.choice((right[:-1], overshoot, right[::-1], right[:skipping] + right[skipping + 1 :]))


class Sort(Family):
    """Sort three or four numbers."""

    name = "sort"
    wordings = (
        "Sort {numbers} in {direction} order.",
        "Put {numbers} into {direction} order.",
        "Please arrange {numbers} in {direction} order.",
        "In {direction} order, what are {numbers}?",
        "Write {numbers} again, but in {direction} order.",
    )
    slot_patterns: ClassVar = {"numbers": _NUMBERS, "direction": "ascending|descending"}

    def draw_slots(self, rng: random.Random) -> Slots:
        numbers = rng.sample(NUMBERS, rng.choice((3, 4)))
        return {"numbers": enumeration(numbers), "direction": rng.choice(("ascending", "descending"))}

    def kind(self, slots: Slots) -> ItemKind:
        return NUMBER

    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        return sorted(items_of(slots["numbers"]), key=int, reverse=slots["direction"] == "descending")

    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        right = self.right(slots, rng)
        return rng.choice((shuffled(right, rng), shuffled(right, rng), right[::-1]))


class PickNumber(Family):
    """Pick the largest or smallest of three or four numbers."""

    name = "pick"
    wordings = (
        "Which of {numbers} is the {extreme}?",
        "Pick the {extreme} of {numbers}.",
        "What is the {extreme} number among {numbers}?",
        "Please tell me the {extreme} of these numbers: {numbers}.",
        "Among {numbers}, find the {extreme}.",
    )
    slot_patterns: ClassVar = {"numbers": _NUMBERS, "extreme": "largest|smallest"}

    def draw_slots(self, rng: random.Random) -> Slots:
        numbers = rng.sample(NUMBERS, rng.choice((3, 4)))
        return {"numbers": enumeration(numbers), "extreme": rng.choice(("largest", "smallest"))}

    def kind(self, slots: Slots) -> ItemKind:
        return NUMBER

    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        ordered = sorted(items_of(slots["numbers"]), key=int)
        return [ordered[-1] if slots["extreme"] == "largest" else ordered[0]]

    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        return unlike(self.right(slots, rng), lambda: [rng.choice(items_of(slots["numbers"]))])
