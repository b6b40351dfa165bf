"""`data=on_policy`: sample from the policy, score, form groups, and train on them, round by round; resumable in the
middle of one.
"""

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float

from dpo_ref.component import LEFT_OPEN, MemberOf, RunPlan, component
from dpo_ref.data.groups import Groups, TokenGroups, from_groups
from dpo_ref.data.packing import epoch_order, share_of, steps_per_epoch
from dpo_ref.distributed import ranks
from dpo_ref.files.digests import Damaged, sealed, unsealed
from dpo_ref.files.writing import write_json
from dpo_ref.generation.engine import SampledPolicy, Sampling, answer, held_out
from dpo_ref.generation.records import Generation, Scores, read_generations, scored_together, write_generations
from dpo_ref.generation.sampling import Local
from dpo_ref.models.asked import Workspace
from dpo_ref.models.loading import TrainedModel
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.table import (
    PrecomputedReference,
    Rows,
    of_all_ranks,
    read_shards,
    row_key,
    score,
    write_shard,
)
from dpo_ref.tracking.terminal import say
from dpo_ref.training.advantages import ADVANTAGES, PAIRS, Grouping, Picked, all_with, best_of_n, bradley_terry
from dpo_ref.training.rounds import Round, Rounds, RoundsContext, groups_for
from dpo_ref.types import Asked, PreferenceData, Progress, TokenGroup, digest, silent

# --- the samples of one round: drawn from the policy, scored, kept as files from which a resumed run goes on


GENERATIONS, RECORD = "generations.jsonl", "record.json"


