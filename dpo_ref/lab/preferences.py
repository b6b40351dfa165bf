"""Preference pairs: two writers answer the same prompt, and a fallible judge says which answer is better; and
demonstrations, one writer's answers, the text that the lab's models are built from.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

from dpo_ref.generation.engine import PromptSet, held_out
from dpo_ref.lab.conversations import FAMILIES, draw_prompt
from dpo_ref.lab.gold import gold_reward
from dpo_ref.lab.tasks import Family, Prompt, Split, Task, enumeration
from dpo_ref.types import PreferenceData, Progress, PromptGroup, silent

# --- pairs


COMPETENCES = (0.15, 0.45, 0.75, 1.0)
"""Of the writers that the two authors of a pair are drawn from, independently."""


def lab(
    seed: int,
    progress: Progress = silent,
    *,
    num_pairs: int = 8192,
    num_eval_pairs: int = 512,
    num_test_prompts: int = 400,
    test_split: Literal["validation", "test"] = "test",
    length_bias: float = 1.0,
    label_noise: float = 0.02,
    label_steepness: float = 10.0,
    families: list[str] | None = None,
    competences: list[float] | None = None,
) -> PreferenceData:
    """Preference pairs of the lab, with held-out pairs (validation prompts) and prompts to generate answers for.

    A response a is preferred to b with probability

        sigmoid(label_steepness (gold_a - gold_b) + length_bias (words_a - words_b) / 10)

    (Bradley-Terry on the gold reward, with a judge who likes length), and then the label is flipped with probability
    `label_noise`. With `length_bias=0` and `label_noise=0` nothing is left to chance: the label is the order of the
    gold rewards, and pairs of equal gold are drawn anew. Pairs of equal texts are drawn anew always. Train, validation
    and test prompts are disjoint by content. The families of instructions take turns; with `families` the pairs, those
    held out included, are of these alone. The prompts to generate answers for are of all families whatever is trained
    on, and the same for every seed, so that runs can be compared prompt by prompt. Each response is of a writer drawn
    from those of these `competences`; without them of 0.15, 0.45, 0.75 and 1.

    `rewards` of a group are the gold rewards of its responses, the preferred one first. Raises ValueError for an
    option out of range.
    """
    check_counts(num_pairs=num_pairs, num_eval_pairs=num_eval_pairs, num_test_prompts=num_test_prompts)
    judge = SimulatedJudge(length_bias, label_noise, label_steepness)
    of = _families(families), _competences(competences)
    train = draw_pairs(judge, "train", random.Random(f"{seed} train pairs"), *of)
    held_out = draw_pairs(judge, "validation", random.Random(f"{seed} eval pairs"), *of)
    return PreferenceData(
        train=list(progress(islice(train, num_pairs), "drawing the lab's data", num_pairs)),
        eval=list(islice(held_out, num_eval_pairs)),
        test_prompts=draw_prompts(test_split, num_test_prompts),
    )


@dataclass(frozen=True)
class SimulatedJudge:
    """Prefers the better answer, likes the longer one, and errs. Raises ValueError for an option out of range."""

    length_bias: float
    label_noise: float
    label_steepness: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.length_bias):
            raise ValueError(f"data.length_bias={self.length_bias}: must be finite (log-odds per 10 words)")
        if not 0 <= self.label_noise < 0.5:
            raise ValueError(f"data.label_noise={self.label_noise}: the share of flipped labels must be in [0, 0.5)")
        if not 0 < self.label_steepness < math.inf:
            raise ValueError(f"data.label_steepness={self.label_steepness}: must be positive and finite")

    @property
    def infallible(self) -> bool:
        """Whether its labels are the order of the gold rewards."""
        return self.length_bias == 0 and self.label_noise == 0

    def probability(self, gold: tuple[float, float], words: tuple[int, int]) -> float:
        """That the first of two responses is labelled the better one."""
        if self.infallible:
            return float(gold[0] > gold[1])
        log_odds = self.label_steepness * (gold[0] - gold[1]) + self.length_bias * (words[0] - words[1]) / 10
        honest = 0.5 * (1 + math.tanh(log_odds / 2))
        return (1 - self.label_noise) * honest + self.label_noise * (1 - honest)


def _families(names: list[str] | None) -> list[Family]:
    """The families of these names, in the lab's order; all for None. Raises ValueError for an empty list and for a
    name that is none of theirs."""
    if names is not None and (not names or set(names) - set(FAMILIES)):
        raise ValueError(f"data.families={names} must be some of {', '.join(FAMILIES)}")
    return [family for name, family in FAMILIES.items() if names is None or name in names]


def _competences(probabilities: list[float] | None) -> Sequence[float]:
    """Those of the writers. Raises ValueError for an empty list and for what is no probability."""
    if probabilities is not None and (not probabilities or not all(0 <= each <= 1 for each in probabilities)):
        raise ValueError(f"data.competences={probabilities} must be probabilities, of at least one writer")
    return probabilities or COMPETENCES


def draw_pairs(
    judge: SimulatedJudge,
    split: Split,
    rng: random.Random,
    families: Sequence[Family] = tuple(FAMILIES.values()),
    competences: Sequence[float] = COMPETENCES,
) -> Iterator[PromptGroup]:
    """An endless stream of labelled pairs, the preferred response first; the families take turns."""
    writers = [Writer(competence, MIXED) for competence in competences]
    for family in cycle(families):
        pair = None
        while pair is None:
            task, prompt = draw_prompt(family, split, rng)
            texts = rng.choice(writers).respond(task, rng), rng.choice(writers).respond(task, rng)
            gold = gold_reward(task, texts[0], True), gold_reward(task, texts[1], True)
            if texts[0] != texts[1] and not (judge.infallible and gold[0] == gold[1]):
                pair = _labelled_pair(prompt, texts, gold, judge, rng)
        yield pair


def _labelled_pair(
    prompt: Prompt, texts: tuple[str, str], gold: tuple[float, float], judge: SimulatedJudge, rng: random.Random
) -> PromptGroup:
    words = len(texts[0].split()), len(texts[1].split())
    first_is_better = rng.random() < judge.probability(gold, words)
    order = slice(None) if first_is_better else slice(None, None, -1)
    return PromptGroup(prompt, texts[order], ((0, 1),), gold[order], origin="lab")


def draw_prompts(split: Split, num_prompts: int) -> list[Prompt]:
    """The split's first prompts, the same in every run; the families take turns."""
    rng = random.Random(f"{split} prompts")
    return [draw_prompt(family, split, rng)[1] for family in islice(cycle(FAMILIES.values()), num_prompts)]


