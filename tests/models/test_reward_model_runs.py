"""Reward models as users have them: trained, saved, resumed, scoring evaluations and on-policy rounds."""

import json
import math
import os
import re
import shlex
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpo_ref.cli import resolve
from dpo_ref.evaluation import scorers
from dpo_ref.generation.records import read_generations
from dpo_ref.lab.models import locate
from tests.support.command import ROOT, composed, train
from tests.support.evaluate_command import measure
from tests.support.evaluations import answer
from tests.support.reward_models import SMALL, classified

LAB = [*SMALL, "data.num_pairs=96", "data.num_eval_pairs=16", "data.num_test_prompts=6"]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    done = train(*LAB, "objective=reward_model", "optim.lr=0.003", "trainer.save_every=2", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "reference: none" in done.stdout
    return folder


def test_what_a_run_reports(run):
    first, *steps, last = rows_of(run)
    assert len(steps) == 6
    assert all(row["train/grad_norm"] > 0 for row in steps)
    assert last["eval/loss"] != first["eval/loss"]
    assert not any("logps" in key or "logratios" in key for key in steps[0])
    assert steps[0]["train/rewards/margins"] == pytest.approx(
        steps[0]["train/rewards/chosen"] - steps[0]["train/rewards/rejected"], abs=1e-9
    )


def test_the_folder_is_read_by_transformers_and_by_the_scorer_alike(run):
    """The scorer writes prompt and answer as training did: with the template, up to the end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    answers = [answer(0, text="plum, kiwi."), answer(1, text="No.", finished=False), answer(2, text="<|eot|> and")]
    scores = scorers.reward_model(answers, path=str(run / "policy"), batch_size=2)
    assert scores.name == "reward_model"
    written = [
        tokenizer.apply_chat_template(
            [*generation.prompt, {"role": "assistant", "content": generation.output}], tokenize=False
        ).removesuffix("\n")
        for generation in answers
    ]
    assert all(text.endswith((tokenizer.eos_token, "<|eot|>")) for text in written)
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in written[:2]]
    _, alone = classified(run / "policy", sequences)
    assert scores.values[:2] == pytest.approx(alone, abs=1e-5)
    assert len(set(scores.values)) == 3


def test_a_resumed_run_is_the_same(run, tmp_path):
    parts = tmp_path / "parts"
    options = [*LAB, "objective=reward_model", "optim.lr=0.003", f"output_dir={parts}"]
    assert train(*options, "optim.schedule=constant", "trainer.max_steps=2").returncode == 0
    done = train(f"resume={parts}", "trainer.max_steps=4", "tracking=none")
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    options[-1] = f"output_dir={whole}"
    assert train(*options, "optim.schedule=constant", "trainer.max_steps=4").returncode == 0
    weights = [(folder / "policy" / "model.safetensors").read_bytes() for folder in (parts, whole)]
    assert weights[0] == weights[1]


def evaluated(folder, *overrides):
    overrides = ["policy=lab:tiny", *LAB[2:], "generation.max_new_tokens=10", f"output_dir={folder}", *overrides]
    measure(*overrides)
    return json.loads((folder / "evaluation.json").read_text()), read_generations(folder / "generations.jsonl")


def test_evaluation_with_a_reward_model_and_best_of_n(run, tmp_path):
    """Two answers to a prompt, each the best of four by the reward model: those of eight plain ones that it scores
    highest among the first four and the last four."""
    scorer = ["scorer=reward_model", f"scorer.path={run / 'policy'}"]
    evaluation, plain = evaluated(tmp_path / "plain", *scorer, "generation.samples_per_prompt=8")
    scores = scorers.reward_model(plain, path=str(run / "policy")).values
    assert evaluation["metrics"]["reward_model/mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)
    chosen = ["generation=best_of", "generation.samples_per_prompt=2", "scorer@generation.scorer=reward_model"]
    chosen.append(f"generation.scorer.path={run / 'policy'}")
    evaluation, best = evaluated(tmp_path / "best", *scorer, *chosen)
    assert evaluation["generation"]["scorer"]["name"] == "reward_model"
    expected = [max(range(4 * n, 4 * n + 4), key=scores.__getitem__) for n in range(12)]
    assert [generation.output for generation in best] == [plain[index].output for index in expected]
    assert [(generation.prompt_index, generation.sample_index) for generation in best] == [
        (n, s) for n in range(6) for s in range(2)
    ]
    best_mean = sum(scores[index] for index in expected) / 12
    assert evaluation["metrics"]["reward_model/mean"] == pytest.approx(best_mean, abs=1e-6)
    with pytest.raises(ValueError, match=r"generation.best_of=1 must be at least 2"):
        evaluated(tmp_path / "one", *chosen, "generation.best_of=1")


def test_a_changed_reward_model_chooses_anew(run, tmp_path):
    """The same folder with the head's sign turned: the answers kept are the worst of those that were drawn."""
    folder = shutil.copytree(run / "policy", tmp_path / "rm")
    scorer = ["scorer@generation.scorer=reward_model", f"generation.scorer.path={folder}"]
    options = [*scorer, "generation=best_of", "generation.best_of=3", "scorer=none", "tracking=none"]
    _, best = evaluated(tmp_path / "found", *options)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = -weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "digests.json").unlink()  # it was changed on purpose
    scorers._load.cache_clear()
    _, worst = evaluated(tmp_path / "found", *options)
    _, drawn = evaluated(tmp_path / "drawn", "scorer=none", "generation.samples_per_prompt=3")
    scores = scorers.reward_model(drawn, path=str(run / "policy")).values
    for kept, extreme in ((best, max), (worst, min)):
        indices = [extreme(range(3 * n, 3 * n + 3), key=scores.__getitem__) for n in range(6)]
        assert [generation.output for generation in kept] == [drawn[index].output for index in indices]


