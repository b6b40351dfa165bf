"""The product of a frozen layer and the low-rank factors beside it, in one function. Written as modules it makes four
tensors of the output's size and keeps one; this makes the one, and its backward pass one of the input's.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_ref.models.adapters import TRAINED, lora_layers


@torch.library.custom_op("dpo_ref::low_rank_product", mutates_args=())
def _product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """x W^T + b + s (x A^T) B^T, and x A^T. An operator of its own, so that checkpointing keeps or makes it again as a
    whole: what is added in place is nobody else's yet."""
    out, inner = nn.functional.linear(rows, weight, bias), rows @ a.T
    return out.addmm_(inner, b.T, alpha=scaling), inner


@_product.register_fake
def _(
    rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0], weight.shape[0]), rows.new_empty(rows.shape[0], a.shape[0])


class _LowRankProduct(torch.autograd.Function):
    """The product in the dtype that x, or autocast, has; only x, A and B get gradients. Its output is no view: an
    architecture may add to it in place (Falcon)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rows, below = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            out, inner = _product(rows, weight.to(dtype), below, a.to(dtype), b.to(dtype), scaling)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scaling, ctx.given = scaling, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, inner, weight, a, b = ctx.saved_tensors
        d_out = grads[0]
        d_inner = (d_out @ b.to(d_out.dtype)).mul_(ctx.scaling)
        d_a, d_b = d_inner.T @ rows, (d_out.T @ inner).mul_(ctx.scaling)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (d_out @ weight.to(d_out.dtype)).addmm_(d_inner, a.to(d_out.dtype)).to(ctx.given)
        return d_x, None, None, d_a.to(a.dtype), d_b.to(b.dtype), None


class _InOneProduct:
    """What stands before a linear layer of peft's in its class: the product above where that is all it computes."""

    def forward(self: Any, x: Float[Tensor, "... in"], *args: Any, **kwargs: Any) -> Float[Tensor, "... out"]:
        """As peft's layer."""
        if args or kwargs or self.disable_adapters or self.merged or self.active_adapters != [TRAINED]:
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        a, b = self.lora_A[TRAINED].weight, self.lora_B[TRAINED].weight
        base, rows = self.base_layer, x.flatten(0, -2)
        out: Any = _LowRankProduct.apply(rows, base.weight, base.bias, a, b, self.scaling[TRAINED])
        return out.view(*x.shape[:-1], out.shape[-1])


@cache
def _in_one_product(layer: type) -> type:
    return type(layer.__name__, (_InOneProduct, layer), {"__module__": layer.__module__})


def _is_plain(layer: Any) -> bool:
    """Whether a layer is frozen weights and two factors, and no more: no DoRA, no dropout, no bias of its own."""
    base = layer.base_layer
    return (
        isinstance(base, nn.Linear)
        and type(layer).__name__ == "Linear"
        and not any(weight.requires_grad for weight in base.parameters())
        and TRAINED in layer.lora_A
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[TRAINED], nn.Identity)
        and layer.lora_B[TRAINED].bias is None
    )


def in_one_product(model: nn.Module) -> None:
    """Let every layer that peft has put plain low-rank factors beside compute in one function, in place."""
    for _, layer in lora_layers(model):
        if _is_plain(layer):
            layer.__class__ = _in_one_product(type(layer))
