"""Candidate references before training: every number against brute force, and the stage as a user runs it."""

import json
import math
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_ref.cli import command_line, resolve
from dpo_ref.cli.compatibility import _in_order, title_of
from dpo_ref.data.packing import collate
from dpo_ref.data.tokenise import tokenise
from dpo_ref.evaluation.compatibility import CompatibilityOptions
from dpo_ref.evaluation.kl import BY_TEXT, BY_TOKEN, both_by_text
from dpo_ref.files.cache import cache_folder
from dpo_ref.generation.sampling import generate
from dpo_ref.lab import models as lab_models
from dpo_ref.lab.preferences import lab
from dpo_ref.models.loading import load_model, load_tokenizer, locate
from dpo_ref.references import table
from dpo_ref.references.table import read_shards, row_key
from dpo_ref.types import Message, PromptGroup
from tests.support.command import train
from tests.support.evaluate_command import evaluate, evaluate_drawn
from tests.support.evaluations import answers
from tests.support.foreign import foreign  # noqa: F401  (a fixture)
from tests.support.pages import parsed
from tests.support.tiny import random_groups
from tests.support.wandb_runs import Offline

DATA = ["data.num_pairs=40", "data.num_eval_pairs=4", "data.num_test_prompts=4"]
STAGE = "stage=compatibility"
SMALL = [*DATA, "tracking=none", STAGE, "compatibility.num_pairs=24", "compatibility.num_prompts=8"]
SMALL += ["compatibility.betas=[0.01,0.1,1.0]", "compatibility.max_new_tokens=24"]


