"""Prompts of one and of two turns: drawn, and read back to the task they ask for."""

import random
from collections.abc import Callable, Sequence
from typing import ClassVar

from dpo_ref.lab.families import Count, NameMembers, PickNumber, ReadPassage, Repeat, Reverse, Sort, Spell
from dpo_ref.lab.tasks import NUMBER, WORD, Family, ItemKind, Prompt, Slots, Split, Task, enumeration, items_of, unlike
from dpo_ref.types import Message


class FollowUp(Family):
    """A second instruction that refers to the answer of the first, which was right."""

    name = "follow_up"
    wordings = (
        "Now give {request}.",
        "Please write {request} now.",
        "Thanks. Next, {request}.",
        "Good. I would like {request}.",
        "And now {request}, please.",
        "Can you also give me {request}?",
        "From your answer, I need {request}.",
    )
    requests: ClassVar[dict[str, Callable[[list[str]], list[str]]]] = {
        "the same in reverse order": lambda items: items[::-1],
        "only the first one": lambda items: items[:1],
        "only the last one": lambda items: items[-1:],
        "all but the first one": lambda items: items[1:],
    }
    slot_patterns: ClassVar = {"request": "|".join(requests)}
    answered = "Answer: {items}."

    def __init__(self, first: Sequence[Family]) -> None:
        super().__init__()
        self.first = tuple(first)

    def draw(self, rng: random.Random) -> tuple[Task, Prompt]:
        """A first instruction, its right answer, and an instruction about that answer."""
        first = rng.choice(self.first)
        first_task, (question,) = first.draw(rng)
        items = enumeration(first.right(dict(first_task.slots), rng))
        slots = self.draw_slots(rng)
        answer = Message(role="assistant", content=self.answered.format(items=items))
        follow_up = Message(role="user", content=rng.choice(self.wordings).format(**slots))
        return self.task(slots | {"items": items}), (question, answer, follow_up)

    def draw_slots(self, rng: random.Random) -> Slots:
        return {"request": rng.choice(list(self.requests))}

    def read(self, prompt: Sequence[Message]) -> Task | None:
        """The inverse of `draw`: the items are those of the first answer as it stands in the conversation."""
        if len(prompt) != 3:
            return None
        task = self.read_text(prompt[2]["content"])
        items = [item for kind in (NUMBER, WORD) for item in kind.find(prompt[1]["content"])]
        return self.task(dict(task.slots) | {"items": enumeration(items)}) if task and items else None

    def kind(self, slots: Slots) -> ItemKind:
        return NUMBER if slots["items"][0].isdigit() else WORD

    def right(self, slots: Slots, rng: random.Random) -> list[str]:
        return self.requests[slots["request"]](items_of(slots["items"]))

    def wrong(self, slots: Slots, rng: random.Random) -> list[str]:
        items = items_of(slots["items"])
        mistakes = [request(items) for request in self.requests.values()] + [items, items[:-1]]
        return unlike(self.right(slots, rng), lambda: rng.choice(mistakes))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        NameMembers(),
        Count(),
        Spell(),
        Sort(),
        Repeat(),
        Reverse(),
        PickNumber(),
        ReadPassage(),
        FollowUp((NameMembers(), Count(), Sort(), Reverse())),
    )
}


def draw_prompt(family: Family, split: Split, rng: random.Random) -> tuple[Task, Prompt]:
    """A random task of the family that belongs to the split, and a prompt that asks for it."""
    draws = iter(lambda: family.draw(rng), None)
    return next((task, prompt) for task, prompt in draws if task.split == split)


def read_prompt(prompt: Sequence[Message]) -> Task:
    """The task that a prompt asks for.

    Raises ValueError where it is none of the lab's.
    """
    readings = (family.read(prompt) for family in FAMILIES.values())
    task = next((task for task in readings if task), None)
    if task is None:
        raise ValueError(
            f"not a prompt of the lab: {prompt[-1]['content']!r:.200}. The gold reward knows the right answers of "
            "the lab's own instructions only; score other data with another scorer"
        )
    return task
