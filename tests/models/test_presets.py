"""Every model preset says how long its texts may be and names a template there is; the guide's commands compose."""

import re

import pytest
from omegaconf import OmegaConf

from dpo_ref import component
from dpo_ref.cli import schemas
from dpo_ref.data import chat_templates
from dpo_ref.models.loading import pretrained
from tests.support.command import REQUIRED, ROOT, composes, resolved

PRESETS = sorted(schemas.CONF.glob("model/*.yaml"))
NO_LENGTH = {
    "lab": "built here; its tokenizer says 1,024",
    "lab_large": "as lab",
    "lab_tiny": "as lab",
    "pretrained": "any model: what its tokenizer says",
}
GUIDE = (ROOT / "docs" / "coming_from.md").read_text()
COMMANDS = re.findall(r"^python (?:train|evaluate)\.py.*", GUIDE, re.MULTILINE)
LISTED = re.findall(r"^#   (python train\.py .*)$", "\n".join(path.read_text() for path in PRESETS), re.MULTILINE)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset(path):
    options = resolved(f"model={path.stem}", *REQUIRED.get(path.stem, [])).model.options
    assert options["template"] in ("auto", *chat_templates.NAMES)
    assert (options["max_length"] or 0) > 0 or path.stem in NO_LENGTH
    assert options["dtype"] == "auto"


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_says_nothing_of_its_own_twice(path):
    """Options are the signature's, and those of published models name one repository of the hub."""
    options = OmegaConf.to_container(OmegaConf.load(path))
    assert set(options) <= {"defaults", "_target_", *component.configuration(pretrained)}
    if path.stem not in NO_LENGTH:
        assert re.fullmatch(r"[\w-]+/[\w.-]+", options["path"])
        assert options["path"] in path.read_text().split("defaults:")[0]


@pytest.mark.parametrize("command", sorted({*COMMANDS, *LISTED}))
def test_commands_compose(command):
    composes(command)


def test_there_are_commands_of_every_sort():
    assert len(COMMANDS) == GUIDE.count("\npython ") >= 12
    assert any("-m " in command for command in COMMANDS)
    named = set(re.findall(r" model=(\w+)", " ".join(COMMANDS)))
    assert {path.stem for path in PRESETS} >= named > {"pretrained"}


def test_template_options_are_what_the_template_looks_at():
    """Templates of models that may think write an empty thinking block before an answer; switched off, it belongs to
    the prompt. Llama's of 3.1 and 3.2 write a date, which is pinned."""
    written = {path.stem: OmegaConf.load(path).get("template_options") for path in PRESETS}
    thinkers = [name for name in written if name.startswith(("qwen3", "smollm3")) and "2507" not in name]
    dated = [name for name in written if name.startswith(("llama3_1", "llama3_2"))]
    expected = {name: {"enable_thinking": False} for name in thinkers}
    expected |= {name: {"date_string": "26 Jul 2024"} for name in dated}
    assert {name: options for name, options in written.items() if options} == expected
    for name, options in expected.items():
        assert resolved(f"model={name}").model.options["template_options"] == options