@pytest.fixture(scope="module")
def report_folder(foreign, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("compatibility")
    listed = f"references=[initial, '{foreign}', none, prior, uniform_token, {{reference: mixture, parts: "
    listed += "[{reference: initial}, {reference: prior}]}, {reference: interpolate, path: lab:tiny, share: 0.5}]"
    evaluate_drawn("policy=lab:tiny", listed, *SMALL, f"output_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def report(report_folder):
    content = json.loads((report_folder / "compatibility.json").read_text())
    return content | {"by": {candidate["kind"]: candidate for candidate in content["candidates"]}}


def drawn_groups():
    """The training pairs that the report looks at."""
    data = lab(0, num_pairs=40, num_eval_pairs=4, num_test_prompts=4)
    return [data.train[index] for index in sorted(np.random.default_rng(0).permutation(40)[:24].tolist())]


@torch.no_grad()
def explicit(path, groups):
    """Log-probs of responses: messages through the model's own template, and a plain forward pass of each."""
    folder = locate(path)
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.device("cpu"), "eager").model
    model.set_attn_implementation("eager")
    sums = []
    for group in tokenise(groups, tokenizer).groups:
        for response in group.response_ids:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
            positions = range(len(group.prompt_ids) - 1, ids.shape[1] - 1)
            sums.append(sum(logps[position, ids[0, position + 1]].item() for position in positions))
    return np.array(sums)


def test_margins_are_those_of_explicit_forward_passes(report, foreign):  # noqa: F811
    def margins(path):
        chosen, rejected = explicit(path, drawn_groups()).reshape(-1, 2).T
        return (chosen - rejected).tolist()

    assert report["policy_margins"] == pytest.approx(margins("lab:tiny"), abs=2e-3)
    assert report["by"]["other"]["margins"] == pytest.approx(margins(str(foreign)), abs=2e-3)
    assert report["by"]["none"]["margins"] == [0.0] * 24
    assert report["by"]["none"]["start"]["sd"] == pytest.approx(np.std(report["policy_margins"]))


def test_the_policy_as_its_own_reference(report):
    initial = report["by"]["initial"]
    assert initial["forward"]["per_answer"]["mean"] == initial["reverse"]["per_answer"]["mean"] == 0
    assert initial["beside"]["margins_pearson"] == pytest.approx(1)
    assert initial["start"]["unit"] is None
    assert all(at["loss"] == pytest.approx(math.log(2)) for at in initial["start"]["at"])


def test_kl_where_there_is_one(report):
    kinds = {
        kind: [candidate[side]["estimator"] for side in ("forward", "reverse")]
        for kind, candidate in report["by"].items()
    }
    assert kinds["initial"] == kinds["interpolate"] == [BY_TOKEN, BY_TOKEN]
    assert kinds["none"] == kinds["mixture"] == [None, None]
    assert kinds["prior"] == kinds["uniform_token"] == [BY_TEXT, None]
    assert "sum to 1" in report["by"]["mixture"]["forward"]["reason"]
    assert "no model to draw" in report["by"]["prior"]["reverse"]["reason"]
    assert kinds["other"][0] == BY_TEXT


def test_kl_to_a_reference_of_another_tokenizer(report, foreign):  # noqa: F811
    """The policy's answers drawn again, those that ended scored as text by explicit forward passes."""
    folder = lab_models.locate("lab:tiny")
    prompts = list(dict.fromkeys(str(group.prompt) for group in drawn_groups()))[:8]
    asked = [next(group.prompt for group in drawn_groups() if str(group.prompt) == text) for text in prompts]
    policy, tokenizer = load_model(folder, torch.device("cpu"), "auto").model, load_tokenizer(folder)
    samples = generate(policy, tokenizer, asked, 0, max_new_tokens=24)
    texts = [PromptGroup(sample.prompt, (sample.output,)) for sample in samples if sample.finished]
    kl = report["by"]["other"]["forward"]
    assert (kl["num_answers"], kl["num_cut"]) == (len(texts), 8 - len(texts))
    assert len(texts) >= 2
    differences = explicit("lab:tiny", texts) - explicit(str(foreign), texts)
    assert kl["per_answer"]["mean"] == pytest.approx(differences.mean(), abs=1e-3)
    num_bytes = sum(len(text.responses[0].encode()) for text in texts)
    assert kl["per_byte"]["mean"] == pytest.approx(differences.sum() / num_bytes, abs=1e-4)


def test_the_other_tokenizer_is_described(report, foreign):  # noqa: F811
    tokens = report["by"]["other"]["tokens"]
    words = [
        {word for word in tokenizer.get_vocab() if not word.startswith("<|")}
        for tokenizer in map(load_tokenizer, (lab_models.locate("lab:tiny"), str(foreign)))
    ]
    assert tokens["shared"] == pytest.approx(len(words[0] & words[1]) / len(words[0]))
    sizes = [
        sum(len(ids) for group in tokenise(drawn_groups(), tokenizer).groups for ids in group.response_ids)
        for tokenizer in map(load_tokenizer, (lab_models.locate("lab:tiny"), str(foreign)))
    ]
    assert tokens["tokens_per_token"] == pytest.approx(sizes[1] / sizes[0])
    assert all(candidate["tokens"] is None for kind, candidate in report["by"].items() if kind != "other")


def test_page_picture_and_numbers(report_folder, report):
    assert sorted(p.name for p in report_folder.iterdir()) == [
        f"compatibility.{end}" for end in ("html", "json", "png")
    ]
    structure = parsed((report_folder / "compatibility.html").read_text())
    assert structure.fetched == []
    assert structure.tags.count("script") == 1  # the page's own, which sorts tables
    shown = "".join(structure.texts)
    assert all(verdict in shown for verdict in report["verdicts"].values())
    assert "they are the policy's own" in report["verdicts"]["none"]
    assert (report_folder / "compatibility.png").stat().st_size > 20_000


@pytest.fixture(scope="module")
def trained(report_folder):
    """A run on the same policy and data, after the report: its folder, and what its table held before it."""
    tables = {path.name: read_shards(path)[0] for path in (cache_folder() / "reference").iterdir()}
    run = report_folder.with_name("trained")
    done = train(*DATA, "model.path=lab:tiny", "trainer.max_steps=1", "tracking=none", f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    name = done.stdout.split("reference: initial (")[1][:12]
    return run, next(rows for folder, rows in tables.items() if folder.startswith(name))


def test_training_finds_the_log_probs(report, trained):
    groups = tokenise(drawn_groups(), load_tokenizer(lab_models.locate("lab:tiny"))).groups
    keys = set(map(row_key, groups))
    assert len(keys) == report["num_pairs"] == 24
    assert keys <= trained[1].keys()


def test_a_run_brings_its_data(trained, tmp_path, capsys):
    run, _ = trained
    options = ["compatibility.num_pairs=4", "compatibility.num_prompts=2", "compatibility.max_new_tokens=2"]
    evaluate(f"policy={run}", "references=[initial, none]", STAGE, "tracking=none", *options, f"output_dir={tmp_path}")
    content = json.loads((tmp_path / "compatibility.json").read_text())
    assert (content["policy"], content["num_pairs"]) == ("trained", 4)
    words = shlex.split(capsys.readouterr().out.split("next:")[1].splitlines()[1])
    assert words[2:] == ["model=pretrained", f"model.path={run / 'policy'}", *DATA, "reference=initial"]


def test_what_to_type_next_composes_and_wandb_gets_everything(foreign, tmp_path, capsys):  # noqa: F811
    options = ["compatibility.num_pairs=4", "compatibility.num_prompts=2", "compatibility.max_new_tokens=2"]
    listed = "references=[initial, {reference: mixture, parts: [{reference: initial}, {reference: other, "
    listed += f"path: '{foreign}'}}], weights: [1.0, 3.0]}}]"
    evaluate("policy=lab:tiny", listed, *DATA, STAGE, *options, f"output_dir={tmp_path}")
    tracked = Offline(tmp_path)
    assert tracked.summary["compatibility/initial/kl_forward"] == 0
    assert any(row.get("compatibility.nrows") == 3 for row in tracked.history)
    stored = {path.name for path in (tracked.files[0].parent / "files").iterdir()}
    assert {"compatibility.html", "compatibility.json", "media"} <= stored
    shown = capsys.readouterr().out
    sentences = [
        line.partition(" (")[0].partition("%")[0] for line in shown.splitlines() if line.startswith("reference")
    ]
    initial, mixed = ["reference: initial"], ["reference text: 100.00", "reference: mixture"]
    assert sentences == [*initial, *initial, *mixed]  # the policy's own, then each candidate, once
    commands = [line.strip() for line in shown.split("next:")[1].splitlines() if line.strip()]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)[2:]
        assert words[:2] == ["model=pretrained", "model.path=lab:tiny"]
        run = resolve.resolve(*command_line.compose_command(words), words)
        assert run.data.options["num_pairs"] == 40
    assert run.reference.options["weights"] == [1.0, 3.0]


def test_packs_of_any_size_give_the_same_margins(report, tmp_path):
    evaluate("policy=lab:tiny", "references=[initial]", *SMALL, "data.tokens_per_batch=60", f"output_dir={tmp_path}")
    found = json.loads((tmp_path / "compatibility.json").read_text())
    assert found["policy_margins"] == pytest.approx(report["policy_margins"], abs=1e-5)
    assert found["candidates"][0]["margins"] == pytest.approx(report["by"]["initial"]["margins"], abs=1e-5)


def test_runs_of_groups_are_all_of_them_in_their_order():
    groups = random_groups([(5, (3, 2)), (40, (9, 1)), (2, (1, 1)), (3, (2, 2)), (4, (1, 4))])
    runs = list(_in_order(groups, 20))
    assert [len(run) for run in runs] == [1, 1, 3]  # of 10, 50, and 4 + 7 + 9 tokens
    assert [group for run in runs for group in run] == groups


def test_a_candidate_that_takes_all_memory_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))  # no other test's table of the candidate
    evaluate("policy=lab:tiny", "references=[none]", *SMALL, f"output_dir={tmp_path}")  # the policy's own table

    def little_room(groups):
        if len(groups) > 12:  # a whole table; a look at whether one is stale asks for few
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return collate(groups)

    monkeypatch.setattr(table, "collate", little_room)
    another = "{reference: other, path: lab:initial}"
    evaluate("policy=lab:tiny", f"references=[{another}, none]", *SMALL, f"output_dir={tmp_path}")
    found = json.loads((tmp_path / "compatibility.json").read_text())
    assert [candidate["kind"] for candidate in found["candidates"]] == ["none"]
    (refused,) = found["refused"]
    assert "memory ran out in the reference's pass over a pack of" in refused["reason"]
    assert "data.tokens_per_batch" in refused["reason"]


