"""Pieces of self-contained HTML pages: one file that opens offline, on a phone as on a desk, in light and dark.

Figures are inline SVG without a background, whose ink is the text colour of the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, without black and yellow; then the same, dashed.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = Path(__file__).parent / "assets" / "report.css"
INK = "#010203"  # stands for the text colour of the page


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """A whole page; the sections are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="quiet">{escape(subtitle)}</p>\n'
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def significant(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, never in powers of ten."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def size(count: float) -> str:
    """Bytes in powers of 1024."""
    units = ["B", "KiB", "MiB", "GiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{significant(count)} {units[0]}"


def figure(name: str, alt: str, width: float, height: float, draw: Callable[[Figure], None]) -> str:
    """Draw a figure and return it as inline SVG; texts stay texts, and nothing in it is fetched."""
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys((f"{part}.color" for part in ("text", "xtick", "ytick", "grid")), INK),
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor"), INK),
        "grid.alpha": 0.15,
        "axes.grid": True,
        "axes.facecolor": "none",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # Names inside a figure are its own: several figures share one page.
    svg = svg.replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    inner = svg[svg.index(">") + 1 :]
    return f'<figure><svg {box[0]} role="img" aria-label="{escape(alt)}">{inner}</figure>'
