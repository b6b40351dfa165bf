"""Two tiny models, groups whose responses end by either token, and what a diagnosis reads of them."""

import math
from dataclasses import replace

import pytest
import torch

from dpo_ref.evaluation.diagnostics.token_statistics import readings_of, tokens_of
from tests.support.tiny import random_groups, tiny_model

ENDS = {2, 7}
NEVER = torch.tensor([5, 60])
LAYOUT = [(5, (4, 6)), (3, (7, 2, 5)), (6, (3, 3)), (4, (1, 8)), (2, (11, 4))]
POLICY, INITIAL = (tiny_model(seed=seed, dtype=torch.float64) for seed in (1, 2))


@pytest.fixture(scope="module")
def groups():
    """Responses of which some end, by either token; the first two groups have the same prompt."""
    token_groups = random_groups(LAYOUT, seed=1)
    for group, response, end in ((0, 0, 2), (0, 1, 7), (1, 1, 2), (1, 2, 2), (3, 0, 2), (4, 0, 7), (4, 1, 2)):
        token_groups[group].response_ids[response][-1] = end
    token_groups[1] = replace(token_groups[1], prompt_ids=token_groups[0].prompt_ids)
    return token_groups


@pytest.fixture(scope="module")
def tokens(groups):
    return tokens_of(
        groups, ENDS, *(readings_of(model, groups, sorted(ENDS), NEVER[:0]) for model in (POLICY, INITIAL))
    )


def clustered(values, clusters):
    """Mean and cluster-robust error, by loops."""
    mean = sum(values) / len(values)
    sums = {c: sum(v - mean for v, k in zip(values, clusters, strict=True) if k == c) for c in set(clusters)}
    count = len(sums)
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(sum(s * s for s in sums.values()) * count / (count - 1)) / len(values)
