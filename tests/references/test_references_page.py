"""Every reference composes, and the table of docs/references.md is what composing each with every objective gives."""

import re

import pytest

from dpo_ref.cli import docs_tables
from dpo_ref.cli.docs_tables import PAGE, commands, refusal
from dpo_ref.cli.schemas import CONF
from tests.support.command import composed, file_composes, files_of


@pytest.mark.parametrize("choice", files_of("reference"))
def test_every_file_composes(choice):
    file_composes(choice)


def test_the_page_is_up_to_date(monkeypatch):
    monkeypatch.setattr(docs_tables, "compose_command", lambda words: composed(*words))  # which keeps what it composed
    assert PAGE.read_text() == docs_tables.references_page(), "python -m dpo_ref.cli.docs_tables references"


def test_every_kind_is_described_and_has_its_command():
    described = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert described >= {path.stem for path in CONF.glob("reference/*.yaml")}
    served = commands(CONF / "reference" / "served.yaml")
    assert served == [
        ["reference=served", "reference.url=http://host:8000/v1", "reference.model=Qwen/Qwen3-32B",
         "reference.tokenizer=Qwen/Qwen3-32B"],
    ]  # fmt: skip
    assert len(commands(CONF / "reference" / "moving.yaml")) == 5


def test_refusals_are_those_of_a_run():
    mixture = composed(*commands(CONF / "reference" / "mixture.yaml")[0])[0]
    objectives = {name: composed(f"objective={name}")[0] for name in ("dpo", "nca", "sft")}
    refusals = {name: refusal(mixture, cfg, ("mixture", name)) for name, cfg in objectives.items()}
    assert refusals["dpo"] is None
    assert "does not cancel in the objective" in refusals["nca"]
    assert "has no effect" in refusals["sft"]
