"""A diagnosis on disk and on the page, and files of labelled pairs: RewardBench's layout and LLMBar's."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest

from dpo_ref.evaluation.diagnostics.diagnose import Diagnosis, metrics_of, restore
from dpo_ref.evaluation.diagnostics.pairs import check_pairs, content_of, read_pairs
from dpo_ref.evaluation.stages import read_diagnosis, read_examples
from dpo_ref.files.writing import plain
from dpo_ref.reports import page
from dpo_ref.reports.diagnostics import BLUE, ORANGE, colour, diagnostics_section
from tests.support import chromium
from tests.support.command import train
from tests.support.evaluate_command import DATA, QUICK, measure
from tests.support.foreign import foreign  # noqa: F401  (a fixture)
from tests.support.pages import parsed
from tests.support.quick import only

LLMBAR = Path(os.environ.get("DPO_REF_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "llmbar"
INPUTS = [
    {
        "input": "Name a fruit.",
        "output_1": "An apple.",
        "output_2": "No fruit comes to mind at the moment.",
        "label": 1,
    },
    {"input": "Name a bird.", "output_1": "A stone is what I would name.", "output_2": "An owl.", "label": 2},
]
PAIRS = [
    {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "4, I think", "subset": "sums", "id": 1},
    {"prompt": "Spell 'ab' backwards.", "chosen": "<|eot|> ba", "rejected": "ab", "subset": "<b>words</b>", "id": 2},
    {"prompt": "Add 2 and 2.", "chosen": "It is 4.", "rejected": "5", "subset": "sums", "id": 3},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "Natural.json").write_text(json.dumps(INPUTS))
    (folder / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = train(*DATA, "model.path=lab:tiny", "trainer.batch_size=16", "tracking=none", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    measure(f"policy={folder}", *QUICK, f"diagnostic.pairs=[{files}]", "diagnostic.examples=2")
    return folder / "evaluation"


def metrics(folder):
    return json.loads((folder / "evaluation.json").read_text())["metrics"]


def test_both_layouts_are_read_with_their_subsets(files):
    pairs = read_pairs([str(files / "bench.jsonl"), str(files / "Natural.json")])
    assert pairs.subsets == ["sums", "<b>words</b>", "sums", "Natural", "Natural"]
    better = [group.responses[group.pairs[0][0]] for group in pairs.groups]
    assert better == ["3", "<|eot|> ba", "It is 4.", "An apple.", "An owl."]
    assert content_of([str(files)]) != content_of([str(files / "bench.jsonl")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}\n', "bad.jsonl row 1 fits no known format"),
        ('{"prompt": "a", "completion": "b"}\n', "bad.jsonl row 1 is no pair; a row is {prompt, chosen, rejected}"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', "bad.jsonl row 2 is not JSON"),
    ],
    ids=["half a pair", "no pair", "no JSON"],
)
def test_what_is_no_pair_is_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pairs([str(tmp_path / "bad.jsonl")])


def test_files_are_looked_for_before_anything_is_generated(files, tmp_path):
    with pytest.raises(ValueError, match=r"pairs=\./nowhere does not exist"):
        measure("policy=lab:tiny", "diagnostic.pairs=[./nowhere]", *QUICK, *DATA, f"output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"names Natural\.json twice"):
        check_pairs([str(files), str(files / "Natural.json")])
    with pytest.raises(ValueError, match=r"diagnostic\.examples=-1 must be at least 0"):
        measure("policy=lab:tiny", "diagnostic.examples=-1", *QUICK)


@pytest.mark.skipif(not LLMBAR.is_dir(), reason="no LLMBar here")
def test_real_llmbar():
    """419 pairs in five files; the longer answer is the better one in 11.9 % of Neighbor's."""
    pairs = read_pairs([str(LLMBAR)])
    sizes = {"GPTInst": 92, "GPTOut": 47, "Manual": 46, "Natural": 100, "Neighbor": 134}
    assert {name: pairs.subsets.count(name) for name in pairs.subsets} == sizes
    longer = [
        len(group.responses[group.pairs[0][0]]) > len(group.responses[group.pairs[0][1]])
        for group, name in zip(pairs.groups, pairs.subsets, strict=True)
        if name == "Neighbor"
    ]
    assert sum(longer) / len(longer) == pytest.approx(16 / 134)


def test_a_diagnosis_survives_the_disk(run):
    diagnosis = read_diagnosis(run)
    again = restore(Diagnosis, json.loads(json.dumps(plain(diagnosis))))
    assert plain(again) == plain(diagnosis)
    assert again.texts["own"].shift == diagnosis.texts["own"].shift
    (run.parent / "other").mkdir()
    (run.parent / "other" / "diagnostics.json").write_text('{"key": "k", "diagnosis": {"texts": 3}}')
    with pytest.raises(ValueError, match=r"diagnostics\.json is no diagnosis .* make it again with stage=diagnose"):
        read_diagnosis(run.parent / "other")


