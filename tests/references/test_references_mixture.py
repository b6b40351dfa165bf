"""Mixtures of any kinds: their moving parts in checkpoints, their still parts in tables, what is refused before
anything is loaded."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_ref.cli import docs_tables
from dpo_ref.cli.command_line import typed_words
from dpo_ref.data.packing import collate
from dpo_ref.models.logps import response_logps
from dpo_ref.references import policies
from dpo_ref.references.table import read_shards
from tests.support.cache import empty_cache
from tests.support.command import REQUIRED, composed, files_of, resolved, train
from tests.support.evaluate_command import measure
from tests.support.on_policy import SMALL as SAMPLED
from tests.support.reference_contexts import LAYOUT, TOKENIZER, context_for, mixed
from tests.support.tiny import policy_of, random_groups, tiny_model

BATCH = collate(random_groups(LAYOUT))
MADE = torch.tensor(True)
MOVES, AVERAGES = {"reference": "moving", "share": 0.5, "every": 1}, {"reference": "bema", "every": 1}
SMALL = ["model.path=lab:tiny", "data.num_pairs=64", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=16", "tracking=none", "beta=0.1", "optim.lr=0.01"]
SMALL += ["optim.schedule=constant", "optim.warmup_ratio=0"]


def sums(model):
    with torch.no_grad():
        return response_logps(model, BATCH).sums


@torch.no_grad()
def shifted(model, by):
    for index, weight in enumerate(model.parameters()):
        weight.add_(by * math.cos(index))
    return model


# --- what a mixture is made of, by its formula


def test_parts_of_every_sort_by_their_formula(tmp_path):
    """A table, one that moves, no reference, a tempered one and a mixture of others, each with its weight."""
    context = context_for(tmp_path)
    inner = {"reference": "mixture", "parts": ["initial", "uniform_token"], "mean": "arithmetic"}
    parts = ["initial", MOVES, "none", {"reference": "prior", "strength": 0.5}, inner]
    reference = mixed(context, *parts, weights=[1.0, 2.0, 3.0, 1.0, 1.0])
    policy = shifted(tiny_model(seed=0), 0.02)
    reference.update(policy, 1, MADE)
    half = tiny_model(seed=0)
    with torch.no_grad():
        for ours, theirs in zip(half.parameters(), policy.parameters(), strict=True):
            ours.lerp_(theirs, 0.5)
    first, prior = sums(tiny_model(seed=0)), policies.prior(context).logps(BATCH).sums
    uniform = -BATCH.lengths * math.log(len(TOKENIZER))
    both = np.log(0.5 * np.exp(first) + 0.5 * np.exp(uniform))
    expected = (first + 2 * sums(half) + 0 + 0.5 * prior + both) / 8
    torch.testing.assert_close(reference.logps(BATCH).sums, expected, atol=1e-4, rtol=0)
    assert not reference.normalised
    assert not reference.live  # two of its parts are tables of what was known


def test_what_moves_is_asked_and_what_stays_is_a_table(tmp_path):
    """The table holds the rows of the still part; those of the moving one are in no table."""
    context = context_for(tmp_path)
    reference = mixed(context, "initial", MOVES)
    tables = [path.name for path in (tmp_path / "reference").iterdir() if path.is_dir()]
    assert tables == [policies.initial(context).table]
    assert len(read_shards(tmp_path / "reference" / tables[0])[0]) == len(context.groups)
    assert reference.table is None
    stays, moves = policies.initial(context), mixed(context, "initial", MOVES)
    moves.update(shifted(tiny_model(seed=0), 0.05), 1, MADE)
    assert not torch.equal(moves.logps(BATCH).sums, reference.logps(BATCH).sums)
    assert torch.equal(policies.initial(context).logps(BATCH).sums, stays.logps(BATCH).sums)


@pytest.mark.parametrize("others", [["none"], [{"reference": "moving", "reset": "round"}, "uniform_token"]], ids=str)
def test_a_mixture_that_is_live_answers_what_it_has_not_seen(others, tmp_path):
    reference = mixed(context_for(tmp_path), AVERAGES, *others)
    assert reference.live
    unseen = collate([replace(group, group_index=99 + at) for at, group in enumerate(random_groups(LAYOUT, seed=7))])
    assert torch.isfinite(reference.logps(unseen).sums).all()


def test_of_two_that_are_not_the_same_neither_identity_nor_weights_are(tmp_path):
    """Weights tell a mixture on another device, where its dtype and so its identity is another."""
    context = context_for(tmp_path)
    parts = [["initial", "none"], ["initial", "uniform_token"], [{"reference": "initial", "strength": 2.0}, "none"]]
    parts += [["initial", "none", "none"]]
    references = [mixed(context, *each) for each in parts]
    references.append(mixed(context, *parts[0], weights=[1.0, 2.0]))
    references.append(mixed(context, "initial", {"reference": "interpolate", "path": "3", "share": 0.5}))
    assert len({reference.identity for reference in references}) == len(references)
    assert len({reference.weights for reference in references}) == len(references)
    assert mixed(context, *parts[0]).weights == references[0].weights
    assert mixed(context, "none", "uniform_token").weights == ""
    assert not references[0].equals(context.policy)


# --- state


def test_the_state_of_the_parts_that_move(tmp_path):
    """Under the part's number; another mixture's is refused, and a part lacks nothing of its own."""
    context, policy = context_for(tmp_path), tiny_model(seed=0)
    reference = mixed(context, "initial", MOVES, AVERAGES)
    for step in (1, 2):
        reference.update(shifted(policy, 0.01 * step), step, MADE)
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    assert {name.partition("/")[0] for name in state} == {"1", "2"}
    assert {name.split("/")[1] for name in state if name.count("/") > 1} == {"ema", "start"}
    other = mixed(replace(context, policy=policy_of(tiny_model(seed=0), TOKENIZER)), "initial", MOVES, AVERAGES)
    other.load_state_dict(state)
    for each in (reference, other):
        each.update(shifted(tiny_model(seed=0), 0.3), 3, MADE)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in reference.state_dict().items())
    with pytest.raises(ValueError, match="of another mixture than these 2 parts"):
        mixed(context, "initial", MOVES).load_state_dict(state)
    with pytest.raises(ValueError, match="has other weights than this one, or none"):
        other.load_state_dict({name: value for name, value in state.items() if name.startswith("2")})
    with pytest.raises(ValueError, match="weights of a reference that moves, and this one does not"):
        mixed(context, "initial", "none", AVERAGES).load_state_dict(state)


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


PARTS = "[initial, {reference: moving, every: 2, share: 0.5}, {reference: bema, every: 1, burn_in: 1}, none]"


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["model.lora_rank=2", "optim.lr=0.05"], marks=pytest.mark.slow)],
    ids=["all weights", "an adapter"],
)
def test_a_run_that_stops_goes_on_as_if_it_had_not(options, tmp_path, monkeypatch):
    cache = empty_cache(monkeypatch, tmp_path / "cache")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, *options, "reference=mixture", f"reference.parts={PARTS}"]
    done = train(*options, f"output_dir={whole}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("it moves, so it is asked at every step") == 1
    assert len([path for path in (cache / "reference").iterdir() if path.is_dir()]) == 1
    assert json.loads((whole / "summary.json").read_text())["reference"] == "mixture of initial, moving, bema, none"
    assert train(*options, f"output_dir={parts}", "trainer.max_steps=1").returncode == 0
    for steps in (3, 4):
        assert train(f"resume={parts}", f"trainer.max_steps={steps}").returncode == 0
    assert losses(parts) == losses(whole)
    ours, theirs = (
        load_file(run / "checkpoints" / "step-00000004" / "reference.safetensors") for run in (whole, parts)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    measure(f"policy={whole}", "tracking=none", "generation.max_new_tokens=8")
    metrics = json.loads((whole / "evaluation" / "evaluation.json").read_text())["metrics"]
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["rewards/margins"] == pytest.approx(last["eval/rewards/margins"] / 0.1, abs=1e-3)


def test_rounds_ask_every_part(tmp_path):
    """The policy of the round's beginning in both parts: there the loss of DPO is ln 2; beside the initial policy,
    which has no table here, it is so in the first round."""
    begun = {"reference": "moving", "reset": "round"}
    for name, other in (("both", begun), ("one", {"reference": "initial"})):
        words = typed_words({"reference.parts": [begun, other], "output_dir": str(tmp_path / name)})
        done = train(*SAMPLED, "reference=mixture", "optim.warmup_ratio=0", *words)
        assert done.returncode == 0, done.stderr
    both, one = ([losses(tmp_path / name)[step] for step in (0, 2, 4)] for name in ("both", "one"))
    assert both == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert one[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(one[2] - math.log(2)) > 1e-5


def test_log_probs_of_the_data_as_a_part(tmp_path):
    """columns in a geometric mixture: their sums, with their weight; a run that goes on longer comes to other rows."""
    groups = random_groups(LAYOUT)
    rows = [
        {"prompt": f"question {at}", "chosen": f"yes {at}", "rejected": f"no {at}", "ref_chosen_logps": -9.0 - at,
         "ref_rejected_logps": -7.5} for at in range(len(groups) * 4)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    part = "{reference: columns, provenance: made up}"
    options = ["model.path=lab:tiny", "data=jsonl", f"data.path={tmp_path / 'pairs.jsonl'}", "tracking=none"]
    options += ["trainer.batch_size=4", "data.eval_fraction=0", "optim.schedule=constant", "optim.warmup_ratio=0"]
    options += ["reference=mixture", f"reference.parts=[{part}, none]", "reference.weights=[1.0, 3.0]"]
    done = train(*options, "trainer.max_steps=1", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert train(f"resume={tmp_path / 'run'}", "trainer.max_steps=2").returncode == 0
    assert train(*options, "trainer.max_steps=2", f"output_dir={tmp_path / 'whole'}").returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_tables_of_parts_are_filled_ahead(tmp_path, monkeypatch):
    """By a stage of its own, one for each part that has one; a check then finds both."""
    cache = empty_cache(monkeypatch, tmp_path / "cache")
    parts = typed_words({"reference.parts": ["initial", "none", {"reference": "other", "path": "lab:initial"}]})
    options = ["model.path=lab:tiny", "data.num_pairs=24", "data.num_eval_pairs=8", "data.num_test_prompts=0"]
    options += ["tracking=none", "trainer.batch_size=4", "reference=mixture", *parts]
    first = train(*options, "stage=check", f"output_dir={tmp_path / 'before'}")
    assert "not there; 32 groups to score" in first.stdout
    done = train(*options, "stage=cache_reference", f"output_dir={tmp_path / 'stage'}")
    assert done.returncode == 0, done.stderr
    tables = [path for path in (cache / "reference").iterdir() if path.is_dir()]
    assert len(tables) == 2
    assert all(f"cached 32 groups in {path}" in done.stdout for path in tables)
    assert {len(read_shards(path)[0]) for path in tables} == {32}
    then = train(*options, "stage=check", f"output_dir={tmp_path / 'after'}")
    assert "32 of 32 groups are in the cache" in then.stdout
    tables[0].rename(tmp_path / "elsewhere")
    assert "not there; 32 groups" in train(*options, "stage=check", f"output_dir={tmp_path / 'half'}").stdout


# --- what is refused at compose time


KNOWN = sorted(path.partition("=")[2] for path in files_of("reference"))


@pytest.mark.parametrize("kind", KNOWN)
def test_every_kind_of_conf_is_a_part(kind):
    """There is no list of those that are besides conf/reference/ itself."""
    required = REQUIRED.get(kind, [])
    required = required["reference"] if isinstance(required, dict) else required
    options = [word.removeprefix("reference.").replace("=", ": ", 1) for word in required if word.startswith("refer")]
    model = [word for word in required if word.startswith("model")]
    part = ", ".join([f"reference: {kind}", *options])
    resolved_run = resolved("reference=mixture", f"reference.parts=[initial, {{{part}}}]", *model)
    assert [part.name for part in resolved_run.reference.parts] == ["initial", kind]


@pytest.mark.parametrize(
    ("parts", "words", "message"),
    [
        ("[initial]", [], "reference.parts of a mixture are at least two"),
        ("[initial, prior]", ["reference.weights=[1.0]"], r"weights=\[1.0\] must be 2 positive numbers"),
        ("[initial, prior]", ["reference.weights=[1.0, 0.0]"], "must be 2 positive numbers, one for each part"),
        ("[initial, pryor]", [], r"parts\[1\]=pryor is no reference: a name, or .* did you mean prior\?"),
        ("[initial, {path: x}]", [], r"parts\[1\]={'path': 'x'} is no reference: a name, or {reference: <name>"),
        ("[{reference: initial, path: x}, prior]", [], r"reference.parts\[0\].path is not an option; known: refere"),
        ("[initial, other]", [], r"parts\[1\]: reference=other needs reference.path="),
        ("[initial, {reference: interpolate, path: x, share: y}]", [], r"parts\[1\]: Error .*Value 'y' of type"),
        ("[initial, {reference: moving, share: 2}]", [], r"parts\[1\]: reference.share=2.0 must lie in \(0, 1\]"),
        ("[initial, {reference: bema, cache: auto}]", [], r"parts\[1\]: reference.cache=auto: reference=bema changes"),
        ("[initial, {reference: prior, strength: 0}]", [], r"parts\[1\]: reference.strength=0.* leaves no reference"),
        ("[initial, adapter_base]", [], r"parts\[1\]: reference=adapter_base: the policy has no adapter"),
        ("[initial, {reference: moving, reset: round}]", [], r"parts\[1\]: .*reset=round replaces .* data=lab"),
        ("[initial, none]", ["reference.mean=arithmetic"], r"parts\[1\]: reference=none is no distribution here"),
        ("[{reference: moving, strength: 0.5}, initial]", ["reference.mean=arithmetic"], r"parts\[0\]: .*=moving is"),
        (
            "[initial, {reference: mixture, parts: [prior, initial]}]",
            ["reference.mean=arithmetic"],
            r"parts\[1\]: reference=mixture is no distribution here",
        ),
        (
            "[{reference: columns, provenance: x}, initial]",
            ["objective=ld_dpo"],
            r"parts\[0\]: reference=columns has log-probs of whole responses, and objective=ld_dpo looks at single",
        ),
        ("[initial, prior]", ["data=on_policy"], "reference=prior scores what is known before training"),
        ("[initial, moving]", ["objective=nca"], "mean of log-probs is not normalised, and a constant per prompt"),
    ],
)  # fmt: skip
def test_refused_at_compose_time(parts, words, message):
    cfg, choices = composed("reference=mixture", f"reference.parts={parts}", *words)
    with pytest.raises(ValueError, match=message):
        docs_tables.resolve(cfg, choices)
