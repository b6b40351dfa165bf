"""Groups in flat arrays are the groups that went in; what is masked is not scored, by any path."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ref.data.groups import ConcatGroups, MappedGroups, TokenGroups, from_groups
from dpo_ref.data.packing import collate
from dpo_ref.data.tokenise import tokenise, tokenised_once
from dpo_ref.models.logps import head_of, packed_hidden, response_logps, separate_hidden, token_logps
from dpo_ref.references.table import row_key, score
from dpo_ref.types import PromptGroup, TokenGroup, silent
from tests.support.tiny import random_groups, tiny_model

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)


@st.composite
def token_groups(draw, index):
    responses = draw(st.lists(IDS, min_size=1, max_size=4))
    masks = tuple(draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r))) for r in responses)
    everything = all(map(all, masks))
    pair = st.tuples(st.integers(0, len(responses) - 1), st.integers(0, len(responses) - 1))
    return TokenGroup(
        group_index=index,
        group_id=f"{draw(st.integers(0, 2**128 - 1)):032x}",
        prompt_ids=draw(IDS),
        response_ids=tuple(responses),
        num_bytes=tuple(draw(st.integers(0, 10**9)) for _ in responses),
        pairs=tuple(draw(st.lists(pair, max_size=3))),
        scored=None if everything or draw(st.booleans()) else masks,
        labels=draw(st.none() | st.just(tuple(draw(st.booleans()) for _ in responses))),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 5))
def test_what_goes_in_comes_out(data, count, tmp_path_factory):
    expected = [data.draw(token_groups(index)) for index in range(count)]
    groups = from_groups(expected)
    assert list(groups) == expected
    folder = tmp_path_factory.mktemp("kept") / "groups"
    groups.save(folder, {"note.txt": "so"})
    assert list(TokenGroups.load(folder, ())) == expected
    assert list(groups[1:]) == expected[1:]
    assert [g.group_index for g in groups.numbered_from(10)] == list(range(10, 10 + count))
    assert groups.have_pairs.tolist() == [bool(g.pairs) for g in expected]
    assert groups.wanted.tolist() == [g.labels is None or g.labels[0] for g in expected]
    assert list(groups.where(groups.have_pairs)) == [g for g in expected if g.pairs]
    both = ConcatGroups(groups[:1], groups, groups)
    assert list(both) == [expected[0], *expected, *expected]
    assert both[1:3] == [*expected, *expected][:2]
    assert [g.pairs for g in MappedGroups(groups, lambda g: g)[1:]] == [g.pairs for g in expected[1:]]


def test_what_another_process_kept_meanwhile_stays(tmp_path):
    """Its arrays may be mapped by those who read them."""
    groups = from_groups([TokenGroup(0, "0" * 32, [1, 2], ([3],), (1,), ())])
    groups.save(tmp_path / "kept", {"note.txt": "theirs"})
    groups.save(tmp_path / "kept", {"note.txt": "ours"})
    assert (tmp_path / "kept" / "note.txt").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def masked(group, *masks):
    return TokenGroup(
        group.group_index, group.group_id, group.prompt_ids, group.response_ids, group.num_bytes, group.pairs, masks
    )


@pytest.mark.parametrize("path", ["packed", "one response at a time"])
def test_only_scored_tokens_count(path):
    """The masked sums are sums over a choice of the unmasked per-token values."""
    model = tiny_model(seed=1)
    plain = random_groups([(3, (4, 2)), (2, (5, 3, 1))])
    first = [True, False, True, True], [False, True]
    second = [False, False, True, False, True], [True, True, True], [True]
    chosen = [masked(plain[0], *first), masked(plain[1], *second)]
    keep = torch.tensor([flag for mask in (*first, *second) for flag in mask])
    whole, batch = collate(plain), collate(chosen)
    everything = response_logps(model, whole).tokens()
    forward = {"packed": packed_hidden, "one response at a time": separate_hidden}[path]
    if path != "packed":
        model.set_attn_implementation("eager")
    logps = token_logps(forward(model, batch), head_of(model), batch.target_ids)
    torch.testing.assert_close(logps, everything[keep], atol=1e-5, rtol=0)
    assert batch.lengths.tolist() == [3, 1, 2, 3, 1]
    assert batch.scored_per_group == (4, 6)


def test_the_table_tells_masks_apart():
    model = tiny_model(seed=1)
    (plain,) = random_groups([(3, (4, 2))])
    other = masked(plain, [True, False, True, True], [True, True])
    assert row_key(plain) != row_key(other)
    rows = score(model, [plain, other], torch.device("cpu"))
    assert rows[row_key(other)].tolist() == pytest.approx(rows[row_key(plain)][[0, 2, 3, 4, 5]].tolist(), abs=1e-5)


@pytest.mark.parametrize("cause", ["none", "text", "pairs", "limit", "tokenizer"])
def test_tokens_are_kept_for_what_they_depend_on(cause, tmp_path):
    """A second run tokenises again when anything changed that matters, and only then."""
    from functools import partial

    from dpo_ref.types import Message, PromptGroup
    from tests.support.tokenizers_here import byte_bpe

    passes = []

    def counting(items, description, total):
        passes.append(description)
        return silent(items, description, total)

    def groups(text="why", pairs=((0, 1),), origin="a"):
        return [PromptGroup((Message(role="user", content=text),), ("so", "no no"), pairs, origin=origin)]

    tokenizer = byte_bpe()
    make = partial(tokenise, max_length=100)
    first = tokenised_once(groups(), tokenizer, make, "words", tmp_path, counting)
    changed = {
        "none": (groups(origin="b"), partial(tokenise, max_length=100), "words"),
        "text": (groups(text="who"), make, "words"),
        "pairs": (groups(pairs=((1, 0),)), make, "words"),
        "limit": (groups(), partial(tokenise, max_length=99), "words"),
        "tokenizer": (groups(), make, "other words"),
    }
    data, tokenised, identity = changed[cause]
    second = tokenised_once(data, tokenizer, tokenised, identity, tmp_path, counting)
    assert len(passes) == (1 if cause == "none" else 2)
    if cause == "none":
        assert list(second.groups) == list(first.groups)
        assert second.counts == first.counts


def test_groups_know_their_texts_whatever_is_done_with_them():
    rows = [PromptGroup((), (f"yes {n}", f"no {n}"), ((0, 1),)) for n in range(4)]
    groups = from_groups(random_groups([(2, (1, 1))] * 4), rows)
    views = {
        "slice": groups[1:3],
        "selection": groups.where(np.array([False, True, True, False])),
        "numbers": groups.numbered_from(7)[1:3],
        "function": MappedGroups(groups[1:3], lambda group: group),
        "parts": ConcatGroups(groups[1:2], MappedGroups(groups[2:3], lambda group: group)),
    }
    for name, view in views.items():
        assert [view.text(index) for index in range(len(view))] == rows[1:3], name
        assert view.others == []