def test_the_diagnosis_agrees_with_the_measurements(run):
    """End shift and displacement were measured by another path: evaluation/kl.py and heldout.py."""
    diagnosis, measurements = read_diagnosis(run), metrics(run)
    assert diagnosis.texts["own"].end.logratio.mean == pytest.approx(measurements["eos/own_logratio"], abs=1e-5)
    assert diagnosis.texts["own"].end.logratio.se == pytest.approx(measurements["eos/own_logratio_se"], abs=1e-5)
    assert diagnosis.texts["chosen"].end.logratio.mean == pytest.approx(measurements["eos/chosen_logratio"], abs=1e-5)
    assert diagnosis.displacement.chosen.mean.mean == pytest.approx(measurements["logratios/chosen"], abs=1e-4)
    assert diagnosis.rankings["held-out pairs"].accuracy["implicit"].mean == measurements["rewards/accuracies"]
    assert diagnosis.rankings["held-out pairs"].accuracy["length"].mean == measurements["rewards/length_baseline"]
    assert {name: measurements[name] for name in metrics_of(diagnosis)} == metrics_of(diagnosis)
    assert diagnosis.rankings["sums"].num_pairs == 2
    assert diagnosis.rankings["all files"].num_pairs == 5
    assert measurements["pairs/Natural/length"] == 0


def test_twice_is_the_same_and_is_read_not_made(run, files):
    options = (f"policy={run.parent}", *QUICK, f"diagnostic.pairs=[{files}]", "diagnostic.examples=2")
    path, metrics_before = run / "diagnostics.json", metrics(run)
    before, stamp = path.read_text(), path.stat().st_mtime_ns
    measure(*options, "stage=diagnose")
    assert path.stat().st_mtime_ns == stamp
    path.unlink()
    measure(*options, "stage=diagnose")
    assert path.read_text() == before
    assert metrics(run) == metrics_before
    measure(f"policy={run.parent}", *QUICK, "stage=score")
    assert metrics(run) == metrics_before


def test_none_leaves_none(run, tmp_path):
    copy = shutil.copytree(run.parent, tmp_path / "run")
    measure(f"policy={copy}", *QUICK, "stage=diagnose", "diagnostic=none")
    assert read_diagnosis(copy / "evaluation") is None
    kept = metrics(copy / "evaluation")
    assert kept.keys() < metrics(run).keys()
    assert not [name for name in kept if name.startswith(("entropy/", "tokens/", "pairs/", "displacement/"))]
    assert kept["kl/initial"] == metrics(run)["kl/initial"]


def test_the_page_shows_it_and_escapes_what_it_is_given(run):
    section = diagnostics_section(run)
    structure = parsed(section)
    page_text = "".join(structure.texts)
    assert "<b>words</b>" in page_text
    assert section.count("<figure>") == 7
    examples = read_examples(run)
    assert len(examples) == 2 + 4
    assert section.count('class="tok"') == 9 + sum(len(r.tokens) for example in examples for r in example.responses)
    assert f"{100 * read_diagnosis(run).texts['own'].shift.top_1_percent:.1f}\u00a0%" in page_text
    for name in ("chosen", "own"):
        end = read_diagnosis(run).texts[name].end.logratio
        assert f"{end.mean:+.2f} ± {end.se:.2f} on {name}".replace("-", "−") in page_text
    measurements = metrics(run)
    for name in ("kl/initial", "kl/initial_k1"):
        assert f"{measurements[name]:.2f} ± {measurements[name + '_se']:.2f}".replace("-", "−") in structure.texts
    assert diagnostics_section(run.parent) == ""


@pytest.mark.skipif(chromium.executable() is None, reason="no Chromium is installed")
def test_the_section_fits_a_phone_and_a_screen(run, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.page("diagnosis", diagnostics_section(run)), encoding="utf-8")
    with chromium.browser(tmp_path / "profile") as tab:
        for width in (390, 1280):
            tab.open(path, width)
            assert tab.value("document.documentElement.scrollWidth") <= width
            assert tab.complaints() == []


def test_colours_are_white_at_nothing_and_full_at_three_nats():
    assert colour(0.0) == "#ffffff"
    assert colour(3.0) == colour(9.0) == "#" + "".join(f"{part:02x}" for part in BLUE)
    assert colour(-3.0) == "#" + "".join(f"{part:02x}" for part in ORANGE)
    half = [round(255 + math.sqrt(0.1) * (part - 255)) for part in BLUE]
    assert colour(0.3) == "#" + "".join(f"{part:02x}" for part in half)


@pytest.mark.parametrize("reference", only(["none", "uniform_token", "foreign"], "none", "foreign"))
def test_a_loss_reference_without_tokens_is_absent_with_its_reason(run, foreign, tmp_path, reference):  # noqa: F811
    other = ["reference=other", f"reference.path={foreign}"]
    words = other if reference == "foreign" else [f"reference={reference}"]
    out = tmp_path / "out"
    measure(f"policy={run.parent}", *QUICK, *words, f"output_dir={out}", "diagnostic.examples=1")
    diagnosis = read_diagnosis(out)
    page_text = "".join(parsed(diagnostics_section(out)).texts)
    if reference == "uniform_token":
        text = diagnosis.texts["own"]
        assert diagnosis.absent == {}
        assert text.reference_shift.num_tokens == text.shift.num_tokens
        return
    why = {"none": "it is no distribution over answers", "foreign": "its tokens do not correspond to the policy's"}
    assert set(diagnosis.absent.values()) == {why[reference]}
    assert all(text.reference_shift is None for text in diagnosis.texts.values())
    assert why[reference] in page_text
    assert diagnosis.rankings["held-out pairs"].accuracy["implicit"].mean == metrics(out)["rewards/accuracies"]


def test_columns_that_are_not_read_are_told(tmp_path, capsys):
    row = {"prompt": "why?", "chosen": "because", "rejected": "no", "subset": "all", "margin": 2}
    (tmp_path / "bench.jsonl").write_text(json.dumps(row) + "\n")
    read_pairs([str(tmp_path / "bench.jsonl")])
    assert capsys.readouterr().out == "diagnostic.pairs=bench.jsonl: columns not read: margin\n"
