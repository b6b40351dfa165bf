"""Every number of a diagnosis against brute force in float64: one response at a time, full logits, plain loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_ref.evaluation.diagnostics.examples import Looks, drawn_answers, drawn_pairs
from dpo_ref.evaluation.diagnostics.logratios import (
    CLASSES,
    EDGES,
    END,
    FIRST,
    LEVELS,
    OTHER,
    PUNCTUATION,
    WHITESPACE,
    Vocabulary,
    classes_of,
    concentration,
    end_shift,
    hazard,
    ranks_of,
    relative_hazard,
    shift_of,
)
from dpo_ref.evaluation.diagnostics.logratios import kind_of_text as kind
from dpo_ref.evaluation.diagnostics.token_statistics import readings_of
from tests.support.diagnosed import ENDS, INITIAL, NEVER, POLICY, clustered, groups, tokens  # noqa: F401
from tests.support.tiny import naive_logps, tiny_model
from tests.support.tokenizer_families import FAMILIES

TOKENIZER = FAMILIES["qwen: byte-level, no BOS, ChatML"]().tokenizer


def full(model, group, response, never=()):
    """All next-token log-probs of one response, [tokens, vocabulary], by the model's own attention."""
    used = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    ids = group.prompt_ids + group.response_ids[response]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
    model.set_attn_implementation(used)
    logits[:, list(never)] = -torch.inf
    return logits.log_softmax(dim=-1).numpy()


def every_response(groups):  # noqa: F811
    return [(group, response) for group in groups for response in range(len(group.response_ids))]


@pytest.mark.parametrize("never", [(), (5, 60)], ids=["data", "samples"])
def test_readings_are_those_of_each_response_alone(groups, never):  # noqa: F811
    if never:  # samples hold none of them
        groups = [
            replace(g, response_ids=tuple([3 if t in never else t for t in r] for r in g.response_ids)) for g in groups
        ]
    readings = readings_of(POLICY, groups, sorted(ENDS), torch.tensor(never, dtype=torch.int64))
    index = 0
    for group, response in every_response(groups):
        logps = full(POLICY, group, response, never)
        for token, row in zip(group.response_ids[response], logps, strict=True):
            finite_logps = row[np.isfinite(row)]
            assert readings.logps[index] == pytest.approx(row[token], abs=1e-9)
            assert readings.end_logps[index] == pytest.approx(math.log(sum(math.exp(row[e]) for e in ENDS)), abs=1e-9)
            assert readings.entropy[index] == pytest.approx(-(np.exp(finite_logps) * finite_logps).sum(), abs=1e-9)
            assert readings.ranks[index] == 1 + (finite_logps > row[token]).sum()
            index += 1
    assert index == len(readings.logps)


def test_log_ratios_are_of_the_shared_function(groups, tokens):  # noqa: F811
    expected = [naive_logps(POLICY, group) for group in groups]
    expected = torch.cat([logps for responses in expected for logps in responses]).detach().numpy()
    np.testing.assert_allclose(tokens.policy.logps, expected, atol=1e-9)


def test_the_batch_size_changes_nothing_and_twice_is_the_same(groups):  # noqa: F811
    single = tiny_model(seed=1)  # float32, as in use
    read = [readings_of(single, groups, sorted(ENDS), NEVER[:0], tokens_per_batch=size) for size in (9, 9, 40, 9999)]
    for values, other in zip(read[0], read[1], strict=True):
        np.testing.assert_array_equal(values, other)
    for readings in read[2:]:
        for values, other in zip(read[0][:3], readings[:3], strict=True):
            np.testing.assert_allclose(values, other, atol=1e-5)


def test_chunks_of_the_vocabulary_change_nothing(groups, monkeypatch):  # noqa: F811
    whole = readings_of(POLICY, groups, sorted(ENDS), NEVER)
    monkeypatch.setattr(
        "dpo_ref.evaluation.diagnostics.token_statistics.CHUNK_LOGITS", 3 * 4 * 61
    )  # three tokens at a time
    for values, other in zip(whole, readings_of(POLICY, groups, sorted(ENDS), NEVER), strict=True):
        np.testing.assert_allclose(values, other, atol=1e-12)


def rows_of(groups, tokens):  # noqa: F811
    """(token, response, position, length, prompt, log-ratio) of every token, from the groups themselves."""
    rows, index = [], 0
    for response_index, (group, response) in enumerate(every_response(groups)):
        ids = group.response_ids[response]
        for position, token in enumerate(ids):
            ratio = tokens.policy.logps[index] - tokens.initial.logps[index]
            rows.append((token, response_index, position, len(ids), tuple(group.prompt_ids), ratio))
            index += 1
    return rows