def test_on_policy_rounds_are_scored_by_a_reward_model(run, tmp_path):
    """A round's rewards are the reward model's scores of its stored answers; the default would be the gold reward."""
    options = ["data=on_policy", "data.prompts.num_pairs=32", "data.prompts.num_eval_pairs=8", "data.rounds=2"]
    options += ["data.prompts_per_round=4", "data.samples_per_prompt=3", "data.max_new_tokens=8", *SMALL]
    scorer = ["scorer@data.scorer=reward_model", f"data.scorer.path={run / 'policy'}"]
    done = train(*options, *scorer, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "24 rewards from reward_model" in done.stdout
    for index in (1, 2):
        folder = tmp_path / "run" / "rounds" / f"{index:04d}"
        answers = read_generations(folder / "generations.jsonl")
        scores = scorers.reward_model(answers, path=str(run / "policy")).values
        assert json.loads((folder / "record.json").read_text())["rewards"] == pytest.approx(scores, abs=1e-6)
    row = next(row for row in rows_of(tmp_path / "run") if "on_policy/reward_mean" in row)
    first = json.loads((tmp_path / "run" / "rounds" / "0001" / "record.json").read_text())["rewards"]
    assert row["on_policy/reward_mean"] == pytest.approx(sum(first) / 12, abs=1e-9)


def test_margins_come_from_the_rows(tmp_path):
    """A step's loss is that of the logged scores and the rows' margins: 2 everywhere, at scale 0.5."""
    rows = [
        {"prompt": f"ask {n}", "chosen": f"plum {n}", "rejected": f"no {n}", "score_chosen": 5, "score_rejected": 3}
        for n in range(16)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [*SMALL, "data=jsonl", f"data.path={path}", "data.eval_fraction=0.25"]
    losses = {}
    for name in ("reward_model", "reward_model_margin"):
        scale = ["objective.scale=0.5"] if "margin" in name else []
        done = train(*data, f"objective={name}", *scale, f"output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        losses[name] = rows_of(tmp_path / name)[0]
    margin = losses["reward_model"]["eval/rewards/margins"]
    assert losses["reward_model_margin"]["eval/rewards/margins"] == margin
    assert losses["reward_model"]["eval/loss"] == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-3)
    assert losses["reward_model_margin"]["eval/loss"] == pytest.approx(math.log1p(math.exp(1 - margin)), abs=1e-3)
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if "score" not in k}) + "\n" for row in rows))
    done = train(*data, "objective=reward_model_margin", f"output_dir={tmp_path / 'none'}")
    assert "rows.jsonl row 1 has no scores to make a margin of" in done.stderr


