"""`train.py stage=check`: what a training run would be like, from its own options, before anything is spent on it.

The model makes a few real optimiser steps, whose weights go with the process. Nothing else is left behind than
check.html: no run's record, no table of a reference.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_ref.cli.build import (
    NOTHING_LEFT,
    NUM_SAMPLES,
    SAMPLE_TOKENS,
    asks_reference,
    build_reference,
    check_paths,
    parallel_of,
    rounds_of,
    say_which,
    tokenise_data,
    tokenizer_of,
    trained_model,
    workspace,
)
from dpo_ref.cli.cache import check_cache
from dpo_ref.cli.rank_check import as_asked, fit_of, ranks_facts, scratch
from dpo_ref.cli.ranks import agree
from dpo_ref.cli.resolve import RunConfig, strength
from dpo_ref.cli.starting_point import Size, rate_of, size_of, trains_adapter
from dpo_ref.component import Component
from dpo_ref.data.chat_templates import ChatText
from dpo_ref.data.groups import ConcatGroups, Groups, SelectedGroups
from dpo_ref.data.inspection import examples_of, inspect
from dpo_ref.data.packing import Share, epoch_order, share_of
from dpo_ref.data.tokenise import Tokenised, end_of_turn_ids, length_limit
from dpo_ref.distributed import available_bytes, keep_memory, peak_memory_gib, ranks, resident_bytes
from dpo_ref.evaluation.check import RanksFacts, RunFacts, StepZero, run_warnings, step_zero
from dpo_ref.evaluation.results import MARGIN
from dpo_ref.models.asked import Workspace
from dpo_ref.models.folders import stored_positions
from dpo_ref.models.layers import CHECKPOINTING, check_checkpointing
from dpo_ref.models.loading import Policy, TrainedModel, compute_dtype, locate
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.models.memory import MOMENTS, WEIGHTS, StepMemory, meta_model, step_memory
from dpo_ref.models.rank_costs import ModelSizes, held_by_rank
from dpo_ref.models.sharding import Parallel
from dpo_ref.references.interface import Reference
from dpo_ref.references.table import read_shards, row_key
from dpo_ref.reports.check import Elsewhere, RunCheck, show_check, write_check
from dpo_ref.tracking.terminal import progress, say
from dpo_ref.training.cost import (
    CARDS,
    NUM_ANSWERS,
    ModelShape,
    Speed,
    Spent,
    StepTime,
    Stopwatch,
    answers_seconds,
    decoding_seconds,
    estimated_speed,
    forward_speed,
    speed_of,
    timed_steps,
    times_due,
    within,
)
from dpo_ref.training.optim import optimisation
from dpo_ref.training.reference_margins import by_reference, margins_of, told_of
from dpo_ref.training.rounds import Rounds, objective_groups
from dpo_ref.training.trainer import evaluate
from dpo_ref.types import Asked, Message, PreferenceData, TokenGroup

MOST_PAIRS, FEWEST_PAIRS = 64, 8  # that policy and reference score
SCORING_SECONDS, STEPS_SECONDS = 25.0, 45.0  # what the scoring and the steps may take on a slow device
NUM_STEPS = 3  # that are timed, after one that warms up
NUM_BATCHES = 8  # of which packs are made, to see how full they are
FORWARD_TOKENS = 1024.0  # by which forward passes are timed


def check_run(config: RunConfig, directory: Path) -> None:
    """`stage=check`. Raises ValueError for what a run would be refused for."""
    started = time.monotonic()
    keep_memory()
    check_cache()
    check_paths(config)
    torch.manual_seed(config.seed)
    trial = Trial(config, workspace(config, directory))
    agree({"the training data": trial.tokens[0].groups.digest})
    num_groups = len(trial.tokens[0].groups)
    say(f"{num_groups:,} groups to train on; counting memory, then measuring on {trial.work.device.type}")
    measured = NOTHING
    if trial.fits:
        with trial.policy.precision():
            measured = measure(trial)
    check = report(trial, measured, started)
    if ranks().is_first:
        show_check(check, write_check(directory, check))


# --- a run, put together up to its first step


@dataclass(frozen=True)
class Trial:
    """What a run would be made of. Each part is made when it is first asked for."""

    config: RunConfig
    work: Workspace

    @cached_property
    def data(self) -> PreferenceData:
        """The rows."""
        return self.config.data(self.config.seed, progress)

    @cached_property
    def program(self) -> int:
        """Bytes that the program and the data have in main memory, without the model."""
        return resident_bytes()

    @cached_property
    def available(self) -> int | None:
        """Bytes that a run, or this rank of it, can have on the device."""
        return available_bytes(self.work.device)

    @cached_property
    def parallel(self) -> Parallel:
        """How ranks hold the model."""
        return parallel_of(self.config)

    @cached_property
    def size(self) -> Size:
        """Of the model that is trained."""
        options = self.config.model.options
        return size_of(options["path"], "model.path", options["revision"])

    @cached_property
    def policy(self) -> TrainedModel:
        """The model that is trained; one without weights where they are far more than there is room for."""
        self.program  # noqa: B018  (before the model is there)
        options, device = self.config.model.options, self.work.device
        least = self.size.weights * LEAST_BYTES[device.type, trains_adapter(options)]
        least //= ranks().size if self.parallel.in_parts else 1
        if any(ranks().gather(self.available is not None and least > self.available)):
            return described(self.config, self.tokenizer, device)
        return trained_model(self.config, device)

    @cached_property
    def memory(self) -> StepMemory:
        """Of a step of the run, with what is there besides: on a CPU the program too."""
        memory = counted(self, self.policy, self.work.device)
        more = {"the program and the data": self.program} if self.on_cpu else {}
        return replace(memory, parts=memory.parts | more)

    @property
    def on_cpu(self) -> bool:
        """Whether the model shares its memory with the program."""
        return self.work.device.type == "cpu"

    @cached_property
    def sizes(self) -> ModelSizes:
        """Of the model that is trained."""
        return ModelSizes.of(self.policy.holding.as_saved(self.policy.model), self.policy.compute_dtype)

    @cached_property
    def tokens_that_fit(self) -> int:
        """Of a pack, at most those of the run; on every rank."""
        most = self.rounds.tokens_per_batch
        fit = most if self.available is None else min(most, self.memory.tokens_within(self.available))
        return min(ranks().gather(fit))

    @cached_property
    def fits(self) -> bool:
        """Whether a step can be made here, if only of one group."""
        loaded = self.policy.device.type != "meta"
        return loaded and self.tokens_that_fit >= max(group.num_tokens for group in self.sample)

    @property
    def pack(self) -> Any:
        """The run's packs, or smaller ones that fit."""
        return partial(self.rounds.pack, tokens_per_batch=self.tokens_that_fit)

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's, with its template."""
        return tokenizer_of(self.config)

    @cached_property
    def tokens(self) -> tuple[Tokenised, Tokenised]:
        """Training and held-out groups. Raises ValueError where none is left to train on."""
        options = self.config.model.options
        positions = stored_positions(locate(options["path"]), revision=options["revision"])
        train, held_out = tokenise_data(self.config, self.data, self.tokenizer, positions)
        if not len(train.groups):
            raise ValueError(NOTHING_LEFT)
        return train, held_out

    @cached_property
    def prompts(self) -> list[Asked]:
        """A few prompts to answer, where the run has the policy answer any."""
        answers = self.policy.writes and (self.rounds.live or bool(len(self.data.test_prompts)))
        rows = [self.data.train[index] for index in range(min(NUM_ANSWERS, len(self.data.train)))]
        return [row.asked for row in rows if row.prompt] if answers else []

    @cached_property
    def rounds(self) -> Rounds:
        """How training groups come about."""
        return rounds_of(self.config, self.work, self.policy, self.data, self.tokens[0].groups)

    @cached_property
    def held_out(self) -> Groups:
        """Held-out groups as the objective needs them."""
        return (self.config.data.hooks.held_out or objective_groups)(self.config.objective, self.tokens[1].groups)

    @cached_property
    def visited(self) -> Groups:
        """Training groups in the order in which the run comes to them; where it samples its own, those of the data
        that are like them."""
        known = self.config.data.hooks.held_out or objective_groups
        groups = known(self.config.objective, self.tokens[0].groups)
        return SelectedGroups(groups, epoch_order(len(groups), self.config.seed, 0))

    @cached_property
    def sample(self) -> list[TokenGroup]:
        """The groups of the first batches, as they are tokenised where the objective has none before the run."""
        groups = self.visited if len(self.visited) else self.tokens[0].groups
        return list(groups[: NUM_BATCHES * self.config.trainer.batch_size])

    @property
    def tokens_per_group(self) -> float:
        """Packed, in the mean of the sample."""
        return sum(group.num_tokens for group in self.sample) / len(self.sample)

    @property
    def batches(self) -> list[list[TokenGroup]]:
        """The sample as the run's first batches."""
        size = self.config.trainer.batch_size
        return [self.sample[start : start + size] for start in range(0, len(self.sample), size)]

    @cached_property
    def shares(self) -> list[Share]:
        """What this rank does of the first batches."""
        return [share_of(batch, self.rounds.pack) for batch in self.batches]

    @cached_property
    def fullest_pack(self) -> list[TokenGroup]:
        """Of this rank's shares."""
        packs = [some for share in self.shares for some, _ in share.passes]
        return max(packs, key=lambda some: sum(group.num_tokens for group in some))


