"""Exported rows read back: a run on them is the run they came from, and their certificate holds or is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_ref.lab.models import locate
from tests.support.command import train
from tests.support.exported import COMMON, LAB, certificate_in, exported, forged, rows_in
from tests.support.given_columns import PAIR, given, written
from tests.support.quick import only

STEPS = ("trainer.batch_size=8", "optim.lr=1e-3")


def read_back(folder, *words, path=None):
    """A run on the rows of an exported folder."""
    data = ("data=jsonl", f"data.path={path or folder}", "reference=columns")
    return train(*COMMON, *data, f"output_dir={folder.parent / 'run'}", *words)


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows for name in ("train/loss", "eval/loss") if name in row]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "table"
    assert exported(folder, *LAB).returncode == 0
    return folder


@pytest.fixture
def own(table, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(table, tmp_path / "table")


def test_a_run_on_the_rows_is_the_run_they_came_from(table, tmp_path):
    ours = train(*COMMON, *LAB, *STEPS, "reference=initial", f"output_dir={tmp_path / 'ours'}")
    assert ours.returncode == 0, ours.stderr
    data = ("data=jsonl", f"data.path={table}", "data.eval_split=validation", f"output_dir={tmp_path / 'theirs'}")
    theirs = train(*COMMON, *STEPS, *data, "reference=columns", "reference.certificate=auto")
    assert theirs.returncode == 0, theirs.stderr
    assert losses(tmp_path / "theirs") == pytest.approx(losses(tmp_path / "ours"), abs=1e-6)
    assert len(losses(tmp_path / "ours")) == 7
    assert "the policy gives 8 responses of the certificate the same log-probs" in theirs.stdout
    summary = json.loads((tmp_path / "theirs" / "summary.json").read_text())
    assert summary["provenance"].startswith("certificate ")
    assert summary["provenance"].endswith(": initial of lab:tiny")


def test_a_run_goes_on_with_the_certificate_it_had(own, tmp_path):
    words = ("reference.certificate=auto", "trainer.batch_size=8", "trainer.save_every=1", "trainer.max_steps=2")
    assert read_back(own, *words).returncode == 0
    going_on = (f"resume={tmp_path / 'run'}", "tracking=none", "trainer.max_steps=3")
    forged(own, made_with={"someone": "else"})
    refused = train(*going_on)
    assert refused.returncode == 1
    assert "reference was" in refused.stderr


def test_one_file_and_a_part_of_the_rows(own):
    done = read_back(own, "reference.certificate=auto", "data.subset=9", path=own / "train.jsonl")
    assert done.returncode == 0, done.stderr


def changed_row(own, change):
    rows = rows_in(own)
    change(rows[3])
    written(own / "train.jsonl", *rows)


def other_logp(row):
    for name in ("ref_chosen_logps", "chosen_logprob"):
        row[name] -= 1e-9


def other_text(row):
    row["rejected"][0]["content"] += "!"


def swapped(row):
    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]


@pytest.mark.parametrize("change", [other_logp, other_text, swapped])
def test_a_row_that_was_changed_is_named(change, own):
    changed_row(own, change)
    done = read_back(own, "reference.certificate=auto")
    assert done.returncode == 1
    assert "train.jsonl row 4 is none of the rows of " in done.stderr
    assert "(1 of 40 groups)" in done.stderr
    assert read_back(own, "reference.provenance=mine").returncode == 0


def test_two_sets_of_columns_that_differ_are_none(own):
    changed_row(own, lambda row: row.update(chosen_logprob=row["chosen_logprob"] - 1e-9))
    done = read_back(own, "reference.certificate=auto")
    assert "row 4 has log-probs that are missing or no finite numbers (nan, nan)" in done.stderr


def other_weights(own):
    forged(own, weights="0" * 32)


def probes_of(own, change):
    probes = certificate_in(own)["probes"]
    for probe in probes:
        change(probe)
    forged(own, probes=probes)


def means(own):
    probes_of(own, lambda p: p.update(logps=[v / len(i) for v, i in zip(p["logps"], p["response_ids"], strict=True)]))


def without_end(own):
    probes_of(own, lambda p: p.update(response_ids=[ids[:-1] for ids in p["response_ids"]]))


def unknown_token(own):
    probes_of(own, lambda p: p["response_ids"][0].append(10**6))


def no_token(own):
    probes_of(own, lambda p: p["response_ids"][0].clear())


def damaged(own):
    (own / "certificate.json").write_text((own / "certificate.json").read_text().replace("nats", "bits"))


def without_digests(own):
    (own / "rows.digests").unlink()


def fewer_digests(own):
    (own / "rows.digests").write_text((own / "rows.digests").read_text()[33:])


def another_version(own):
    forged(own, certificate=2)


def no_model(own):
    forged(own, model={"path": ["a"], "revision": None, "adapter": None, "dtype": "auto", "quantisation": "none"})


FORGED = {
    other_weights: "lab:tiny has other weights",
    means: "the policy gives the certificate's rows other log-probs, by ",
    without_end: "the policy gives the certificate's rows other log-probs, by ",
    unknown_token: "has tokens that its model does not know",
    no_token: "has no tokens that could be scored",
    damaged: "is damaged: its digest is that of other content",
    without_digests: "is no certificate of log-probs: ",
    fewer_digests: "rows.digests beside it is not the list of rows that it names",
    another_version: "its layout is of version 2, and 1 is read",
    no_model: "its model is none",
}


@pytest.mark.parametrize("forgery", only(FORGED, *list(FORGED)[::2]), ids=lambda forgery: forgery.__name__)
def test_a_certificate_that_does_not_hold_is_refused(forgery, own):
    forgery(own)
    done = read_back(own, "reference.certificate=auto")
    assert done.returncode == 1
    assert FORGED[forgery] in done.stderr


def test_the_model_can_be_left_alone(own):
    other_weights(own)
    done = read_back(own, "reference.certificate=auto", "reference.probe=off")
    assert done.returncode == 0, done.stderr
    assert "the same log-probs" not in done.stdout


OTHERS = {
    "template": ("model.template=plain", "its log-probs are of the policy's tokens under another chat template"),
    "turns": ("data.score=all", "its log-probs are of data.score=last data.score_thinking=all, and this run has"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_log_probs_of_another_text_are_refused(case, own):
    option, message = OTHERS[case]
    done = read_back(own, "reference.certificate=auto", option)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_policy_with_another_tokenizer_reads_sums_over_the_same_words(own):
    """As of any reference with a tokenizer of its own; the model that the certificate names scores its own tokens."""
    done = read_back(own, "reference.certificate=auto", "model.path=lab:foreign")
    assert done.returncode == 0, done.stderr
    assert "of the same words in another tokenizer, template or system prompt than the policy's" in done.stdout
    assert "lab:tiny gives 8 responses of the certificate the same log-probs" in done.stdout


MODELS = {
    "own text": ["reference=other", "reference.path=lab:foreign", "reference.system_prompt=be kind"],
    "without the end": ["reference=other", "reference.path=lab:foreign", "reference.terminator=skip"],
    "same tokens": ["reference=other", "reference.path=lab:strong"],
    "prior": ["reference=prior"],
    "half": ["reference=other", "reference.path=lab:strong", "reference.dtype=bfloat16"],
    "strength": ["reference=initial", "reference.strength=0.5"],
    "below a fresh adapter": ["reference=adapter_base", "model.lora_rank=2"],
    "with a fresh adapter": ["reference=initial", "model.lora_rank=2"],
}


@pytest.mark.parametrize("kind", only(MODELS, "same tokens", "own text"))
def test_the_named_model_scores_its_rows_again(kind, tmp_path):
    folder = tmp_path / "table"
    assert exported(folder, *LAB, *MODELS[kind]).returncode == 0
    whose = (certificate_in(folder)["model"] or {}).get("path")
    policy = "lab:initial" if whose != "lab:initial" else "lab:tiny"
    for path in ("lab:tiny", policy):  # by the policy where it is the same model, else loaded
        run = read_back(folder, "reference.certificate=auto", f"model.path={path}", "trainer.max_steps=1")
        assert run.returncode == 0, run.stderr
        name = "the policy" if whose == path else whose
        assert f"{name} gives 8 responses of the certificate the same log-probs" in run.stdout
        shutil.rmtree(tmp_path / "run")
    assert ("without the token that ends the turn" in run.stdout) == (kind == "without the end")


def test_a_folder_with_other_weights_than_the_certified_is_named(tmp_path):
    model = shutil.copytree(locate("lab:strong"), tmp_path / "model")
    folder = tmp_path / "table"
    assert exported(folder, *LAB, "reference=other", f"reference.path={model}").returncode == 0
    assert read_back(folder, "reference.certificate=auto", "trainer.max_steps=1").returncode == 0
    shutil.rmtree(tmp_path / "run")
    changed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.001)
    for path in model.glob("*.json"):
        if path.name == "digests.json":
            path.unlink()
    changed.save_pretrained(model)
    refused = read_back(folder, "reference.certificate=auto")
    assert f"{model} has other weights" in refused.stderr
    shutil.rmtree(model)
    without = read_back(folder, "reference.certificate=auto", "trainer.max_steps=1")
    assert without.returncode == 0, without.stderr
    assert f"{model} is not on this machine, so no row of its certificate was scored again" in without.stdout


WORDS = {
    "neither": ([], "reference=columns needs reference.provenance=... "),
    "both": (["reference.provenance=a", "reference.certificate=auto"], "and not both"),
    "none there": (["reference.certificate=auto"], "there is no "),
    "no such file": (["reference.certificate=nowhere/certificate.json"], "there is no nowhere/certificate.json"),
}


@pytest.mark.parametrize("case", WORDS)
def test_whose_they_are_is_said_in_one_way(case, tmp_path):
    words, message = WORDS[case]
    path = written(tmp_path / "rows.jsonl", given(-1, -2))
    done = train(*COMMON, "data=jsonl", f"data.path={path}", "reference=columns", *words, f"output_dir={tmp_path}/r")
    assert done.returncode == 1
    assert message in done.stderr


def test_auto_needs_a_path(tmp_path):
    path = written(tmp_path / "rows.jsonl", PAIR)
    sources = f"data.sources=[{{path: '{path}'}}]"
    done = train(*COMMON, "data=mixture", sources, "reference=columns", "reference.certificate=auto")
    assert "reference.certificate=auto is the certificate.json beside data.path, and the data has none" in done.stderr


def test_two_equal_sets_of_columns_are_one(tmp_path):
    row = given(-1.5, -2.5, ref_chosen_logps=-1.5, ref_rejected_logps=-2.5)
    path = written(tmp_path / "rows.jsonl", row)
    words = ("reference=columns", "reference.provenance=mine", f"output_dir={tmp_path / 'run'}")
    done = train(*COMMON, "data=jsonl", f"data.path={path}", *words)
    assert done.returncode == 0, done.stderr
    assert "columns not read" not in done.stdout
