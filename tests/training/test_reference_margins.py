"""Pairs that the reference chooses and weighs: by hand, against log-probs computed naively, and in real runs."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import collate, pack
from dpo_ref.objectives.interface import BatchLogps, ObjectiveInputs, bind
from dpo_ref.objectives.mix import mix
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.references.interface import Reference
from dpo_ref.references.policies import LiveReference
from dpo_ref.training.reference_margins import ByReference, ChosenPairs, by_reference, chosen_pairs, given_margins
from dpo_ref.training.trainer import backward
from dpo_ref.types import Message, PromptGroup, ResponseLogps
from tests.support.command import ROOT, composes, resolved, train
from tests.support.exported import LAB, Naive, exported, rows_in, written
from tests.support.given_columns import written as rows_to
from tests.support.tiny import policy_of, random_groups, shared, tiny_model

COMMON = ("model.path=lab:tiny", "tracking=none", "trainer.batch_size=8")
PACK = partial(pack, tokens_per_batch=40)
CPU = torch.device("cpu")


class Told(Reference):
    """Gives every response of a group what it was told."""

    name, identity = "told", "told"

    def __init__(self, logps):
        self.known = logps

    def logps(self, batch):
        values = [value for index in batch.group_index for value in self.known[index]]
        return ResponseLogps(torch.tensor(values, dtype=torch.float64), batch.lengths, batch.num_bytes, None)


def pairs(*sizes):
    """Groups of one prompt and two responses, numbered from 0."""
    return from_groups(random_groups(tuple((3, size) for size in sizes)))


def chosen(choice, groups, logps):
    return chosen_pairs(choice, Told(logps), groups, PACK, CPU)


# --- by hand


FIVE = [[-5.0, -9.0], [-4.0, -4.0], [-7.0, -6.0], [-3.0, -1.0], [-2.0, -4.5]]  # margins 4, 0, -1, -2, 2.5


@pytest.mark.parametrize(
    ("band", "kept"),
    [
        ([0.0, None], [0, 1, 4]),
        ([None, -1.0], [2, 3]),
        ([-1.0, 2.5], [1, 2, 4]),
        ([3.0, 5.0], [0]),
        (None, [0, 1, 2, 3, 4]),
    ],
)
def test_the_ends_of_the_band_are_in_it(band, kept):
    groups = pairs((2, 3), (4, 1), (1, 1), (2, 2), (3, 5))
    found = chosen(by_reference(reference_margin=band), groups, FIVE)
    assert found.margins.tolist() == [4.0, 0.0, -1.0, -2.0, 2.5]
    assert [group.group_index for group in found.groups] == kept
    assert found.counts == {
        "pessimistic pairs": 2,
        "pairs kept by their reference margin": len(kept),
        "pairs left out by their reference margin": 5 - len(kept),
    }


def test_of_a_ranking_single_pairs_go_and_all_responses_stay():
    layout = ((3, (2, 3, 4)), (2, (1, 2, 1)))
    groups = [replace(group, pairs=((0, 1), (0, 2), (1, 2))) for group in random_groups(layout)]
    logps = [[-1.0, -3.0, -2.0], [-5.0, -4.0, -3.0]]  # 2, 1, -1; -1, -2, -1
    found = chosen(ByReference(low=0.0, scale=2.0), from_groups(groups), logps)
    (group,) = found.groups
    assert (group.group_index, group.pairs, len(group.response_ids)) == (0, ((0, 1), (0, 2)), 3)
    raw = [1 / (1 + math.exp(-margin / 2)) for margin in (2.0, 1.0)]
    assert group.weights == pytest.approx([2 * w / sum(raw) for w in raw])


def test_weights_are_the_reference_s_belief_in_the_label_and_1_in_the_mean():
    """By hand, at scale 2: sigmoid(2), sigmoid(0), sigmoid(-.5), sigmoid(-1), sigmoid(1.25)."""
    found = chosen(ByReference(scale=2.0), pairs(*[(2, 3)] * 5), FIVE)
    assert found.weights is not None
    by_hand = np.array([0.880797, 0.5, 0.377541, 0.268941, 0.777300])
    assert found.weights == pytest.approx(by_hand / by_hand.mean(), rel=1e-5)
    assert found.weights.mean() == pytest.approx(1)
    assert [group.weights for group in found.groups] == [(weight,) for weight in found.weights]
    flat = chosen(ByReference(scale=1e9), pairs(*[(2, 3)] * 5), FIVE).weights
    assert flat == pytest.approx(np.ones(5), abs=1e-8)


def test_margins_beyond_all_reach_weigh_nothing():
    assert ByReference(scale=0.5).weights(np.array([-1e4, 3.0])) == pytest.approx(np.array([0.0, 2.0]))
    with pytest.raises(ValueError, match=r"gives every pair the weight 0: .* by 1e\+04 nats and more"):
        ByReference(scale=0.5).weights(np.array([-1e4, -2e4]))


def test_where_none_is_left_the_margins_are_said():
    with pytest.raises(ValueError, match=r"\[5,null\] leaves none of 5 training pairs: .* -2 \(0 %\), .* 4 \(100 %\)"):
        chosen(ByReference(low=5.0), pairs(*[(2, 3)] * 5), FIVE)


def test_what_tells_one_choice_from_another_is_in_the_digest():
    groups, ends = pairs(*[(2, 3)] * 3), np.array([1, 2, 3])
    masks = [np.array([True, True, False]), np.array([True, False, True])]
    weights = [None, np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.5, 3.0])]
    digests = {ChosenPairs(groups, ends, mask, weight).digest for mask in masks for weight in weights}
    assert len(digests) == 6
    assert ChosenPairs(groups, ends, masks[0], None).digest in digests


def test_a_reference_that_moves_chooses_nothing():
    moving = Told(FIVE)
    moving.state_dict = lambda: {"w": torch.zeros(1)}
    with pytest.raises(ValueError, match="reference_margin: reference=told has a part that moves"):
        chosen_pairs(ByReference(low=0.0), moving, pairs(*[(2, 3)] * 5), PACK, CPU)


def test_margins_that_came_with_the_rows():
    prompt = (Message(role="user", content="q"),)
    rows = [
        PromptGroup(prompt, ("a", "b"), ((0, 1),), logps=(-1.0, -4.0)),
        PromptGroup(prompt, ("a", "b"), ((0, 1),)),
        PromptGroup(prompt, ("a", "b"), ((0, 1),), logps=(math.nan, -4.0)),
        PromptGroup(prompt, ("a", "b", "c"), ((2, 0), (2, 1)), logps=(-1.0, -2.0, -3.0)),
    ]
    assert given_margins(rows).tolist() == [3.0, -2.0, -1.0]
    assert len(given_margins(rows[1:2])) == 0


# --- the seam in the loss


def test_a_pair_of_weight_two_is_two_pairs_and_one_of_weight_0_is_none():
    """Gradients of the mean over three pairs, in float64."""
    groups = list(random_groups(((3, (2, 4)), (5, (3, 1)), (2, (6, 2)))))
    twice = [groups[0], groups[0], groups[2]]
    weighed = [replace(group, weights=(weight,)) for group, weight in zip(groups, (2.0, 0.0, 1.0), strict=True)]
    gradients, losses = [], []
    for batch in (weighed, twice):
        model = tiny_model(seed=0, dtype=torch.float64)
        policy = policy_of(model)
        reference = LiveReference("other", tiny_model(seed=1, dtype=torch.float64), "", "")
        values, _ = backward(policy, reference, bind(dpo, beta=0.5), shared([[group] for group in batch]))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        losses.append(float(values["loss"].mean()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"nll_weight": 0.5}])
def test_a_sum_of_objectives_is_weighed_once(options):
    """MPO: dpo, bco on both responses, sft on the chosen one."""
    made: Any = mix
    objective, groups = bind(made, **options), random_groups(((3, (2, 4)), (5, (3, 1))))
    policy = policy_of(tiny_model(seed=0))
    losses = []
    for weights in ((1.0, 1.0), (3.0, 0.5)):
        batch = collate([replace(group, weights=(w,)) for group, w in zip(groups, weights, strict=True)])
        logps = policy.outputs(batch)
        pairs = logps.pairs(batch.chosen, batch.rejected)
        whole = BatchLogps(pairs, pairs, None, slice(0, 2))
        losses.append(objective(logps, ObjectiveInputs(batch, logps, whole=whole, running={})).losses)
    torch.testing.assert_close(losses[1], losses[0] * torch.tensor([3.0, 0.5]).double())


def test_weights_follow_their_pairs_through_packs_and_parts():
    groups = [
        replace(g, weights=tuple(float(10 * i + j) for j in range(len(g.pairs))))
        for i, g in enumerate(replace(g, pairs=((0, 1), (1, 0))) for g in random_groups(((3, (2, 4)),) * 3))
    ]
    batch = collate(groups)
    whole, *parts = (each.weights for each in (batch, *map(batch.part, batch.spans(7))))
    expected = torch.tensor([0.0, 1.0, 10.0, 11.0, 20.0, 21.0]).double()
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(parts, list(expected.split(2)))
    assert collate(random_groups(((3, (2, 4)),))).weights is None


# --- runs


@pytest.fixture(scope="module")
def margins(tmp_path_factory):
    """The lab's training pairs and their margins under lab:tiny, by transformers from texts written by hand."""
    folder = tmp_path_factory.mktemp("pairs") / "table"
    assert exported(folder, *LAB).returncode == 0
    tiny, found = Naive("lab:tiny"), []
    for row in rows_in(folder):
        said = [row[side][0]["content"] for side in ("chosen", "rejected")]
        first, second = (tiny.logp(written(row["prompt"]), f"{words}<|eot|>") for words in said)
        found.append(first - second)
    return np.array(found)


