"""Policies trained in a bandit by several methods, over several seeds, and what each of them came to.

A method is an objective and where its data comes from. `offline` draws everything from the reference before training
and goes through it `steps_per_round` times; `on_policy` draws each round from the policy as it then is, and takes the
same number of steps on it. Both see as many rounds of as many responses, so they cost the same reward queries and the
same optimiser steps. The step is `trainer.train`'s, the loss any objective.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from dpo_ref.component import RunPlan, component
from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import pack
from dpo_ref.lab.bandits.worlds import Arms, Draws, TokenWorld, World, frozen_copy, rated_groups, utilities
from dpo_ref.models.loading import Policy
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference
from dpo_ref.references.policies import LiveReference, NoReference
from dpo_ref.training.on_policy import grouping_of, takes_advantages
from dpo_ref.training.optim import Optimisation, adamw, optimisation
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig, groups_for
from dpo_ref.training.trainer import Step, train
from dpo_ref.types import TokenGroup


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """`bandit.*` of every bandit. Raises ValueError for a value out of range.

    `beside` are methods to compare with, each as one would type it after `train.py`: "ipo_sum beta=0.3",
    "sft bandit.samples_per_group=10".
    """

    peaks: tuple[int, ...] = (20, 70)
    schedules: tuple[str, ...] = ("offline", "on_policy")
    beside: tuple[str, ...] = ()
    num_seeds: int = 5
    rounds: int = 20
    steps_per_round: int = 10
    queries_per_round: int = 100
    samples_per_group: int = 2
    label_steepness: float = 10.0
    lr: float = 0.03
    measure_every: int = 10

    def __post_init__(self) -> None:
        counts = {"num_seeds": self.num_seeds, "rounds": self.rounds, "steps_per_round": self.steps_per_round}
        counts |= {"queries_per_round": self.queries_per_round, "samples_per_group": self.samples_per_group}
        counts |= {"measure_every": self.measure_every}
        for name, value in {**counts, "label_steepness": self.label_steepness, "lr": self.lr}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"bandit.{name}={value} must be positive and finite")
        if self.samples_per_group % 2:
            raise ValueError(f"bandit.samples_per_group={self.samples_per_group} must be even: responses are paired")
        if self.queries_per_round % self.samples_per_group:
            raise ValueError(
                f"bandit.queries_per_round={self.queries_per_round} must be a multiple of "
                f"bandit.samples_per_group={self.samples_per_group}"
            )
        if not self.schedules or set(self.schedules) - set(SCHEDULES):
            raise ValueError(f"bandit.schedules={list(self.schedules)} must be some of {', '.join(SCHEDULES)}")
        if not self.peaks or not all(0 <= peak < 100 for peak in self.peaks):
            raise ValueError(f"bandit.peaks={list(self.peaks)} must be arms from 0 to 99")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "StudyOptions":
        """From a component's options, which hold lists and also those of its world."""
        own: dict[str, Any] = {field.name: values[field.name] for field in fields(cls)}
        own |= {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
        return cls(**own)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of a run."""
        return self.rounds * self.steps_per_round

    @property
    def groups_per_round(self) -> int:
        """Prompts of a round, each answered `samples_per_group` times; the groups of one optimiser step."""
        return self.queries_per_round // self.samples_per_group


@dataclass(frozen=True, slots=True)
class Method:
    """An objective with the options it is trained under. `beta` is its KL strength, None where it has none; `words`
    are what was said about the objective besides its name."""

    objective: Objective
    options: StudyOptions
    beta: float | None
    words: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its name in tables and pictures."""
        fitted = set(self.objective.inputs) == {"policy"} and not self.objective.pairwise
        best = (f"best of {self.options.samples_per_group}",) if fitted else ()
        return ", ".join((self.objective.name, *best, *self.words))


def slug(label: str) -> str:
    """A method's label as part of a metric's name."""
    return label.replace(", ", "_").replace(" ", "_")


@dataclass(frozen=True, slots=True)
class Trace:
    """What one method came to under one reward: S seeds, measured at P steps; KL in nats per response."""

    peak: int
    schedule: str
    label: str
    steps: Int[np.ndarray, " P"]
    queries: Int[np.ndarray, " P"]
    reward: Float[np.ndarray, "S P"]
    kl: Float[np.ndarray, "S P"]
    tokens: Float[np.ndarray, "S V"]  # a token's mean distribution at the end

    @property
    def key(self) -> str:
        """Its prefix in metrics.jsonl."""
        return f"peak_{self.peak}/{self.schedule}/{slug(self.label)}"


Draw = Callable[[int], list[TokenGroup]]  # a round, by its index
Fit = Callable[[list[TokenGroup]], Iterator[Step]]


def _offline(draw: Draw, fit: Fit, options: StudyOptions) -> Iterator[int]:
    """Every round's data is drawn before the first step; yields the rounds drawn, after each step."""
    for _ in fit([group for index in range(options.rounds) for group in draw(index)]):
        yield options.rounds


def _on_policy(draw: Draw, fit: Fit, options: StudyOptions) -> Iterator[int]:
    """Every round's data is drawn when the round begins; yields the rounds drawn, after each step."""
    for index in range(options.rounds):
        for _ in fit(draw(index)):
            yield index + 1


SCHEDULES: dict[str, Callable[[Draw, Fit, StudyOptions], Iterator[int]]] = {
    "offline": _offline,
    "on_policy": _on_policy,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A world with one of its rewards, and whether the loss sees the initial policy as its reference."""

    world: World
    peak: int
    with_reference: bool


def _stream(*names: int) -> torch.Generator:
    """A random stream of its own for every combination of numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(names).generate_state(1)[0]))


