"""Runs whose reference log-probs came with the data."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ref.lab.models import locate
from tests.support.command import train
from tests.support.given_columns import PAIR, given, written

QUESTIONS = ["what is two plus two?", "name a bird.", "say the word blue twice.", "why?", "count: one, two"]
ANSWERS = ["four is it.", "it is a heron, which fishes", "blue blue", "who knows", "three, four, five and so on"]


@pytest.fixture(scope="module")
def scored():
    """Two answers to every question with the log-probs that lab:tiny gives: its text written by hand, each answer
    alone, in float64, by transformers."""
    folder = locate("lab:tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()

    @torch.no_grad()
    def logp(question, answer):
        start, body = f"<|bos|><|user|>{question}<|eot|><|assistant|>", f"{answer}<|eot|>"
        before, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (start, start + body))
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logps[position - 1, ids[position]].item() for position in range(len(before), len(ids)))

    pairs = [(q, a, b) for q, a, b in zip(QUESTIONS, ANSWERS, ANSWERS[::-1], strict=True) if a != b]
    return [((q, a, b), (logp(q, a), logp(q, b))) for q, a, b in pairs]


def flat(names, scored):
    """Rows with a column for each log-prob."""
    texts = ("prompt", "chosen", "rejected")
    return [dict(zip((*texts, *names), (*pair, *logps), strict=True)) for pair, logps in scored]


def ranked(scored):
    """Rows with lists, the worse response first."""
    return [
        {"prompt": q, "responses": [b, a], "scores": [0, 1], "logprobs": [second, first]}
        for (q, a, b), (first, second) in scored
    ]


LAYOUTS = {
    "columns": (lambda scored: flat(("chosen_logprob", "rejected_logprob"), scored), []),
    "named": (lambda scored: flat(("c", "r"), scored), ["data.logps_columns=[c,r]"]),
    "lists": (ranked, ["data.pairing=all"]),
}
RUN = ["model.path=lab:tiny", "data=jsonl", "reference=columns", "tracking=none", "beta=1", "trainer.batch_size=2"]
RUN += ['reference.provenance="lab:tiny, float64, EOS counted"']


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_whose_columns_are_the_policy_s_starts_at_ln_2(layout, scored, tmp_path):
    rows, options = LAYOUTS[layout]
    data = [f"data.path={written(tmp_path / 'rows.jsonl', *rows(scored))}"]
    data += [f"data.eval_path={written(tmp_path / 'held.jsonl', *rows(scored[:2]))}"]
    run = tmp_path / "run"
    done = train(*RUN, *data, *options, "trainer.max_steps=1", f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    before = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    for side, name in enumerate(("chosen", "rejected")):
        assert before[f"eval/rewards/{name}"] == pytest.approx(0, abs=2e-5)
        mean = sum(logps[side] for _, logps in scored[:2]) / 2
        assert before[f"eval/ref_logps/{name}"] == pytest.approx(mean, rel=1e-6)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert json.loads((run / "summary.json").read_text())["reference"] == "columns"


def test_a_run_goes_on_only_with_the_values_it_had(scored, tmp_path):
    rows = flat(("chosen_logprob", "rejected_logprob"), scored)
    path, run = tmp_path / "rows.jsonl", tmp_path / "run"
    options = [*RUN, f"data.path={written(path, *rows)}", f"output_dir={run}", "trainer.save_every=1"]
    assert train(*options, "trainer.max_steps=1").returncode == 0
    going_on = (f"resume={run}", "tracking=none", "trainer.max_steps=2")
    rows[3]["rejected_logprob"] -= 1e-9
    written(path, *rows)
    refused = train(*going_on)
    assert refused.returncode == 1
    assert "reference_values was" in refused.stderr
    rows[3]["rejected_logprob"] = scored[3][1][1]
    written(path, *rows)
    assert train(*going_on).returncode == 0


def test_provenance_has_to_be_given(tmp_path):
    done = train(*RUN[:-1], f"data.path={written(tmp_path / 'rows.jsonl', PAIR)}", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "reference=columns needs reference.provenance=..." in done.stderr


def test_kto_has_no_log_probs_behind_other_prompts(tmp_path):
    path = written(tmp_path / "rows.jsonl", given(-1, -2))
    words = [*RUN, f"data.path={path}", "reference.provenance=mine", "objective=kto"]
    done = train(*words, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "objective=kto estimates its KL from responses behind other prompts; use objective=bco" in done.stderr
