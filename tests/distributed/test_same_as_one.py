"""Any number of ranks is one rank: losses, metrics and final weights of a run are those of one process, in float64 to
1e-9, however the model is held and whichever rank a group falls to.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_ref.cli.resolve import component
from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import tokenise
from dpo_ref.distributed import ranks
from dpo_ref.models.layers import CHECKPOINTING
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.models.reward_model import with_score_head
from dpo_ref.models.sharding import ddp, fsdp, none
from dpo_ref.models.shards import gathered
from dpo_ref.references.interface import build
from dpo_ref.training.metrics import mean_of
from dpo_ref.training.optim import adamw, optimisation
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig, objective_groups
from dpo_ref.training.trainer import evaluate, train
from tests.support import reference_texts
from tests.support.command import composed, resolved
from tests.support.ranks import on_ranks
from tests.support.reference_contexts import TOKENIZER, context_for
from tests.support.tiny import disturbed, policy_of, random_groups, tiny_model

LAYOUT = [(3 + 7 * i % 13, (2 + 5 * i % 11, 1 + 3 * i % 4)) for i in range(11)]
STEPS, PAIRS = 3, 5  # of a step; the last of an epoch has one, so that a rank has none
BOUND = 1e-9
SIGNS = ("rewards/ties", "rewards/accuracies")


class Case(NamedTuple):
    parallel: str
    objective: str
    reference: str
    adapter: bool = False
    tied: bool = False
    ranks: int = 2
    accumulate: str = "every_pass"
    keep: str = "off"  # activations

    def __str__(self):
        words = [self.parallel, self.objective, self.reference, str(self.ranks), self.accumulate]
        more = {"lora": self.adapter, "tied": self.tied, self.keep: self.keep != "off"}
        return "-".join([*words, *(name for name, there in more.items() if there)])


OTHER = next(iter(reference_texts.OTHERS))
PARALLEL = {"none": none, "ddp": ddp, "fsdp": fsdp}


def _model(seed: int, case: Case):
    size = {"vocab_size": reference_texts.SIZE} if case.reference == "other_tokenizer" else {}
    return tiny_model(seed=seed, dtype=torch.float64, tie_word_embeddings=case.tied, **size)


def _policy(case: Case, parallel: str):
    model = _model(0, case)
    torch.manual_seed(3)
    adapter = AdapterOptions(lora_rank=3, lora_alpha=6.0).put_on(model) if case.adapter else None
    tokenizer = reference_texts.POLICY if case.reference == "other_tokenizer" else TOKENIZER
    policy = replace(policy_of(disturbed(model), tokenizer), adapter=adapter)
    if case.objective == "reward_model":
        policy = with_score_head(policy, 0)
    policy.model.double()  # a new head and an adapter are float32
    CHECKPOINTING[case.keep](policy.model)
    options = {"reduce": case.accumulate} if parallel == "fsdp" else {}
    return replace(policy, holding=PARALLEL[parallel](**options).holding(policy.model, torch.float32))


def _groups(case: Case):
    if case.reference == "other_tokenizer":
        return tokenise(
            reference_texts.data(reference_texts.TEXTS * 2), reference_texts.POLICY, max_length=10**6
        ).groups
    return from_groups(random_groups(LAYOUT))


def _reference(case: Case, policy, groups, uses_reference: bool, cache: Path):
    words = REFERENCES[case.reference] if uses_reference else ["reference=none"]
    configured = component("reference", composed(*words)[0].reference, words[0].partition("=")[2])
    make = partial(_other_model, case)
    theirs = reference_texts.OTHERS[OTHER] if case.reference == "other_tokenizer" else None
    tokenizer = theirs and theirs.tokenizer
    context = context_for(cache, make=make, theirs=tokenizer, policy=policy.model, groups=groups)
    return build(configured, replace(context, policy=policy, uses_reference=uses_reference))


def _other_model(case: Case, source):
    return _model(int(source.path), case)


def _run(case: Case, parallel: str, folder: Path) -> None:
    """Train a few steps; the first rank writes what came of it."""
    objective = resolved(f"objective={case.objective}").objective
    groups, policy = objective_groups(objective, _groups(case)), _policy(case, parallel)
    reference = _reference(case, policy, groups, objective.uses_reference, folder / f"cache-{case}")
    optim = optimisation(adamw, policy.model, STEPS, lr=1e-2, schedule="constant", warmup_ratio=0.0)
    packing = partial(pack, tokens_per_batch=40)
    rounds = OfflineRounds(groups, TrainerConfig(batch_size=PAIRS, max_steps=STEPS), packing, 2)
    lines = [step.metrics for step in train(policy, reference, objective, optim, rounds)]
    lines.append(mean_of(evaluate(policy, reference, objective, groups, packing)))
    weights = gathered(policy.model.state_dict())
    if ranks().is_first:
        named = [{name: float(value) for name, value in line.items()} for line in lines]
        (folder / f"{case}-{parallel}.json").write_text(json.dumps(named))
        kept = {name: value.detach().clone() for name, value in weights.items()}
        save_file(kept, folder / f"{case}-{parallel}.safetensors")


REFERENCES = {
    "initial": ["reference=initial", "reference.cache=off"],  # a table's float32 would be told from float64
    "moving": ["reference=moving", "reference.share=0.5", "reference.every=1"],
    "bema": ["reference=bema", "reference.every=1"],
    "other_tokenizer": ["reference=other", "reference.path='1'", "reference.max_altered=1.0"],
}
CASES = [
    Case("ddp", "dpo", "initial"),
    Case("fsdp", "dpo", "initial"),
    Case("ddp", "kto", "moving"),
    Case("fsdp", "kto", "moving", tied=True),
    Case("ddp", "beta_dpo", "other_tokenizer"),
    Case("fsdp", "beta_dpo", "other_tokenizer", tied=True),
    Case("ddp", "reward_model", "initial"),
    Case("fsdp", "reward_model", "initial"),
    Case("fsdp", "sft", "initial", accumulate="last_pass"),
    Case("ddp", "dpo", "initial", adapter=True),
    Case("fsdp", "dpo", "initial", adapter=True),
    Case("fsdp", "dpo", "bema"),
    Case("fsdp", "aot", "initial"),  # of which items a rank has matters
    Case("ddp", "dpo", "initial", keep="offload"),
    Case("fsdp", "dpo", "initial", keep="offload"),
]
UNEVEN = [Case("ddp", "beta_dpo", "initial", ranks=3), Case("fsdp", "dpo", "initial", ranks=3)]
WIDE = [
    case
    for parallel in ("ddp", "fsdp")
    for objective in ("dpo", "kto", "beta_dpo", "sft", "reward_model", "aot", "bco")
    for reference in ("initial", "moving", "other_tokenizer")
    for adapter in (False, True)
    for size in (2, 3)
    if (case := Case(parallel, objective, reference, adapter, ranks=size)) not in (*CASES, *UNEVEN)
    and not (objective == "reward_model" and (adapter or reference != "initial"))
    and not (objective == "sft" and reference != "initial")
]


def _all(cases: list[Case], folder: Path) -> None:
    for case in cases:
        _run(case, case.parallel, folder)


def _decided(line: dict[str, float]) -> dict[str, float]:
    """Without counts of signs where the policy is the reference: there every margin is zero up to rounding, and its
    sign is that of the order in which sums were taken."""
    margin = line.get("rewards/margins", 1.0)
    return {name: value for name, value in line.items() if name not in SIGNS or abs(margin) > BOUND}


def _compare(cases: list[Case], folder: Path, compared=dict) -> None:
    for size in sorted({case.ranks for case in cases}):
        some = [case for case in cases if case.ranks == size]
        on_ranks(folder / f"ranks-{size}", size, _all, some, folder)
    for case in cases:
        _run(case, "none", folder)
        ours, theirs = (json.loads((folder / f"{case}-{kind}.json").read_text()) for kind in (case.parallel, "none"))
        assert [line.keys() for line in ours] == [line.keys() for line in theirs], str(case)
        for mine, its in zip(ours, theirs, strict=True):
            assert compared(mine) == pytest.approx(compared(its), abs=BOUND, nan_ok=True), str(case)
        weights, alone = (load_file(folder / f"{case}-{kind}.safetensors") for kind in (case.parallel, "none"))
        assert weights.keys() == alone.keys(), str(case)
        for name, value in alone.items():
            assert (weights[name] - value).abs().max() < BOUND, f"{case}: {name}"


def test_two_ranks_are_one(tmp_path):
    _compare(CASES, tmp_path)


def test_three_ranks_with_an_uneven_batch_are_one(tmp_path):
    """Steps of five pairs on three ranks, and a last one of a single pair, of which two ranks have none."""
    _compare(UNEVEN, tmp_path)


@pytest.mark.slow
def test_the_wide_matrix(tmp_path):
    _compare(WIDE, tmp_path, compared=_decided)
