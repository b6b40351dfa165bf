"""How a run's training groups come about: at once, as offline data, or round by round; and the groups as an objective
needs them: pairs, wanted responses, labels, advantages, other prompts' responses.

A data component that makes its groups while the run goes on declares `rounds`: a function of a `RoundsContext` that
returns `Rounds`; `offline` is that of all others, one round that is there already.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import overload

from dpo_ref.data.groups import Groups, MappedGroups, SelectedGroups, TokenGroups
from dpo_ref.data.packing import epoch_order, optimiser_batches, steps_per_epoch
from dpo_ref.models.asked import Workspace
from dpo_ref.models.loading import TrainedModel
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference
from dpo_ref.types import PromptGroup, TokenGroup, digest


@dataclass
class TrainerConfig:
    """`trainer.*`. Cadences are in optimiser steps, or as named; training ends at whichever of epochs and max_steps
    comes first."""

    batch_size: int = 32  # groups (pairs) per optimiser step
    epochs: float = 1.0
    max_steps: int | None = None
    eval_every: int | None = None  # None: before and after training only
    save_every: int | None = None  # None: by `save_minutes`, at the end and when interrupted only
    save_minutes: float | None = 30.0  # after the first step that ends so long after the last checkpoint
    keep_checkpoints: int | None = 1  # the newest; None: all
    stop_when_degenerate: bool = False  # end the run once an evaluation in training says so
    keep_best: str | None = None  # a metric of eval/ or evaluation/: the policy best by it is kept, and is `policy/`
    patience: int | None = None  # end the run after so many evaluations in a row that are no better than the best

    def __post_init__(self) -> None:
        lengths = {"batch_size": self.batch_size, "epochs": self.epochs, "max_steps": self.max_steps}
        cadences = {"eval_every": self.eval_every, "save_every": self.save_every}
        cadences |= {"save_minutes": self.save_minutes}
        counts = {"keep_checkpoints": self.keep_checkpoints, "patience": self.patience}
        for name, value in (lengths | cadences | counts).items():
            if value is not None and value <= 0:
                raise ValueError(f"trainer.{name}={value} must be positive; null leaves it out")

    def num_steps(self, num_groups: int) -> int:
        """Optimiser steps of the whole run."""
        steps = max(1, round(self.epochs * steps_per_epoch(num_groups, self.batch_size)))
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True, slots=True)
class Round:
    """Groups to train on from optimiser step `begin` (0-based) on.

    `config` says how many steps that is; `old` are log-probs of the policy that drew the responses; `metrics` what is
    to be told of the round itself.
    """

    begin: int
    groups: Sequence[TokenGroup]
    config: TrainerConfig
    seed: int  # of the order
    old: Reference | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def batches(self, first_step: int) -> Iterator[tuple[int, list[TokenGroup]]]:
        """The round's optimiser steps from `first_step` on, and their groups: a function of seed and step alone."""
        first, last = max(self.begin, first_step), self.begin + self.config.num_steps(len(self.groups))
        batches = optimiser_batches(self.groups, self.config.batch_size, self.seed, first - self.begin)
        for step in range(first, last):
            yield step, next(batches)[1]

    def epochs(self, steps: int) -> float:
        """Epochs of the round's groups completed after so many steps of the run."""
        return (steps - self.begin) / steps_per_epoch(len(self.groups), self.config.batch_size)


class Rounds(ABC):
    """Training groups, round by round; how they are packed, and for how many steps."""

    known: Groups  # what is known before training: what a reference can precompute
    data: Groups  # what they are made from; a resumed run must have the same
    num_steps: int  # optimiser steps of the whole run
    config: TrainerConfig
    pack: "partial[list[list[TokenGroup]]]"  # `data.packing.pack` with its options
    live: bool = False  # whether there are groups besides the known ones, which the reference is asked about
    notes: tuple[str, ...] = ()  # what the user is told of how they come about

    @property
    def tokens_per_batch(self) -> int:
        """What a pack has room for."""
        return self.pack.keywords["tokens_per_batch"]

    def known_by(self, step: int) -> Groups:
        """The known groups that the first `step` steps need."""
        return self.known

    @abstractmethod
    def after(self, first_step: int) -> Iterator[Round]:
        """The rounds that are not over after `first_step` steps. The policy is trained on each before the next is
        asked for. Raises ValueError where a round cannot be gone on with."""


