"""Pages in a headless Chromium: they load without a complaint or a request, their tables sort, nothing overflows."""

import re
from itertools import product

import pytest

from dpo_ref.evaluation.sweep import collect
from dpo_ref.reports.policy import write_report
from dpo_ref.reports.sweep import write_sweep
from tests.support import chromium
from tests.support import evaluations as invented
from tests.support.quick import only

pytestmark = pytest.mark.skipif(
    chromium.executable() is None, reason="no Chromium is installed, so no page is looked at: apt-get install chromium"
)
LAST_TABLE = "[...document.querySelectorAll('table.numbers')].at(-1)"
FIRST_TABLE = "document.querySelector('table.numbers')"
OPENED = "document.querySelector('details.samples[open]')"
VISIBLE = f"[...{OPENED}.querySelectorAll('.sample')].filter(s => !s.hidden)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page on three policies, and that on a sweep with a job that failed."""
    root = tmp_path_factory.mktemp("pages")
    baseline = invented.initial(root / "initial", 60)
    policies = [invented.trained(root / f"{beta}", baseline, beta, 0) for beta in (0.005, 0.3, 3.0)]
    invented.sweep(root / "sweep", baseline, (0.005, 0.3, 3.0), (0, 1), ("initial", "other"))
    invented.summary(root / "sweep" / "12_beta=10", status="failed", error="ValueError: <loss>", beta=10.0, seed=0)
    write_sweep(root / "sweep", collect(root / "sweep"), baseline)
    return {"report": write_report(root / "report", [baseline, *policies]), "sweep": root / "sweep" / "report.html"}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def column(tab, index, table=FIRST_TABLE):
    """The texts of a column of a table, from top to bottom; those of its rows' heads for 0."""
    return tab.value(f"[...{table}.tBodies[0].rows].map(r => r.cells[{index}]?.textContent.trim() ?? '')")


def numbers(texts):
    """The leading numbers of texts that have one, read independently of the page's script."""
    matches = [re.match(r"[+−-]?\d+(\.\d+)?", text.replace("−", "-")) for text in texts]
    return [float(match[0]) for match in matches if match]


LOOKED_AT = only(
    list(product(("report", "sweep"), (390, 1280), (False, True))),
    ("report", 390, True),
    ("sweep", 390, False),
    ("sweep", 1280, True),
)