def _rate(draws: Draws, method: Method, noise: torch.Generator, first_number: int) -> list[TokenGroup]:
    """A round's groups with what the rater says of them, and advantages where the objective takes them.

    Advantages are in the rater's units, steepness times the reward, so that a beta means the same for every method.
    """
    steepness = method.options.label_steepness
    groups = rated_groups(draws, utilities(draws.rewards, steepness, noise), first_number)
    if not takes_advantages(method.objective):
        return groups
    grouping, chance = grouping_of(method.objective, None, None, None), random.Random(0)  # these leave nothing to it
    scaled_rewards = (steepness * draws.rewards).tolist()
    advantages = [grouping(values, chance).advantages for values in scaled_rewards]  # pyright: ignore[reportOptionalMemberAccess]
    return [replace(group, advantages=values) for group, values in zip(groups, advantages, strict=True)]


def _optimiser(policy: nn.Module, options: StudyOptions) -> Optimisation:
    flat: Any = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": None}
    return optimisation(adamw, policy, options.num_steps, lr=options.lr, **flat)


def one_run(
    problem: Problem, method: Method, schedule: str, start: nn.Module, seeds: tuple[int, int]
) -> tuple[list[tuple[int, int, float, float]], Float[torch.Tensor, " V"]]:
    """Train a copy of `start`; (step, queries, reward, KL) at the steps measured, and the last token distribution.

    `seeds`, seed and replicate, choose the draws, the rater's noise and the order of the data; the draws of equally
    sized rounds are the same for every objective as long as the policies are.
    """
    options, world = method.options, problem.world
    policy, initial = frozen_copy(start).requires_grad_(True), frozen_copy(start)
    reference: Reference = LiveReference("initial", initial, "", "") if problem.with_reference else NoReference()
    rewards, draws = world.rewards(problem.peak), _stream(*seeds, problem.peak, 0)
    optim = _optimiser(policy, options)

    def draw(index: int) -> list[TokenGroup]:
        sample = world.draw(policy, rewards, (options.groups_per_round, options.samples_per_group), draws)
        return _rate(sample, method, draws, index * options.groups_per_round)

    def fit(groups: list[TokenGroup]) -> Iterator[Step]:
        fitting = groups_for(method.objective, from_groups(groups))
        config = TrainerConfig(batch_size=options.groups_per_round, epochs=float(options.steps_per_round))
        whole = partial(pack, tokens_per_batch=2**20)
        old = LiveReference("old", frozen_copy(policy), "", "")
        rounds = OfflineRounds(fitting, config, whole, seeds[0], old)
        return train(Policy(lambda: policy, None), reference, method.objective, optim, rounds)

    def measure(step: int, rounds: int) -> tuple[int, int, float, float]:
        measurements.append(world.measure(policy, initial, rewards, _stream(*seeds, problem.peak, 1, step)))
        return step, rounds * options.queries_per_round, measurements[-1].reward, measurements[-1].kl

    measurements = []
    points = [measure(0, 0)]
    for step, rounds in enumerate(SCHEDULES[schedule](draw, fit, options), 1):
        if step % options.measure_every == 0 or step == options.num_steps:
            points.append(measure(step, rounds))
    return points, measurements[-1].tokens


def trace(problem: Problem, method: Method, schedule: str, starts: list[nn.Module], seed: int) -> Trace:
    """One method under one reward, from each of the initial policies."""
    runs = [one_run(problem, method, schedule, start, (seed, replicate)) for replicate, start in enumerate(starts)]
    steps, queries, reward, kl = np.array([points for points, _ in runs]).transpose(2, 0, 1)
    return Trace(
        peak=problem.peak,
        schedule=schedule,
        label=method.label,
        steps=steps[0].astype(int),
        queries=queries[0].astype(int),
        reward=reward,
        kl=kl,
        tokens=np.stack([tokens.numpy() for _, tokens in runs]),
    )


# --- what can be chosen with `bandit=`, and what has no effect beside it


WITHOUT_EFFECT = (  # a bandit has its own, or no use for it
    "model", "data", "optim", "trainer", "evaluation", "scorer", "resume", "stage",
)  # fmt: skip
REFERENCES = ("auto", "initial", "none")


def _check_options(**values: Any) -> None:
    """Raise ValueError for a value out of range."""
    for name in values.keys() - {field.name for field in fields(StudyOptions)}:
        if not 0 < values[name] < float("inf"):
            raise ValueError(f"bandit.{name}={values[name]} must be positive and finite")
    StudyOptions.of(values)


def _check_run(objective: Objective, plan: RunPlan) -> None:
    """Refuse what has no effect on a bandit: the groups of language models, and references that are none here."""
    for override in plan.overrides:
        if override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0] in WITHOUT_EFFECT:
            raise ValueError(
                f"{override} has no effect on a bandit, which has a policy, data and an optimiser of its own "
                "(bandit.*); leave it out"
            )
    reference = plan.components["reference"].name
    if reference not in REFERENCES:
        raise ValueError(
            f"reference={reference} has no meaning in a bandit; there are {', '.join(REFERENCES)}, and auto is initial"
        )


@component(check=_check_options, check_run=_check_run)
def arms(*, width: float = 10.0) -> World:
    """The 100-arm bandit: the reference is the histogram of tanh(Cauchy(-0.7, 0.4)), `width` that of the reward."""
    return Arms(width)


@component(check=_check_options, check_run=_check_run)
def tokens(*, width: float = 10.0, length: int = 10, fit_steps: int = 200) -> World:
    """The sequence bandit: `length` tokens of 100; `fit_steps` fit the initial policy to the reference."""
    return TokenWorld(width, length, fit_steps)