class OfflineRounds(Rounds):
    """Groups that are there already: one round. `old` gives the log-probs of the policy that drew the responses."""

    def __init__(
        self,
        groups: Groups,
        config: TrainerConfig,
        pack: "partial[list[list[TokenGroup]]]",
        seed: int,
        old: Reference | None = None,
    ) -> None:
        self.known, self.config, self.pack = groups, config, pack
        self._seed, self._old = seed, old
        self.data, self.num_steps = groups, config.num_steps(len(groups))

    def known_by(self, step: int) -> Groups:
        """Those that the first `step` steps visit, in the data's order."""
        count = step * self.config.batch_size
        if count >= len(self.data):
            return self.data
        return SelectedGroups(self.data, sorted(epoch_order(len(self.data), self._seed, 0)[:count]))

    def after(self, first_step: int) -> Iterator[Round]:
        """The one round."""
        yield Round(0, self.known, self.config, self._seed, self._old)


@dataclass(frozen=True, slots=True)
class RoundsContext:
    """What rounds are made from at run time."""

    work: Workspace
    policy: TrainedModel
    objective: Objective
    groups: TokenGroups  # the data's training groups
    first_index: int  # from here on `group_index` is free
    max_length: int  # tokens of prompt and response
    pack: "partial[list[list[TokenGroup]]]"
    config: TrainerConfig


def offline(context: RoundsContext) -> Rounds:
    """The data's training groups as they are. Raises ValueError if they are not what the objective needs."""
    groups = objective_groups(context.objective, context.groups)
    return OfflineRounds(groups, context.config, context.pack, context.work.seed)


def objective_groups(objective: Objective, groups: TokenGroups) -> Groups:
    """Training or held-out groups as an objective needs them, with the scores of their rows where it asks for them."""
    return with_rewards(objective, groups_for(objective, groups))


# --- groups as an objective needs them


def best_response_only(group: TokenGroup) -> TokenGroup:
    """The group reduced to its chosen response: what likelihood objectives fit, so the rest is never forwarded."""
    best = group.pairs[0][0] if group.pairs else 0
    return replace(
        group,
        response_ids=(group.response_ids[best],),
        num_bytes=(group.num_bytes[best],),
        pairs=(),
        scored=None if group.scored is None else (group.scored[best],),
        labels=None,
        advantages=None,
    )


def with_labels(group: TokenGroup) -> TokenGroup:
    """The group with its labels, or with those that its pairs say: what is better in a pair is wanted."""
    if group.labels is not None:
        return group
    better = {index for index, _ in group.pairs}
    return replace(group, labels=tuple(index in better for index in range(len(group.response_ids))))


def _likelihood(objective: Objective, groups: TokenGroups) -> Groups:
    return MappedGroups(groups.where(groups.wanted), best_response_only)


def _pairwise(objective: Objective, groups: TokenGroups) -> Groups:
    if not groups.have_pairs.all():
        raise ValueError(
            f"objective={objective.name} compares responses, but the data has rows with only one; use sft, or kto for "
            "rows with a label"
        )
    return groups


def _with_all_labels(objective: Objective, groups: TokenGroups) -> Groups:
    decided = groups.have_pairs | groups.labelled
    if not decided.all():
        raise ValueError(
            f"objective={objective.name} learns from wanted and unwanted responses, but {(~decided).sum():,} of "
            f"{len(decided):,} rows have neither a label nor a second response; use sft"
        )
    if (ranked := groups.undecided & ~groups.labelled).any():
        raise ValueError(
            f"objective={objective.name}: {ranked.sum():,} of {len(decided):,} rows rank several responses, and "
            "whether a middle one is wanted is not said; data.pairing=best_vs_worst keeps the ends"
        )
    return MappedGroups(groups, with_labels)


