"""Stochastic rounding is unbiased, keeps tiny updates, and its optimiser is AdamW."""

import os
from functools import partial

import pytest
import torch
from torch import nn

from dpo_ref.training.optim import RoundedAdamW, adamw, adamw_bf16, optimisation, stochastic_round_


def test_rounds_to_neighbours_and_is_unbiased():
    """1 + 0.3 ulp becomes 1 + ulp in 30 % of draws; standard error 0.0023 at 40,000 draws."""
    torch.manual_seed(0)
    ulp = 2.0**-7
    for value, share in ((1 + 0.3 * ulp, 0.3), (-1 - 0.75 * ulp, 0.75), (1e-30, None), (0.0, 0.0)):
        target = torch.empty(40_000, dtype=torch.bfloat16)
        stochastic_round_(target, torch.full((40_000,), value))
        assert len(target.unique()) <= 2
        if share is not None:
            moved = (target.float().abs() - abs(round(value))).abs() > 0.5 * ulp
            assert abs(moved.float().mean().item() - share) < 0.012
        assert abs(target.double().mean().item() - value) < 4 * 0.0025 * max(abs(value) * ulp, 1e-32)


def test_infinities_and_nan_are_kept():
    target = torch.zeros(4, dtype=torch.bfloat16)
    stochastic_round_(target, torch.tensor([float("inf"), -float("inf"), float("nan"), 2.0]))
    assert target[0] == float("inf")
    assert target[1] == -float("inf")
    assert target[2].isnan()
    assert target[3] == 2.0


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


def test_an_update_of_5e_7_is_not_lost():
    """20 steps of lr 5e-7 along a constant gradient move the mean weight by 1e-5; rounded to nearest, by nothing."""
    torch.manual_seed(0)
    start = torch.full((300, 300), 1.0)
    layer = linear(start)
    optim = optimisation(adamw_bf16, layer, 20, lr=5e-7, schedule="constant", warmup_ratio=0.0)
    nearest = start.bfloat16()
    for _ in range(20):
        layer.weight.grad = torch.ones_like(layer.weight)
        optim.optimizer.step()
        nearest = (nearest.float() - 5e-7).bfloat16()
    moved = (start.double() - layer.weight.detach().double()).mean().item()
    # neighbours of 1 are 2^-8 below: the mean of 90,000 draws has a standard error of about 7e-7
    assert abs(moved - 1e-5) < 3e-6
    assert torch.equal(nearest, start.bfloat16())


def test_follows_adamw_on_average():
    torch.manual_seed(0)
    start, gradients = torch.randn(40, 30), torch.randn(25, 40, 30)
    exact, rounded = linear(start), linear(start)
    options = {"lr": 0.05, "schedule": "constant", "warmup_ratio": 0.0}
    pair = [
        (layer, optimisation(partial(optimiser, weight_decay=0.1), layer, 25, **options))
        for layer, optimiser in ((exact, adamw), (rounded, adamw_bf16))
    ]
    for gradient in gradients:
        for layer, optim in pair:
            layer.weight.grad = gradient.to(layer.weight.dtype)
            optim.optimizer.step()
    gap = (exact.weight - rounded.weight.float()).detach()
    assert gap.abs().mean() < 0.01
    assert gap.mean().abs() < 0.001
    assert (exact.weight - start).abs().mean() > 10 * gap.abs().mean()


def test_a_non_finite_step_changes_nothing_and_state_is_bfloat16():
    layer = linear(torch.randn(4, 3)).to(torch.bfloat16)
    optimizer = RoundedAdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(layer.weight, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(layer.weight, before)
    state = optimizer.state[layer.weight]
    assert (state["exp_avg"].dtype, state["step"].item(), state["exp_avg"].any().item()) == (
        torch.bfloat16,
        0.0,
        False,
    )


def test_the_kernel_is_the_written_update():
    """Every entry becomes one of the two bfloat16 neighbours of what float32 arithmetic gives, unbiased, in weights
    and moments. Without CUDA: in Triton's interpreter, with TRITON_INTERPRET=1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from dpo_ref.models.kernels import update_rounded

    torch.manual_seed(0)
    group = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    weights, grads, mean = (torch.randn(5, 700).bfloat16() for _ in range(3))
    square, step = torch.rand(5, 700).bfloat16(), torch.tensor(3.0)
    for skip in (0.0, 1.0):
        exact = [x.float() for x in (weights, mean, square)]
        if not skip:
            exact[1].lerp_(grads.float(), 0.1)
            exact[2].lerp_(grads.float().square(), 0.01)
            step_size = 0.01 * (exact[1] / (1 - 0.9**3)) / ((exact[2] / (1 - 0.99**3)).sqrt() + 1e-8)
            exact[0] = exact[0] * (1 - 0.01 * 0.1) - step_size
        draws = []
        for _ in range(60):
            parameter = nn.Parameter(weights.clone().to(device))
            parameter.grad = grads.to(device)
            state = {
                "exp_avg": mean.clone().to(device),
                "exp_avg_sq": square.clone().to(device),
                "step": step.to(device),
            }
            seeds = torch.randint(2**31 - 1, (4,), device=device)
            update_rounded(parameter, state, group, seeds, 2, torch.tensor(skip, device=device))
            draws.append([parameter.detach(), state["exp_avg"], state["exp_avg_sq"]])
        for value, drawn in zip(exact, zip(*draws, strict=True), strict=True):
            drawn = torch.stack(drawn).double().cpu()
            ulp = 2.0 ** (value.abs().log2().floor().double() - 7)
            errors = (drawn - value.double()) / ulp
            assert errors.abs().max() < 1.001
            assert errors.mean().abs() < 4 * 0.5 / errors.numel() ** 0.5
            assert (errors.abs().mean() == 0) == bool(skip)
