"""What a rank holds and sends, beside the page that derives it and beside what two ranks really send."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import pack, share_of
from dpo_ref.distributed import ranks
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.models.memory import ACTIVATIONS, GRADIENTS, MOMENTS, WEIGHTS
from dpo_ref.models.rank_costs import GATHERED, ModelSizes, held_by_rank, sent_by_rank
from dpo_ref.models.sharding import Parallel, Replication, Sharding, ddp, fsdp
from dpo_ref.references.policies import NoReference
from dpo_ref.training.trainer import backward
from tests.support.command import resolved
from tests.support.programs import program  # noqa: F401
from tests.support.ranks import on_ranks
from tests.support.tiny import policy_of, random_groups, tiny_model

PARTS = {WEIGHTS: 1, GRADIENTS: 2, MOMENTS: 3, ACTIVATIONS: 4}


def llama(shape):
    """Of so many bytes, none of which are there."""
    config = LlamaConfig(
        vocab_size=shape.head // shape.hidden, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=32, num_key_value_heads=shape.kv * 32 // shape.hidden,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("size", ["1 B", "8 B"])
@pytest.mark.parametrize(("reduce", "passes"), [("every_pass", 3), ("last_pass", 1), ("last_pass", 3)])
def test_what_is_sent_is_what_the_page_derives(program, size, reduce, passes):  # noqa: F811
    plan = program("scale_plan")
    shape = plan.SHAPES[size]
    sizes = ModelSizes.of(llama(shape), torch.bfloat16)
    assert sizes.whole.all == sizes.whole.trained == shape.total
    sent, last = plan.sent_by_fsdp(shape, 8), int(reduce == "last_pass")
    expected = (passes - 1) * sent.of_pass(not last) + sent.of_pass()
    assert sent_by_rank(Sharding(False, reduce), sizes, 8, passes) == pytest.approx(expected, rel=1e-12)
    assert sent_by_rank(Replication(25.0), sizes, 8, passes) == pytest.approx(plan.sent_by_ddp(shape, 8, shape.total))
    assert sent_by_rank(Parallel(), sizes, 1, passes) == 0


def test_an_adapter_sends_its_own_gradients_alone(program):  # noqa: F811
    plan = program("scale_plan")
    shape, model = plan.SHAPES["8 B"], llama(plan.SHAPES["8 B"])
    AdapterOptions(lora_rank=16).put_on(model)
    sizes = ModelSizes.of(model, torch.bfloat16)
    assert sizes.whole.trained == shape.adapter()
    assert sent_by_rank(Replication(25.0), sizes, 64, 2) == pytest.approx(
        plan.sent_by_ddp(shape, 64, shape.adapter()), rel=1e-12
    )


def test_what_a_rank_holds():
    """V = 40, H = 8, I = 12, 2 layers, 2 heads of 4 with one of keys: a layer has 8 x 8 + 2 x 8 x 4 + 8 x 8 of
    attention, 3 x 8 x 12 of the rest and 2 x 8 of norms, 496; embedding and head 320 each; the last norm 8."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    half, total = ModelSizes.of(model, torch.bfloat16), 2 * 496 + 2 * 320 + 8
    held = held_by_rank(Sharding(False, "every_pass"), PARTS, half, 4)
    gathered = 10 * 496 + 2 * (320 + 8) + 8 * 320
    assert held == {WEIGHTS: total, GRADIENTS: total, MOMENTS: 2 * total, ACTIVATIONS: 4, GATHERED: gathered}
    assert held_by_rank(Sharding(False, "last_pass"), PARTS, half, 4)[GRADIENTS] == 4 * total
    full = held_by_rank(Sharding(False, "every_pass"), PARTS, ModelSizes.of(model, torch.float32), 4)
    assert full[GATHERED] == 16 * 496 + 4 * (320 + 8) + 8 * 320
    assert held_by_rank(Replication(25.0), PARTS, half, 4) == {**PARTS, GRADIENTS: 4 * total}
    assert held_by_rank(Parallel(), PARTS, half, 1) == PARTS


TAKEN = {  # of what a rank takes part in, how much of it a rank of two sends
    "_allgather_base_": 0.5, "all_gather_into_tensor": 0.5, "_reduce_scatter_base_": 0.5, "reduce_scatter_tensor": 0.5,
    "allreduce_": 1.0,
}  # fmt: skip


class Sent(TorchDispatchMode):
    """Bytes that a rank of two sends of weights and gradients."""

    def __init__(self):
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if taken := TAKEN.get(func.__name__.partition(".")[0]):
            tensors = [each for each in tree_leaves((out, args)) if isinstance(each, torch.Tensor)]
            self.bytes += taken * max(each.nbytes for each in tensors)
        return out


WAYS = {"fsdp": fsdp, "last_pass": lambda: fsdp(reduce="last_pass"), "ddp": ddp}
PASSES = 2


def _step(folder, way, tied):
    model, parallel = tiny_model(tie_word_embeddings=tied, vocab_size=62), WAYS[way]()  # halves of all weights
    sizes = ModelSizes.of(model, torch.float32)
    policy = replace(policy_of(model), holding=parallel.holding(model, torch.float32))
    objective = resolved("objective=dpo").objective
    groups = from_groups(random_groups([(5, (3, 3))] * (2 * PASSES)))
    share = share_of(groups, lambda some: pack(some, tokens_per_batch=11))
    assert len(share.passes) == PASSES
    backward(policy, NoReference(), objective, share)  # the first one sends its shapes besides
    policy.model.zero_grad()
    with Sent() as sent:
        backward(policy, NoReference(), objective, share)
    if ranks().is_first:
        told = {"sent": sent.bytes, "formula": sent_by_rank(parallel, sizes, 2, PASSES)}
        (folder / f"{way}-{tied}.json").write_text(json.dumps(told))


def _all(folder):
    for way in WAYS:
        for tied in (False, True):
            _step(folder, way, tied)


def test_two_ranks_send_what_is_said(tmp_path):
    on_ranks(tmp_path / "ranks", 2, _all, tmp_path)
    told = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(told) == 2 * len(WAYS)
    for way, numbers in told.items():
        assert numbers["sent"] == numbers["formula"] > 0, way
