"""Every YAML composes onto its schema; what would have no effect is refused with key and remedy."""

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dpo_ref.cli import command_line, schemas
from tests.support.command import INSIDE, composed, file_composes, files_of, resolved, typed, typed_afresh

FILES = sorted(schemas.CONF.glob("*/*.yaml"))
ROOMS = {"data", "model", "objective", "reference"}  # composed by the tests of their rooms
GROUPS = {path.parent.name for path in FILES}


@pytest.mark.parametrize("choice", files_of(*sorted(GROUPS - ROOMS)))
def test_every_file_composes(choice):
    file_composes(choice)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_file_says_what_it_is(path):
    """What it is, and unless it is a default, a command."""
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    assert first.startswith("# ")
    assert len(first) > 30


def test_beta_goes_to_the_strength_of_the_objective():
    assert resolved("beta=0.02").objective.function.keywords == {"beta": 0.02}
    assert resolved().objective.function.keywords == {"beta": 0.1}


def test_an_option_that_may_be_a_mapping_is_given_as_one():
    run = resolved("model.template_options={enable_thinking: false}")
    assert run.model.options["template_options"] == {"enable_thinking": False}
    assert resolved("data=tldr", "data.hub={path: mine}").data.options["hub"]["path"] == "mine"


ANYTHING = {
    "options alone": ["objective.beta=0.3", "trainer.batch_size=4", "optim.schedule=cosine"],
    "a choice and its option": ["reference.path=lab:strong", "reference=other", "seed=3"],
    "a preset and more": ["+experiment=demo", "objective=ipo_sum", "trainer.max_steps=3"],
    "one inside another": INSIDE["scorer=judge"],
    "more than the schema": [
        "+model.template_options={a: 1}",
        "data.sources=[{path: a}]",
        "data=mixture",
    ],
}


@pytest.mark.parametrize("case", ANYTHING)
def test_these_tests_compose_what_hydra_does(case):
    """`composed` of the tests types options over trees that it keeps."""
    cfg, choices = composed(*ANYTHING[case])
    whole, chosen = command_line.compose_command(ANYTHING[case])
    assert (OmegaConf.to_container(cfg), choices) == (OmegaConf.to_container(whole), chosen)


REFUSED = {
    "misspelt group": (["objectve=dpo"], "objectve is not an option; did you mean objective?"),
    "misspelt key": (["objective.bta=1"], "objective.bta is not an option; did you mean objective.beta?"),
    "added key": (["+objective.bta=1"], "objective.bta is not an option; did you mean objective.beta?"),
    "added top level": (["+betta=1"], "betta is not an option; did you mean beta?"),
    "trainer key": (["+trainer.bach_size=1"], "did you mean trainer.batch_size?"),
    "choice of a value": (["optim.schedule=cosin"], "optim.schedule=cosin is none of constant, linear, cosine"),
    "beta zero": (["beta=0"], "beta=0.0 must be positive"),
    "beta twice": (["beta=1", "objective.beta=1"], "beta and objective.beta say the same thing"),
    "beta without effect": (["objective=sft", "beta=1"], "beta=1.0 has no effect: objective=sft has no KL strength"),
    "reference without effect": (["objective=sft", "reference=initial"], "reference=initial has no effect"),
    "missing path": (["data=jsonl"], "data needs data.path=..."),
    "stage": (["stage=tain"], "stage=tain is none of train, cache_reference, data"),
    "trainer value": (["trainer.batch_size=0"], "trainer.batch_size=0 must be positive"),
    "no dictionary": (["model.template_options=5"], "model.template_options=5 must be a dictionary"),
    "key of another member": (["+data.deduplicate=exact"], "data.deduplicate is not an option"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_remedy(case):
    overrides, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        resolved(*overrides)
    assert message in str(error.value)


def test_a_dictionary_may_stand_where_null_was():
    """OmegaConf 2.3 fails to merge one into a typed null."""
    assert resolved("model.template_options={a: 1}").model.options["template_options"] == {"a": 1}


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("optim.lr=fast", ["'fast' of type 'str' could not be converted to Float", "optim.lr"]),
        ("seed=1.5", ["could not be converted to Integer", "seed"]),
    ],
)
def test_hydra_refuses_wrong_types_itself(override, messages):
    with pytest.raises(HydraException) as error:
        composed(override)
    shown = f"{error.value} {error.value.__cause__}"
    assert all(message in shown for message in messages), shown


def test_hydra_refuses_a_wrong_choice_itself():
    shown = typed("train.py", "objective=dop")
    assert shown.returncode == 1
    assert all(message in shown.stderr for message in ("Could not find 'objective/dop'", "Available options", "dpo"))


def test_help_shows_real_choices_and_every_option():
    shown = typed("train.py", "--help")
    assert shown.returncode == 0, shown.stderr
    objectives = sorted(path.stem for path in schemas.CONF.glob("objective/*.yaml"))
    assert f"objective: {', '.join(objectives)}\n" in shown.stdout
    assert "schema" not in shown.stdout.split("Options and")[0]
    assert "length_bias" in shown.stdout


def test_cfg_job_shows_the_composed_configuration():
    """Whole, and what these tests compose."""
    words = ["objective=sft", "reference.path=lab:strong", "reference=other", "seed=3"]
    shown = typed_afresh("train.py", "--cfg", "job", *words)
    assert "_target_: dpo_ref.objectives.unpaired.sft" in shown.stdout
    assert shown.stdout.strip() == OmegaConf.to_yaml(composed(*words)[0]).strip()


def test_a_misspelt_key_costs_no_time_and_no_folder(tmp_path):
    shown = typed("train.py", "objective.bta=1", f"output_dir={tmp_path / 'run'}")
    assert shown.returncode == 1
    assert shown.stderr.strip() == "error: objective.bta is not an option; did you mean objective.beta?"
    assert not (tmp_path / "run").exists()


def test_tab_completion(monkeypatch):
    """What the shell asks when TAB is pressed after `objective=`: the real choices and nothing else."""
    monkeypatch.setenv("COMP_LINE", "train.py objective=")
    monkeypatch.setenv("COMP_POINT", "19")
    shown = typed("train.py", "-sc", "query=bash")
    assert set(shown.stdout.split()) == {f"objective={path.stem}" for path in schemas.CONF.glob("objective/*.yaml")}
