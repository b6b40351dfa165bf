"""What happened to pairs: displacement, rankings, and their accuracy by difference of length."""

import numpy as np
import pytest

from dpo_ref.evaluation.diagnostics.pairs import displacements, length_bins, ranking, wilson
from dpo_ref.evaluation.diagnostics.token_statistics import pair_places
from tests.support.diagnosed import INITIAL, POLICY, clustered, groups, tokens  # noqa: F401
from tests.support.tiny import naive_logps


def test_displacement_and_ranking_by_loops(groups, tokens):  # noqa: F811
    pairs, moved, sizes = pair_places(groups), [], []
    for group in groups:
        ours, theirs = (naive_logps(model, group) for model in (POLICY, INITIAL))
        change = [(a - b).sum().item() for a, b in zip(ours, theirs, strict=True)]
        moved += [(change[better], change[worse], tuple(group.prompt_ids)) for better, worse in group.pairs]
        sizes += [(len(group.response_ids[better]), len(group.response_ids[worse])) for better, worse in group.pairs]
    displacement, prompts = displacements(tokens, pairs), [each[2] for each in moved]
    for index, side in enumerate((displacement.chosen, displacement.rejected)):
        values, lengths = [each[index] for each in moved], [each[index] for each in sizes]
        assert side.mean == pytest.approx(clustered(values, prompts), abs=1e-9)
        assert side.median == pytest.approx(np.median(values))
        assert side.share_down == pytest.approx(clustered([float(v < 0) for v in values], prompts))
        ratio = sum(values) / sum(lengths)
        residuals = [v - ratio * size for v, size in zip(values, lengths, strict=True)]
        assert side.per_token == pytest.approx((ratio, clustered(residuals, prompts)[1] / np.mean(lengths)))
    quadrants = [(a >= 0, b >= 0) for a, b, _ in moved]
    for name, where in (("both_up", (True, True)), ("chosen_up_rejected_down", (True, False)),
                        ("chosen_down_rejected_up", (False, True)), ("both_down", (False, False))):  # fmt: skip
        assert getattr(displacement, name) == quadrants.count(where) / len(moved)
    margins = np.array([a - b for a, b, _ in moved])
    gaps = np.array([a - b for a, b in sizes])
    ranked = ranking({"implicit": margins, "likelihood": -margins}, gaps, tokens.prompts[pairs.chosen].tolist())
    assert ranked.accuracy["implicit"] == pytest.approx(clustered((margins > 0).astype(float).tolist(), prompts))
    assert ranked.accuracy["implicit"].mean + ranked.accuracy["likelihood"].mean == 1
    longer = [0.5 if gap == 0 else float(gap > 0) for gap in gaps]
    assert ranked.accuracy["length"].mean == np.mean(longer)
    difference = [float(m > 0) - b for m, b in zip(margins, longer, strict=True)]
    assert ranked.above_length == pytest.approx(clustered(difference, prompts))
    expected = {"−10 to −4": gaps < -3, "−3 to −1": (gaps < 0) & (gaps > -4), "0": gaps == 0, "+4 to +10": gaps > 3}
    assert [length_bin.name for length_bin in ranked.by_length] == list(expected)
    for length_bin, inside in zip(ranked.by_length, expected.values(), strict=True):
        assert (length_bin.num_pairs, length_bin.accuracy) == (inside.sum(), (margins[inside] > 0).mean())
        assert length_bin.margin == pytest.approx(margins[inside].mean())


def test_length_bins_and_wilson_by_hand():
    codes, names = length_bins(np.array([0, 1, 3, 4, -10, -11, 30, 31, 100, 101, -500]))
    assert [names[code] for code in codes.tolist()] == [
        "0", "+1 to +3", "+1 to +3", "+4 to +10", "−10 to −4", "−30 to −11", "+11 to +30", "+31 to +100",
        "+31 to +100", "+101 or more", "−101 or less",
    ]  # fmt: skip
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)  # Newcombe 1998, method 3
    assert wilson(0, 4) == pytest.approx((0.0, 0.4899), abs=5e-5)
