"""Optimisers beside AdamW: numbers by hand, torch's own as oracles, what they leave in a checkpoint, LoRA."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from dpo_ref.models import checkpoint
from dpo_ref.training.optim import (
    AdamW8bit,
    Muon,
    RMSprop,
    adamw,
    adamw_8bit,
    muon,
    optimisation,
    orthogonalised,
    rmsprop,
)
from tests.support.command import resolved
from tests.support.tiny import tiny_model


def parameter(*values):
    return nn.Parameter(torch.tensor(values))


def step_with(optimizer, weights, grad, lr=0.1):
    optimizer.param_groups[0]["lr"] = lr
    weights.grad = torch.tensor(grad)
    optimizer.step()


def test_two_steps_of_rmsprop_by_hand():
    """v = 0.01 g² = 0.04 and the step 0.1 * 2 / 0.2 = 1; then v = 0.99 * 0.04 + 0.01 * 9 = 0.1296, 0.1 * 3 / 0.36."""
    weights = parameter(5.0)
    optimizer = RMSprop([weights], alpha=0.99, eps=0.0)
    step_with(optimizer, weights, [2.0])
    assert weights.item() == pytest.approx(4.0)
    step_with(optimizer, weights, [3.0])
    assert weights.item() == pytest.approx(4.0 - 0.3 / 0.36)
    assert optimizer.state[weights]["square_avg"].item() == pytest.approx(0.1296)


def newton_schulz(value):
    """The singular value after five iterations of a s + b s³ + c s⁵."""
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


def test_a_step_of_muon_by_hand():
    """A diagonal gradient (3, 4): Nesterov's momentum scales it, its norm makes (0.6, 0.8) of it, and each of these
    goes through the polynomial by itself. The larger side is 4, so the update is 0.2 * 2 as large."""
    weights = nn.Parameter(torch.ones(2, 4))
    optimizer = Muon([weights], [], momentum=0.95, weight_decay=0.5, betas=(0.9, 0.999), eps=1e-8)
    step_with(optimizer, weights, [[3.0, 0, 0, 0], [0, 4.0, 0, 0]])
    expected = torch.ones(2, 4) * (1 - 0.1 * 0.5)
    expected[0, 0] -= 0.1 * 0.4 * newton_schulz(0.6)
    expected[1, 1] -= 0.1 * 0.4 * newton_schulz(0.8)
    torch.testing.assert_close(weights.detach(), expected, atol=2e-3, rtol=0)  # five times in bfloat16
    assert optimizer.state[weights]["momentum_buffer"][0, 0].item() == pytest.approx(0.05 * 3)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_orthogonalised_has_singular_values_about_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    update = orthogonalised(matrix)
    inner = (left.T @ update @ right.T).diagonal()
    assert inner.min() > 0.6
    assert inner.max() < 1.25
    assert (update - left @ inner.diag() @ right).abs().max() < 0.05


ORACLES = {
    "rmsprop": (rmsprop, lambda p: torch.optim.RMSprop(p, alpha=0.99, eps=1e-8)),
    "muon": (
        partial(muon, weight_decay=0.1),
        lambda p: torch.optim.Muon(p, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ),
}


class Backbone(nn.Linear):
    """A model whose backbone is itself: one matrix."""

    @property
    def base_model(self):
        return self


@pytest.mark.parametrize("name", ORACLES)
def test_is_torchs_own(name):
    """Ten steps, as torch takes them; ours can be left out by the device."""
    ours, theirs = Backbone(5, 3, bias=False), nn.Linear(5, 3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    optimiser, oracle = ORACLES[name]
    optimizers = (
        optimisation(optimiser, ours, 10, lr=0.01, schedule="constant").optimizer,
        oracle(theirs.parameters()),
    )
    torch.manual_seed(0)
    for _ in range(10):
        gradient = torch.randn(3, 5)
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01
            layer.weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("gpt_neox", False)])
def test_muon_is_for_matrices_of_hidden_layers_alone(model_type, tied):
    """Embeddings, heads, norms and biases take AdamW's step: its first one is lr * sign(gradient)."""
    policy = tiny_model(model_type, tie_word_embeddings=tied)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optim = optimisation(muon, policy, 10, lr=1e-3, schedule="constant", warmup_ratio=0.0)
    torch.manual_seed(0)
    for p in policy.parameters():
        p.grad = torch.randn_like(p)
    optim.optimizer.step()
    for name, p in policy.named_parameters():
        by_adamw = p.ndim == 1 or any(word in name for word in ("embed", "lm_head"))
        assert ("exp_avg" in optim.optimizer.state[p]) == by_adamw, name
        assert ("momentum_buffer" in optim.optimizer.state[p]) != by_adamw, name
        if by_adamw:
            torch.testing.assert_close(before[name] - p, 1e-3 * p.grad.sign(), atol=1e-6, rtol=0)
        else:  # 0.2 sqrt(larger side) times singular values of about one: entries of AdamW's size in the mean
            assert 0.1e-3 < (before[name] - p).square().mean().sqrt() < 0.3e-3, name