# --- measured


@dataclass(frozen=True, slots=True)
class Measurements:
    """What was seen of the model here; None for what this run has not."""

    forward: float  # packed tokens a second without gradient
    reference: Reference | None
    reference_seconds: float  # of its pass over one group; 0 for one without a table
    zero: StepZero | None
    steps: Sequence[StepTime]
    decoding: float | None  # seconds of one more token of a few answers
    margins: np.ndarray  # of the reference, in nats, of pairs that it was asked about


NO_MARGINS = np.zeros(0)
NOTHING = Measurements(0.0, None, 0.0, None, (), None, NO_MARGINS)  # of a model that does not fit
LEAST_BYTES = {  # for each weight, by device and whether an adapter is trained: what loading takes, or training
    ("cpu", False): 16, ("cpu", True): 8, ("cuda", False): 8, ("cuda", True): 1,
}  # fmt: skip


def described(config: RunConfig, tokenizer: Any, device: torch.device) -> Policy:
    """The policy without its weights, which may be more than there is room for."""
    model = meta_model(config.model.options["path"], config.model.options["revision"])
    rank, how = config.model.options["lora_rank"], config.model.options["gradient_checkpointing"]
    if trains_adapter(config.model.options):
        AdapterOptions(lora_rank=rank or USUAL_RANK).put_on(model)
    check_checkpointing(how, device)
    CHECKPOINTING[how](model)
    return Policy(lambda: model, tokenizer, compute_dtype(config.model.options["dtype"], device))


