"""What a step takes is what its tensors are: as torch's profiler counts real ones, by hand, and as the system counts a
process that trains a real model.

    DPO_REF_REAL_MODEL=<folder of SmolLM2-135M-Instruct> python -m pytest -m slow tests/models/test_step_memory.py
"""

import json
import os
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from dpo_ref.data.packing import collate
from dpo_ref.models import layers, loading
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.models.memory import (
    ACTIVATIONS,
    GRADIENTS,
    LIBRARY,
    MOMENTS,
    REST,
    WEIGHTS,
    StepMemory,
    meta_model,
    step_memory,
)
from dpo_ref.models.reward_model import with_score_head
from tests.support.command import typed_afresh
from tests.support.tiny import policy_of, random_groups, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GROUPS = random_groups([(60, (90, 75)), (40, (66, 110))])
SIZES = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 503, "num_hidden_layers": 2}


def model_of(rank=None, checkpointing="off"):
    model = tiny_model(**SIZES)
    if rank is not None:
        AdapterOptions(lora_rank=rank).put_on(model)
    layers.CHECKPOINTING[checkpointing](model)
    return model


OPTIONS = {"full": {}, "LoRA": {"rank": 4}, "recomputed": {"checkpointing": "full"}}


@cache
def counted(kind):
    return step_memory(policy_of(model_of(**OPTIONS[kind])), GROUPS, 2, CPU)


def measured(model, groups):
    """Bytes that torch's allocator gave out at most, beyond those before, in a second pack's passes."""
    policy, batch = policy_of(model.train()), collate(groups)

    def step():
        loss, outputs = policy.loss(batch, lambda part, span: part.sums.sum())
        del outputs
        loss.backward()

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_peak_is_what_the_allocator_gives_out(kind):
    parts = counted(kind).parts
    assert parts[ACTIVATIONS] + parts[REST] == pytest.approx(measured(model_of(**OPTIONS[kind]), GROUPS), rel=0.05)


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_parts_by_hand(kind):
    """Weights and what is trained of them, 4 bytes each; gradients while a second pack is taken, two moments."""
    model, parts = model_of(**OPTIONS[kind]), counted(kind).parts
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parts[WEIGHTS] == 4 * sum(p.numel() for p in model.parameters()) + buffers
    assert parts[GRADIENTS] == 4 * trained
    assert parts[MOMENTS] == 8 * trained


def test_activations_grow_with_tokens_and_shrink_when_they_are_computed_again():
    once, half = counted("full"), step_memory(policy_of(model_of()), GROUPS[:1], 2, CPU)
    share = GROUPS[0].num_tokens / once.num_tokens
    assert half.num_tokens == GROUPS[0].num_tokens
    assert half.parts[ACTIVATIONS] == pytest.approx(share * once.parts[ACTIVATIONS], rel=0.05)
    assert counted("recomputed").parts[ACTIVATIONS] < once.parts[ACTIVATIONS] / 5
    assert counted("recomputed").peak < once.peak / 1.5


def test_the_model_is_left_as_it_is():
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step_memory(policy_of(model), GROUPS, 2, CPU)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks


def test_half_precision_on_cuda_takes_less_and_has_no_c_library():
    policy = policy_of(model_of())
    half = step_memory(replace(policy, load=lambda: policy.model, compute_dtype=torch.bfloat16), GROUPS, 2, CUDA)
    assert LIBRARY not in half.parts
    assert half.parts[ACTIVATIONS] < 0.8 * counted("full").parts[ACTIVATIONS]


def test_a_reward_model_and_one_without_weights_are_counted():
    scored = with_score_head(loading.Policy(lambda: model_of(), loading.load_tokenizer(loading.locate("lab:tiny"))), 0)
    assert step_memory(scored, GROUPS, 1, CPU).parts[ACTIVATIONS] > 0
    described = meta_model("lab:tiny")
    assert {p.device.type for p in described.parameters()} == {"meta"}
    there = step_memory(policy_of(loading.load_model(loading.locate("lab:tiny"), CPU, "auto").model), GROUPS, 2, CPU)
    assert step_memory(policy_of(described), GROUPS, 2, CPU).parts == there.parts


def test_tokens_that_fit_by_hand():
    """100 bytes whatever the pack, 10 a token: 90 tokens in 1,000 bytes, none in 50."""
    memory = StepMemory({WEIGHTS: 60, REST: 70, ACTIVATIONS: 290, LIBRARY: 180}, num_tokens=50, chunk=40)
    assert memory.peak == 600
    assert [memory.tokens_within(size) for size in (1000, 600, 50)] == [90, 50, 0]


# --- a real model, by what the system says of the process


MODEL = os.environ.get("DPO_REF_REAL_MODEL")


@pytest.mark.slow
@pytest.mark.skipif(MODEL is None, reason="DPO_REF_REAL_MODEL names no folder")
@pytest.mark.parametrize("more", [[], ["model.lora_rank=16"]], ids=["full", "LoRA"])
def test_a_check_says_what_a_run_of_a_real_model_takes(more, tmp_path):
    """Within a tenth."""
    long = "The river runs past the mill, and the miller counts the sacks that he has not yet ground. "
    rows = [
        {"prompt": f"Tell me of mill {index}.", "chosen": long * (7 + index % 5), "rejected": long * (4 + index % 3)}
        for index in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "model=smollm2_135m", f"model.path={MODEL}", "data=jsonl", f"data.path={tmp_path / 'pairs.jsonl'}",
        "data.tokens_per_batch=1024", "trainer.batch_size=6", "trainer.max_steps=3", "tracking=none", *more,
    ]  # fmt: skip
    checked = typed_afresh("train.py", "stage=check", *words, f"output_dir={tmp_path / 'check'}")
    assert checked.returncode == 0, checked.stderr
    said = float(re.search(r"^  memory +([\d.]+) GiB of", checked.stdout, re.MULTILINE)[1])
    run = typed_afresh("train.py", *words, f"output_dir={tmp_path / 'run'}")
    assert run.returncode == 0, run.stderr
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert said == pytest.approx(max(line.get("train/memory/peak_gib", 0.0) for line in lines), rel=0.1)
