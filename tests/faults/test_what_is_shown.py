"""What texts of strangers are in pages, cards, spreadsheets and W&B's tables: text."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from dpo_ref.evaluation.sweep import collect
from dpo_ref.files.writing import as_csv
from dpo_ref.reports.model_card import write_card
from dpo_ref.reports.page import SCRIPT
from dpo_ref.reports.policy import write_report
from dpo_ref.reports.sweep import write_sweep
from dpo_ref.tracking.tracker import RunInfo
from dpo_ref.tracking.weights_and_biases import wandb_tracker
from tests.support import chromium
from tests.support import evaluations as invented
from tests.support.command import train
from tests.support.evaluate_command import DATA
from tests.support.pictures import undrawn

ATTACKS = {
    "a script": "<script>alert(1)</script></script><script src=//evil.example/x.js></script>",
    "handlers": "<svg onload=alert(1)><img src=x onerror=alert(1)>\" onmouseover=\"alert(1)' onfocus='alert(1)",
    "addresses that run": '<a href="javascript:alert(1)">x</a> [x](javascript:alert(1)) <iframe srcdoc=x>',
    "styles that fetch": "<style>*{background:url(//evil.example)}</style>\"style=\"background:url('//evil.example')",
    "pictures and links": "![x](https://evil.example/x.png) [x](//evil.example) <https://evil.example> www.x.example",
    "ends of tables, blocks and comments": "a | b\n\n---\n```\n# c ````` --> </details></main> $x$ _d_ **e** &lt;",
    "turned and unseen characters": "\u202egpj.exe\u202c\u200b\x1b[2J\x07\x9b31m",
    "a word of a megabyte": "w" * 1_000_000,
}
ALL = " ".join(text for name, text in ATTACKS.items() if name != "a word of a megabyte")


class Page(HTMLParser):
    """What a page would run, load or lead to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.scripts, self.policies, self.worrying, self.inside = [], [], [], None
        self.feed(page.read_text())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        values = {name: value or "" for name, value in attrs}
        self.policies += [values["content"]] if values.get("http-equiv") == "Content-Security-Policy" else []
        self.worrying += [tag] if tag in ("iframe", "object", "embed", "base", "form", "link", "img") else []
        for name, value in values.items():
            leads = name in ("src", "srcset", "href", "xlink:href", "data", "action", "srcdoc")
            local = value.startswith("#") and name in ("href", "xlink:href")
            if name.startswith("on") or (leads and not local) or _fetches(name, value):
                self.worrying.append(f"{tag} {name}={value}")

    def handle_data(self, data):
        self.scripts += [data] if self.inside == "script" else []
        self.worrying += re.findall(r"url\((?!#)|@import", data) if self.inside == "style" else []

    def handle_endtag(self, tag):
        self.inside = None


def _fetches(name: str, value: str) -> bool:
    """Whether a style or what SVG draws with fetches something."""
    return name not in ("title", "content", "d") and re.search(r"url\((?!['\"]?#)", value) is not None


def harmless(path: Path) -> None:
    page = Page(path)
    assert page.scripts == [SCRIPT.read_text()]
    assert page.worrying == []
    assert len(page.policies) == 1
    assert page.policies[0].startswith("default-src 'none'; script-src 'sha256-")
    assert not set("\u202e\u200b\x1b\x07\x9b") & set(path.read_text())


@pytest.fixture(scope="module")
def attacked(
    tmp_path_factory,
):
    """Pages on a policy and on a sweep in which every text is an attack, and the table of the sweep."""
    root = tmp_path_factory.mktemp("attacked")

    def evil(evaluated):
        texts = list(ATTACKS.values())
        answers = [
            replace(g, output=texts[i % len(texts)], prompt=({"role": "user", "content": ALL},))
            for i, g in enumerate(evaluated.generations)
        ]
        about = replace(evaluated.evaluation, name=ALL, objective=ALL, reference=ALL, degenerate=[ALL])
        return replace(evaluated, generations=answers, evaluation=about)

    baseline = invented.initial(root / "initial", 10)
    policy = invented.trained(root / "policy", baseline, 0.3, 0)
    report = write_report(root / "report", [baseline, evil(policy)])
    invented.sweep(root / "sweep", baseline, (0.005, 0.3), (0,))
    for index, text in enumerate(FORMULAS):
        invented.summary(root / "sweep" / f"{8 + index}_x", status="failed", error=text + ALL, objective=text, seed=0)
    with undrawn():
        write_sweep(root / "sweep", collect(root / "sweep"), baseline)
    return report, root / "sweep" / "report.html"


FORMULAS = (
    "=HYPERLINK(\"//evil.example\")", "+cmd|'/C calc'!A0", "-2+3+cmd|'/C calc'!A0", "@SUM(1)", "\t=1", "\r=1", " =1",
    "＝1", "-",
)  # fmt: skip


def test_pages_show_what_is_in_them(attacked, tell):
    for path in attacked:
        harmless(path)
    text = attacked[0].read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert r"\u202egpj.exe\u202c\u200b\x1b[2J\x07\x9b31m" in text
    seen = "&lt;script&gt;alert(1)&lt;/script&gt;"
    tell("let in", "HTML, handlers, styles and turned text in answers, names and errors", seen=seen,
         survived="pages with one script, their own, that load nothing and lead nowhere")  # fmt: skip


