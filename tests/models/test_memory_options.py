"""Options that trade time for memory change no number."""

import copy

import pytest
import torch

from dpo_ref.data.packing import collate
from dpo_ref.generation.sampling import decoding_mode
from dpo_ref.models import layers
from dpo_ref.models.logps import response_logps
from tests.support.tiny import random_groups, tiny_model

LAYOUTS = [((5, (4, 7)), (12, (3, 8))), ((9, (11, 2)),), ((3, (6, 1)), (2, (2, 9)), (7, (5, 5)))]


def result(model, layout):
    model.zero_grad()
    model.train()
    logps = response_logps(model, collate(random_groups(layout)))
    logps.sums.sum().backward()
    return logps.token_logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("how", ["selective", "full"])
def test_checkpointing_changes_nothing(how):
    plain = tiny_model()
    saving = copy.deepcopy(plain)
    layers.CHECKPOINTING[how](saving)
    assert saving.is_gradient_checkpointing
    for layout in LAYOUTS:
        for ours, theirs in zip(result(saving, layout), result(plain, layout), strict=True):
            assert torch.equal(ours, theirs)


def test_selective_keeps_products_and_recomputes_the_rest():
    """Counted in the backward pass: full checkpointing runs every product of the layers again, selective none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = others = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            is_product = any(name in str(operator) for name in ("aten.mm", "aten.addmm"))
            self.products += is_product
            self.others += not is_product
            return operator(*args, **(kwargs or {}))

    counts = {}
    for how in ("off", "selective", "full"):
        model = tiny_model()
        layers.CHECKPOINTING[how](model)
        model.train()
        loss = response_logps(model, collate(random_groups(LAYOUTS[0]))).sums.sum()
        with Count() as count:
            loss.backward()
        counts[how] = count
    assert counts["selective"].products == counts["off"].products < counts["full"].products
    assert counts["off"].others < counts["selective"].others


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo touches .grad of what is no leaf
def test_compiled_layers_change_nothing_and_compile_no_more_after_warm_up():
    plain = tiny_model()
    compiled = copy.deepcopy(plain)
    for layer in layers.decoder_layers(compiled):
        layer.compile(dynamic=True)
    for layout in LAYOUTS[:2]:
        result(compiled, layout)
    graphs = layers.graphs_compiled()
    assert graphs > 0
    for layout in LAYOUTS:
        for ours, theirs in zip(result(compiled, layout), result(plain, layout), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert layers.graphs_compiled() == graphs
    with decoding_mode(compiled):
        assert not any(module._compiled_call_impl for module in compiled.modules())
    assert any(module._compiled_call_impl for module in compiled.modules())