USUAL_RANK = 16  # of a saved adapter, which is not looked into


def counted(trial: Trial, policy: TrainedModel, device: torch.device) -> StepMemory:
    """The memory of a step on the run's fullest pack, with a reference that stays and what an evaluation keeps."""
    num_packs = max(len(share.passes) for share in trial.shares)
    memory = step_memory(as_asked(policy, trial.parallel), trial.fullest_pack, num_packs, device)
    parts = held_by_rank(trial.parallel, memory.parts, trial.sizes, ranks().size)
    memory = replace(memory, parts=parts)
    config, more = trial.config, {}
    if config.objective.uses_reference and (held := held_by(config.reference, memory.parts)):
        more["reference"] = held
    if config.evaluation is not None and device.type == "cpu":
        more["the initial policy"] = memory.parts[MOMENTS] // 2
    return replace(memory, parts=memory.parts | more)


def held_by(reference: Component, parts: Mapping[str, int]) -> int:
    """Bytes of what a reference keeps on the device while the policy is trained, of whose step `parts` are: a model, a
    copy of what is trained, or nothing."""
    if reference.parts:
        return sum(held_by(part, parts) for part in reference.parts)
    if reference.options.get("cache") != "off" or reference.name == "adapter_base":
        return 0
    if "path" in reference.options:  # an adapter alone is on the policy's base
        return 0 if reference.options["path"] is None else parts[WEIGHTS]
    return parts[MOMENTS] // 2


def measure(trial: Trial) -> Measurements:
    """Score a few groups and make a few optimiser steps, as many as a slow device does in about a minute."""
    policy, batch_size = trial.policy, trial.config.trainer.batch_size
    alone = forward_speed(policy, within(trial.sample, FORWARD_TOKENS), trial.pack)
    forward = ranks().size * min(ranks().gather(alone))
    decoding = decoding_seconds(policy, trial.prompts, trial.work.seed) if trial.prompts else None
    if not len(trial.visited):
        return Measurements(forward, None, 0.0, None, (), decoding, NO_MARGINS)
    most = STEPS_SECONDS / (3 * (NUM_STEPS + 1)) * forward  # a gradient takes twice a forward pass
    size = len(within(trial.sample[:batch_size], most))
    affordable = int(SCORING_SECONDS * forward / trial.tokens_per_group)
    count = max(min(MOST_PAIRS, max(FEWEST_PAIRS, affordable)), (NUM_STEPS + 1) * size)
    groups = SelectedGroups(trial.visited, range(min(count, len(trial.visited))))
    with scratch(trial.work.cache) as cache:
        watch = Stopwatch(progress)
        work = replace(trial.work, cache=cache, progress=watch)
        reference = build_reference(trial.config, work, policy, groups)
    say_which(reference)
    seconds = watch.seconds.get("reference log-probs", 0.0) / len(groups)
    margins = looked_at(trial, reference, groups)
    zero = first_look(trial, reference, groups, margins) if len(margins) else None
    batches = [groups[start : start + size] for start in range(0, len(groups), size)]
    return Measurements(forward, reference, seconds, zero, steps_of(trial, reference, batches), decoding, margins)


