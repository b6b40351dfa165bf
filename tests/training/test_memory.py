"""What a step is said to need: against the kernel's count of a real step, and against numbers by hand."""

import ctypes
import gc
import os
import platform
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ref.data.packing import collate
from dpo_ref.models import loading
from dpo_ref.models.attention import register
from dpo_ref.models.loading import Policy
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.training.memory import step_memory, useful_flops
from dpo_ref.training.optim import adamw, adamw_bf16, optimisation
from dpo_ref.training.trainer import update
from tests.support.command import forked
from tests.support.tiny import SHAPE, random_groups

SHAPE_OF_TENS_OF_MB = SHAPE | {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 2048,
}  # fmt: skip
PACKS = [((60, (90, 70)), (40, (110, 130))), ((100, (60, 140)), (20, (50, 30)))]


def optim_of(model, optimiser=adamw):
    return optimisation(optimiser, model, 2)


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def resident(entry):
    """VmRSS or VmHWM of this process, in bytes."""
    return 1024 * int(re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def built(config, rank=None, checkpointing="off"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation(register("sdpa"))
    if rank is not None:
        AdapterOptions(lora_rank=rank).put_on(model)
    loading.CHECKPOINTING[checkpointing](model)
    return model


def on_meta(*how):
    with torch.device("meta"):
        return built(*how)


def two_steps_of(model, packs):
    policy, optim = Policy(lambda: model, None), optim_of(model)
    model.train()
    for step in range(2):
        for layout in packs:
            loss, outputs = policy.loss(collate(random_groups(layout)), lambda part, span: part.sums.sum())
            loss.backward()
            del loss, outputs
        update(policy, optim, step, torch.ones((), dtype=torch.bool))


def two_steps(result, config, packs, *how):
    """Write what two real steps make of this process at most, in bytes, over what it was before the model was made
    and after a step of a tiny one, for which torch loads what it needs: blocks of memory are given back to the kernel
    when they are freed, so that it counts what is alive."""
    for option, value in ((M_MMAP_THRESHOLD, 2**15), (M_MMAP_MAX, 2**20), (M_TRIM_THRESHOLD, 0)):
        ctypes.CDLL(None).mallopt(option, value)
    two_steps_of(built(AutoConfig.for_model("llama", **SHAPE)), packs)
    gc.collect()
    before = resident("VmRSS")
    two_steps_of(built(config, *how), packs)
    result.write_text(str(resident("VmHWM") - before))


def measured(folder, config, packs, *how):
    """Of a process of its own."""
    process = forked(folder, two_steps, folder / "bytes", config, packs, *how)
    process.join(300)
    assert process.exitcode == 0, (folder / "err").read_text()
    return int((folder / "bytes").read_text())


def tens_of_mb():
    return AutoConfig.for_model("llama", **SHAPE_OF_TENS_OF_MB)


@GLIBC
@pytest.mark.parametrize("how", [(None, "off"), (4, "off")], ids=["full", "lora"])
def test_the_peak_is_that_of_a_real_step(tmp_path, how):
    predicted = step_memory(on_meta(tens_of_mb(), *how), optim_of, PACKS).total
    assert predicted > 30e6
    assert predicted == pytest.approx(measured(tmp_path, tens_of_mb(), PACKS, *how), rel=0.1)


@pytest.mark.slow
@GLIBC
@pytest.mark.parametrize("rank", [None, 8], ids=["full", "lora"])
def test_the_peak_is_that_of_a_real_model(tmp_path, rank):
    if "DPO_REF_REAL_MODEL" not in os.environ:
        pytest.skip("DPO_REF_REAL_MODEL names the folder of SmolLM2-135M-Instruct")
    config = AutoConfig.from_pretrained(os.environ["DPO_REF_REAL_MODEL"])
    packs = [((348, (72, 49)), (165, (233, 61))), ((182, (10, 32)), (181, (18, 9)), (42, (86, 69)))]
    predicted = step_memory(on_meta(config, rank), optim_of, packs).total
    assert predicted == pytest.approx(measured(tmp_path, config, packs, rank), rel=0.1)


def test_parts_by_hand():
    """Embedding and head are apart: of every weight 4 bytes, of what is trained 4 of gradient and 8 of moments (and 4
    for the count of steps of a tensor)."""
    model = on_meta(tens_of_mb())
    size, tensors = sum(weight.numel() for weight in model.parameters()), len(list(model.parameters()))
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    memory = step_memory(model, optim_of, PACKS)
    assert memory.weights == 4 * size + buffers
    assert memory.gradients == 4 * size
    assert memory.moments == 8 * size + 4 * tensors
    assert memory.total == max(memory.phases.values())
    assert set(memory.phases) == {"reference", "forward", "backward", "update"}


def test_what_saves_memory_is_said_to():
    plain = step_memory(on_meta(tens_of_mb()), optim_of, PACKS)
    saving = step_memory(on_meta(tens_of_mb(), None, "full"), optim_of, PACKS)
    adapter = step_memory(on_meta(tens_of_mb(), 4), optim_of, PACKS)
    half = step_memory(on_meta(tens_of_mb()), partial(optim_of, optimiser=adamw_bf16), PACKS, torch.bfloat16)
    assert saving.activations < plain.activations / 2
    assert adapter.moments < plain.moments / 20
    assert half.weights < 0.51 * plain.weights
    assert half.moments < 0.51 * plain.moments


def test_operations_by_hand():
    """One group, prompt 2, responses 1 and 3, so context lengths 3, 3 and 2 · 3 + 6."""
    assert useful_flops([((2, (1, 3)),)], body=10, head=100, layers=2, width=4) == 3 * (
        2 * 10 * 6 + 2 * 100 * 4 + 4 * 2 * 4 * (3 + 3 + 12)
    )
