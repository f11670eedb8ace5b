"""The page loads nothing, holds the whole report, and shows in a browser no figure but those in its JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from embedge.bench import Report
from embedge.bench.report.choose import choose
from embedge.bench.report.html_page import html_page, page_data
from embedge.bench.report.report import Row
from tests.bench.conftest import example_row

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><script>alert(1)</script><!-- & \u2028"


class Page(HTMLParser):
    """Elements with their attributes, and the text of each element that has an id or is a cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append(dict(attrs).get("id") or tag)

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[self._inside[-1]] = self.texts.get(self._inside[-1], "") + data

    def handle_endtag(self, tag: str) -> None:
        if self._inside:
            self._inside.pop()


@pytest.fixture
def several(report: Report) -> Report:
    """A report of two precisions and tasks, with a name that would end the JSON."""
    at = {"value": 0.7, "reference": 0.8, "difference": -0.1, "low": -0.12, "high": -0.08}
    worse = {"held-out": {"metric": "ndcg@10", "items": 50, "dims": {"32": at}}}
    rows = [
        example_row(f"embedge {precision}", "embedge", task, precision=precision, **changes)
        for task in ("search", "code")
        for precision, changes in (
            ("int8", {}),
            ("int4", {"quality": worse, "single": {"p50_ms": 1.25, "p95_ms": 2.125, "texts": 10}}),
        )
    ]
    return replace(report, rows=(report.rows[0], *rows), notes=(HOSTILE,))


def with_pages() -> Row:
    """A row of a bundle that takes images too, measured at two budgets."""
    at = {"value": 0.625, "reference": 0.75, "difference": -0.125, "low": -0.25, "high": 0.0625}
    cosines = {"matched": 0.375, "mismatched": 0.25, "gap": 0.6875, "texts_matched": None}
    pages = {
        "metric": "ndcg@10", "modality": "image", "items": 40, "pages": 60, "dims": {"32": at},
        "ndcg@5": {"32": at}, "multi_vector": {"ndcg@5": at, "ndcg@10": at},
        "alignment": {"value": cosines, "reference": cosines},
    }  # fmt: skip
    times = {"p50_ms": 310.0, "p95_ms": 420.0, "p95_slow_ms": 430.0, "pages": 16}
    depths = {"set": "pages", "ndcg@5": at, "ndcg@10": at}
    images = {
        budget: {"tokens": tokens, "quality": depths, **times}
        for budget, tokens in (("602112", 780.0), ("150528", 200.0))
    }
    return example_row(
        "embedge fp32", "embedge", precision="fp32", quality={"pages": pages}, images=images
    )