def steps_of(trial: Trial, reference: Reference, batches: Sequence[Sequence[TokenGroup]]) -> list[StepTime]:
    """Optimiser steps on the first batches, without the first of them."""
    optimiser = trial.config.optim
    optim = optimiser.bound(optimisation)(optimiser, trial.policy.model, trial.rounds.num_steps)
    some = list(islice(cycle(batches), NUM_STEPS + 1))
    times = timed_steps(trial.policy, reference, trial.config.objective, optim, some, trial.pack)
    return list(progress(times, "optimiser steps", len(some)))[1:]


def looked_at(trial: Trial, reference: Reference, groups: Groups) -> np.ndarray:
    """Margins of the reference; empty where there are no pairs, or no reference."""
    have_pairs = any(group.pairs for group in groups)
    asked = trial.config.objective.uses_reference and have_pairs
    return margins_of(reference, groups, trial.pack, trial.work.device)[0] if asked else NO_MARGINS


def first_look(trial: Trial, reference: Reference, groups: Groups, margins: np.ndarray) -> StepZero:
    """What policy and reference say of pairs, before any step."""
    objective = trial.config.objective
    beta = beta_of(trial.config) if objective.pairwise else None
    ours = theirs = margins
    if objective.pairwise and not reference.equals(trial.policy):
        values = evaluate(trial.policy, reference, objective, groups[:], trial.pack)
        theirs = (values["ref_logps/chosen"] - values["ref_logps/rejected"]).cpu().numpy()
        ours = theirs + values[MARGIN.key].double().cpu().numpy() / (beta or 1.0)
    return step_zero(ours, theirs, beta, range(len(theirs)))


def beta_of(config: RunConfig) -> float | None:
    """How strong the run's KL constraint is, where its objective has one."""
    name = strength(config.objective.function.func)
    return None if name is None else config.objective.function.keywords[name]


# --- what follows from it


def report(trial: Trial, measured: Measurements, started: float) -> RunCheck:
    """Everything that is shown."""
    config = trial.config
    speed = speed_here(trial, measured)
    stored, asked = table_rows(trial, measured)
    spent = spent_by(trial, measured, speed, asked - stored) if measured.forward else []
    step = speed.step_seconds(trial.config.trainer.batch_size * trial.tokens_per_group) if measured.forward else None
    together = ranks_facts(trial, step)
    facts = facts_of(trial, measured, together, {part.part: part.seconds for part in spent})
    (example,) = examples_of(trial.tokenizer, trial.tokens[0].groups[:1])
    return RunCheck(
        title=title_of(config),
        facts=facts,
        warnings=run_warnings(facts),
        example=example,
        trained=trained_of(trial.policy.model),
        memory=trial.memory.parts,
        peak=trial.memory.peak,
        measured_peak=peak_here(trial, measured),
        speed=speed_words(trial, measured, speed),
        spent=spent,
        elsewhere=elsewhere_of(trial, num_steps(trial, measured)),
        table=table_words(measured, stored, asked),
        margins=measured.margins,
        told=told_of(measured.margins, config.data.bound(by_reference)()) if len(measured.margins) else {},
        took=time.monotonic() - started,
    )


def title_of(config: RunConfig) -> str:
    """What is checked."""
    beta = beta_of(config)
    strength_words = "" if beta is None else f" beta={beta:g}"
    return f"{config.objective.name}{strength_words} of {config.model.options['path']} on {config.data.name}"


def speed_here(trial: Trial, measured: Measurements) -> Speed:
    """Of the run's steps, as measured; or from forward passes, where the run samples what the data has none of."""
    if measured.steps:
        return speed_of(measured.steps, trial.config.trainer.batch_size)
    return Speed(measured.forward / 3, 0.0, "three times what a forward pass over the data's own answers takes")


