"""What is typed is what is meant: characters of Hydra's grammar, nothing for a group, options of swept members."""

import shutil

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from dpo_ref.cli.command_line import checked, quoted
from tests.support.checkpoints import lines
from tests.support.command import typed
from tests.support.faults import summary
from tests.support.model_folders import model_folder, pairs_file, words_for
from tests.support.sweeps import short_evaluation  # noqa: F401 (a fixture)

SWEPT = ["-m", "trainer.max_steps=1"]


def refusal(*words, kind="train"):
    """The one sentence with which words are refused."""
    with pytest.raises(SystemExit) as ended:
        checked(words, kind)
    sentence = str(ended.value.code)
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    return sentence


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12))
def test_a_quoted_text_is_read_as_it_is(text):
    assert OverridesParser.create().parse_override(f"data.path={quoted(text)}").value() == text


NAMES = ["epoch=3.jsonl", "c#1.jsonl", "偏好.jsonl", "it's (2) a,b=c.jsonl", "a & b; [c] {d}.jsonl", 'say "no".jsonl',
         "back\\slash=.jsonl", "20261128", "1e5", "~tilde@home.jsonl", "[x].jsonl", "true"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_a_file_is_named_as_it_is_called(tmp_path, monkeypatch, name, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("")
    for path in (name, str(tmp_path / name)):
        *_, word = checked([*flags, f"data.path={path}"], "train")
        override = OverridesParser.create().parse_override(word)
        assert not override.is_sweep_override()
        assert override.value() == path


def test_texts_that_are_no_files_are_read_too_and_numbers_stay_numbers():
    assert checked(["output_dir=2026_11", "beta=1_0"], "train") == ["output_dir='2026_11'", "beta=1_0"]
    assert checked(["reference.revision=1234567"], "train") == ["reference.revision='1234567'"]
    assert checked(["-m", "data.path=a=1,b,偏好"], "train") == ["-m", "data.path='a=1',b,'偏好'"]
    assert checked(["policy=/runs/lr=1"], "evaluate") == ["policy='/runs/lr=1'"]
    untouched = ["data.path=a.jsonl", "data.ignore=[a, b]", "data.columns={prompt: ask}", "model.path=lab:tiny"]
    assert checked(untouched, "train") == untouched
    assert checked(["beta=1,2", "-m"], "train") == ["-m", "beta=1,2"]  # flags may stand anywhere


def test_a_file_whose_name_reads_another_option_is_refused(tmp_path):
    (tmp_path / "a${beta}.jsonl").write_text("")
    assert "give the file a name without it" in refusal(f"data.path={tmp_path}/a${{beta}}.jsonl")


def test_what_cannot_be_told_is_refused_with_the_quoted_form():
    assert "\"data.ignore=['a=b']\"" in refusal("data.ignore=[a=b")
    assert "with -m each is a run" in refusal("beta=0.1,0.3")
    assert "write key=value" in refusal("beta")
    assert "trainer.batch_size=" in refusal("trainer=8")


@pytest.mark.parametrize("nothing", ["{}=null", "~{}", "{}=None", "{}="])
@pytest.mark.parametrize(
    ("group", "kind", "remedy"),
    [
        ("tracking", "train", "write tracking=none"),
        ("reference", "train", "write reference=none"),
        ("evaluation", "train", "leave evaluation out"),
        ("bandit", "train", "leave bandit out"),
        ("model", "train", "choose one of gemma2_2b"),
        ("tracking", "evaluate", "write tracking=none"),
        ("scorer", "evaluate", "write scorer=none"),
        ("reference", "evaluate", "leave reference out or write reference=none"),
        ("judge", "evaluate", "leave judge out"),
    ],
)
def test_nothing_for_a_group_is_refused_with_what_says_so(nothing, group, kind, remedy):
    assert remedy in refusal(nothing.format(group), kind=kind)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("objective=alpha_dpo", "objective=alpha_divergence_dpo is what this was; objective=alphadpo is arXiv:2410"),
        ("objective=dpo,alpha_dpo", "objective=alpha_divergence_dpo is what this was"),
    ],
)
def test_words_of_before_are_refused_with_those_of_now(word, sentence):
    assert sentence in refusal(word)


def test_an_option_of_before_is_refused_with_its_name_of_now():
    for words in (["objective=cdpo"], ["objective=mix"]):
        assert "objective.eps is called objective.label_smoothing now" in refusal(*words, "objective.eps=0.2")


def test_groups_without_a_default_need_no_plus():
    assert checked(["recipe=soup", "beta=0.1"], "train") == ["+recipe=soup", "beta=0.1"]
    assert checked(["export=folder"], "train") == ["export_to=folder"]


def test_options_are_not_deleted():
    assert "write trainer.max_steps=null" in refusal("~trainer.max_steps")


def test_options_of_swept_members_reach_those_that_take_them():
    words = ["-m", "objective=cdpo,robust_dpo", "objective.label_smoothing=0.2"]
    assert checked(words, "train") == [*words[:2], "++objective.label_smoothing=0.2"]
    sentence = refusal("-m", "objective=cdpo,dpo,ipo_sum", "objective.label_smoothing=0.2")
    assert "objective.label_smoothing=0.2 is no option of objective=dpo, objective=ipo_sum" in sentence
    alone = ["objective=cdpo", "objective.label_smoothing=0.2"]
    assert checked(alone, "train") == alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with = and, (1)")
    model_folder(folder / "model")
    pairs_file(folder / "pairs.jsonl")
    return folder


def test_a_run_in_such_a_folder_trains_goes_on_and_is_evaluated(folder, tmp_path):
    run = tmp_path / "lr=1e-3 #2"
    done = typed("train.py", *words_for(folder / "model", folder / "pairs.jsonl", run))
    assert done.returncode == 0, done.stderr
    again = typed("train.py", f"resume={run}", "trainer.max_steps=3", "tracking=none")
    assert again.returncode == 0, again.stderr
    assert max(row["step"] for row in lines(run)) == 3


def test_a_sweep_that_holds_nothing_out_is_trained_and_says_how_to_evaluate_it(folder, tmp_path):
    words = [*words_for(folder / "model", folder / "pairs.jsonl", tmp_path / "sweep"), *SWEPT, "beta=0.1"]
    done = typed("train.py", *(word for word in words if not word.startswith("data.eval_fraction")))
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    (job,) = [path for path in (tmp_path / "sweep").iterdir() if path.is_dir()]
    assert summary(job)["held_out_prompts"] == 0
    for subject in (f"policy={job}", f"sweep={tmp_path / 'sweep'}"):
        assert f"evaluate.py {subject} prompts=jsonl prompts.path=questions.jsonl" in said
    assert "not evaluated" in said


@pytest.mark.slow
def test_one_job_and_one_of_two_leave_a_report_without_empty_panels(folder, tmp_path):
    sweep = tmp_path / "one=1"
    shutil.copy(folder / "pairs.jsonl", tmp_path / "pairs.jsonl")
    words = [*words_for(folder / "model", tmp_path / "pairs.jsonl", sweep), *SWEPT]
    done = typed("train.py", *words, "beta=0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (sweep / "report.html").read_text()
    assert "None reward</text>" not in page
    assert {path.name for path in (sweep / "panels").glob("*.png")} == {"1_answer_length_tokens.png"}

    other = tmp_path / "two"
    words = [*words_for(folder / "model", tmp_path / "pairs.jsonl,nowhere.jsonl", other), *SWEPT]
    done = typed("train.py", *words)
    assert done.returncode == 1
    assert "nowhere.jsonl does not exist" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert (other / "sweep.png").is_file()