@dataclass(frozen=True, slots=True)
class Samples:
    """Answers to one round's prompts, ordered by prompt and sample, and their rewards; seconds of either."""

    generations: list[Generation]
    rewards: list[float]
    sample_seconds: float
    score_seconds: float
    server: dict[str, float] = field(default_factory=dict)  # metrics of one that drew them

    @property
    def have_server_logps(self) -> bool:
        """Whether a server gave log-probs that are the policy's own. At other temperatures than 1 servers differ in
        whether they give those before or after it."""
        return all(each.logps is not None and each.temperature == 1 for each in self.generations)

    def by_prompt(self) -> list[tuple[list[Generation], list[float]]]:
        """The samples of each prompt and their rewards."""
        size = max(generation.sample_index for generation in self.generations) + 1
        starts = range(0, len(self.generations), size)
        return [(self.generations[at : at + size], self.rewards[at : at + size]) for at in starts]

    def metrics(self) -> dict[str, float]:
        """What the round's samples are like. `reward_spread` is the standard deviation among a prompt's samples,
        `reward_best` the mean of each prompt's highest reward, `length` in tokens."""
        rewards = [rewards for _, rewards in self.by_prompt()]
        values = {
            "reward_mean": fmean(self.rewards),
            "reward_best": fmean(map(max, rewards)),
            "reward_spread": fmean(map(pstdev, rewards)),
            "length": fmean(generation.num_tokens for generation in self.generations),
            "ended": fmean(generation.finished for generation in self.generations),
            "sample_seconds": self.sample_seconds,
            "score_seconds": self.score_seconds,
            **self.server,
        }
        return {f"on_policy/{name}": value for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class PolicyInMemory:
    """The policy that is trained, which answers where it is."""

    policy: TrainedModel
    sampling: Sampling
    batch_size: int
    progress: Progress

    def hand_over(self, index: int) -> dict[str, float]:
        """Nothing is to be done: what is trained is what answers."""
        return {}

    def answer(self, prompts: Sequence[Asked], seed: int, folder: Path) -> list[Generation]:
        """The policy's answers as it is now."""
        engine = Local(self.policy.tokenizer, self.sampling, self.batch_size, lambda: self.policy.model)
        return answer(engine, held_out(prompts), seed, self.progress)

    def close(self) -> None:
        """Nothing is to be ended."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """The policy that is trained, and who scores its answers."""

    policy: SampledPolicy
    scorer: Callable[[Sequence[Generation]], Scores]

    def draw(self, prompts: Sequence[Asked], seed: int, folder: Path) -> Samples:
        """Answers of the policy as it was handed over. Raises ValueError where the scorer has no number for one."""
        started = time.perf_counter()
        generations = self.policy.answer(prompts, seed, folder)
        sampled_at = time.perf_counter()
        scores = scored_together(self.scorer, generations)
        unscored = sum(not math.isfinite(value) for value in scores.values)
        if unscored:
            raise ValueError(
                f"scorer {scores.name} has no finite reward for {unscored} of {len(generations)} samples, such as "
                f"an answer to {generations[0].prompt[-1]['content']!r}; choose another with scorer@data.scorer=..."
            )
        return Samples(generations, list(scores.values), sampled_at - started, time.perf_counter() - sampled_at)


def write_samples(folder: Path, samples: Samples) -> None:
    """Write a round's files; the record comes last and says that the folder is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    write_generations(folder / GENERATIONS, samples.generations)
    seconds = {"sample_seconds": samples.sample_seconds, "score_seconds": samples.score_seconds}
    of_server = {"server": samples.server} if samples.server else {}
    write_json(folder / RECORD, sealed({"rewards": samples.rewards} | seconds | of_server))
    for answers in folder.glob("*.partial.jsonl"):  # that a server gave before it was lost
        answers.unlink()


LOST = "the policy that drew the round's samples has been trained since: put the folder back, or start a new run"


def read_samples(folder: Path) -> Samples | None:
    """What `write_samples` wrote; None where it did not come to its end. Raises Damaged."""
    if not (folder / RECORD).is_file():
        return None
    record = unsealed((folder / RECORD).read_bytes(), str(folder / RECORD), LOST)
    try:
        samples = Samples(read_generations(folder / GENERATIONS, LOST), **record)
    except TypeError as error:
        raise Damaged(f"{folder / RECORD} is damaged: {error}", LOST) from error
    if len(samples.rewards) != len(samples.generations):
        raise Damaged(f"{folder} holds {len(samples.generations)} samples and {len(samples.rewards)} rewards", LOST)
    return samples


LARGE_GAP = 0.05  # nats per token in the mean; computing in bfloat16 makes some 0.02 (references/served.py)


def server_differences(samples: Samples, here: Sequence[Float[np.ndarray, " _"]]) -> dict[str, float]:
    """How the log-probs of the server that drew the samples differ from those computed here (for each sample, of its
    tokens), in nats: d = log p_server - log p_here of every token drawn.

    `server_gap` is the mean of |d|, `server_gap_max` the largest; `server_kl` estimates KL(server || policy) per token
    by exp(-d) - 1 + d, which is never negative and has the KL as its mean (Schulman 2020, "k3"). `samples` have the
    server's log-probs.
    """
    theirs = [np.asarray(generation.logps, dtype=np.float64) for generation in samples.generations]
    gaps = np.concatenate([logps - ours[: len(logps)] for logps, ours in zip(theirs, here, strict=True)])
    return {
        "server_gap": float(np.abs(gaps).mean()),
        "server_gap_max": float(np.abs(gaps).max()),
        "server_kl": float((np.expm1(-gaps) + gaps).mean()),
    }


def token_group(index: int, generations: Sequence[Generation], picked: Picked) -> TokenGroup:
    """The samples that were kept, as the tokens that were drawn: text tokenised again may be other tokens."""
    samples = [generations[position] for position in picked.places]
    return TokenGroup(
        group_index=index,
        group_id=replace(samples[0].texts, responses=tuple(sample.output for sample in samples)).group_id,
        prompt_ids=list(samples[0].prompt_ids),
        response_ids=tuple(list(sample.token_ids) for sample in samples),
        num_bytes=tuple(len(sample.output.encode()) for sample in samples),
        pairs=picked.pairs,
        advantages=picked.advantages,
    )


def groups_of(samples: Samples, grouping: Grouping, first_number: int, seed: int) -> list[TokenGroup]:
    """The groups that the samples give, numbered from `first_number`: a prompt whose samples say nothing gives none,
    nor does a pair of equal answers."""
    chance = random.Random(f"{seed} pairs")
    groups = []
    for index, (generations, rewards) in enumerate(samples.by_prompt(), first_number):
        picked = grouping(rewards, chance)
        if picked is not None:
            groups.append(token_group(index, generations, picked))
    return [group for group in groups if not group.pairs or len(set(map(tuple, group.response_ids))) > 1]


# --- what is refused before anything is loaded, and which grouping an objective gets


COUNTS = (
    "rounds", "prompts_per_round", "samples_per_prompt", "max_new_tokens", "generation_batch_size", "inner_epochs",
    "sample_every",
)  # fmt: skip
TWO_DRAWS = ("random_two", "bradley_terry")


def grouping_of(objective: Objective, pairs: str | None, scale: float | None, advantage: str | None) -> Grouping:
    """What becomes of a prompt's samples: a pair, all of them with advantages, or the best one."""
    if takes_pairs(objective):
        return PAIRS[pairs or "best_vs_worst"] if scale is None else partial(bradley_terry, scale=scale)
    return all_with(_advantage(objective, advantage)) if takes_advantages(objective) else best_of_n


def takes_pairs(objective: Objective) -> bool:
    """Whether it learns from a better and a worse response."""
    return objective.pairwise or "labels" in objective.inputs


def takes_advantages(objective: Objective) -> bool:
    """Whether it learns from all samples and what they are worth."""
    return "advantages" in objective.inputs


def _advantage(objective: Objective, advantage: str | None) -> str:
    usual = advantage or objective.hooks.advantage
    if usual is None:
        raise ValueError(f"objective={objective.name} names no advantage of its own; give one with data.advantage=...")
    return usual


def check_options(**options: Any) -> None:
    """Refuse values out of range. Raises ValueError naming the key."""
    for name in COUNTS:
        if options[name] < 1:
            raise ValueError(f"data.{name}={options[name]} must be at least 1")
    if options["prompts"].hooks.rounds is not None:
        raise ValueError("data.prompts are rows of other data, not on_policy itself; see data@data.prompts=...")
    if options["sample_every"] > options["rounds"]:
        raise ValueError(f"data.sample_every={options['sample_every']} exceeds data.rounds={options['rounds']}")
    if not 0 <= options["mix_offline"] < 1:
        raise ValueError(f"data.mix_offline={options['mix_offline']} must lie in [0, 1): a share of offline pairs")
    if not 0 <= options["temperature"] < float("inf"):
        raise ValueError(f"data.temperature={options['temperature']} must be 0 (greedy) or positive")
    if options["temperature"] == 0 and options["samples_per_prompt"] > 1:
        raise ValueError("data.temperature=0 gives every sample of a prompt alike; use data.samples_per_prompt=1")
    scale = options["preference_scale"]
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"data.preference_scale={scale} must be positive and finite")
    if scale is not None and options["pairs"] != "bradley_terry":
        raise ValueError(f"data.preference_scale={scale} has no effect without data.pairs=bradley_terry")