def groups_per_second(trial: Trial, speed: Speed) -> float:
    """How many groups steps take in a second."""
    size = trial.config.trainer.batch_size
    return size / speed.step_seconds(size * trial.tokens_per_group)


def speed_words(trial: Trial, measured: Measurements, speed: Speed) -> str:
    """Groups a second, or seconds a group where that says more, and where it is from."""
    if not measured.forward:
        return "not measured: it does not fit here"
    rate = groups_per_second(trial, speed)
    words = f"{rate:.1f} groups a second" if rate >= 0.1 else f"{1 / rate:.1f} s for each group"
    return f"{words}, {speed.how}"


def peak_here(trial: Trial, measured: Measurements) -> str | None:
    """What the steps that were made here took, beside what is counted for packs of their size."""
    if not measured.steps:
        return None
    passes = share_of(trial.sample[: measured.steps[0].num_groups], trial.pack).passes
    largest = max(sum(group.num_tokens for group in some) for some, _ in passes)
    counted_there = trial.memory.peak - trial.memory.by_token * (trial.memory.num_tokens - largest)
    peak = max(ranks().gather(peak_memory_gib(trial.work.device)))
    return f"{peak:.2f} GiB at most for packs of {largest:,} tokens, where {counted_there / 2**30:.2f} GiB are counted"


def elsewhere_of(trial: Trial, steps: int) -> list[Elsewhere]:
    """The run of so many steps on a graphics card, where there is none here, the run is one process and the model no
    toy."""
    shape = ModelShape.of(trial.policy.model)
    if not trial.on_cpu or trial.size.is_toy or ranks().size > 1:
        return []
    cuda = torch.device("cuda")
    half = replace(trial.policy, load=lambda: trial.policy.model, compute_dtype=torch.bfloat16)
    needed = counted(trial, half, cuda).peak
    found = []
    for card in CARDS:
        speed = estimated_speed(shape, trial.sample, card)
        seconds = steps * speed.step_seconds(trial.config.trainer.batch_size * trial.tokens_per_group)
        found.append(Elsewhere(card.name, needed, round(card.gib * 2**30), groups_per_second(trial, speed), seconds))
    return found


def table_rows(trial: Trial, measured: Measurements) -> tuple[int, int]:
    """How many of the groups that the run asks its reference about are in its table already, in each of a mixture's,
    and how many they are. Of a reference that reads other text it is not known."""
    reference = measured.reference
    if reference is None or reference.live or not measured.reference_seconds:
        return 0, 0
    rounds = trial.rounds
    visited = rounds.known if asks_reference(trial.config) else rounds.known_by(rounds.num_steps)
    groups = ConcatGroups(visited, trial.held_out)
    folders = [trial.work.cache / "reference" / table for table in reference.tables]
    if not all(folder.is_dir() for folder in folders):
        return 0, len(groups)
    keys = {row_key(group) for group in progress(groups, "looking for the table", len(groups))}
    return min(len(groups), *(len(read_shards(folder, keys)[0]) for folder in folders)), len(groups)


def table_words(measured: Measurements, stored: int, asked: int) -> str:
    """What a reference's table has already."""
    if not asked:
        return "" if measured.reference is None else "none: the reference is asked as the run goes on, or needs none"
    return f"{stored:,} of {asked:,} groups are in the cache" if stored else f"not there; {asked:,} groups to score"


def num_steps(trial: Trial, measured: Measurements) -> int:
    """Of the run; where the reference chooses its pairs, as many as it would be if it kept the share of all groups
    that it keeps of those looked at."""
    whole = trial.rounds.num_steps
    if not asks_reference(trial.config) or not len(measured.margins):
        return whole
    kept = trial.config.data.bound(by_reference)().keeps(measured.margins).mean()
    return min(whole, trial.config.trainer.num_steps(max(1, round(kept * len(trial.rounds.known)))))


def spent_by(trial: Trial, measured: Measurements, speed: Speed, missing: int) -> list[Spent]:
    """The run's seconds by part."""
    config, steps = trial.config, num_steps(trial, measured)
    size = config.trainer.batch_size
    spent = [
        Spent("reference pass", f"{missing:,} groups", missing * measured.reference_seconds),
        Spent("steps", f"{steps:,} of {size} groups", steps * speed.step_seconds(size * trial.tokens_per_group)),
    ]
    times, count = times_due(steps, config.trainer.eval_every), len(trial.held_out)
    if count:
        seconds = times * count * trial.tokens_per_group / measured.forward
        spent.append(Spent("evaluation", f"{times} times {count:,} held-out groups", seconds))
    return [*spent, *(_answers(trial, steps, measured.decoding) if measured.decoding else [])]