@pytest.mark.parametrize("optimiser", [adamw, muon, rmsprop])
def test_an_adapter_alone_is_trained(optimiser):
    peft, policy = pytest.importorskip("peft"), tiny_model()
    peft.get_peft_model(policy, peft.LoraConfig(r=2, target_modules="all-linear"))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optim = optimisation(optimiser, policy, 10, lr=1e-2)
    for p in policy.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optim.optimizer.step()
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in moved)


def test_the_published_defaults_of_rmsprop():
    config = resolved("optim=rmsprop")
    optim = config.optim.bound(optimisation)(config.optim, tiny_model(), 1000)
    assert [optim.lr_at(step) for step in (0, 149, 999)] == pytest.approx([5e-7 / 150, 5e-7, 5e-7])
    assert optim.max_grad_norm == 10.0


@pytest.mark.parametrize("option", ["momentum=1", "beta2=1", "weight_decay=-1", "warmup_steps=-1", "min_lr_ratio=1"])
def test_options_out_of_range_are_refused_before_anything_is_loaded(option):
    with pytest.raises(ValueError, match=rf"^optim\.{option}.* is out of range: it must be"):
        resolved("optim=muon", f"optim.{option}")


def test_8_bit_moments_need_cuda():
    with pytest.raises(ValueError, match="optim=adamw_8bit needs CUDA, and the policy is on cpu: use optim=adamw"):
        optimisation(adamw_8bit, tiny_model(), 10)


def test_8_bit_moments_need_bitsandbytes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install bitsandbytes"):
        AdamW8bit([parameter(1.0)], betas=(0.9, 0.999), eps=1e-8)


def quantised(weights):
    optimizer = AdamW8bit([{"params": list(weights.parameters()), "weight_decay": 0.0}], betas=(0.9, 0.999), eps=1e-8)
    optimizer.param_groups[0]["lr"] = 0.01
    return optimizer


def large():
    torch.manual_seed(0)
    return nn.Linear(128, 64)  # above the 4,096 entries from which moments are quantised


def test_8_bit_moments_are_restored_and_steps_left_out(tmp_path):
    """bitsandbytes' code for CPUs, which is none for use: four steps, and two that go on from a checkpoint."""
    pytest.importorskip("bitsandbytes")
    layers = (large(), large())
    gradients = [[torch.randn_like(p) for p in layers[0].parameters()] for _ in range(4)]

    def steps(layer, optimizer, some):
        for gradient in some:
            for p, g in zip(layer.parameters(), gradient, strict=True):
                p.grad = g.clone()
            optimizer.step()

    whole, halves = quantised(layers[0]), quantised(layers[1])
    steps(layers[0], whole, gradients)
    steps(layers[1], halves, gradients[:2])
    halves.found_inf = torch.tensor(1.0)
    steps(layers[1], halves, [[g * math.nan for g in gradients[0]]])
    saved = checkpoint.save(tmp_path, layers[1], halves, {}, {"step": 2}).result()
    again = large()
    restored = quantised(again)
    checkpoint.load(saved, again, restored)
    steps(again, restored, gradients[2:])
    assert whole.state[layers[0].weight]["state1"].dtype == torch.uint8
    for ours, theirs in zip(again.parameters(), layers[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert all(torch.equal(value, restored.state[ours][key]) for key, value in whole.state[theirs].items())
