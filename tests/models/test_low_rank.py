"""The product with low-rank factors in one function: beside peft's layer, which writes it out."""

from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_ref.models.adapters import adapter_off, lora_layers
from dpo_ref.models.frozen import hold_in_bfloat16
from dpo_ref.models.layers import CHECKPOINTING
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.references.policies import NoReference
from dpo_ref.training.trainer import backward
from tests.support.tiny import policy_of, random_groups, shared, tiny_model

OPTIONS = AdapterOptions(lora_rank=4, lora_alpha=12.0)
SHAPES = [(3, 5), (7,), (0,), (2, 3, 2)]


def adapted(dtype=torch.float64, options=OPTIONS, hold=False):
    """A model with an adapter whose factors are all drawn."""
    torch.manual_seed(0)
    model = tiny_model(seed=0)
    if hold:
        hold_in_bfloat16(model)
    options.put_on(model)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    return model if hold else model.to(dtype)


def results(forward, layer, x):
    """Output and gradients of one layer's forward pass."""
    x, factors = x.clone().requires_grad_(), (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    out = forward(x)
    return (out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), (x, *factors)))


def peft_of(layer):
    """Its forward pass as peft has it."""
    return lambda x: Linear.forward(layer, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_peft(shape):
    for _, layer in lora_layers(adapted()):
        x = torch.randn(*shape, layer.in_features, dtype=torch.float64)
        for ours, theirs in zip(results(layer, layer, x), results(peft_of(layer), layer, x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (7,)])
def test_an_architecture_may_add_to_it_in_place(shape):
    """As Falcon adds attention to the MLP's output."""
    for _, layer in lora_layers(adapted()):
        x = torch.randn(*shape, layer.in_features, dtype=torch.float64)
        found = (
            results(lambda x, forward=forward: forward(x).add_(1).mul_(2), layer, x)
            for forward in (layer, peft_of(layer))
        )
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_weights_below_held_in_bfloat16_and_autocast():
    """Held in bfloat16 the product is float32's; under autocast it differs from peft's by rounding."""
    for _, layer in lora_layers(adapted(hold=True)):
        x = torch.randn(5, layer.in_features)
        for ours, theirs in zip(results(layer, layer, x), results(peft_of(layer), layer, x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half, written_out = results(layer, layer, x), results(peft_of(layer), layer, x)
        assert half[0].dtype == torch.bfloat16
        assert [value.dtype for value in half[1:]] == [torch.float32] * 3
        for ours, theirs in zip(half, written_out, strict=True):
            assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_under_checkpointing_are_those_without(kind):
    found = []
    for checkpointing in ("off", kind):
        model = adapted(torch.float32)
        CHECKPOINTING[checkpointing](model)
        policy = policy_of(model)
        policy.train()
        backward(policy, NoReference(), bind(dpo, beta=0.1), shared([random_groups([(3, (4, 2)), (2, (5, 3))])]))
        found.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


def test_switched_off_it_is_the_layer_below():
    model = adapted()
    with adapter_off(model):
        for _, layer in lora_layers(model):
            x = torch.randn(3, layer.in_features, dtype=torch.float64)
            assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("changed", [{"lora_dora": True}, {"lora_init": "pissa"}])
def test_what_is_more_than_two_factors_is_left_to_peft(changed):
    for _, layer in lora_layers(adapted(options=replace(OPTIONS, **changed))):
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        assert torch.equal(layer(x), Linear.forward(layer, x))


class Sizes(TorchDispatchMode):
    """How many numbers each tensor has that is made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor) and not func.is_view]
        self.made += [each.numel() for each in made if all(each is not a for a in args)]
        return out


def test_one_tensor_of_the_output_s_size_is_made():
    layer = max((layer for _, layer in lora_layers(adapted())), key=lambda layer: layer.out_features)
    x = torch.randn(50, layer.in_features, dtype=torch.float64)
    sizes = []
    for forward in (layer, peft_of(layer)):
        with Sizes() as seen, torch.no_grad():
            forward(x)
        sizes.append(seen.made.count(50 * layer.out_features))
    assert sizes == [1, 4]