@pytest.mark.parametrize(("name", "width", "dark"), LOOKED_AT)
def test_a_page_loads_in_silence_and_fits_its_width(tab, pages, name, width, dark, tmp_path):
    tab.open(pages[name], width, dark=dark)
    assert tab.complaints() == []
    assert tab.requests() == [pages[name].as_uri()]
    assert tab.value("document.documentElement.scrollWidth") <= width
    tab.screenshot(tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").stat().st_size > 50_000
    paper = tab.value("getComputedStyle(document.querySelector('figure')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == dark


def test_what_a_page_must_not_do_is_noticed(tab, tmp_path):
    """The test above can fail: a script that is not the page's, a request and a wide element are all seen."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><script>1</script>"
        f"<pre>{'wide' * 100}</pre><img src='http://127.0.0.1:9/x.png'>"
    )
    tab.open(page, 390)
    tab.value("console.error('said')")
    complaints = str(tab.complaints())
    assert all(part in complaints for part in ("inline script", "x.png", "'said'"))
    assert tab.value("document.documentElement.scrollWidth") > 390
    page.write_text("<img src='http://127.0.0.1:9/x.png'>")
    tab.open(page, 390)
    assert tab.requests() == [page.as_uri(), "http://127.0.0.1:9/x.png"]


def test_a_click_sorts_by_number_and_missing_values_stay_last(tab, pages):
    tab.open(pages["report"], 1280)
    names, rewards = column(tab, 0), column(tab, 1)
    head = f"{FIRST_TABLE}.tHead.rows[0].cells[%d].querySelector('button').click()"
    tab.value(head % 1)
    assert numbers(column(tab, 1)) == sorted(numbers(rewards), reverse=True)
    assert column(tab, 1) != rewards
    tab.value(head % 1)
    assert numbers(column(tab, 1)) == sorted(numbers(rewards))
    for order in (["descending"], ["ascending"]):  # the initial policy has no KL
        tab.value(head % 6)
        assert tab.value(f"{FIRST_TABLE}.tHead.rows[0].cells[6].ariaSort") == order[0]
        assert column(tab, 0)[-1] == "initial policy"
        assert numbers(column(tab, 6)) == sorted(numbers(column(tab, 6)), reverse=order == ["descending"])
        assert len(numbers(column(tab, 6))) == 3
    tab.value(head % 0)
    assert column(tab, 0) == names  # by the policies' own order, in which beta 0.005 stands before 0.3


def test_negative_numbers_and_failed_rows(tab, pages):
    tab.open(pages["sweep"], 1280)
    index = tab.value(f"[...{LAST_TABLE}.tHead.rows[0].cells].findIndex(c => c.textContent == 'End-token shift')")
    tab.value(f"{LAST_TABLE}.tHead.rows[0].cells[{index}].querySelector('button').click()")
    shifts = numbers(column(tab, index, LAST_TABLE))
    assert shifts == sorted(shifts, reverse=True)
    assert min(shifts) < -2 < -0.1 < max(shifts)
    assert column(tab, 0, LAST_TABLE)[-1] == "12_beta=10"


def test_tables_sort_by_keyboard(tab, pages):
    tab.open(pages["report"], 1280)
    before = column(tab, 1)
    for _ in range(2):  # the columns' buttons come first on the page
        tab.press("Tab")
    assert tab.value("document.activeElement.textContent") == "Gold reward"
    tab.press("Enter")
    assert tab.value("document.activeElement.closest('th').ariaSort") == "descending"
    assert numbers(column(tab, 1)) == sorted(numbers(before), reverse=True)


def test_on_a_phone_a_list_of_columns_sorts_the_cards(tab, pages):
    tab.open(pages["report"], 1280)
    assert tab.value("getComputedStyle(document.querySelector('.sorter')).display") == "none"
    tab.open(pages["report"], 390)
    assert tab.value(f"getComputedStyle({FIRST_TABLE}.tHead).display") == "none"
    tab.value(
        "(s => { s.value = '1'; s.dispatchEvent(new Event('change')) })(document.querySelector('.sorter select'))"
    )
    highest = numbers(column(tab, 1))
    assert highest == sorted(highest, reverse=True)
    tab.value("document.querySelector('.sorter button').click()")
    assert numbers(column(tab, 1)) == sorted(highest)


def chosen(tab, kind, text):
    """Pick an entry of one of the lists above the answers."""
    change = f"s.value = [...s.options].find(o => o.text == '{text}').value; s.dispatchEvent(new Event('change'))"
    tab.value(f"(s => {{ {change} }})({OPENED}.querySelector('select[aria-label=\\'{kind}\\']'))")


@pytest.mark.parametrize(
    ("order", "key", "sign"),
    [
        ("Gain: largest first", "gain", -1),
        ("Score: lowest first", "score", 1),
        ("Length: longest first", "tokens", -1),
        ("Growth in length: smallest first", "growth", 1),
    ],
)
def test_answers_are_ordered(tab, pages, order, key, sign):
    tab.open(pages["report"], 1280)
    drawn = tab.value(f"{VISIBLE}.map(s => s.textContent)")
    chosen(tab, "Order of the answers", order)
    everything = tab.value(f"[...{OPENED}.querySelectorAll('.sample')].map(s => Number(s.dataset.{key}))")
    shown = tab.value(f"{VISIBLE}.map(s => Number(s.dataset.{key}))")
    assert shown == sorted(everything, key=lambda value: sign * value)[: len(shown)]
    assert tab.value(f"{VISIBLE}.map(s => s.textContent)") != drawn
    assert tab.value(f"[...{OPENED}.querySelectorAll('h4')].every(h => h.hidden)")
    chosen(tab, "Order of the answers", "As drawn")
    assert tab.value(f"{VISIBLE}.map(s => s.textContent)") == drawn
    assert tab.value(f"{OPENED}.querySelector('h4').hidden") is False


def test_answers_are_searched_filtered_and_shown_a_few_at_a_time(tab, pages):
    tab.open(pages["report"], 1280)
    total = tab.value(f"{OPENED}.querySelectorAll('.sample').length")
    assert tab.value(f"{OPENED}.querySelector('output').textContent") == f"8 of {total} shown"
    tab.value(f"{OPENED}.querySelector('.more').click()")
    assert tab.value(f"{VISIBLE}.length") == 16
    chosen(tab, "Which answers", "Scored worse")
    assert all(gain < 0 for gain in tab.value(f"{VISIBLE}.map(s => Number(s.dataset.gain))"))
    chosen(tab, "Which answers", "All answers")
    tab.value(f"(s => {{ s.value = 'WINDOW'; s.dispatchEvent(new Event('input')) }})({OPENED}.querySelector('input'))")
    texts = tab.value(f"{VISIBLE}.map(s => s.textContent)")
    assert len(texts) > 0
    assert all("window" in text for text in texts)
    hits = tab.value(f"[...{OPENED}.querySelectorAll('.sample')].filter(s => s.textContent.includes('window')).length")
    assert tab.value(f"{OPENED}.querySelector('output').textContent") == f"{len(texts)} of {hits} shown"


def test_without_scripts_everything_can_be_read(tab, pages):
    tab.open(pages["report"], 1280, scripts=False)
    shown = tab.value("[...document.querySelectorAll('details[open] .sample')].filter(s => s.offsetHeight > 0).length")
    assert shown == tab.value("document.querySelectorAll('details[open] .sample').length") > 20
    assert tab.value("document.querySelectorAll('button, input, select').length") == 0
    assert tab.complaints() == []
