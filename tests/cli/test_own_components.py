"""Components in a folder of the user's own: chosen, configured, refused, completed, evaluated like ours."""

import json
import sys

import pytest

from dpo_ref.cli import command_line, schemas
from dpo_ref.cli.docs_tables import objectives_page
from tests.support.command import ROOT, Done, typed
from tests.support.model_folders import model_folder, pairs_file, words_for
from tests.support.pictures import undrawn

EXAMPLE = ROOT / "examples" / "my_components"
CONF = f"--config-dir={EXAMPLE / 'conf'}"
PAIRS = EXAMPLE / "pairs.tsv"

ALIASED = '''from dpo_ref.objectives.interface import Preference, Strength
from dpo_ref.types import PairLogps


def square(policy: PairLogps, reference: PairLogps, *, beta: Strength = 0.1, knee: float = 1.0) -> Preference:
    """(knee - margin)^2."""
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    return Preference((knee - chosen + rejected).square(), chosen.detach(), rejected.detach())


def dpo(policy: PairLogps, reference: PairLogps, *, steepness: float = 1.0) -> Preference:
    """A function with the name of one of ours."""
    return square(policy, reference, beta=0.1, knee=steepness)


def untyped(policy: PairLogps, reference: PairLogps, *, knee=1.0) -> Preference:
    return square(policy, reference, knee=knee)


def unmade(policy: PairLogps, weather: float, *, knee: float = 1.0) -> Preference:
    return square(policy, policy, knee=knee)
'''
FILES = {  # as people write them: with the line that names the schema, and without
    "with_line": "defaults:\n  - /schema/objective/square@_here_\n_target_: own_losses.square\n",
    "without": "_target_: own_losses.square\n",
    "changed": "# Steeper.\n_target_: own_losses.square\nknee: 2.0\n",
    "same_name": "_target_: own_losses.dpo\n",
    "untyped": "_target_: own_losses.untyped\n",
    "unmade": "_target_: own_losses.unmade\n",
    "nowhere": "_target_: own_losses.nothing\n",
}


