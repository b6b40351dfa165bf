"""Tables equal live models, are shared, find holes, and refuse what is stale."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import collate
from dpo_ref.models.logps import response_logps
from dpo_ref.references import policies, table
from dpo_ref.references.interface import Reference
from tests.support.reference_contexts import TOKENIZER, context_for
from tests.support.tiny import policy_of, tiny_model

sized = partial(tiny_model, vocab_size=len(TOKENIZER))  # an embedding with a row for every token


@pytest.fixture
def context(tmp_path):
    passes = []

    def progress(items, description, total):
        passes.append(total)
        yield from items

    policy, models = sized(seed=0), lambda source: sized(seed=int(source.path))
    return context_for(tmp_path, policy=policy, make=models, progress=progress), passes


@pytest.mark.parametrize("make", [policies.initial, partial(policies.other, path="3")])
def test_table_equals_the_live_model(context, make):
    context, _ = context
    batch = collate(context.groups)
    cached, live = make(context, cache="auto"), make(context, cache="off")
    assert isinstance(cached, Reference)
    assert isinstance(live, Reference)
    torch.testing.assert_close(cached.logps(batch).sums, live.logps(batch).sums, atol=1e-5, rtol=0)
    torch.testing.assert_close(cached.logps(batch).token_logps, live.logps(batch).token_logps, atol=1e-5, rtol=0)
    assert cached.identity == live.identity
    assert cached.weights == live.weights


def test_initial_stays_when_the_policy_moves(context):
    context, _ = context
    batch = collate(context.groups)
    for cache in ("auto", "off"):
        policy = policy_of(copy.deepcopy(context.policy.model), TOKENIZER)
        reference = policies.initial(replace(context, policy=policy), cache=cache)
        before = reference.logps(batch).sums.clone()
        with torch.no_grad():
            context.policy.model.lm_head.weight.add_(0.5)
        assert torch.equal(reference.logps(batch).sums, before)
        with torch.no_grad():
            context.policy.model.lm_head.weight.sub_(0.5)


def test_second_run_computes_only_what_is_missing(context):
    context, passes = context
    policies.initial(replace(context, groups=context.groups[:3]))
    first = sum(passes)
    policies.initial(replace(context, groups=context.groups[:3]))
    assert sum(passes) == first
    everything = policies.initial(context)
    assert sum(passes) == first + 1
    live = policies.initial(context, cache="off")
    batch = collate(context.groups)
    torch.testing.assert_close(everything.logps(batch).sums, live.logps(batch).sums, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cause", ["weights", "text", "prompt", "response"])
def test_the_table_is_not_hit_when_meaning_changes(context, cause):
    context, passes = context
    policies.initial(context)
    before = sum(passes)
    if cause == "weights":
        changed = replace(context, policy=policy_of(sized(seed=1), TOKENIZER))
    elif cause == "text":
        changed = replace(context, policy=policy_of(sized(seed=0), TOKENIZER, "other words"))
    else:
        group = context.groups[0]
        shorter = (
            replace(group, prompt_ids=group.prompt_ids[1:])
            if cause == "prompt"
            else replace(group, response_ids=(group.response_ids[0][:-1], group.response_ids[1]))
        )
        changed = replace(context, groups=from_groups([shorter, *context.groups[1:]]))
    policies.initial(changed)
    assert sum(passes) > before


def test_a_stale_table_is_refused(context):
    context, _ = context
    reference = policies.initial(context)
    folder = context.work.cache / "reference" / reference.identity
    rows = table.read_shards(folder)[0]
    for path in folder.glob("*"):
        path.unlink()
    table.write_shard(folder, {key: values + np.float32(0.1) for key, values in rows.items()})
    with pytest.raises(ValueError, match=r"differ from the reference by 0\.1 nats.*stale"):
        policies.initial(context)


def test_a_run_takes_its_own_rows_of_a_table_alone(context):
    context, _ = context
    reference = policies.initial(context)
    folder = context.work.cache / "reference" / reference.identity
    whole, wanted = table.read_shards(folder)[0], {table.row_key(context.groups[1])}
    (row,) = table.read_shards(folder, wanted)[0].items()
    assert row[0] in wanted
    assert len(whole) > 1
    assert np.array_equal(row[1], whole[row[0]])


def test_holes_are_found(context):
    context, _ = context
    rows = table.score(context.policy.model, context.groups[:2], context.work.device)
    with pytest.raises(ValueError, match="lacks 2 groups"):
        table.PrecomputedReference("initial", "x", "y", context.groups, rows, context.work.device)


def test_a_table_of_no_groups(context):
    """Nothing is held out, and the samples of a run are asked about as they come."""
    context, _ = context
    whole = policies.initial(context)
    assert policies.initial(replace(context, groups=context.groups[:0])).identity == whole.identity


def test_shards_survive_a_crash(context, monkeypatch):
    """Partial work is kept: a pass that dies in its third pack leaves two packs' rows."""
    context, _ = context
    monkeypatch.setattr(table, "SHARD_TOKENS", 1)
    real, calls = table.score, []

    def dies_once(model, groups, device):
        calls.append(len(groups))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, groups, device)

    monkeypatch.setattr(table, "score", dies_once)
    with pytest.raises(KeyboardInterrupt):
        policies.initial(context)
    kept, calls[:] = sum(calls[:2]), [0, 0, 0]
    policies.initial(context)
    _probe, *passes = calls[3:]
    assert sum(passes) == len(context.groups) - kept


def test_none_is_zero_and_auto_follows_the_objective(context):
    context, passes = context
    batch = collate(context.groups)
    assert not policies.none(context).logps(batch).sums.any()
    assert policies.auto(replace(context, uses_reference=False)).name == "none"
    assert passes == []
    assert policies.auto(context).name == "initial"


def test_uniform_is_minus_length_times_ln_v(context):
    context, _ = context
    batch = collate(context.groups)
    logps = policies.uniform_token(context).logps(batch)
    assert logps.sums.tolist() == pytest.approx([-n * math.log(len(TOKENIZER)) for n in batch.lengths.tolist()])
    assert logps.tokens().shape == batch.target_ids.shape


def test_interpolation_lies_between(context, tmp_path):
    """At share 0 and 1 it is one of the two; between them the weights are their mean."""
    context, _ = context
    batch = collate(context.groups)
    ends = [policies.interpolate(context, path="3", share=share).logps(batch).sums for share in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], policies.initial(context).logps(batch).sums, atol=1e-5, rtol=0)
    torch.testing.assert_close(ends[1], policies.other(context, path="3").logps(batch).sums, atol=1e-5, rtol=0)
    middle = sized(seed=0)
    with torch.no_grad():
        for ours, theirs in zip(middle.parameters(), sized(seed=3).parameters(), strict=True):
            ours.add_(theirs).div_(2)
    logps = policies.interpolate(context, path="3", share=0.5, cache="off").logps(batch)
    torch.testing.assert_close(logps.sums, response_logps(middle, batch).sums, atol=1e-5, rtol=0)
    narrow = context_for(tmp_path, make=lambda _: sized(hidden_size=16))
    with pytest.raises(ValueError, match="has other weights than the policy"):
        policies.interpolate(narrow, path="3", share=0.5)
