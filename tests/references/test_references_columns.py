"""`reference=columns`: log-probs that come with the rows arrive unchanged, and what is none is refused."""

import math
from functools import partial
from pathlib import Path

import pytest

from dpo_ref.data.groups import whole_id
from dpo_ref.data.packing import collate, pack
from dpo_ref.data.sources import preferences
from dpo_ref.data.tokenise import tokenise
from dpo_ref.references.columns import columns
from tests.support.given_columns import PAIR, given, written
from tests.support.reference_contexts import context_for
from tests.support.tokenizer_families import FAMILIES

POLICY = FAMILIES["qwen: byte-level, no BOS, ChatML"]().tokenizer
HH = {"chosen": "\n\nHuman: why?\n\nAssistant: so", "rejected": "\n\nHuman: why?\n\nAssistant: no"}
RANKED = {"prompt": "Pick.", "responses": ["one", "five", "three"], "scores": [1, 5, 3]}
NONE = math.nan


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))


def brought(data):
    """The log-probs of every group, None in place of NaN, which equals nothing."""
    return [
        None if group.logps is None else [None if math.isnan(v) else v for v in group.logps] for group in data.train
    ]


BROUGHT = {
    "RefDPO": ([PAIR | {"chosen_logprob": -3.25, "rejected_logprob": -0.1}], {}, [[-3.25, -0.1]]),
    "TRL": ([PAIR | {"ref_chosen_logps": -3, "ref_rejected_logps": "-4.5"}], {}, [[-3.0, -4.5]]),
    "older TRL": ([HH | {"reference_chosen_logps": -1e-9, "reference_rejected_logps": -2e3}], {}, [[-1e-9, -2e3]]),
    "none": ([PAIR], {}, [None]),
    "empty": ([PAIR | {"chosen_logprob": None, "rejected_logprob": None}], {}, [None]),
    "one of two": ([PAIR | {"chosen_logprob": -3.0}], {}, [[-3.0, None]]),
    "no numbers": ([PAIR | {"chosen_logprob": [-3.0], "rejected_logprob": True}], {}, [[None, None]]),
    "one that is null beside another": (
        [PAIR | {"chosen_logprob": None, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}], {}, [[-1.0, -2.0]],
    ),
    "two sets": (
        [PAIR | {"chosen_logprob": -1, "rejected_logprob": -2, "ref_chosen_logps": -3, "ref_rejected_logps": -4}], {},
        [[None, None]],
    ),
    "two sets, one named": (
        [PAIR | {"chosen_logprob": -1, "rejected_logprob": -2, "ref_chosen_logps": -3, "ref_rejected_logps": -4}],
        {"logps_columns": ["ref_chosen_logps", "ref_rejected_logps"]}, [[-3.0, -4.0]],
    ),
    "named, of a few rows": (
        [PAIR, PAIR | {"a": -1.0, "b": -2.0}], {"logps_columns": ["a", "b"]}, [[None, None], [-1.0, -2.0]],
    ),
    "best and worst": ([RANKED | {"logprobs": [-1.0, -5.0, -3.0]}], {}, [[-5.0, -1.0]]),
    "all": ([RANKED | {"logprobs": [-1.0, -5.0, None]}], {"pairing": "all"}, [[-5.0, None, -1.0]]),
    "a list of another length": ([RANKED | {"logprobs": [-1.0, -5.0]}], {}, [[None, None]]),
    "a list of another name": ([RANKED | {"mine": [-1, -5, -3]}], {"logps_columns": ["mine"]}, [[-5.0, -1.0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROUGHT)
def test_what_rows_bring(name, tmp_path, own_cache):
    rows, options, expected = BROUGHT[name]
    path = written(tmp_path / "rows.jsonl", *rows)
    assert brought(preferences(0, path=path, **options)) == expected
    assert brought(preferences(0, path=path, **options)) == expected  # from the cache
    assert brought(preferences(0, path=path, subset=5, **options)) == expected


def test_tables_of_text_bring_them_too(tmp_path, own_cache):
    (tmp_path / "rows.csv").write_text(
        "prompt,chosen,rejected,chosen_logprob,rejected_logprob\na,b,c,-1.5,-2\nd,e,f,,-3\n"
    )
    assert brought(preferences(0, path=str(tmp_path / "rows.csv"))) == [[-1.5, -2.0], [None, -3.0]]


def test_sources_with_columns_of_their_own(tmp_path, own_cache):
    first = written(tmp_path / "a.jsonl", PAIR | {"a": -1.0, "b": -2.0})
    second = written(tmp_path / "b.jsonl", PAIR | {"chosen_logprob": -3.0, "rejected_logprob": -4.0})
    data = preferences(0, sources=[{"path": first, "logps_columns": ["a", "b"]}, {"path": second}])
    assert brought(data) == [[-1.0, -2.0], [-3.0, -4.0]]


def test_they_are_no_part_of_what_a_group_is(tmp_path, own_cache):
    """So tokens and tables are shared with the same data without them."""
    without = preferences(0, path=written(tmp_path / "a.jsonl", PAIR)).train
    given = preferences(0, path=written(tmp_path / "b.jsonl", PAIR | {"chosen_logprob": -1, "rejected_logprob": -2}))
    assert given.train[0].logps == (-1.0, -2.0)
    assert given.train.content == without.content
    for id_of in (whole_id, lambda group: group.group_id, lambda group: group.prompt_id):
        assert id_of(given.train[0]) == id_of(without[0])


NAMED_IN_VAIN = [
    ([PAIR], ["a", "b"], r"rows\.jsonl: no row has the column a, which .*; the first has prompt, chosen, rejected"),
    ([PAIR | {"a": -1}], ["a", "b"], r"no row has the column b, which data\.logps_columns names"),
    (
        [PAIR | {"a": -1}],
        ["a"],
        r"=\[a\] has no effect: format preference takes columns like chosen_logprob, rejected",
    ),
    ([RANKED], ["a", "b"], r"=\[a, b\] has no effect: format ranked takes columns like logprobs"),
    ([{"text": "a", "b": -1}], ["b"], r"=\[b\] has no effect: format text has no place for log-probs"),
    ([PAIR | {"a": -1}], ["a", "a"], r"data\.logps_columns=\[a, a\] must name columns, each once"),
    ([PAIR], [], r"data\.logps_columns=\[\] must name columns, each once"),
]


@pytest.mark.parametrize(("rows", "names", "message"), NAMED_IN_VAIN)
def test_columns_named_in_vain(rows, names, message, tmp_path, own_cache):
    path = written(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=message):
        preferences(0, path=path, logps_columns=names)


def context_of(path, **limits):
    """The context of a run on the rows of a file."""
    groups = preferences(0, path=path).train
    return context_for(
        Path(path).parent,
        tokenizer=POLICY,
        groups=tokenise(groups, POLICY, **({"max_length": 1000} | limits)).groups,
        pack=partial(pack, tokens_per_batch=200),
    )


def test_sums_are_the_columns_and_nothing_else(tmp_path, own_cache):
    """Float64 throughout: 2,000.0001 nats would be 2,000 in float32. The rows a limit drops are not missed."""
    values = [(-2000.0001, -3.5), (-7.25, 0.0), (-1e-7, -30.125)]
    rows = [given(*pair, prompt=f"q {n}") for n, pair in enumerate(values)]
    rows.insert(1, {**PAIR, "chosen": "very " * 300})
    context = context_of(written(tmp_path / "rows.jsonl", *rows))
    assert len(context.groups) == 3
    reference = columns(context, provenance="mine")
    batch = collate([context.groups[index] for index in (2, 0, 1)])
    logps = reference.logps(batch)
    assert logps.sums.tolist() == [*values[2], *values[0], *values[1]]
    assert logps.token_logps is None
    assert (reference.name, reference.weights, reference.provenance) == ("columns", "", "mine")


def test_the_identity_is_whose_they_are_and_the_values_are_known_apart(tmp_path, own_cache):
    first, same, other = (
        context_of(written(tmp_path / f"{n}.jsonl", given(-1.0, value))) for n, value in enumerate((-2.0, -2.0, -2.1))
    )
    references = [columns(context, provenance="mine") for context in (first, same, other)]
    assert references[0].identity == references[1].identity == references[2].identity
    assert references[0].values_digest == references[1].values_digest != references[2].values_digest
    assert columns(first, provenance="his").identity != references[0].identity


REFUSED = [
    (
        [PAIR, PAIR],
        r"row 2 has no log-probs \(2 of 3 groups\); .* chosen_logprob, rejected_logprob; ref_chosen_logps, ",
    ),
    (
        [PAIR],
        r"row 2 has no log-probs \(1 of 2 groups\); .*\(one of these sets in a row\), or those of data\.logps_columns",
    ),
    ([given(-1.0, "n/a")], r"row 2 has log-probs that are missing or no finite numbers \(-1, nan\) \(1 of 2 groups\)"),
    ([given(-math.inf, -1.0)], r"row 2 has log-probs that are missing or no finite numbers \(-inf, -1\)"),
    (
        [given(-1, -2), given(12.5, 14), given(-1, 1)],
        r"row 3 has log-probs above 0 \(12\.5, 14\) \(2 of 4 groups\); .* a negative log-likelihood or a mean of it",
    ),
]


@pytest.mark.parametrize(("rows", "message"), REFUSED)
def test_values_that_are_none_are_refused(rows, message, tmp_path, own_cache):
    context = context_of(written(tmp_path / "rows.jsonl", given(-1.0, -2.0), *rows))
    with pytest.raises(ValueError, match=r"reference=columns: rows\.jsonl " + message):
        columns(context, provenance="mine")


def test_a_cut_response_is_refused(tmp_path, own_cache):
    path = written(
        tmp_path / "rows.jsonl", given(-1, -2), given(-1, -2) | {"chosen": "a much longer answer than that"}
    )
    limits = {"max_response_length": 15, "over_length": "truncate_response"}
    with pytest.raises(
        ValueError, match=r"rows\.jsonl row 2 has a response that was cut.*data\.over_length=drop leave"
    ):
        columns(context_of(path, **limits), provenance="mine")
    dropped = columns(context_of(path, **limits | {"over_length": "drop"}), provenance="mine")
    assert dropped.logps(collate(list(context_of(path).groups)[:1])).sums.tolist() == [-1.0, -2.0]


def test_an_empty_provenance_is_refused(tmp_path, own_cache):
    with pytest.raises(ValueError, match=r"reference\.provenance is empty: say whose"):
        columns(context_of(written(tmp_path / "rows.jsonl", given(-1, -2))), provenance=" ")
