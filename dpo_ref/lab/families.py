"""Families of single-turn instructions: about words, and about numbers."""

import random
from typing import ClassVar

from dpo_ref.lab.tasks import (
    CATEGORIES,
    COLOURS,
    COUNT_WORDS,
    MARKS,
    NUMBER,
    NUMBERS,
    PARTIAL_CREDIT,
    SPELLING,
    THING,
    THINGS,
    WORD,
    WORDS,
    Family,
    ItemKind,
    Slots,
    enumeration,
    enumeration_pattern,
    grade,
    items_of,
    shuffle,
    unlike,
)

# --- about words


_WORD = "|".join(WORDS)


class NameMembers(Family):
    """Name so many members of a category, other than the given ones."""

    name = "name"
    wordings = (
        "Name {count} {category}, but not {excluded}.",
        "Give me {count} {category} without {excluded}.",
        "Please list {count} {category} other than {excluded}.",
        "I need {count} {category}. Leave out {excluded}.",
        "Which {count} {category} come to mind, apart from {excluded}?",
        "Leaving out {excluded}, name {count} {category}.",
        "Not {excluded}, please: I want {count} other {category}.",
    )
    slot_patterns: ClassVar = {
        "count": "two|three|four",
        "category": "|".join(CATEGORIES),
        "excluded": enumeration_pattern(_WORD),
    }

    def draw_slots(self, rng: random.Random) -> Slots:
        category = rng.choice(list(CATEGORIES))
        excluded = rng.sample(CATEGORIES[category], rng.choice((1, 2)))
        count = rng.choice(("two", "three", "four"))
        return {"count": count, "category": category, "excluded": enumeration(excluded)}

    def kind(self, slots: Slots) -> ItemKind:
        return WORD

    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        return rng.sample(_allowed_words(slots), COUNT_WORDS[slots["count"]])

    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        count, allowed = COUNT_WORDS[slots["count"]], _allowed_words(slots)
        category = rng.choice([name for name in CATEGORIES if name != slots["category"]])
        forbidden = [*rng.sample(allowed, count - 1), rng.choice(items_of(slots["excluded"]))]
        return rng.choice(
            (
                rng.sample(CATEGORIES[category], count),
                rng.sample(allowed, count + rng.choice((-1, 1))),
                rng.sample(forbidden, count),
            )
        )

    def correctness(self, slots: Slots, items: list[str]) -> float:
        """1 for exactly so many different allowed members; else 0.4 times the share of good ones."""
        count, good = COUNT_WORDS[slots["count"]], len(set(items) & set(_allowed_words(slots)))
        return 1.0 if good == len(items) == count else PARTIAL_CREDIT * min(good, count) / max(len(items), count)


def _allowed_words(slots: Slots) -> list[str]:
    excluded = items_of(slots["excluded"])
    return [word for word in CATEGORIES[slots["category"]] if word not in excluded]


class Spell(Family):
    """Spell a word with a given mark between its letters."""

    name = "spell"
    wordings = (
        "Spell {word} with {mark} between the letters.",
        "Please spell the word {word} using {mark}.",
        "How do you spell {word}? Put {mark} between the letters.",
        "Use {mark} to spell {word}.",
        "Take the word {word} and spell it with {mark}.",
        "With {mark} between its letters, spell {word}.",
        "I want to see {word} spelled with {mark}.",
    )
    words = tuple(word for word in (*WORDS, *THINGS, *COLOURS) if len(word) <= 4)
    slot_patterns: ClassVar = {"word": "|".join(words), "mark": "|".join(MARKS)}

    def draw_slots(self, rng: random.Random) -> Slots:
        return {"word": rng.choice(self.words), "mark": rng.choice(list(MARKS))}

    def kind(self, slots: Slots) -> ItemKind:
        return SPELLING

    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        return [MARKS[slots["mark"]].join(slots["word"])]

    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        word = slots["word"]
        other_mark = MARKS[rng.choice([mark for mark in MARKS if mark != slots["mark"]])]
        other_word = rng.choice(
            [candidate for candidate in self.words if len(candidate) == len(word) and candidate != word]
        )
        index = rng.randrange(len(word))
        slip = word[:index] + rng.choice("abcdefghijklmnopqrstuvwxyz".replace(word[index], "")) + word[index + 1 :]
        mark = MARKS[slots["mark"]]
        return [rng.choice((other_mark.join(word), mark.join(other_word), mark.join(slip), mark.join(word[:-1])))]

    def correctness(self, slots: Slots, items: list[str]) -> float:
        """Graded by character, marks included."""
        right = self.right(slots, random.Random(0))
        return grade(list("".join(items)), list("".join(right)))