def check_run(objective: Objective, plan: RunPlan) -> None:
    """Refuse options that this objective leaves without effect or sense. Raises ValueError with the remedy."""
    options = plan.components["data"].options
    if "trainer.epochs" in plan.given:
        raise ValueError(
            "trainer.epochs has no effect on data=on_policy: data.rounds and data.inner_epochs say how long it trains"
        )
    if takes_pairs(objective):
        _check_pairs(objective, options)
    elif options["pairs"] is not None:
        raise ValueError(
            f"data.pairs={options['pairs']} has no effect: objective={objective.name} takes no pairs; leave it out"
        )
    if takes_advantages(objective):
        _check_advantages(objective, options)
    elif options["advantage"] is not None:
        raise ValueError(
            f"data.advantage={options['advantage']} has no effect: objective={objective.name} takes no advantages; "
            "leave it out"
        )


def _check_pairs(objective: Objective, options: Mapping[str, Any]) -> None:
    samples, pairs = options["samples_per_prompt"], options["pairs"]
    if samples < 2:
        raise ValueError(f"data.samples_per_prompt={samples}: objective={objective.name} compares two; use 2 or more")
    if pairs in TWO_DRAWS and samples > 2:
        raise ValueError(
            f"data.pairs={pairs} looks at two of {samples} samples, and the others' rewards would have no effect; "
            "use data.samples_per_prompt=2"
        )