REFUSED = {
    "reference": (["reference=initial"], "reference=initial has no effect: objective=reward_model uses no reference"),
    "beta": (["beta=0.1"], "beta=0.1 has no effect: objective=reward_model has no KL strength"),
    "adapter": (["model.lora_rank=4"], "trains all weights and a new head; leave model.lora_rank out"),
    "on-policy": (["data=on_policy"], "trains a model that writes no answers; data=on_policy needs one"),
    "answers": (["evaluation.every=5"], "writes no answers to evaluate; leave evaluation.every out"),
    "likelihood": (["objective.nll_weight=1"], "objective.nll_weight has no place in objective=reward_model"),
    "bandit": (["bandit=arms"], "has no meaning in a bandit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    overrides, message = REFUSED[case]
    cfg, choices = composed("objective=reward_model", *overrides)
    with pytest.raises(ValueError) as error:
        resolve.resolve(cfg, choices, overrides)
    assert message in str(error.value)


PAGE = (ROOT / "docs" / "reward_models.md").read_text()
COMMANDS = re.findall(r"^python (train|evaluate)\.py (.*)$", PAGE, re.MULTILINE)


def test_commands_of_the_page_compose(run):
    """With this run in the place of the page's; the scorer stands where each command says."""
    assert len(COMMANDS) >= 6
    for script, line in COMMANDS:
        words = shlex.split(line.replace("outputs/my_reward_model/policy", str(run / "policy")))
        cfg, choices = composed(*words, kind=script)
        parts = resolve.components(cfg, choices, script)
        if script == "train":
            resolve.resolve(cfg, choices, words)
        for word in words:
            key, _, value = word.partition("=")
            if key.startswith("scorer@"):
                group, name = key.removeprefix("scorer@").split(".")
                assert parts[group].options[name].name == value == "reward_model"


def test_code_of_the_page_gives_the_scorers_score(run):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)
    space = {}
    exec(code.replace("outputs/my_reward_model/policy", str(run / "policy")), space)
    generation = replace(answer(text="..."), prompt=({"role": "user", "content": "..."},))
    values = scorers.reward_model([generation], path=str(run / "policy")).values
    assert values == pytest.approx([space["score"].item()], abs=1e-6)


def test_tables_of_the_page_are_the_committed_results():
    """Row by row, as each is rounded."""
    results = json.loads((ROOT / "benchmarks" / "results" / "reward_model.json").read_text())
    rows = re.findall(r"^\| [^`|]+ \| (\d+\.\d.*) \|$", PAGE, re.MULTILINE)
    ranked = [f"{100 * row['labels']:.1f} % | {100 * row['gold']:.1f} %" for row in results["pairs"].values()]
    gains = [f" ({row['gain']:+.3f} ± {row['gain_se']:.3f})" if row["n"] > 1 else "" for row in results["best_of_n"]]
    kept = [
        f"{row['gold']:.3f}{gain}, {row['tokens']:.1f}" for row, gain in zip(results["best_of_n"], gains, strict=True)
    ]
    assert rows == ranked + [" | ".join(kept[start : start + 3]) for start in (0, 3, 6)]


def test_data_without_pairs_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"ask {n}", "completion": "yes"}) + "\n" for n in range(4)))
    done = train(*SMALL, "data=jsonl", f"data.path={path}", "objective=reward_model", f"output_dir={tmp_path / 'run'}")
    assert "objective=reward_model compares responses, but the data has rows with only one" in done.stderr


def test_what_is_no_reward_model_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"scorer.path=.*it is a LlamaForCausalLM, and a reward model is a sequence"):
        scorers.reward_model([answer()], path=locate("lab:tiny"))
    with pytest.raises(ValueError, match=r"is not a model folder: it has no config.json; the run's policy is in"):
        scorers.reward_model([answer()], path=str(run))
    model = AutoModelForSequenceClassification.from_pretrained(
        run / "policy", num_labels=2, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"it is a LlamaForSequenceClassification with 2 outputs"):
        scorers.reward_model([answer()], path=str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"generation 1 has 21\d\d tokens with its prompt, and the reward model has"):
        scorers.reward_model([answer(text=" plum" * 2100)], path=str(run / "policy"))
    with pytest.raises(ValueError, match=r"it is a LlamaForSequenceClassification, which scores answers"):
        evaluated(tmp_path / "rm", f"policy={run / 'policy'}")


def test_a_reward_model_that_is_not_what_was_saved_is_told(run, tmp_path):
    folder = shutil.copytree(run / "policy", tmp_path / "policy")
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(-3, os.SEEK_END)
        weights.write(b"\x00\x3f")
    with pytest.raises(ValueError, match=r"scorer.path=.*model.safetensors is not as it was written"):
        scorers.reward_model([answer()], path=str(folder))