def _answers(trial: Trial, steps: int, a_token: float) -> list[Spent]:
    """What the policy writes in so many steps and at the end, where one more token of a few answers takes so many
    seconds; every answer as long as it may be."""
    config, device = trial.config, trial.work.device
    spent = []
    if config.evaluation is not None:
        options = config.evaluation.options
        times = times_due(steps, options["every"]) + 1  # the initial policy's own, once
        count, tokens = options["num_prompts"] * options["samples_per_prompt"], options["max_new_tokens"]
        seconds = times * answers_seconds(a_token, count, options["batch_size"], tokens, device)
        spent.append(Spent("answers", f"{times} times {count}, of {tokens} tokens at most", seconds))
    if trial.rounds.live and config.generation is None:
        options = config.data.options
        count, tokens = options["prompts_per_round"] * options["samples_per_prompt"], options["max_new_tokens"]
        each = answers_seconds(a_token, count, options["generation_batch_size"], tokens, device)
        spent.append(Spent("sampling", f"{options['rounds']} rounds of {count} answers", options["rounds"] * each))
    count = min(NUM_SAMPLES, len(trial.data.test_prompts))
    last = answers_seconds(a_token, count, NUM_SAMPLES, SAMPLE_TOKENS, device)
    return [*spent, *([Spent("samples", f"{count} answers at the end", last)] if count else [])]


def trained_of(model: Any) -> list[str]:
    """What is trained and what stays."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [f"{trained:,} of {total:,} parameters ({trained / total:.1%})"]


def frozen_experts(model: Any) -> float:
    """The share of a model's parameters that are experts which nothing trains."""
    total = sum(p.numel() for p in model.parameters())
    layers = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    frozen = [
        p.numel() for name, p in model.named_parameters()
        if ".experts." in name and not p.requires_grad and not name.startswith(tuple(layers) or "\0")
    ]  # fmt: skip
    return sum(frozen) / total


def facts_of(trial: Trial, measured: Measurements, together: RanksFacts | None, seconds: dict[str, float]) -> RunFacts:
    """What warnings are made from."""
    config, model, tokenizer = trial.config, trial.policy.model, trial.tokenizer
    objective, ends = config.objective, end_of_turn_ids(tokenizer)
    responses = [ids for group in trial.sample for ids in group.response_ids]
    adapter = trial.policy.adapter is not None
    num_groups, steps = max(len(trial.rounds.data), 1), num_steps(trial, measured)
    options = config.data.options
    return RunFacts(
        hygiene=inspect(trial.data, *trial.tokens),
        max_length=length_limit(tokenizer, options["max_length"]),
        tokens_per_batch=trial.rounds.tokens_per_batch,
        num_steps=steps,
        epoch_share=1.0 if trial.rounds.live else trial.rounds.num_steps * config.trainer.batch_size / num_groups,
        pairwise=objective.pairwise,
        uses_reference=objective.uses_reference,
        reference=measured.reference.name if measured.reference is not None else config.reference.name,
        lr=config.optim.options["lr"],
        usual_lr=rate_of(objective, trial.size, adapter).lr,
        whose_lr=f"{'an adapter on ' if adapter else ''}a model of {trial.size} weights",
        unfinished=sum(ids[-1] not in ends for ids in responses) / len(responses),
        longest=max(group.num_tokens for group in trial.sample),
        positions=trial.policy.positions,
        prompt_is_open=is_open(tokenizer),
        held_out_option="data.eval_fraction=0.1" if "eval_fraction" in options else "data.eval_path",
        frozen_experts=frozen_experts(model),
        float32_on_cuda=config.model.options["dtype"] == "float32" and trial.work.device.type == "cuda",
        step_zero=measured.zero,
        fit=fit_of(trial, together),
        together=together,
        seconds=seconds,
    )


def is_open(tokenizer: Any) -> bool:
    """Whether the chat template goes on from a question to where the assistant begins, or needs nothing there."""
    question = [Message(role="user", content="a")]
    chat = ChatText(tokenizer)
    closed, opened = (chat.write([question], start=start)[0] for start in (False, True))
    return closed != opened or chat.render(question, ["b"]).bodies[0].lstrip().startswith("b")
