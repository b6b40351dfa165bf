"""The weights below an adapter, which are not trained, held in bfloat16: half the memory. What is computed with them
is what float32 weights of these values give, so they have the same identity.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_ref.models.adapters import plain_name


class _FrozenProduct(torch.autograd.Function):
    """x W^T in the dtype of x, with W held in another: it is cast for each product and forgotten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained: its weight in half precision, its products in that of what it is given."""

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """x W^T + b."""
        by_autocast = torch.is_autocast_enabled(input.device.type)
        if by_autocast or self.weight.requires_grad or self.weight.dtype == input.dtype:
            return super().forward(input)
        product = _FrozenProduct.apply(input, self.weight)
        return product if self.bias is None else product + self.bias  # pyright: ignore


def hold_in_bfloat16(model: nn.Module) -> None:
    """Freeze a model, and hold its linear layers and embeddings in bfloat16; what flows between layers stays float32,
    as do norms, biases and experts. Under autocast to bfloat16 products are those of float32 weights, which it
    casts."""
    model.requires_grad_(False)
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FrozenLinear
            layer.weight.data = layer.weight.data.bfloat16()
        elif isinstance(layer, nn.Embedding):
            layer.weight.data = layer.weight.data.bfloat16()
            layer.register_forward_hook(_as_float32)


def _as_float32(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def held_in_bfloat16(model: nn.Module) -> set[str]:
    """The names, as they are without adapters, of the weights that `hold_in_bfloat16` left in bfloat16."""
    held = {
        id(layer.weight)
        for layer in model.modules()
        if isinstance(layer, FrozenLinear) or _as_float32 in layer._forward_hooks.values()
    }
    return {plain_name(name) for name, weight in model.state_dict(keep_vars=True).items() if id(weight) in held}
