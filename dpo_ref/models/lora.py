"""Fresh low-rank adapters: where they go, what they begin with, and what of the model is trained then."""

from typing import Any

from torch import nn

from dpo_ref.models.adapters import peft_for


def add_lora(model: nn.Module, rank: int, alpha: float | None) -> Any:
    """Put a fresh adapter into every linear layer but the head; it alone is trained. Returns peft's view of the model.

    `alpha` is twice the rank unless given. Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"model.lora_rank={rank} must be at least 1; null trains all weights")
    options = {"r": rank, "lora_alpha": 2 * rank if alpha is None else alpha, "target_modules": "all-linear"}
    with peft_for("model.lora_rank") as peft:
        return peft.get_peft_model(model, peft.LoraConfig(**options))
