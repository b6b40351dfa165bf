"""The page of a check: what is shown of memory and other devices, and texts of strangers as text."""

from dataclasses import replace

import numpy as np
import pytest

from dpo_ref.data.inspection import Example, Hygiene, Piece, Turn
from dpo_ref.evaluation.check import Fit, RunFacts, run_warnings, step_zero
from dpo_ref.reports.check import Elsewhere, RunCheck, check_page, gib, show_check
from dpo_ref.training.cost import Spent
from dpo_ref.types import Reading
from tests.support.pages import parsed
from tests.support.pictures import undrawn

GIB = 2**30
EVIL = "<script>alert(1)</script>"
SIZES = np.full(90, 20)
FACTS = RunFacts(
    hygiene=Hygiene(
        Reading(3, {"no <b>": 2}), {"groups": 100, "dropped: too long": 4}, 90, 10, 100, 0, 0, 0, 0, 0, SIZES, SIZES,
        SIZES, np.zeros(0, dtype=np.int64),
    ),
    max_length=512, tokens_per_batch=8192, num_steps=3, epoch_share=1.0, pairwise=True, uses_reference=True,
    reference="other", lr=1e-4, usual_lr=1e-6, whose_lr="a model of 135 M parameters", unfinished=0.0, longest=40,
    positions=None, prompt_is_open=True, held_out_option="data.eval_fraction=0.1",
    step_zero=step_zero(np.array([9.0, -1.0]), np.array([1.0, -2.0]), 0.1, range(2)),
    fit=Fit(3 * GIB, 2 * GIB, 4096, "this machine"),
)  # fmt: skip
CHECK = RunCheck(
    title=f"dpo of {EVIL}",
    facts=FACTS,
    warnings=run_warnings(FACTS),
    example=Example(
        [Turn("user", [Piece(EVIL, False)], 3, 0)], {"chosen": [Turn("assistant", [Piece("b", True)], 0, 1)]}
    ),
    trained=["1 of 2 parameters"],
    memory={"weights": GIB, "activations": 2 * GIB},
    peak=3 * GIB,
    measured_peak="measured 2.9 GiB",
    speed="2.0 groups a second",
    spent=[Spent("steps", "3 of 32 groups", 7200.0), Spent("evaluation", "2 times 10", 1800.0)],
    elsewhere=[Elsewhere("H100 80 GB", 3 * GIB, 79 * GIB, 100.0, 60.0)],
    table="not there",
    took=3.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def page():
    with undrawn():
        return check_page(CHECK)


def test_the_page_says_whether_it_fits_and_how_long_it_takes(page):
    texts = parsed(page).texts
    assert any("it does not fit, 2.5 h to the end, 3 warnings" in text for text in texts)
    for cell in ("3.00 GiB", "H100 80 GB", "79.00 GiB", "yes", "2.0 h", "30.0 min", "1 of 2 parameters"):
        assert cell in texts
    assert texts.index("weights") < texts.index("activations") < texts.index("at most")


def test_the_costliest_stand_above_all_else(page):
    alert = page.partition('<p class="alert">')[2].partition("</p>")[0]
    assert alert.startswith("it takes 3.0 GiB at packs of 8,192 tokens, and this machine has 2.0")
    assert "optim.lr=0.0001 is 100 times" in alert


def test_what_strangers_wrote_is_text(page):
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(1)") >= 3
    assert parsed(page).fetched == []


def test_a_run_without_a_device_at_hand_says_what_is_not_known():
    with undrawn():
        page = check_page(replace(CHECK, spent=[], facts=replace(FACTS, step_zero=None, fit=None), elsewhere=[]))
    assert "how long it takes is not known here" in page
    assert "On other devices" not in page
    parsed(page)


def test_the_screen_has_a_line_for_each(capsys, tmp_path):
    show_check(CHECK, tmp_path / "check.html")
    said = capsys.readouterr().out
    assert "  memory     3.00 GiB of 2.00 GiB (this machine): activations 2.00 GiB, weights 1.00 GiB" in said
    assert "  time       2.5 h: steps 2.0 h, evaluation 30.0 min" in said
    assert "prefers the rejected response on 50.0" in said
    assert said.index("it takes 3.0 GiB") < said.index("optim.lr=0.0001")


@pytest.mark.parametrize(("size", "text"), [(0, "0.0 MiB"), (3 * 2**19, "1.5 MiB"), (3 * 2**29, "1.50 GiB")])
def test_bytes(size, text):
    assert gib(size) == text