def _check_advantages(objective: Objective, options: Mapping[str, Any]) -> None:
    samples, advantage = options["samples_per_prompt"], _advantage(objective, options["advantage"])
    if advantage != "none" and samples < 2:
        raise ValueError(
            f"data.samples_per_prompt={samples}: data.advantage={advantage} compares samples; use 2 or more"
        )
    if options["mix_offline"]:
        raise ValueError(
            f"data.mix_offline={options['mix_offline']}: the data's own answers have no advantages, which "
            f"objective={objective.name} needs; leave it out"
        )
    if options["temperature"] != 1:
        raise ValueError(
            f"data.temperature={options['temperature']}: objective={objective.name} is a gradient of the expected "
            "reward of the policy's own samples, which are those of temperature 1"
        )
    assert advantage in ADVANTAGES


# --- the component, and the rounds it makes


@dataclass(frozen=True, slots=True)
class Plan:
    """How many rounds of what."""

    rounds: int
    prompts_per_round: int
    samples_per_prompt: int
    num_offline: int  # groups of the data among a round's
    steps: int  # optimiser steps of a round
    sample_every: int
    grouping: Grouping
    max_new_tokens: int


NOTHING = "the samples of every prompt have equal rewards or texts, so there is no pair to learn from"


class OnPolicyRounds(Rounds):
    """On-policy rounds. Everything a round is made of depends on the run's seed, the round's number and the policy at
    its beginning; samples, rewards and the sampling policy's log-probs are files in the run's folder."""

    live = True

    def __init__(self, context: RoundsContext, sampler: Sampler, plan: Plan) -> None:
        self.config, self.pack = context.config, context.pack
        self.data = context.groups
        self.num_steps = min(plan.rounds * plan.steps, context.config.max_steps or plan.rounds * plan.steps)
        self._context, self._sampler, self._plan = context, sampler, plan
        self.known = comparable_groups(context.objective, context.groups) if plan.num_offline else context.groups[:0]
        if plan.num_offline and not len(self.known):
            raise ValueError("data.mix_offline: data.prompts has no pairs to mix in; leave it out")
        count = plan.rounds * plan.prompts_per_round
        self._prompts, self.notes = draw_prompts(context, plan.max_new_tokens, count)

    def after(self, first_step: int) -> Iterator[Round]:
        """The rounds that are not over after `first_step` steps, each sampled when it is asked for."""
        try:
            yield from self._rounds(first_step)
        finally:
            self._sampler.policy.close()

    def _rounds(self, first_step: int) -> Iterator[Round]:
        learnt = first_step > 0
        for begin in range(first_step - first_step % self._plan.steps, self.num_steps, self._plan.steps):
            index = begin // self._plan.steps
            samples = self._samples(index, max(begin, first_step))
            fresh = self._groups(index, samples)
            groups = [*groups_for(self._context.objective, from_groups(fresh)), *self._offline(index)]
            if not groups:
                say(f"round {index + 1}: {NOTHING}; it makes no steps")
                continue
            learnt = True
            steps = min(self._plan.steps, self.num_steps - begin)
            config = replace(self._context.config, epochs=float(steps), max_steps=steps)
            old = self._old(index, fresh) if self._needs_old else None
            yield Round(begin, groups, config, self._seed(index), old, self._metrics(index, samples, fresh))
        if not learnt:
            raise ValueError(
                f"in every round {NOTHING}; raise data.samples_per_prompt, data.prompts_per_round or data.temperature"
            )

    @property
    def _needs_old(self) -> bool:
        return "old" in self._context.objective.inputs

    def _seed(self, index: int) -> int:
        return int(digest(["round", self._context.work.seed, index])[:8], 16)

    def _folder(self, index: int) -> Path:
        return self._context.work.directory / "rounds" / f"{index + 1:04d}"

    def _samples(self, index: int, step: int) -> Samples:
        """The round's samples: from its files, or drawn now if now is when they are due. Raises ValueError if they are
        lost: the policy that drew them is gone."""
        first = index - index % self._plan.sample_every
        if step == first * self._plan.steps:
            due = range(first, min(first + self._plan.sample_every, self._plan.rounds))
            if lacking := ranks().first(lambda: [each for each in due if not self._is_drawn(each)]):
                told = self._sampler.policy.hand_over(first)
                for each in lacking:
                    self._draw(each, told if each == lacking[0] else {})
        samples = read_samples(self._folder(index))
        if samples is None:
            raise Damaged(f"{self._folder(index)} is not complete", LOST)
        return samples

    def _is_drawn(self, index: int) -> bool:
        """Whether the round's files are there and whole; damage is told of."""
        folder = self._folder(index)
        try:
            return read_samples(folder) is not None and (not self._needs_old or bool(_old_rows(folder)))
        except Damaged as damage:
            say(f"{damage.what}: the round is sampled again")
            return False

    def _draw(self, index: int, told: Mapping[str, float]) -> None:
        size, folder = self._plan.prompts_per_round, self._folder(index)
        samples = self._sampler.draw(self._prompts[index * size : (index + 1) * size], self._seed(index), folder)
        samples = replace(samples, server={**told, **self._compared(index, samples)})
        old = self._score(self._groups(index, samples)) if self._needs_old else None
        if ranks().is_first:
            if old is not None:
                shutil.rmtree(folder / "old", ignore_errors=True)
                write_shard(folder / "old", old)
            write_samples(folder, samples)
        ranks().wait()

    def _compared(self, index: int, samples: Samples) -> dict[str, float]:
        """How the log-probs of a server that drew the samples differ from the policy's; says where that is much."""
        if not samples.have_server_logps:
            return {}
        groups = groups_of(samples, all_with("none"), 0, 0)
        rows = self._score(groups)
        sizes = [np.cumsum([len(ids) for ids in group.response_ids])[:-1] for group in groups]
        parts = [np.split(rows[row_key(group)], ends) for group, ends in zip(groups, sizes, strict=True)]
        differences = server_differences(samples, [part for of_group in parts for part in of_group])
        if differences["server_gap"] > LARGE_GAP:
            say(
                f"round {index + 1}: the server's log-probs differ from the policy's by "
                f"{differences['server_gap']:.2g} nats per token in the mean, {differences['server_gap_max']:.2g} at "
                "most: it samples from another policy. Is its base model.path, and its precision model.weights?"
            )
        return differences

    def _score(self, groups: list[TokenGroup]) -> Rows:
        """Per-token log-probs of the policy as it is; of several ranks each asks it about its share."""
        policy, device = self._context.policy.model.eval(), self._context.work.device
        rows: Rows = {}
        for pack, counts in share_of(groups, self._context.pack).passes:
            found = score(policy, pack, device)
            rows |= found if counts else {}
        return of_all_ranks(rows)

    def _groups(self, index: int, samples: Samples) -> list[TokenGroup]:
        first = self._context.first_index + index * self._plan.prompts_per_round
        return groups_of(samples, self._plan.grouping, first, self._seed(index))

    def _offline(self, index: int) -> list[TokenGroup]:
        """The round's pairs of the data; none comes again before all have come."""
        count, total = self._plan.num_offline, len(self.known)
        indices = range(index * count, (index + 1) * count)
        return [self.known[epoch_order(total, self._context.work.seed, at // total)[at % total]] for at in indices]

    def _old(self, index: int, groups: list[TokenGroup]) -> PrecomputedReference:
        rows = _old_rows(self._folder(index))
        return PrecomputedReference("old", "", "", groups, rows, self._context.work.device)

    def _metrics(self, index: int, samples: Samples, fresh: list[TokenGroup]) -> dict[str, float]:
        size = self._plan.prompts_per_round
        return {
            "on_policy/round": float(index + 1),
            "on_policy/reward_queries": float((index + 1) * size * self._plan.samples_per_prompt),
            "on_policy/prompts_used": len(fresh) / size,
            **samples.metrics(),
        }


def _old_rows(folder: Path) -> Rows:
    """What the policy that drew a round's samples thought of them. Raises Damaged."""
    rows, damaged = read_shards(folder / "old")
    if damaged:
        raise Damaged(f"{damaged[0]} is damaged: its name is the digest of other content", LOST)
    return rows


def comparable_groups(objective: Objective, groups: TokenGroups) -> Groups:
    """Those that have what a round's groups have: pairs, or one wanted answer; none have advantages."""
    if takes_advantages(objective):
        return groups[:0]
    return groups_for(objective, groups.where(groups.have_pairs) if takes_pairs(objective) else groups)


def sampling_rounds(
    context: RoundsContext,
    served: Callable[[Any, Sampling, Workspace], SampledPolicy] | None = None,
    *,
    scorer: Annotated[Any, MemberOf("scorer")],
    rounds: int = 32,
    prompts_per_round: int = 64,
    samples_per_prompt: int = 4,
    max_new_tokens: Annotated[int, LEFT_OPEN] = 128,
    temperature: float = 1.0,
    generation_batch_size: int = 256,
    pairs: Literal["best_vs_worst", "random_two", "bradley_terry"] | None = None,
    preference_scale: float | None = None,
    advantage: Literal["none", "group_mean", "leave_one_out", "group_standardised"] | None = None,
    inner_epochs: int = 1,
    mix_offline: float = 0.0,
    sample_every: int = 1,
) -> Rounds:
    """Rounds of sampling from the policy, scoring, and training on what came of it (as in arXiv:2404.14367).

    In each of `rounds` rounds the policy as it is then answers `prompts_per_round` prompts `samples_per_prompt` times
    and `scorer` scores the answers. A pairwise objective gets a pair of each prompt's samples, as `pairs` says; one
    that takes advantages gets them all, with the `advantage` made of their rewards; any other the best of them.
    `inner_epochs` passes are made over a round's groups: the number of optimiser steps is fixed, so where prompts give
    no pair (equal rewards), what is left is seen more often. `mix_offline` is the share of the data's own pairs among
    a round's groups. `sample_every` rounds are sampled at once, so that all but the first train on samples of a stale
    policy. `served` is where the policy answers, unless here. Raises ValueError if no prompt leaves room for
    `max_new_tokens`.
    """
    plan = Plan(
        rounds=rounds,
        prompts_per_round=prompts_per_round,
        samples_per_prompt=samples_per_prompt,
        num_offline=(num_offline := round(prompts_per_round * mix_offline / (1 - mix_offline))),
        steps=inner_epochs * steps_per_epoch(prompts_per_round + num_offline, context.config.batch_size),
        sample_every=sample_every,
        grouping=grouping_of(context.objective, pairs, preference_scale, advantage),
        max_new_tokens=max_new_tokens,
    )
    sampling = Sampling(temperature, 1.0, max_new_tokens, samples_per_prompt)
    policy: SampledPolicy = PolicyInMemory(context.policy, sampling, generation_batch_size, context.work.progress)
    if served is not None:
        policy = served(context.policy, sampling, context.work)
    sampled_rounds = OnPolicyRounds(context, Sampler(policy, scorer), plan)
    queries = rounds * prompts_per_round * samples_per_prompt
    sampled_rounds.notes += (
        f"on-policy: {rounds} rounds of {prompts_per_round} prompts x {samples_per_prompt} samples, "
        f"{queries:,} rewards from {scorer.name}, {sampled_rounds.num_steps} steps",
    )
    return sampled_rounds


@component(check=check_options, check_run=check_run, rounds=sampling_rounds, held_out=comparable_groups)
def on_policy(seed: int, progress: Progress = silent, *, prompts: Annotated[Any, MemberOf("data")]) -> PreferenceData:
    """The data whose prompts the policy answers: its training prompts in the rounds, its pairs as `mix_offline`; held
    out are its own held-out pairs and test prompts."""
    return prompts(seed, progress)


# --- the prompts of all rounds, drawn from the rows of other data


def draw_prompts(context: RoundsContext, max_new_tokens: int, count: int) -> tuple[list[Asked], tuple[str, ...]]:
    """`count` prompts in an order drawn from the seed; none comes again before all have come.

    Prompts that leave no room for `max_new_tokens` are left out, and counted in a note. Raises ValueError for a row
    without a prompt, and where none is left.
    """
    sizes = context.groups.lengths()[0][context.groups.places]
    room, seen, too_long = context.max_length - max_new_tokens, {}, 0
    for index in np.random.default_rng([context.work.seed, 3]).permutation(len(sizes)).tolist():
        if len(seen) == count:
            break
        if sizes[index] > room:
            too_long += 1
            continue
        row = context.groups.text(index)
        if not row.prompt:
            raise ValueError(f"{row.origin} has no prompt that the policy could answer; choose other data.prompts")
        seen.setdefault(row.asked_id, row.asked)
    if not seen:
        raise ValueError(
            f"no prompt leaves room for data.max_new_tokens={max_new_tokens} in {context.max_length} tokens; lower "
            "it, or raise data.prompts.max_length"
        )
    note = f"  {too_long} prompts left out: with data.max_new_tokens they exceed {context.max_length} tokens"
    return list(islice(cycle(seen.values()), count)), (note,) if too_long else ()