def test_the_shift_of_tokens_by_loops(groups, tokens):  # noqa: F811
    rows = rows_of(groups, tokens)
    ratios = [row[5] for row in rows]
    shift = shift_of(tokens.logratios, tokens, classes_of(tokens, Vocabulary(TOKENIZER)), Vocabulary(TOKENIZER), 4, 2)
    assert shift.num_tokens == len(rows) == sum(shift.counts)
    for index, count in enumerate(shift.counts):
        low = -math.inf if index == 0 else EDGES[index - 1]
        high = math.inf if index == len(EDGES) else EDGES[index]
        assert count == sum(low < ratio <= high for ratio in ratios)
    mean, error = clustered(ratios, [row[4] for row in rows])
    assert shift.mean.mean == pytest.approx(mean, abs=1e-12)
    assert shift.mean.se == pytest.approx(error, rel=1e-9)
    assert shift.mean_abs == pytest.approx(sum(map(abs, ratios)) / len(ratios))
    assert shift.quantiles == pytest.approx(np.quantile(ratios, LEVELS))
    assert shift.share_above_1 == sum(abs(r) > 1 for r in ratios) / len(ratios)
    assert shift.share_still == sum(abs(r) < 0.01 for r in ratios) / len(ratios)
    largest = sorted(map(abs, ratios), reverse=True)
    assert shift.top_1_percent == pytest.approx(largest[0] / sum(largest))  # 1 % of 56 tokens is one
    assert shift.top_10_percent == pytest.approx(sum(largest[:6]) / sum(largest))
    by_token = {token: [row[5] for row in rows if row[0] == token] for token in {row[0] for row in rows}}
    totals = sorted(by_token.values(), key=lambda values: -abs(sum(values)))[:4]
    assert [moved.total for moved in shift.by_total] == pytest.approx([sum(values) for values in totals])
    means = sorted((v for v in by_token.values() if len(v) > 1), key=lambda v: -abs(sum(v) / len(v)))[:4]
    assert [moved.mean for moved in shift.by_mean] == pytest.approx([sum(v) / len(v) for v in means])
    assert [moved.num_tokens for moved in shift.by_mean] == [len(v) for v in means]
    names = {(1,): "1", (2,): "2", (3, 4): "3–4", (5, 6, 7, 8): "5–8", tuple(range(9, 17)): "9–16"}
    for positions, bucket in zip(names, shift.by_position, strict=True):
        inside = [row[5] for row in rows if row[2] + 1 in positions]
        assert (bucket.name, bucket.num_tokens) == (names[positions], len(inside))
        assert bucket.mean.mean == pytest.approx(sum(inside) / len(inside))
        assert bucket.mean.se == pytest.approx(
            clustered(inside, [row[4] for row in rows if row[2] + 1 in positions])[1], nan_ok=True
        )
        assert bucket.share == pytest.approx(sum(map(abs, inside)) / sum(largest))
    ends = [row[5] for row in rows if row[0] in ENDS]
    by_class = {bucket.name: bucket for bucket in shift.by_class}
    assert by_class["end of the answer"].num_tokens == len(ends)
    assert by_class["end of the answer"].mean_abs == pytest.approx(sum(map(abs, ends)) / len(ends))
    assert by_class["first of the answer"].num_tokens == sum(row[2] == 0 and row[0] not in ENDS for row in rows)
    assert sum(bucket.share for bucket in shift.by_class) == pytest.approx(1)


def test_concentration_by_hand():
    values = np.array([-8.0, 1.0, 0.5, 0.5] + [0.0] * 196)  # 1 % of 200 tokens are 2
    assert concentration(values, 0.01) == 0.9
    assert concentration(values, 0.1) == 1.0
    assert math.isnan(concentration(np.zeros(3), 0.01))


