"""What a step is said to need: against the C library's own count of a real step, and against numbers by hand."""

import ctypes
import gc
import os
import platform
import threading
import time
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ref.data.packing import collate
from dpo_ref.models import loading
from dpo_ref.models.adapters import add_lora
from dpo_ref.models.attention import register
from dpo_ref.models.loading import Policy
from dpo_ref.training.memory import step_memory, useful_flops
from dpo_ref.training.optim import adamw, adamw_bf16, optimisation
from dpo_ref.training.trainer import update
from tests.support.tiny import SHAPE, random_groups

SHAPE_OF_TENS_OF_MB = SHAPE | {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 2048,
}  # fmt: skip
PACKS = [((60, (90, 70)), (40, (110, 130))), ((100, (60, 140)), (20, (50, 30)))]


def optim_of(model, optimiser=adamw):
    return optimisation(optimiser, model, 2)


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc says how much of its heap is in use")


FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Mallinfo(ctypes.Structure):
    """malloc.h: struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def in_use():
    """Bytes of the C library's blocks that are in use, on the heap and mapped."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


class Peak(threading.Thread):
    """Looks at what is in use all the time."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.ended = 0, False

    def run(self):
        while not self.ended:
            self.bytes = max(self.bytes, in_use())
            time.sleep(2e-4)


def built(config, rank=None, checkpointing="off"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation(register("sdpa"))
    if rank is not None:
        add_lora(model, rank, None)
    loading.CHECKPOINTING[checkpointing](model)
    return model


def on_meta(*how):
    with torch.device("meta"):
        return built(*how)


def measured(config, packs, *how):
    """Bytes in use at the peak of two real steps, over those before the model was made."""
    gc.collect()
    before = in_use()
    model = built(config, *how)
    policy, optim = Policy(lambda: model, None), optim_of(model)
    model.train()
    peak = Peak()
    peak.start()
    for step in range(2):
        for layout in packs:
            batch = collate(random_groups(layout))
            loss, outputs = policy.loss(batch, lambda part, span: part.sums.sum())
            loss.backward()
            del loss, outputs
        update(policy, optim, step, torch.ones((), dtype=torch.bool))
    peak.ended = True
    peak.join()
    return peak.bytes - before


def tens_of_mb():
    return AutoConfig.for_model("llama", **SHAPE_OF_TENS_OF_MB)


@GLIBC
@pytest.mark.parametrize("how", [(None, "off"), (4, "off"), (None, "full")], ids=["full", "lora", "checkpointing"])
def test_the_peak_is_that_of_a_real_step(how):
    predicted = step_memory(on_meta(tens_of_mb(), *how), optim_of, PACKS).total
    assert predicted > 30e6
    assert predicted == pytest.approx(measured(tens_of_mb(), PACKS, *how), rel=0.1)


@pytest.mark.slow
@GLIBC
@pytest.mark.parametrize("rank", [None, 8], ids=["full", "lora"])
def test_the_peak_is_that_of_a_real_model(rank):
    if "DPO_REF_REAL_MODEL" not in os.environ:
        pytest.skip("DPO_REF_REAL_MODEL names the folder of SmolLM2-135M-Instruct")
    config = AutoConfig.from_pretrained(os.environ["DPO_REF_REAL_MODEL"])
    packs = [((348, (72, 49)), (165, (233, 61))), ((182, (10, 32)), (181, (18, 9)), (42, (86, 69)))]
    predicted = step_memory(on_meta(config, rank), optim_of, packs).total
    assert predicted == pytest.approx(measured(config, packs, rank), rel=0.1)


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
