"""What stage=check counts for a reference is what it then holds in memory beside the policy."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_ref.cli.build import workspace
from dpo_ref.cli.check import held_by
from dpo_ref.data.groups import from_groups
from dpo_ref.lab.models import locate
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.models.memory import MOMENTS, WEIGHTS
from dpo_ref.references.interface import ReferenceContext, build
from tests.support.command import resolved
from tests.support.reference_contexts import LAYOUT
from tests.support.tiny import random_groups


def storages(*models):
    """Bytes of weights, by where they lie."""
    weights = [weight for model in models for weight in model.parameters()]
    return {weight.data_ptr(): weight.numel() * weight.element_size() for weight in weights}


MIXED = "reference.parts=[{reference: initial, cache: 'off'}, {reference: moving, reset: round}, none]"
CASES = {
    "the initial policy's table": (["reference=initial"], []),
    "the initial policy": (["reference=initial", "reference.cache=off"], []),
    "what moves": (["reference=moving"], []),
    "BEMA": (["reference=bema"], []),
    "another": (["reference=other", "reference.path=lab:tiny", "reference.cache=off"], []),
    "the base": (["reference=adapter_base", "reference.cache=off"], ["an adapter"]),
    "what moves, of an adapter": (["reference=moving"], ["an adapter"]),
    "between two": (
        ["reference=interpolate", "reference.path=lab:tiny", "reference.share=0.5", "reference.cache=off"],
        [],
    ),
    "another adapter": (["reference=other", "reference.adapter={adapter}", "reference.cache=off"], ["an adapter"]),
    "a mixture": (["reference=mixture", MIXED, "data=on_policy"], []),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_reference_holds_is_counted(case, tmp_path):
    words, adapter = CASES[case]
    saved = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(locate("lab:tiny"), dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(saved)
    rank = ["model.lora_rank=4"] if adapter else []
    config = resolved("model.path=lab:tiny", *[word.replace("{adapter}", str(saved)) for word in words], *rank)
    policy = config.model(torch.device("cpu"), config.model.bound(AdapterOptions)())
    work = replace(workspace(config, tmp_path), cache=tmp_path)
    groups = from_groups(random_groups(LAYOUT))
    reference = build(config.reference, ReferenceContext(work, policy, groups, lambda some: [list(some)]))
    ours = storages(policy.model)
    parts = reference._parts if case == "a mixture" else [reference]
    theirs = [storages(part.model) for part in parts if part.model is not None]
    held = sum(size for each in theirs for place, size in each.items() if place not in ours)
    trained = sum(w.numel() * w.element_size() for w in policy.model.parameters() if w.requires_grad)
    counted = held_by(config.reference, {WEIGHTS: sum(ours.values()), MOMENTS: 2 * trained})
    assert counted == pytest.approx(held, abs=4 * 256)  # the other adapter, of rank 1
    assert (counted > 0) == (case not in ("the initial policy's table", "the base", "another adapter"))