def figures(value: Any) -> Iterator[float]:
    """Yield every number in a JSON document."""
    if isinstance(value, dict):
        for part in value.values():
            yield from figures(part)
    elif isinstance(value, list):
        for part in value:
            yield from figures(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def browse(text: str, folder: Path) -> Page:
    """Return what a page has become in Chromium."""
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000"),
            *("--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Page(done.stdout)


def test_the_page_holds_the_whole_report(several: Report) -> None:
    page = Page(html_page([several]))

    held = json.loads(page.texts["report"])
    assert held == page_data([several])
    assert Report.from_dict(held["reports"][0]) == several
    assert held["reports"][0]["notes"] == [HOSTILE]


def test_a_figure_that_is_no_number_is_null(several: Report) -> None:
    page = Page(html_page([replace(several, sizes={"int8": float("nan")})]))  # type: ignore[dict-item]

    held = json.loads(page.texts["report"], parse_constant=pytest.fail)
    assert held["reports"][0]["sizes"] == {"int8": None}


def test_the_page_loads_nothing(several: Report) -> None:
    page = Page(html_page([several]))

    assert [tag for tag, _ in page.elements if tag in ("link", "img", "iframe", "object")] == []
    loading = [a for _, a in page.elements if {"src", "href", "action"} & set(a)]
    assert [a.get("href") for a in loading] == ["#configurations"]
    policy = next(a for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")
    style = Path("bench/report/page/style.css").read_text()
    assert not re.search(r"url\(|@import", style)


def test_the_page_can_be_read_aloud_and_used_by_keyboard(several: Report) -> None:
    page = Page(html_page([several]))

    assert dict(page.elements)["html"] == {"lang": "en"}
    ids = {str(a["id"]) for _, a in page.elements if "id" in a}
    named = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert named
    assert set(named) <= ids
    assert [tag for tag, _ in page.elements if tag == "h1"] == ["h1"]
    chart = next(a for _, a in page.elements if a.get("id") == "chart")
    assert (chart["tabindex"], "table below" in str(chart["aria-label"])) == ("0", True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_tables_with_headings_that_sort_and_figures_of_the_json(
    several: Report, tmp_path: Path
) -> None:
    settings = several.settings | {"image_budgets": [602112, 150528]}
    several = replace(several, rows=(*several.rows, with_pages()), settings=settings)
    page = browse(html_page([several]), tmp_path)

    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") >= 3
    assert tags.count("caption") == tags.count("table")
    headings = [a for tag, a in page.elements if tag == "th" and a.get("scope") == "col"]
    assert {a.get("aria-sort") for a in headings} == {"none"}
    assert tags.count("svg") >= 2
    assert {"title", "desc"} <= set(tags)
    shown = [float(str(a["data-value"])) for _, a in page.elements if "data-value" in a]
    assert len(shown) > 50
    assert set(shown) <= set(figures(page_data([several])))
    assert page.texts["answer"] == "3 of 7 configurations are shown."  # texts of the first task
    sections = "".join(text for name, text in page.texts.items() if name.startswith("section-"))
    for title in ("Page images", "Image budget", "Texts beside images"):
        assert title in sections
    assert "alert" not in "".join(text for name, text in page.texts.items() if name == "script")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_sorts_by_a_heading_and_keeps_a_limit(several: Report, tmp_path: Path) -> None:
    acts = """<script>
      const press = () => [...document.querySelectorAll("#table-configurations .sort")]
        .find((b) => b.textContent === "One text, 95th percentile").click();
      press(); press();
      const order = [...document.querySelectorAll("#table-configurations tbody th")].map((c) => c.textContent);
      document.querySelector("[name=share_low]").value = "95";
      byId("filters").dispatchEvent(new Event("input"));
      document.body.insertAdjacentHTML("beforeend", "<p id=order></p>");
      byId("order").textContent = order.join();
      document.body.insertAdjacentHTML("beforeend", "<p id=together></p>");
      const task = document.querySelector("[name=task]");
      task.value = "";
      byId("filters").dispatchEvent(new Event("input"));
      byId("together").textContent = byId("answer").textContent;
      task.value = "search";
      byId("filters").dispatchEvent(new Event("input"));
    </script>"""

    worse = several.row("code", "embedge int4")
    assert worse is not None
    rows = [
        replace(row, quality=worse.quality) if row.task == "code" else row for row in several.rows
    ]
    several = replace(several, rows=tuple(rows))
    page = browse(html_page([several]).replace("</body>", acts + "</body>"), tmp_path)

    assert page.texts["order"] == "int8,int4"  # 4 ms, 2.125 ms
    # of all tasks nothing keeps it: int8 of the other task lost more; `embedge choose` says the same
    assert page.texts["together"].startswith("Nothing meets a limit. Quality kept at least, %: the")
    assert choose([several], {"quality": 0.95}).candidate is None
    headings = [a.get("aria-sort") for tag, a in page.elements if tag == "th"]
    assert headings.count("descending") == 1
    assert page.texts["answer"] == (
        "1 of 4 configurations keep the limits. Best in quality: search: int8, 32 dimensions, float32 vectors "
        "(99.88 %)."
    )