def run(folder, *words):
    done = train(*COMMON, *LAB, f"output_dir={folder}", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(folder):
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def test_a_run_trains_on_the_pairs_in_the_band(margins, tmp_path):
    low, high = np.quantile(margins, [0.3, 0.9]) + 1e-3
    said = run(tmp_path, f"data.reference_margin=[{low},{high}]", "trainer.epochs=2")
    inside = (margins >= low) & (margins <= high)
    wrong = int((margins < 0).sum())
    assert f"the reference prefers the rejected response in {wrong} of 40 training pairs" in said
    assert f"{inside.sum()} are kept with a margin in [" in said
    record = json.loads((tmp_path / "reference_margins.json").read_text())
    assert record["pairs kept by their reference margin"] == inside.sum() == sum(record["histogram"]["kept"])
    assert sum(record["histogram"]["pairs"]) == 40
    assert record["pessimistic share"] == wrong / 40
    assert record["quantiles"]["50 %"] == pytest.approx(np.median(margins), abs=1e-3)
    assert (tmp_path / "reference_margins.png").stat().st_size > 1000
    summary, metrics = json.loads((tmp_path / "summary.json").read_text()), lines(tmp_path)
    assert summary["data"]["pairs left out by their reference margin"] == 40 - inside.sum()
    assert summary["data"]["pessimistic pairs"] == wrong
    steps = [line for line in metrics if "train/loss" in line]
    assert len(steps) == summary["steps"] == 2 * -(-inside.sum() // 8)
    assert metrics[0]["eval/ref/accuracy"] == pytest.approx(evaluated(tmp_path), abs=1e-9)


def test_it_is_the_run_on_a_file_of_those_pairs(margins, tmp_path):
    """Order, number of steps and schedule follow the kept pairs."""
    assert exported(tmp_path / "table", *LAB).returncode == 0
    rows = [row for row, margin in zip(rows_in(tmp_path / "table"), margins, strict=True) if margin >= 0]
    texts = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    alone = ("data=jsonl", f"data.path={rows_to(tmp_path / 'kept.jsonl', *texts)}", "trainer.epochs=2")
    done = train(*COMMON, *alone, f"output_dir={tmp_path / 'alone'}")
    assert done.returncode == 0, done.stderr
    run(tmp_path / "band", "data.reference_margin=[0,null]", "trainer.epochs=2")
    steps = [
        [(line["train/loss"], line["train/lr"]) for line in lines(tmp_path / name) if "train/loss" in line]
        for name in ("alone", "band")
    ]
    assert len(steps[0]) == 2 * -(-len(rows) // 8)
    assert steps[1] == steps[0]


def evaluated(folder):
    """Of held-out pairs in a run that chooses nothing."""
    run(folder / "whole", "trainer.max_steps=1")
    return lines(folder / "whole")[0]["eval/ref/accuracy"]


def test_one_batch_of_all_kept_pairs_has_their_mean_margin(margins, tmp_path):
    """The first step's reference log-probs are those of the kept pairs, and of no others; weights weigh the loss."""
    inside = margins >= 0
    run(tmp_path, "data.reference_margin=[0,null]", "trainer.batch_size=40", "data.reference_weight=4", "beta=0.5")
    first = next(line for line in lines(tmp_path) if "train/loss" in line)
    mean = first["train/ref_logps/chosen"] - first["train/ref_logps/rejected"]
    assert mean == pytest.approx(margins[inside].mean(), abs=1e-4)
    assert first["train/ref/accuracy"] == 1.0
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)  # weights are 1 in the mean
    record = json.loads((tmp_path / "reference_margins.json").read_text())
    raw = 1 / (1 + np.exp(-margins[inside] / 4))
    assert record["weights"]["0 %"] == pytest.approx(raw.min() / raw.mean(), abs=1e-4)


def test_a_run_goes_on_with_the_pairs_it_had(tmp_path):
    words = ("data.reference_margin=[-5,null]", "data.reference_weight=3", "trainer.epochs=2")
    run(tmp_path / "whole", *words)
    stopped = (*words, "trainer.max_steps=3", "trainer.save_every=3")
    run(tmp_path / "parts", *stopped, "optim.schedule=constant", "optim.warmup_ratio=0")
    run(tmp_path / "constant", *words, "optim.schedule=constant", "optim.warmup_ratio=0")
    done = train(f"resume={tmp_path / 'parts'}", "tracking=none", "trainer.max_steps=null")
    assert done.returncode == 0, done.stderr
    whole, parts = (
        [line["train/loss"] for line in lines(tmp_path / name) if "train/loss" in line]
        for name in ("constant", "parts")
    )
    assert len(whole) > 4
    assert parts == whole
    refused = train(f"resume={tmp_path / 'parts'}", "tracking=none", "data.reference_weight=2")
    assert refused.returncode == 1


def test_columns_choose_as_the_model_whose_they_are(tmp_path):
    assert exported(tmp_path / "table", *LAB).returncode == 0
    band = "data.reference_margin=[0,null]"
    run(tmp_path / "model", band)
    data = ("data=jsonl", f"data.path={tmp_path / 'table'}", "data.eval_split=validation", "reference=columns")
    done = train(*COMMON, *data, "reference.certificate=auto", band, f"output_dir={tmp_path / 'rows'}")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        [line["train/loss"] for line in lines(tmp_path / name) if "train/loss" in line] for name in ("model", "rows")
    )
    assert theirs == pytest.approx(ours, abs=1e-6)


# --- what is said without training


def test_a_check_says_what_would_be_kept(margins, tmp_path):
    done = train(*COMMON, *LAB, "stage=check", "data.reference_margin=[0,null]", f"output_dir={tmp_path}")
    kept = int((margins >= 0).sum())
    said = f"data.reference_margin=[0,null] keeps {kept} ({kept / 40:.1%}) (40 pairs looked at; steps and time follow)"
    assert said in done.stdout
    page = (tmp_path / "check.html").read_text()
    assert -(-kept // 8) < 5
    assert f"{-(-kept // 8)} of 8 groups" in page
    assert f"Reference margins of 40 pairs; in {(margins < 0).mean():.1%} the reference prefers" in page


def test_the_data_page_shows_margins_of_log_probs_that_came_along(margins, tmp_path):
    assert exported(tmp_path / "table", *LAB).returncode == 0
    bound = float(np.quantile(margins, 0.7)) / 2 + 1e-3
    words = (
        "stage=data",
        "data=jsonl",
        f"data.reference_margin=[null,{bound}]",
        "model.path=lab:tiny",
        "tracking=none",
    )
    columns = ("reference=columns", "reference.certificate=auto", "reference.strength=0.5")
    done = train(*words, *columns, f"data.path={tmp_path / 'table'}", f"output_dir={tmp_path / 'page'}")
    assert done.returncode == 0, done.stderr
    kept = margins / 2 <= bound
    assert 20 < kept.sum() < 40
    assert f" keeps: {kept.sum()} ({kept.mean():.1%})" in done.stdout
    assert "reference: " not in done.stdout  # no model was asked
    assert f"pessimistic pairs: {(margins < 0).mean():.1%} of 40" in done.stdout
    page = (tmp_path / "page" / "data.html").read_text()
    assert "the log-probs that came with the rows (reference=columns)" in page
    train(*COMMON, *LAB, "stage=data", f"output_dir={tmp_path / 'lab'}")
    assert "What the reference prefers" not in (tmp_path / "lab" / "data.html").read_text()


def test_the_data_page_asks_the_reference_that_chooses(margins, tmp_path):
    words = ("stage=data", "data.reference_margin=[0,null]", "data.reference_weight=4")
    done = train(*COMMON, *LAB, *words, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    kept = margins >= 0
    raw = 1 / (1 + np.exp(-margins[kept] / 4))
    first, last = raw.min() / raw.mean(), raw.max() / raw.mean()
    assert f"data.reference_margin=[0,null] keeps: {kept.sum()} ({kept.mean():.1%})" in done.stdout
    assert f"data.reference_weight=4 weighs them: {first:.2g} to {last:.2g}" in done.stdout
    page = (tmp_path / "data.html").read_text()
    assert f"Reference margins of 40 pairs; in {(margins < 0).mean():.1%} the reference prefers" in page
    assert "<dt>whose</dt><dd>reference=initial</dd>" in page


def test_the_data_page_shows_a_band_that_keeps_nothing(tmp_path):
    done = train(*COMMON, *LAB, "stage=data", "data.reference_margin=[900,1000]", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "data.reference_margin=[900,1000] keeps: 0 (0.0%)" in done.stdout


# --- refused before anything is loaded


BAND = "data.reference_margin=[0,null]"
REFUSED = [
    (
        [BAND, "reference=none"],
        r"reference_margin=\[0,null\]: reference=none gives every response 0, and every margin",
    ),
    ([BAND, "reference=bema"], "reference=bema changes while the policy is trained, and pairs are chosen before"),
    ([BAND, "reference=moving"], "reference=moving changes while the policy is trained, and pairs are chosen before"),
    (
        [BAND, "reference=mixture", "reference.parts=[initial, {reference: moving}]"],
        "reference=moving changes while the policy is trained",
    ),
    (
        [BAND, "reference=mixture", "reference.parts=[initial, {reference: mixture, parts: [initial, bema]}]"],
        "reference=bema changes while the policy is trained",
    ),
    ([BAND, "reference.cache=off", "reference=initial"], "leave reference.cache=off out"),
    ([BAND, "objective=simpo"], "has no effect: objective=simpo uses no reference"),
    ([BAND, "objective=kto"], "is about pairs, and objective=kto is not"),
    (["data=on_policy", "data.prompts.reference_margin=[0,null]"], "data=on_policy makes its pairs while the policy"),
    (["data.reference_weight=1", "objective=aot"], "objective=aot couples the pairs of a batch"),
    (["data.reference_margin=[1]"], r"data.reference_margin=\[1(\.0)?\] must be \[low, high\] in nats"),
    (["data.reference_margin=[null,null]"], "must be"),
    (["data.reference_margin=[2,2]"], r"data.reference_margin=\[2, 2\] is empty"),
    (["data.reference_weight=0"], r"data.reference_weight=0(\.0)? must be a positive number of nats"),
    (["data.reference_weight=-1"], "must be a positive number of nats"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_could_not_choose_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        resolved(*words)


def test_a_band_goes_with_objectives_that_couple_pairs():
    found: Any = resolved(BAND, "objective=aot")
    assert found.data.options["reference_margin"] == [0, None]


def test_no_reference_beside_another_halves_the_margins(margins, tmp_path):
    """The mean of log-probs and zeros: what is within half a bound there is within the bound here."""
    bound = float(np.quantile(margins, 0.7)) + 1e-3
    words = ["reference=mixture", "reference.parts=[initial, none]", f"data.reference_margin=[null,{bound / 2}]"]
    run(tmp_path, *words)
    record = json.loads((tmp_path / "reference_margins.json").read_text())
    assert record["pairs kept by their reference margin"] == (margins <= bound).sum()
    assert record["quantiles"]["50 %"] == pytest.approx(np.median(margins) / 2, abs=1e-3)


def test_a_reference_that_is_not_there_is_told_before_data_is_read(tmp_path):
    words = ("stage=data", "data=jsonl", "data.path=nowhere.jsonl", "reference=other", "reference.path=./no_model")
    done = train(*words, "data.reference_margin=[0,null]", "tracking=none", f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert "reference.path=" in done.stderr


PAGE = (ROOT / "docs" / "pairs_by_reference.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^python train\.py[^#\n]*", PAGE, re.MULTILINE))
def test_the_page_s_commands_compose(command):
    composes(command)
