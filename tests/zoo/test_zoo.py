"""Every family of the zoo is as docs/models.md says (`tests/support/zoo.py` has the stops); `make zoo` writes it."""

import json
import logging

import pytest

from tests.support.quick import only
from tests.support.zoo import PAGE, RESULTS, page, turn_away, visit
from tests.support.zoo_families import AWAY, FAMILIES

WRITTEN = json.loads(RESULTS.read_text())
HERE = ("DeepSeek V3 and R1",)  # values narrower than keys
TITLES = only(FAMILIES, *HERE)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """transformers speaks of packages that make some of them faster; caches do not know a window from none."""
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("title", TITLES)
def test_family(title, tmp_path):
    assert visit(FAMILIES[title], tmp_path)._asdict() == WRITTEN["families"][title], "run: make zoo"


@pytest.mark.parametrize("title", AWAY)
def test_refused(title, tmp_path):
    assert turn_away(AWAY[title], tmp_path) == WRITTEN["refused"][title]


def test_the_page_is_up_to_date():
    assert list(WRITTEN["families"]) == list(FAMILIES)
    assert PAGE.read_text() == page(WRITTEN), "run: make zoo"
    assert len(FAMILIES) >= 50