@pytest.fixture(autouse=True)
def own_modules(monkeypatch):
    """Modules beside the example's files can be imported, and no folder is looked in afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    schemas.look_in([])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_losses.py").write_text(ALIASED)
    (folder / "conf" / "objective").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / "conf" / "objective" / f"{name}.yaml").write_text(text)
    model_folder(folder / "model")
    pairs_file(folder / "pairs.jsonl")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def run(own, out, *words) -> Done:
    return typed(
        "train.py", f"--config-dir={own / 'conf'}", *words_for(own / "model", own / "pairs.jsonl", out), *words
    )


def options(out):
    return schemas.OmegaConf.load(out / "config.yaml").objective


def test_a_file_with_the_line_of_the_schema_trains(own, tmp_path):
    done = run(own, tmp_path / "run", "objective=with_line", "objective.knee=3", "beta=0.5", "trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert options(tmp_path / "run") == {
        "_target_": "own_losses.square", "beta": 0.1, "knee": 3.0, "nll_weight": 0.0, "kl_weight": 0.0,
    }  # fmt: skip
    about = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (about["objective"], about["beta"]) == ("with_line", 0.5)


@pytest.mark.parametrize(
    ("name", "word", "composed"),
    [
        ("without", "objective.knee=2", {"_target_": "own_losses.square", "beta": 0.1, "knee": 2.0}),
        ("changed", "objective.beta=1", {"_target_": "own_losses.square", "beta": 1.0, "knee": 2.0}),
        ("same_name", "objective.steepness=2", {"_target_": "own_losses.dpo", "steepness": 2.0}),
    ],
)
def test_files_without_the_line_compose_onto_their_schema(own, name, word, composed):
    shown = typed("train.py", f"--config-dir={own / 'conf'}", "--cfg", "job", f"objective={name}", word)
    assert schemas.OmegaConf.create(shown.stdout).objective == composed | {"nll_weight": 0.0, "kl_weight": 0.0}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["objective=without", "objective.kne=2"], "objective.kne is not an option; did you mean objective.knee?"),
        (["objective=untyped"], "does not say the type of its option knee: write knee: float"),
        (["objective=nowhere"], "own_losses.nothing cannot be imported"),
        (["-m", "objective=without,dpo", "objective.knee=2"], "objective.knee=2 is no option of objective=dpo"),
    ],
)
def test_what_is_wrong_is_one_sentence(own, words, sentence):
    with pytest.raises(SystemExit) as ended:
        command_line.checked([f"--config-dir={own / 'conf'}", *words], "train")
    assert sentence in str(ended.value.code)
    assert "\n" not in str(ended.value.code)


def test_an_argument_that_nothing_can_be_made_of_is_named(own, tmp_path):
    done = run(own, tmp_path / "run", "objective=unmade")
    assert done.returncode == 1
    assert done.stderr.startswith("error: objective=unmade: unmade: {'weather'} cannot be made")
    assert "Traceback" not in done.stderr


def test_a_value_of_another_type_is_refused(own, tmp_path):
    done = run(own, tmp_path / "run", "objective=without", "objective.knee=high")
    assert done.returncode == 1
    assert "'high' of type 'str' could not be converted to Float" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_name_of_one_of_ours_is_taken(tmp_path):
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "dpo.yaml").write_text("_target_: own_losses.square\n")
    with pytest.raises(SystemExit, match="has the name of our own objective=dpo, which is taken; rename the file"):
        command_line.checked([f"--config-dir={tmp_path}"], "train")
    with pytest.raises(SystemExit, match="nowhere is no folder of YAML files"):
        command_line.checked(["--config-dir", str(tmp_path / "nowhere")], "train")


def test_folders_are_named_by_flags_and_by_search_paths(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    inner = tmp_path / "own_package" / "conf"
    inner.mkdir(parents=True)
    (tmp_path / "own_package" / "__init__.py").write_text("")
    for words in (
        ["-cd", str(inner)],
        [f"hydra.searchpath=[file://{inner}]"],
        ["hydra.searchpath=[pkg://own_package.conf]"],
    ):
        assert command_line.config_folders(["objective=dpo", *words]) == [inner]
        assert command_line.directory_words(["objective=dpo", *words]) == words


def test_help_and_completion_know_them(monkeypatch):
    shown = typed("train.py", CONF, "--help")
    assert "truncated_quadratic" in shown.stdout
    assert "brevity" in shown.stdout
    monkeypatch.setenv("COMP_POINT", "1")
    for line, found in (("objective=trunc", "objective=truncated_quadratic"),
                        ("objective=early_knee objective.kn", "objective.knee=")):  # fmt: skip
        monkeypatch.setenv("COMP_LINE", f"train.py --config-dir {EXAMPLE / 'conf'} {line}")
        assert typed("train.py", "-sc", "query=bash").stdout.split() == [found]


def test_the_table_of_objectives_has_them():
    schemas.look_in([EXAMPLE / "conf"])
    (row,) = [line for line in objectives_page().splitlines() if line.startswith("| `truncated_quadratic`")]
    assert "pairs, reference | - | - | - |" not in row
    assert "`beta` 0.1" in row
    assert "arXiv:2402.05749" in row


def trained_example(out):
    words = ["objective=early_knee", "data=tab_separated", f"data.path={PAIRS}", "reference=uniform_bytes"]
    small = ["model=lab_tiny", "trainer.max_steps=1", "tracking=none", f"output_dir={out}"]
    done = typed("train.py", CONF, *words, *small)
    assert done.returncode == 0, done.stderr
    return done


def test_the_example_trains(tmp_path):
    out = tmp_path / "mine"
    done = trained_example(out)
    assert f"python evaluate.py {CONF} policy={out}" in done.stdout
    assert options(out).knee == 0.5
    without = typed("evaluate.py", f"policy={out}", "tracking=none")
    assert without.returncode == 1
    assert "--config-dir" in without.stderr
    assert without.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_example_goes_on_and_is_evaluated(tmp_path):
    out = tmp_path / "mine"
    trained_example(out)
    again = typed("train.py", CONF, f"resume={out}", "trainer.max_steps=2", "tracking=none")
    assert again.returncode == 0, again.stderr
    scored = ["scorer=brevity", "scorer.target=10", "generation.max_new_tokens=4", "generation.samples_per_prompt=1"]
    with undrawn():
        evaluated = typed("evaluate.py", CONF, f"policy={out}", *scored, "diagnostic=none", "tracking=none")
    assert evaluated.returncode == 0, evaluated.stderr
    metrics = json.loads((out / "evaluation" / "evaluation.json").read_text())["metrics"]
    assert metrics["brevity/mean"] <= 1


def test_a_judge_of_ones_own_is_configured_like_ours():
    words = command_line.checked([CONF, "judge=frugal", "judge.model=big", "policy=lab:tiny"], "evaluate")
    assert words[0] == CONF
    assert schemas.groups()["judge"][EXAMPLE / "conf" / "judge" / "frugal.yaml"].endswith("judges.served")
    with pytest.raises(SystemExit, match=r"did you mean judge\.template\?"):
        command_line.checked([CONF, "judge=frugal", "judge.templat=3"], "evaluate")
