"""The page of a comparison: complete, self-contained, and safe with any text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from trials import decay, plan, record, search

from hyperlora.comparison import analyse
from hyperlora.report import comparison_page, significant, size

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "</title><script>alert(1)</script> $x_ \" ' & <img src=http://evil.example/x>"


class Page(HTMLParser):
    """Elements, attributes and text of a page; refuses elements that are closed out of order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def text(self, *tags: str) -> str:
        return " ".join("".join(self.texts.get(tag, [])) for tag in tags or self.texts)


def compared(labels: dict[str, str] | None = None, seeds: Any = range(1, 6)) -> dict[str, Any]:
    rates = {"adalora": 1.0, "fast": 1.5, "slow": 0.6, "same": 1.0}
    records: list[dict[str, Any]] = []
    for name, rate in rates.items():
        records += search(name)
        ranks = (8, 8, 8, 8) if name == "slow" else (4, 3, 2, 0)
        records += [record(name, decay(rate, s, 0.02), seed=s, ranks=ranks) for s in seeds]
    records[-1] = record("same", None, seed=5)
    told = plan(*rates)
    for c in told["contestants"]:
        c["label"] = (labels or {}).get(c["name"], c["label"])
    return analyse(records, told)


def test_page_has_every_contestant_the_verdict_first_and_what_failed() -> None:
    result = compared()
    page = Page(comparison_page(result))
    assert not page.open
    for c in result["contestants"]:
        assert c["label"] in page.text("th")
        assert c["label"] in page.text("li")
    assert page.text("p").lstrip().find(result["verdict"]) < page.text("p").find("same-lr0.002-seed5 (NonFiniteError")
    assert result["verdict"] in page.text("p")
    assert "same-lr0.002-seed5 (NonFiniteError: loss is not finite at step 17)" in page.text("p")
    assert f"Seeds: 1, 2, 3, 4, 5. {result['selection']}" in page.text("p"), "a sentence of its own"
    assert result["command"] in page.text("pre")
    assert "0123abc" in page.text("pre")


def test_figures_have_alternative_texts_and_do_not_share_names() -> None:
    page = Page(comparison_page(compared()))
    figures = [attributes for tag, attributes in page.seen if tag == "svg"]
    assert len(figures) == 5
    assert all(f["role"] == "img" and len(f["aria-label"] or "") > 20 for f in figures)
    names = [attributes["id"] for _, attributes in page.seen if attributes.get("id")]
    assert len(names) == len(set(names))
    linked = [a["xlink:href"] or "" for _, a in page.seen if "xlink:href" in a]
    assert linked
    assert {link.removeprefix("#") for link in linked} <= set(names)


def test_nothing_is_fetched_and_hostile_text_stays_text() -> None:
    html = comparison_page(compared({"fast": HOSTILE, "adalora": "_a$", "slow": "x" * 200}) | {"name": HOSTILE})
    page = Page(html)
    assert not {tag for tag, _ in page.seen} & {"script", "img", "link", "iframe", "object", "image"}
    for _, attributes in page.seen:
        for key in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(key) or "#").startswith("#")
        assert "http" not in (attributes.get("style") or "")
    assert not re.search(r"url\((?!#)|@import", html)
    assert HOSTILE in page.text("th")
    assert HOSTILE in page.text("h1")


def test_numbers_in_the_table() -> None:
    result = compared()
    fast = next(c for c in result["contestants"] if c["name"] == "fast")
    ratio = fast["against_baseline"]["steps_to_final_ratio"]
    page = Page(comparison_page(result))
    assert f"{ratio['mean']:.2f}" in page.text("td")
    assert f"{ratio['low']:.2f} to {ratio['high']:.2f}" in page.text("small")
    assert "reached 0 of 5" in page.text("small")
    assert "768 MiB" in page.text("td")
    heat = [a["style"] for tag, a in page.seen if tag == "td" and "style" in a]
    # Two layers of two modules, for each of the three contestants that prune; rank 4 of 8 is half of the deepest blue.
    assert len(heat) == 3 * 4
    assert heat[0] == "background:rgba(0,114,178,0.38)"


def test_held_out_loss_and_area_are_in_the_table() -> None:
    records = [*search("adalora"), *search("new")]
    records += [record("adalora", decay()), record("new", decay(1.4), metric=0.77)]
    result = analyse(records, plan("adalora", "new", seeds=[1]))
    new = next(c for c in result["contestants"] if c["name"] == "new")
    area = new["against_baseline"]["auc_difference"]["mean"]
    assert area < 0
    page = Page(comparison_page(result))
    assert "held-out loss − baseline" in page.text("th")
    for cell in ("+0.0300", f"{new['summary']['auc']['mean']:.4f}", f"−{-area:.4f}"):
        assert cell in page.text("td"), cell
    for r in records:
        r["outcome"] |= {"metric": "held_out_loss", "higher_is_better": False}
    page = Page(comparison_page(analyse(records, plan("adalora", "new", seeds=[1]))))
    assert page.text("th").count("held-out loss − baseline") == 1, "where it is the metric, it is no other column"


@pytest.mark.parametrize("kept", [0, 3, 7])
def test_a_partial_result_makes_a_page(kept: int) -> None:
    records = [*search("adalora"), *search("new"), record("adalora", decay(), seed=1)][:kept]
    result = analyse(records, plan("adalora", "new"))
    page = Page(comparison_page(result))
    assert not page.open
    assert result["missing"][0] in page.text("p")


def test_one_seed_and_a_metric_where_lower_is_better() -> None:
    records = [*search("adalora"), *search("new"), record("adalora", decay()), record("new", decay(1.4), metric=0.9)]
    for r in records:
        r["outcome"] |= {"metric": "held_out_loss", "higher_is_better": False}
    page = Page(comparison_page(analyse(records, plan("adalora", "new", seeds=[1]))))
    assert "0.9000" in page.text("td")
    assert "+0.1000" in page.text("td")
    assert "points" not in page.text()


def test_digits() -> None:
    assert [significant(x) for x in (0.0, 0.21046, 12.345, 1234.6, -0.0042)] == [
        "0",
        "0.210",
        "12.3",
        "1,235",
        "−0.00420",
    ]
    assert [size(x) for x in (512, 600_000, 3 * 2**28, 5 * 2**40)] == ["512 B", "586 KiB", "768 MiB", "5,120 GiB"]
