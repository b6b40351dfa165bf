"""A part of a pack is the pack of its groups: every field of every type that is cut, whatever the pack."""

from dataclasses import field, fields, make_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from dpo_ref.data.packing import collate
from dpo_ref.models.logps import sum_by_response
from dpo_ref.objectives.interface import BatchLogps, ObjectiveInputs, TokenLogps
from dpo_ref.types import PackedBatch, ResponseLogps, ResponseScores, axes_of
from tests.support.tiny import random_groups

LAYOUTS = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)),
    min_size=1,
    max_size=6,
)


def full_groups(layout):
    """Groups in which every field says something, and something else in every response."""
    groups = []
    for group in random_groups(layout):
        count = len(group.response_ids)
        values = [10 * group.group_index + index for index in range(count)]
        masks = tuple([position % 3 != 2 for position in range(len(ids))] for ids in group.response_ids)
        groups.append(
            replace(
                group,
                scored=masks,
                labels=tuple(value % 2 == 0 for value in values),
                advantages=tuple(value + 0.5 for value in values),
                rewards=tuple(value + 0.25 for value in values),
                weights=tuple(10 * group.group_index + index + 0.75 for index in range(len(group.pairs))),
            )
        )
    return groups


def random_logps(batch, seed=0):
    tokens = torch.randn(len(batch.target_ids), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ResponseLogps(sum_by_response(tokens, batch), batch.lengths, batch.num_bytes, tokens, *beside(tokens))


def beside(tokens):
    """What else may be said of tokens: the same bytes in another tokenizer, and spans with where they end."""
    return tokens - 1, tokens - 2, tokens > 0


def same(part, want):
    """Every field of two values of one type is there and equal."""
    for f in fields(want):
        ours, theirs = getattr(part, f.name), getattr(want, f.name)
        assert theirs is not None, f.name
        assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs, f.name


def kinds_of_values(groups):
    """One value of each type that is cut, made of these groups: equal token by token to that of any other packs."""
    batch = collate(groups)
    tokens = torch.tensor([[float(t), float(g)] for g, t in _named_tokens(groups)], dtype=torch.float64).sum(1)
    own = (sum_by_response(tokens, batch), batch.lengths, batch.num_bytes, tokens, *beside(tokens))
    logps = ResponseLogps(*own)
    return [batch, logps, TokenLogps(*own, response_index=batch.response_index), ResponseScores(logps.sums)]


def _named_tokens(groups):
    for group in groups:
        for ids, mask in zip(group.response_ids, group.scored, strict=True):
            yield from ((100 * group.group_index, token) for token, scored in zip(ids, mask, strict=True) if scored)


@settings(max_examples=50, deadline=None)
@given(layout=LAYOUTS, max_tokens=st.integers(1, 20))
def test_a_part_is_what_its_groups_alone_would_give(layout, max_tokens):
    groups = full_groups(layout)
    wholes = kinds_of_values(groups)
    spans = list(wholes[0].spans(max_tokens))
    for span in spans:
        for whole, want in zip(wholes, kinds_of_values(groups[span["G"]]), strict=True):
            same(whole.part(span), want)
        tokens = span["R"].stop - span["R"].start
        assert tokens <= max_tokens or span["G"].stop - span["G"].start == 1
    assert [index for span in spans for index in range(span["G"].start, span["G"].stop)] == list(range(len(groups)))


def test_runs_are_as_long_as_they_may_be():
    batch = collate(random_groups([(2, (3, 1)), (1, (2, 2)), (3, (9, 4)), (1, (1, 1))]))
    assert [(span["G"].start, span["G"].stop) for span in batch.spans(8)] == [(0, 2), (2, 3), (3, 4)]


@settings(max_examples=20, deadline=None)
@given(layout=LAYOUTS)
def test_what_an_objective_is_handed_is_cut_as_a_whole(layout):
    batch = collate(full_groups(layout))
    reference, old, collision = (random_logps(batch, seed) for seed in range(3))
    items = [logps.pairs(batch.chosen, batch.rejected) for logps in (reference, old)]
    whole = BatchLogps(items[0], items[1], None, slice(5, 5 + batch.num_pairs))
    inputs = ObjectiveInputs(batch, reference, old, collision, whole)
    for span in batch.spans(7):
        part = inputs.part(span)
        same(part.batch, batch.part(span))
        for cut, logps in zip((part.reference, part.old, part.collision), (reference, old, collision), strict=True):
            same(cut, logps.part(span))
        assert part.whole.here == slice(5 + span["B"].start, 5 + span["B"].stop)
        of_responses = replace(whole, policy=reference, reference=old).part(span)
        assert of_responses.here == slice(5 + span["N"].start, 5 + span["N"].stop)


@pytest.mark.parametrize("kind", [PackedBatch, ResponseLogps, TokenLogps, ResponseScores])
def test_a_field_that_is_added_is_cut_or_refused(kind):
    batch = collate(full_groups([(2, (3, 1)), (1, (2, 2))]))
    logps = random_logps(batch)
    own = (logps.sums, logps.lengths, logps.num_bytes, logps.token_logps, logps.aligned)
    whole = {
        PackedBatch: batch,
        ResponseLogps: logps,
        TokenLogps: TokenLogps(*own, response_index=batch.response_index),
        ResponseScores: ResponseScores(logps.sums),
    }[kind]
    values = {f.name: getattr(whole, f.name) for f in fields(kind)}
    kw = field(kw_only=True)
    wider = make_dataclass("Wider", [("added", Float[Tensor, " N"], kw)], bases=(kind,), frozen=True, slots=True)
    first, second = batch.spans(1)
    added = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert wider(**values, added=added).part(second).added.tolist() == [3.0, 4.0]
    assert wider(**values, added=added).part(first).added.tolist() == [1.0, 2.0]
    shapeless = make_dataclass("Shapeless", [("weight", float, field(kw_only=True))], bases=(kind,), frozen=True)
    with pytest.raises(TypeError, match=r"Shapeless\.weight has no axis"):
        axes_of(shapeless)