def test_the_page_on_data_shows_what_is_in_the_rows(tmp_path, tell):
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{text[:2000]} {ALL}", "chosen": ALL, "rejected": text} for text in ATTACKS.values()]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["stage=data", "data=jsonl", f"data.path={rows}", "model=lab_tiny", "data.max_length=null"]
    done = train(*words, f"output_dir={tmp_path / 'run'}", "tracking=none")
    assert done.returncode == 0, done.stderr
    harmless(tmp_path / "run" / "data.html")
    size = (tmp_path / "run" / "data.html").stat().st_size
    assert size < 3_000_000
    assert len(done.stdout) < 20_000
    tell("let in", "a word of a megabyte, HTML and turned text in rows, stage=data", seen=done.stdout.split("\n")[1],
         survived="a page that is text, of its own script alone")  # fmt: skip


@pytest.mark.skipif(chromium.executable() is None, reason="no Chromium is installed, so no page is looked at")
def test_chromium_runs_and_fetches_nothing_of_it(attacked, tmp_path):
    with chromium.browser(tmp_path / "profile") as tab:
        for path in attacked:
            tab.open(path, 390)
            assert tab.complaints() == []
            assert tab.requests() == [path.as_uri()]
            assert tab.value("document.documentElement.scrollWidth") <= 390


OURS = re.compile(r"</?details>(<summary>every option</summary>)?|<!-- dpo_ref [0-9a-f]{64} -->")


def test_a_model_card_shows_names_and_options(tmp_path, tell):
    folder = tmp_path / "ru|n ![x](y) `<img src=x onerror=alert(1)>` [z](w) www.x.example # h \u202eq\x1b[2J"
    tags = json.dumps(["```\n<script>alert(1)</script>\n![x](//evil.example)", "<b>"])
    words = ["model=lab_tiny", "trainer.batch_size=16", *DATA[1:], "data.num_pairs=16", "tracking=none"]
    done = train(*words, f'output_dir="{folder}"')
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"reference": ALL, "objective": "**x** | <b>", "overrides": [f"tracking={ALL}", f"beta={ALL}", tags]}
    summary["identities"] |= {"loss_reference": "`x` | <img src=x>", "kl_reference": "```"}
    summary["data"] |= {"<b>": 1, "[x](y)": 2}
    options = {"model": {"path": ALL.replace("//", "")}, "data": {"path": None}, "note": ALL, "tags": json.loads(tags)}
    write_card(folder, summary, options, None)
    card = (folder / "policy" / "README.md").read_text().partition("\n---\n")[2]
    assert not set("\u202e\u200b\x1b\x07\x9b") & set(card)
    tokens = MarkdownIt("commonmark").enable("table").parse(card)
    inner = [token for outer in tokens for token in (outer, *(outer.children or ()))]
    assert not {token.type for token in inner} & {"link_open", "image", "hr", "blockquote_open", "bullet_list_open"}
    html = [token.content.strip() for token in inner if token.type in ("html_block", "html_inline")]
    assert [text for text in html if not OURS.fullmatch(text)] == []
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["Results", "Use", "Configuration"]
    rows = [index for index, token in enumerate(tokens) if token.type == "tr_open"]
    widths = [sum(token.type in ("td_open", "th_open") for token in tokens[row : row + 8]) for row in rows]
    assert set(widths) == {2}
    assert len([token for token in tokens if token.type == "fence"]) == 3
    assert "www.x" not in headings[0]
    tell("let in", "links, pictures, HTML and ends of tables in names and options, in a model card", seen=headings[0],
         survived="the card's own headings, table and blocks")  # fmt: skip


def test_texts_that_a_spreadsheet_would_compute_are_texts(attacked, tell):
    """A column holds numbers as they were."""
    table = list(csv.DictReader(io.StringIO((attacked[1].parent / "sweep.csv").read_text())))
    failed = [row for row in table if row["status"] == "failed"]
    assert len(failed) == len(FORMULAS)
    assert all(row["error"].startswith("'") and row["objective"].startswith("'") for row in failed)
    assert all("\r" not in row["error"] for row in failed)
    done = [row for row in table if row["status"] == "completed"]
    assert all(float(row["eos/chosen_logratio"]) < 0 for row in done)
    tell("let in", "=HYPERLINK(...), +cmd|... and their like in errors and names, in sweep.csv",
         seen=failed[0]["objective"], survived="numbers as they are, such as -0.5")  # fmt: skip


@pytest.mark.parametrize(
    "value", [-0.5, "-0.5", "+1.25 ± 0.10", "-1e-05", "-inf", "nan", "−0.5", "dpo", "a=b", None, 3]
)
def test_numbers_and_plain_texts_stay_as_they_are(value):
    assert next(csv.reader(io.StringIO(as_csv([[value, 1]]))))[0] == ("" if value is None else str(value))


def test_tables_of_wandb_hold_texts(tmp_path, tell):
    info = RunInfo(tmp_path, {}, "run", None, "train", resume=False)
    tracker = wandb_tracker(info, mode="offline")
    tracker.table("samples", ["output", "score"], [[ALL, -0.5], ["w" * 1_000_000, 1]], step=0)
    tracker.finish(0)
    (path,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.table.json")
    (text, score), (word, _) = json.loads(path.read_text())["data"]
    assert r"\u202egpj.exe\u202c\u200b\x1b[2J" in text
    assert "<script>" in text  # W&B shows texts as texts
    assert score == -0.5
    assert len(word) < 30_000
    tell("let in", "control characters and a word of a megabyte in a table of W&B", seen=r"\u202egpj.exe",
         survived="the table's numbers and texts")  # fmt: skip