def _scored_samples(objective: Objective, groups: TokenGroups) -> Groups:
    if not groups.have_advantages.all():
        raise ValueError(
            f"objective={objective.name} learns from scored samples, and the data has rows without advantages; use "
            "data=on_policy"
        )
    return groups


KINDS: dict[str, Callable[[Objective, TokenGroups], Groups]] = {
    "pairwise": _pairwise,
    "labels": _with_all_labels,
    "advantages": _scored_samples,
    "quantiles": lambda objective, groups: groups,
    "likelihood": _likelihood,
}


def groups_for(objective: Objective, groups: TokenGroups) -> Groups:
    """The groups as the objective needs them: a likelihood is fitted to wanted responses alone, pairs are split for
    one that asks for labels. Raises ValueError for data that lacks what the objective needs."""
    stated = [name for name in ("labels", "advantages", "quantiles") if name in objective.inputs]
    kind = "pairwise" if objective.pairwise or objective.listwise else (stated or ["likelihood"])[0]
    fitting = KINDS[kind](objective, groups)
    return WithMismatched(fitting) if "mismatched" in objective.inputs and len(fitting) else fitting


def with_rewards(objective: Objective, groups: Groups) -> Groups:
    """The groups with the scores of their rows, where the objective asks for them. Raises ValueError naming the first
    row without scores."""
    if "rewards" not in objective.inputs:
        return groups
    rows = {group.group_index: groups.text(index) for index, group in enumerate(groups)}
    unscored = next((row for row in rows.values() if row.rewards is None), None)
    if unscored is not None:
        raise ValueError(
            f"objective={objective.name}: {unscored.origin or 'a pair of this data'} has no scores to make a margin "
            "of (score_chosen and score_rejected, or a score of each response); use objective="
            f"{'reward_model' if objective.of_scores else 'dpo'}"
        )
    rewards = {index: row.rewards for index, row in rows.items()}
    return MappedGroups(groups, lambda group: replace(group, rewards=rewards[group.group_index]))


class WithMismatched(Groups):
    """Groups with the responses of the next group behind their prompt, as `mismatched`.

    Next is cyclic in the data's order and skips groups with the same prompt; so the responses are the same in every
    run, and a table can hold their reference log-probs. They are cut where they would be longer behind this prompt
    than the longest sequence of the data. Raises ValueError for data with only one prompt.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.longest = max(len(group.prompt_ids) + max(map(len, group.response_ids)) for group in groups)
        self._next(0)

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        group, other = self.groups[index], self.groups[self._next(index)]
        size = self.longest - len(group.prompt_ids)
        mismatched = TokenGroup(
            group_index=-1 - group.group_index,
            group_id=digest([group.group_id, other.group_id]),
            prompt_ids=group.prompt_ids,
            response_ids=tuple(ids[:size] for ids in other.response_ids),
            num_bytes=other.num_bytes,
            pairs=(),
            scored=None if other.scored is None else tuple(mask[:size] for mask in other.scored),
        )
        return replace(group, mismatched=mismatched)

    def _next(self, index: int) -> int:
        prompt = self.groups[index].prompt_ids
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if self.groups[other].prompt_ids != prompt:
                return other
        raise ValueError("a KL on responses of other prompts needs data with at least two prompts")

    @property
    def others(self) -> list[Groups]:
        """The groups of other prompts' responses alone; their `group_index` is -1 minus the prompt's."""
        return [MappedGroups(self, _mismatched_group, self._mismatched_text)]

    @property
    def digest(self) -> str:
        """That of the groups."""
        return self.groups.digest

    def text(self, index: int) -> PromptGroup:
        """The texts of the group, without the other prompt's responses."""
        return self.groups.text(index)

    def _mismatched_text(self, index: int) -> PromptGroup:
        prompt, other = self.text(index), self.text(self._next(index))
        return replace(other, prompt=prompt.prompt, tools=prompt.tools, pairs=(), logps=None)


def _mismatched_group(group: TokenGroup) -> TokenGroup:
    assert group.mismatched is not None
    return group.mismatched