def test_when_answers_end_by_loops(groups, tokens):  # noqa: F811
    rows, hazards = rows_of(groups, tokens), hazard(tokens)
    logps = [full(model, *each) for model in (POLICY, INITIAL) for each in every_response(groups)]
    half = len(logps) // 2
    for model, values in ((0, hazards.policy), (1, hazards.initial)):
        mine = logps[model * half : (model + 1) * half]
        for position in range(11):
            alive = [np.exp(each[position, sorted(ENDS)]).sum() for each in mine if len(each) > position]
            assert hazards.num_responses[position] == len(alive)
            assert values[position] == pytest.approx(sum(alive) / len(alive), abs=1e-9)
        last = [np.exp(each[-1, sorted(ENDS)]).sum() for each in mine]
        assert (relative_hazard(tokens).policy, relative_hazard(tokens).initial)[model][10] == pytest.approx(
            np.mean(last)
        )
    tenths = [
        10 if size == 1 else math.floor(10 * (position / (size - 1)) + 1e-9) for _, _, position, size, _, _ in rows
    ]
    assert relative_hazard(tokens).num_responses == tuple(tenths.count(tenth) for tenth in range(11))
    ended = [row for row in rows if row[0] in ENDS and row[2] == row[3] - 1]
    mean, error = clustered([row[5] for row in ended], [row[4] for row in ended])
    assert (end_shift(tokens).num_ended, len(ended)) == (7, 7)
    assert end_shift(tokens).logratio == pytest.approx((mean, error))


def test_ranks_and_entropy_by_loops(tokens):  # noqa: F811
    ranks, (ours, theirs) = ranks_of(tokens), (tokens.policy.ranks, tokens.initial.ranks)
    assert ranks.policy_first == np.mean([r == 1 for r in ours])
    assert (ranks.share_risen, ranks.share_fallen) == (np.mean(ours < theirs), np.mean(ours > theirs))
    mean, error = clustered(tokens.policy.entropy.tolist(), tokens.prompts[tokens.response].tolist())
    assert tokens.per_token(tokens.policy.entropy) == pytest.approx((mean, error))


def test_a_set_of_responses_is_its_tokens(tokens):  # noqa: F811
    chosen = np.array([1, 3, 8])
    part = tokens.of(chosen)
    assert part.lengths.tolist() == tokens.lengths[chosen].tolist()
    assert part.prompts.tolist() == tokens.prompts[chosen].tolist()
    assert part.sums(part.logratios) == pytest.approx(tokens.sums(tokens.logratios)[chosen])
    assert part.position.tolist() == [p for size in part.lengths for p in range(size)]


def test_classes_by_hand(tokens):  # noqa: F811
    assert [kind(text) for text in (" \n", ".", " –", "a.", "\N{REPLACEMENT CHARACTER}", "", "7", "€")] == [
        WHITESPACE, PUNCTUATION, PUNCTUATION, OTHER, OTHER, OTHER, OTHER, PUNCTUATION,
    ]  # fmt: skip
    classes = classes_of(tokens, Vocabulary(TOKENIZER))
    assert (classes == END).tolist() == [token in ENDS for token in tokens.ids]
    assert ((classes == FIRST) | (classes == END))[tokens.position == 0].all()
    assert len(CLASSES) == 5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_is_shown_as_it_stands_behind_text(name):
    family = FAMILIES[name]()
    vocabulary, tokenizer = Vocabulary(family.tokenizer), family.tokenizer
    written = tokenizer.encode("a the cat", add_special_tokens=False)
    anchor = tokenizer.encode("a", add_special_tokens=False)
    if written[: len(anchor)] != anchor:
        pytest.skip("merges over the border")
    text = "".join(vocabulary.text(token) for token in written[len(anchor) :])
    assert text.replace(" ", "") == "thecat"
    assert text.startswith(" ")


def test_examples_show_every_token_and_its_log_ratio(groups, tokens):  # noqa: F811
    family = FAMILIES["qwen: byte-level, no BOS, ChatML"]()
    looks = Looks(family.tokenizer, groups, tokens)
    shown = drawn_pairs(looks, 2, seed=0) + drawn_answers(looks, 3, seed=0)
    assert [example.picked for example in shown] == ["drawn at random"] * 5 + [
        "furthest from the initial policy, per token"
    ] * 3
    assert shown == drawn_pairs(looks, 2, seed=0) + drawn_answers(looks, 3, seed=0)
    sums = tokens.sums(tokens.logratios)
    for example in shown:
        for response in example.responses:
            total = sum(token.logratio for token in response.tokens)
            assert min(abs(total - value) for value in sums) < 1e-9
    far = tokens.sums(np.abs(tokens.logratios)) / tokens.lengths
    drawn = [sum(token.logratio for token in example.responses[0].tokens) for example in shown[2:5]]
    rest = [index for index in np.argsort(-far) if min(abs(sums[index] - value) for value in drawn) > 1e-9]
    furthest = [sum(token.logratio for token in example.responses[0].tokens) for example in shown[5:]]
    assert furthest == pytest.approx(sums[rest[:3]])
    texts = {"".join(token.text for token in example.responses[0].tokens) for example in shown[2:]}
    assert texts <= {family.tokenizer.decode(ids) for group in groups for ids in group.response_ids}
