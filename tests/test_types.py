"""Types and shapes are checked while the tests run (see conftest.py)."""

import pytest
import torch
from jaxtyping import TypeCheckError

from dpo_ref.data.packing import collate, pack
from dpo_ref.models.logps import sum_by_response
from dpo_ref.tracking.terminal import progress
from tests.support.tiny import random_groups


def test_a_shape_that_is_written_is_followed():
    batch = collate(random_groups([(3, (2, 2))]))
    assert sum_by_response(torch.zeros(4), batch).shape == (2,)
    with pytest.raises(TypeCheckError):
        sum_by_response(torch.zeros(2, 2), batch)


@pytest.mark.parametrize("call", [lambda: pack(7), lambda: next(progress(7, "items"))], ids=["shapes", "none"])
def test_a_type_is_checked_in_modules_with_and_without_shapes(call):
    with pytest.raises(TypeError, match="violates type hint"):
        call()