def check_counts(**counts: int) -> None:
    """Raises ValueError for a negative count, and where there is nothing to train on."""
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"data.{name}={value}: must not be negative")
    name, value = next(iter(counts.items()))
    if value == 0:
        raise ValueError(f"data.{name}=0: nothing to train on")


# --- writers: how often they are right (competence) and how they put it (style); the two vary independently


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


def _cut_answer(answer: str, rng: random.Random) -> str:
    words = " ".join((_polite(answer, rng), *rng.sample(ASIDES, 2))).split()
    beginning = words[: rng.randint(len(words) // 3, len(words) - 1)]
    return " ".join(beginning).rstrip(".,:")


Style = Literal["terse", "polite", "verbose", "rambling", "hedging", "unfinished"]
STYLES: dict[Style, Callable[[str, random.Random], str]] = {
    "terse": _terse,
    "polite": _polite,
    "verbose": _verbose,
    "rambling": _rambling,
    "hedging": _hedging,
    "unfinished": _cut_answer,
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
TERSE: StyleMix = {"terse": 1.0}
STYLE_MIXES: dict[str, StyleMix] = {"mixed": MIXED, "clean": CLEAN, "terse": TERSE}


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


# --- demonstrations


def lab_sft(
    seed: int,
    progress: Progress = silent,
    *,
    num_examples: int = 16384,
    num_eval_examples: int = 512,
    num_test_prompts: int = 400,
    test_split: Literal["validation", "test"] = "test",
    competence: float = 0.45,
    styles: Literal["mixed", "clean", "terse"] = "mixed",
) -> PreferenceData:
    """Demonstrations of one writer: groups of one response, without pairs. For `objective=sft`.

    The writer is right with probability `competence`; `styles` is the mix it writes in: every style, the clean
    ones alone, or the terse one alone (`Writer`). `rewards` holds the gold reward of each. Prompts as in `lab`. Raises
    ValueError for an option out of range.
    """
    check_counts(num_examples=num_examples, num_eval_examples=num_eval_examples, num_test_prompts=num_test_prompts)
    if not 0 <= competence <= 1:
        raise ValueError(f"data.competence={competence}: a probability, must be in [0, 1]")
    writer = Writer(competence, STYLE_MIXES[styles])
    train = draw_demonstrations(writer, "train", random.Random(f"{seed} train demonstrations"))
    held_out = draw_demonstrations(writer, "validation", random.Random(f"{seed} eval demonstrations"))
    return PreferenceData(
        train=list(progress(islice(train, num_examples), "drawing the lab's data", num_examples)),
        eval=list(islice(held_out, num_eval_examples)),
        test_prompts=draw_prompts(test_split, num_test_prompts),
    )


def draw_demonstrations(writer: Writer, split: Split, rng: random.Random) -> Iterator[PromptGroup]:
    """An endless stream of one writer's answers; the families take turns."""
    for family in cycle(FAMILIES.values()):
        task, prompt = draw_prompt(family, split, rng)
        response = writer.respond(task, rng)
        yield PromptGroup(prompt, (response,), (), (gold_reward(task, response, True),), origin="lab_sft")


# --- prompts of an evaluation


def lab_prompts(
    seed: int, progress: Progress, *, num_prompts: int = 400, split: Literal["validation", "test"] = "test"
) -> PromptSet:
    """The lab's first prompts of a split, whatever data a policy was trained on. Raises ValueError for none."""
    if num_prompts < 1:
        raise ValueError(f"prompts.num_prompts={num_prompts} must be at least 1")
    return held_out(draw_prompts(split, num_prompts), "lab")
