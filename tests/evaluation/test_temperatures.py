"""Several temperatures: each as if it had been evaluated alone, joined into one curve; KL at temperature 1 alone."""

import json

import pytest

from dpo_ref.cli import resolve
from dpo_ref.generation.records import read_generations
from tests.support.command import composed, train
from tests.support.evaluate_command import DATA, PLAIN, QUICK, TRAIN, evaluate, measure, numbers
from tests.support.metric_table import unlisted


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(*TRAIN, f"output_dir={folder}", "beta=0.1", "trainer.max_steps=2").returncode == 0
    evaluate(f"policy={folder}", *PLAIN, "generation.temperature=[0,0.7,1]")
    return folder


def test_each_is_as_if_it_had_been_evaluated_alone(run, tmp_path):
    curve = numbers(run / "evaluation")["metrics"]
    for written, options in (("0.7", []), ("0", ["generation.samples_per_prompt=1"])):
        folder = tmp_path / written
        measure(f"policy={run}", *PLAIN, f"generation.temperature={written}", *options, f"output_dir={folder}")
        alone = numbers(folder)["metrics"]
        part = {
            key.split("/", 2)[2]: value for key, value in curve.items() if key.startswith(f"temperature/{written}/")
        }
        assert {"gold/mean", "gold/mean_se", "winrate/initial", "winrate/initial_low", "lengths/response"} <= set(part)
        assert not [key for key in (*part, *alone) if key.startswith(("kl/", "temperature/"))]
        generations = read_generations(run / "evaluation" / f"temperature-{written}" / "generations.jsonl")
        assert [g.output for g in generations] == [g.output for g in read_generations(folder / "generations.jsonl")]
        assert {g.temperature for g in generations} == {float(written)}
        if written == "0.7":
            assert part == {key: value for key, value in alone.items() if key in part}


def test_temperature_1_is_the_evaluation_proper(run, tmp_path):
    measure(f"policy={run}", *PLAIN, f"output_dir={tmp_path / 'one'}")
    alone, curve = numbers(tmp_path / "one")["metrics"], numbers(run / "evaluation")["metrics"]
    assert alone == {key: value for key, value in curve.items() if not key.startswith("temperature/")}
    assert curve["kl/initial"] is not None
    assert unlisted(curve) == set()
    for key in ("gold/mean", "winrate/initial", "ended/share"):
        assert curve[f"temperature/1/{key}"] == curve[key]


def test_what_does_not_depend_on_temperature_is_measured_once(run):
    folders = {path.parent.relative_to(run / "evaluation").name for path in run.rglob("measurements.json")}
    assert folders == {""}
    assert (run / "evaluation" / "temperature-0.7" / "evaluation.json").is_file()


def test_the_page_draws_the_policy_beside_the_initial_one(run):
    drawn = {path.name for path in (run / "evaluation" / "panels").glob("*_by_temperature.svg")}
    assert {name.partition("_")[2] for name in drawn} == {
        "gold_reward_by_temperature.svg",
        "win_rate_against_initial_by_temperature.svg",
        "tokens_by_temperature.svg",
        "repetition_by_temperature.svg",
    }
    (reward,) = (run / "evaluation" / "panels").glob("*_gold_reward_by_temperature.svg")
    assert "initial policy" in reward.read_text()


def test_scoring_again_keeps_the_curve(run):
    before = (run / "evaluation" / "evaluation.json").read_bytes()
    measure(f"policy={run}", *QUICK, "stage=score")
    after = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert after == json.loads(before)
    measure(f"policy={run}", *QUICK, "stage=report", "generation.temperature=[0,0.7,1]")
    assert (run / "evaluation" / "evaluation.json").read_bytes() == before


def test_a_baseline_that_lacks_a_temperature_is_refused(run, tmp_path):
    with pytest.raises(
        ValueError, match=r"the baseline was evaluated at temperature 1.0 and not at 0.3: evaluate it with the same"
    ):
        measure(f"policy={run}", *PLAIN, f"baseline={run}", "generation.temperature=[0.3,1]", f"output_dir={tmp_path}")
    measure(f"policy={run}", *PLAIN, f"baseline={run}", "generation.temperature=[0.7,1]", f"output_dir={tmp_path}")
    metrics = numbers(tmp_path)["metrics"]
    assert metrics["temperature/0.7/winrate/run"] == metrics["temperature/1/winrate/run"] == 0.5


REFUSED = {
    "twice": ("generation.temperature=[1,1]", "generation.temperature=[1.0, 1.0] must be one temperature or several"),
    "none": ("generation.temperature=[]", "generation.temperature=[] must be one temperature or several, each once"),
    "text": ("generation.temperature=[1,warm]", "generation.temperature=warm is no number"),
    "greedy": ("generation.temperature=0", "generation.temperature=0 gives every sample of a prompt alike"),
    "negative": ("generation.temperature=[1,-1]", "generation.temperature=-1.0 must be 0 (greedy) or positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case):
    override, message = REFUSED[case]
    cfg, choices = composed(override, kind="evaluate")
    with pytest.raises(ValueError) as error:
        resolve.components(cfg, choices, "evaluate")
    assert message in str(error.value)


def test_categories_and_a_temperature_contradict_each_other(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text('{"question_id": 1, "category": "math", "turns": ["Spell the word cat.", "Why?"]}\n')
    asked = ["prompts=mt_bench", f"prompts.path={path}", "prompts.temperatures={math: 0}"]
    with pytest.raises(ValueError, match=r"prompts\.temperatures gives every category its own"):
        evaluate("policy=lab:tiny", *PLAIN, *DATA, *asked, "generation.temperature=1", f"output_dir={tmp_path}")
    evaluate("policy=lab:tiny", *QUICK, *DATA, *asked, "stage=generate", f"output_dir={tmp_path / 'own'}")
    generations = read_generations(tmp_path / "own" / "generations.jsonl")
    assert [(g.turn, g.temperature) for g in generations] == [(1, 0.0), (2, 0.0)]


def test_the_held_out_prompts_of_other_data(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"say {n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(9))
    )
    other = [
        "prompts=data",
        "data@prompts.data=jsonl",
        f"prompts.data.path={pairs}",
        f"prompts.data.eval_path={pairs}",
    ]
    evaluate("policy=lab:tiny", *QUICK, *DATA, *other, "prompts.limit=4", "stage=generate", f"output_dir={tmp_path}")
    generations = read_generations(tmp_path / "generations.jsonl")
    assert [g.prompt[-1]["content"] for g in generations[::2]] == [f"say {n}" for n in range(4)]
    assert {g.prompt_set for g in generations} == {"data"}


def test_prompts_have_no_effect_on_answers_that_are_there(run):
    with pytest.raises(ValueError, match="prompts has no effect on stage=report"):
        evaluate(f"policy={run}", *QUICK, "prompts=lab", "stage=report")
