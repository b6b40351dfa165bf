"""What no rank can hold a part of."""

import pytest
import torch
from torch import nn

from dpo_ref.models.sharding import check_in_step
from tests.support.reference_contexts import TOKENIZER
from tests.support.tiny import policy_of, tiny_model


def _quantised(model):
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    model.base_model.layers[0].codes = nn.Parameter(codes, requires_grad=False)


def _unpacked(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("change", "said"), [(_quantised, "its weights are quantised"), (_unpacked, "one response at a time, unpacked")]
)
def test_a_model_that_cannot_be_sharded_says_why(change, said):
    model = policy_of(tiny_model(), TOKENIZER).model
    check_in_step(model, "this model")
    change(model)
    with pytest.raises(ValueError, match=f"this model cannot be sharded: .*{said}"):
        check_in_step(model, "this model")