def test_a_candidate_that_cannot_be_built_is_a_finding(foreign, tmp_path, capsys):  # noqa: F811
    listed = f"references=[none, {{reference: interpolate, path: '{foreign}', share: 0.5}}]"
    evaluate("policy=lab:tiny", listed, *SMALL, f"output_dir={tmp_path}")
    content = json.loads((tmp_path / "compatibility.json").read_text())
    (refused,) = content["refused"]
    assert "another tokenizer or template than the policy" in refused["reason"]
    assert refused["reason"][:40] in (tmp_path / "compatibility.html").read_text()
    with pytest.raises(ValueError, match="another tokenizer"):
        evaluate("policy=lab:tiny", listed.replace("none, ", ""), *SMALL, f"output_dir={tmp_path}")


REFUSED = {
    "no policy": ([STAGE, "references=[none]"], "stage=compatibility needs policy="),
    "no references": ([STAGE, "policy=lab:tiny"], "references='[initial, none, some/model]'"),
    "another stage": (["policy=lab:tiny", "references=[none]"], "references has no effect"),
    "options elsewhere": (["policy=lab:tiny", "compatibility.num_pairs=3"], "compatibility has no effect"),
    "baseline": ([STAGE, "policy=lab:tiny", "references=[none]", "baseline=x"], "baseline has no effect"),
    "generation": ([STAGE, "policy=lab:tiny", "references=[none]", "generation=greedy"], "generation has no effect"),
    "misspelt kind": ([STAGE, "policy=lab:tiny", "references=[pror]"], "did you mean prior?"),
    "no kind": ([STAGE, "policy=lab:tiny", "references=[{path: x}]"], "is not {reference: "),
    "option": ([STAGE, "policy=lab:tiny", "references=[{reference: other, pth: x}]"], "did you mean reference.path?"),
    "required": ([STAGE, "policy=lab:tiny", "references=[mixture]"], "reference=mixture needs reference.parts=..."),
    "no model": ([STAGE, "policy=lab:tiny", "references=[./nowhere]"], "reference.path=./nowhere does not exist"),
    "twice": ([STAGE, "policy=lab:tiny", "references=[none, none]"], "none is there twice"),
    "no pairs": ([STAGE, "policy=lab:tiny", "references=[none]", "data=lab_sft", "data.num_examples=8"], "no prefer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    overrides, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        evaluate(*overrides, "tracking=none", f"output_dir={tmp_path / 'out'}")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_titles():
    mixed = {"reference": "mixture", "mean": "arithmetic", "parts": [{"reference": "prior"}]}
    mixed["parts"].append({"reference": "other", "path": "lab:strong"})
    assert title_of(mixed) == "mixture (prior + lab:strong, mean=arithmetic)"
    assert title_of("./runs/sft/policy/") == "sft/policy"
    assert title_of({"reference": "other", "path": "a/b", "terminator": "skip"}) == "other (a/b, terminator=skip)"
    assert replace(CompatibilityOptions(), betas=[1.0, 0.1, 1.0]).betas == [0.1, 1.0]


def test_kl_by_text_takes_each_models_own_finished_answers():
    ours, _ = answers(6, 1, 12, ends=0.8, good=0.5, seed=1)
    theirs, _ = answers(6, 1, 12, ends=0.8, good=0.5, seed=2)
    ended = [[g for g in drawn if g.finished] for drawn in (ours, theirs)]
    assert all(2 <= len(generations) < 6 for generations in ended)
    asked = []

    def score(texts):
        asked.extend(text.responses[0] for text in texts)
        return np.arange(len(texts)) * 2.0, np.arange(len(texts)) * 3.0, list(range(len(texts)))

    prompts = [(Message(role="user", content=str(index)),) for index in range(6)]
    forward, reverse = both_by_text(ours, theirs, prompts, score)
    assert asked == [g.output for generations in ended for g in generations]
    first, second = map(len, ended)
    assert forward.per_answer is not None
    assert reverse.per_answer is not None
    assert forward.per_answer.mean == pytest.approx(-np.arange(first).mean())  # 2 n - 3 n
    assert reverse.per_answer.mean == pytest.approx(np.arange(first, first + second).mean())
    assert reverse.per_byte is not None
    size = sum(len(g.output.encode()) for g in ended[1])
    assert reverse.per_byte.mean == pytest.approx(np.arange(first, first + second).sum() / size)
    assert (forward.num_cut, reverse.num_cut) == (6 - first, 6 - second)
    assert both_by_text(ours, None, prompts, score)[1].reason is not None