class Repeat(Family):
    """Write a word so many times."""

    name = "repeat"
    wordings = (
        "Write {word} {count} times.",
        "Repeat the word {word} {count} times.",
        "Please say {word} {count} times.",
        "I want to read {word} {count} times.",
        "Can you write the word {word} {count} times?",
        "Say {count} times the word {word}.",
        "Give me {count} copies of the word {word}.",
    )
    slot_patterns: ClassVar = {"word": _WORD, "count": "|".join(COUNT_WORDS)}

    def draw_slots(self, rng: random.Random) -> Slots:
        return {"word": rng.choice(WORDS), "count": rng.choice(list(COUNT_WORDS))}

    def kind(self, slots: Slots) -> ItemKind:
        return WORD

    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        return [slots["word"]] * COUNT_WORDS[slots["count"]]

    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        right = self.right(slots, rng)
        return unlike(right, lambda: [slots["word"]] * rng.randint(1, 8))


class Reverse(Family):
    """Write words in reverse order."""

    name = "reverse"
    wordings = (
        "Write {words} in reverse order.",
        "Reverse the list {words}.",
        "Please turn around the order of {words}.",
        "Here are some words: {words}. Reverse them.",
        "Say {words} backwards, word by word.",
        "Start with the last word of {words} and go back to the first.",
        "What is {words} the other way round?",
    )
    slot_patterns: ClassVar = {"words": enumeration_pattern(_WORD)}

    def draw_slots(self, rng: random.Random) -> Slots:
        return {"words": enumeration(rng.sample(WORDS, rng.choice((3, 4))))}

    def kind(self, slots: Slots) -> ItemKind:
        return WORD

    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        return items_of(slots["words"])[::-1]

    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        right = self.right(slots, rng)
        return rng.choice((shuffle(right, rng), right[::-1], right[:-1]))


class ReadPassage(Family):
    """Name a thing of the passage before, and its colour."""

    name = "passage"
    wordings = (
        "Look at the {passage}. Name the {thing} and its colour.",
        "Suppose there is a {passage}. Tell me about the {thing} and its colour.",
        "I see a {passage}. Which colour has the {thing}?",
        "Read this: {passage}. Now name the {thing}, then its colour.",
        "What about the {thing}, if I have a {passage}?",
        "Find the {thing} among the {passage}.",
        "She has a {passage}. What do you know about the {thing}?",
    )
    _entry = f"(?:{'|'.join(COLOURS)}) (?:{'|'.join(THINGS)})"
    slot_patterns: ClassVar = {"passage": f"{_entry}(?: and {_entry})*", "thing": "|".join(THINGS)}

    def draw_slots(self, rng: random.Random) -> Slots:
        things = rng.sample(THINGS, 3)
        entries = [f"{colour} {thing}" for thing, colour in zip(things, rng.sample(COLOURS, 3), strict=True)]
        return {"passage": " and ".join(entries), "thing": rng.choice(things)}

    def kind(self, slots: Slots) -> ItemKind:
        return THING

    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        return next([thing, colour] for colour, thing in _entries(slots) if thing == slots["thing"])

    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        things, colours = zip(*((thing, colour) for colour, thing in _entries(slots)), strict=True)
        return unlike(self.right(slots, rng), lambda: [rng.choice((slots["thing"], *things)), rng.choice(colours)])


def _entries(slots: Slots) -> list[list[str]]:
    return [entry.split() for entry in slots["passage"].split(" and ")]


# --- about numbers


_NUMBERS = enumeration_pattern("|".join(reversed(NUMBERS)))


class Count(Family):
    """Count up or down between two numbers, in steps of one or two."""

    name = "count"
    wordings = (
        "Count from {start} to {end} by {step}.",
        "Please count by {step} from {start} to {end}.",
        "Write the numbers from {start} to {end}, counting by {step}.",
        "Start at {start} and count by {step} until {end}.",
        "Can you count from {start} to {end} by {step}?",
        "By {step}, count from {start} until you reach {end}.",
        "I want to hear you count by {step}, {start} to {end}.",
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
        "Here are some numbers: {numbers}. Sort them in {direction} order.",
        "I need {numbers} sorted, in {direction} order.",
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
        return rng.choice((shuffle(right, rng), shuffle(right, rng), right[::-1]))


class PickNumber(Family):
    """Pick the largest or smallest of three or four numbers."""

    name = "pick"
    wordings = (
        "Which of {numbers} is the {extreme}?",
        "Pick the {extreme} of {numbers}.",
        "What is the {extreme} number among {numbers}?",
        "Please tell me the {extreme} of these numbers: {numbers}.",
        "Among {numbers}, find the {extreme}.",
        "Only the {extreme} of {numbers}, please.",
        "Look at {numbers}. Which number is the {extreme}?",
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
