"""Groups as objectives need them, and what is said where the data cannot give it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ref.data.groups import TokenGroups, from_groups
from dpo_ref.data.packing import collate
from dpo_ref.objectives.coupled import aot
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.objectives.policy_gradient import rwr
from dpo_ref.objectives.unpaired import bco, kto, sft
from dpo_ref.training.rounds import WithMismatched, groups_for
from dpo_ref.types import PromptGroup, TokenGroup
from tests.support.tiny import random_groups


def groups(*layout, **changes) -> TokenGroups:
    token_groups = random_groups(layout or [(3, (2, 4)), (5, (1, 3)), (2, (6, 2))])
    return from_groups(replace(g, group_id=f"{n:032x}", **changes) for n, g in enumerate(token_groups))


def test_pairs_are_split_into_a_wanted_and_an_unwanted_response():
    (first, *_) = groups_for(bind(bco), groups(pairs=((1, 0),)))
    assert first.labels == (False, True)
    assert first.pairs == ((1, 0),)
    batch = collate(list(groups_for(bind(bco), groups(pairs=((1, 0),)))))
    assert batch.labels is not None
    assert batch.labels.tolist() == [False, True] * 3


def test_labels_of_the_data_stay():
    single = groups((3, (2,)), (4, (5,)), pairs=(), labels=(False,))
    assert [g.labels for g in groups_for(bind(bco), single)] == [(False,), (False,)]
    assert single.labelled.all()
    assert not groups().labelled.any()


def test_responses_in_the_middle_of_a_ranking_are_refused():
    with pytest.raises(ValueError, match=r"1 of 1 rows rank .*data\.pairing=best_vs_worst"):
        groups_for(bind(bco), groups((3, (2, 4, 1))))
    data = groups((3, (2, 4, 1)), (2, (1, 1)), (2, (3, 1, 2)))
    ends = from_groups(replace(g, pairs=((0, len(g.response_ids) - 1), (0, 1))) for g in data)
    assert data.undecided.tolist() == [True, False, True]
    assert [g.labels for g in groups_for(bind(bco), ends)] == [
        (True, False, False),
        (True, False),
        (True, False, False),
    ]


REFUSED = [
    (kto, {"pairs": ()}, "3 of 3 rows have neither a label nor a second response; use sft"),
    (dpo, {"pairs": ()}, "the data has rows with only one; use sft, or kto for rows with a label"),
    (aot, {"pairs": ()}, "objective=aot compares responses"),
    (rwr, {}, "rows without advantages; use data=on_policy"),
]


@pytest.mark.parametrize(("function", "changes", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_data_that_lacks_what_the_objective_needs(function, changes, message):
    with pytest.raises(ValueError) as error:
        groups_for(bind(function), groups(**changes))
    assert message in str(error.value)


def test_advantages_reach_the_batch():
    scored = groups(advantages=(0.5, -1.5))
    assert groups_for(bind(rwr), scored) is scored
    batch = collate(list(scored))
    assert batch.advantages is not None
    assert batch.advantages.tolist() == [0.5, -1.5] * 3
    assert collate(list(groups())).advantages is None
    assert all(g.advantages is None for g in groups_for(bind(sft), scored))


def test_mismatched_responses_are_the_next_prompts_cyclically():
    kto_groups = list(groups_for(bind(kto), groups()))
    for group, after in zip(kto_groups, [*kto_groups[1:], kto_groups[0]], strict=True):
        other = group.mismatched
        assert other is not None
        assert (other.group_index, other.prompt_ids) == (-1 - group.group_index, group.prompt_ids)
        longest = max(len(g.prompt_ids) + len(ids) for g in kto_groups for ids in g.response_ids)
        assert [len(group.prompt_ids) + len(ids) <= longest for ids in other.response_ids] == [True, True]
        for ours, whole in zip(other.response_ids, after.response_ids, strict=True):
            assert ours == whole[: len(ours)]
            assert len(ours) == len(whole) or len(group.prompt_ids) + len(ours) == longest
    assert len({group.mismatched.group_id for group in kto_groups if group.mismatched}) == 3
    assert all(group.mismatched is None for group in groups_for(bind(bco), groups()))


def test_groups_of_the_same_prompt_are_skipped():
    first, second, third = groups()
    same = replace(second, prompt_ids=first.prompt_ids)
    data = WithMismatched(from_groups([first, same, third]))
    owners = {tuple(ids[:1]): n for n, g in enumerate((first, same, third)) for ids in g.response_ids}
    following = [owners[tuple(g.response_ids[0][:1])] for g in data.others[0]]
    assert following == [2, 2, 0]
    with pytest.raises(ValueError, match="needs data with at least two prompts"):
        WithMismatched(from_groups([first, same]))


def test_texts_follow():
    """What a reference that reads text is asked for: this prompt, the next prompt's responses."""

    rows = [
        PromptGroup(
            ({"role": "user", "content": f"ask {n}"},), (f"good {n}", f"bad {n}"), ((0, 1),), logps=(-1.0, -2.0)
        )
        for n in range(3)
    ]
    data = WithMismatched(from_groups(groups(), rows).numbered_from(10))
    (others,) = data.others
    texts = [others.text(index) for index in range(len(others))]
    assert [data.text(index) for index in range(len(data))] == rows
    assert [t.prompt[0]["content"] for t in texts] == ["ask 0", "ask 1", "ask 2"]
    assert [t.responses for t in texts] == [(f"good {n}", f"bad {n}") for n in (1, 2, 0)]
    assert all(t.logps is None for t in texts)


@given(st.lists(st.tuples(st.integers(1, 6), st.tuples(st.integers(1, 6), st.integers(1, 6))), min_size=2, max_size=6))
def test_no_mismatched_sequence_is_longer_than_the_data(layout):
    data = groups(*layout)
    longest = max(p + max(r) for p, r in layout)
    first: TokenGroup
    if len({tuple(g.prompt_ids) for g in data}) == len(layout):
        for first in WithMismatched(data).others[0]:
            assert all(0 < len(ids) <= longest - len(first.prompt_ids) for ids in first.response_ids)
