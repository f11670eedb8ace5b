"""Pages: what they say, and how they are drawn.

A page names a subject, a measure and a month, and says something of a few places: as a text, a table,
or a chart of bars, a line or a pie. Which pairs of subject and measure are held out is fixed by a
hash, so that no page of training has the title of a held-out page.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from page_search.words import KINDS, MEASURES, MONTHS, PLACES, SUBJECTS, VERBS

WIDTH, HEIGHT = 140, 168  # pixels, multiples of 28: no resizing
FONT = "DejaVuSans-Bold.ttf"  # matplotlib ships it
PAPERS = ("#ffffff", "#fff8e7", "#eef4ff", "#f0f7ee")
INKS = ("#000000", "#1b2a49", "#4a1c1c", "#173d2b")
COLORS = ("#c0392b", "#2471a3", "#239b56", "#d68910", "#7d3c98", "#148f77")
HELD_OUT_SHARE = 6  # one title of so many

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Page:
    """What a page says.

    Attributes:
        subject: first word of the title.
        measure: second word of the title.
        month: below the title.
        kind: one of KINDS.
        places: three, different.
        values: one for each place, 10 to 99, different.
        verbs: one for each place; only texts show them, the others show the values.
    """

    subject: str
    measure: str
    month: str
    kind: str
    places: tuple[str, ...]
    values: tuple[int, ...]
    verbs: tuple[str, ...]

    @property
    def top(self) -> str:
        """The place with the largest value."""
        return self.places[self.values.index(max(self.values))]


def is_held_out(subject: str, measure: str) -> bool:
    """Return whether pages of this title are kept from training."""
    return zlib.crc32(f"{subject} {measure}".encode()) % HELD_OUT_SHARE == 0


def draw_pages(seed: int, *, held_out: bool) -> Iterator[Page]:
    """Yield different pages without end.

    Args:
        seed: of what they say.
        held_out: whether their titles are those that are held out, or the others.
    """
    draw = random.Random(f"pages:{seed}:{held_out}")
    titles = [(s, m) for s in SUBJECTS for m in MEASURES if is_held_out(s, m) == held_out]
    seen = set()
    while True:
        page = Page(
            *draw.choice(titles),
            month=draw.choice(MONTHS),
            kind=draw.choice(KINDS),
            places=tuple(draw.sample(PLACES, 3)),
            values=tuple(draw.sample(range(10, 100), 3)),
            verbs=tuple(draw.choices(VERBS, k=3)),
        )
        if page not in seen:
            seen.add(page)
            yield page


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONT, size)


class _Sheet:
    """A page that is being drawn, and where each word of it is."""

    def __init__(self, draw: random.Random) -> None:
        self.random = draw
        self.image = Image.new("RGB", (WIDTH, HEIGHT), draw.choice(PAPERS))
        self.canvas = ImageDraw.Draw(self.image)
        self.ink = draw.choice(INKS)
        self.colors = draw.sample(COLORS, 3)
        self.words: list[tuple[str, Box]] = []

    def write(self, text: str, left: float, top: float, size: int) -> float:
        """Write words of one line; return where it ends."""
        font = _font(size)
        for word in text.split():
            box = self.canvas.textbbox((left, top), word, font=font)
            self.canvas.text((left, top), word, font=font, fill=self.ink)
            self.words.append((word, box))
            left = box[2] + 0.35 * size
        return left

    def mark(self, kind: str, *box: float) -> None:
        """Note where a chart or a table is."""
        left, top, right, bottom = box
        self.words.append((kind, (left, top, right, bottom)))


def render(page: Page, seed: int = 0) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """Draw a page.

    Args:
        page: what it says.
        seed: of font, colours and places on the sheet.

    Returns:
        An RGB image of WIDTH by HEIGHT pixels, and the words in it with their boxes in pixels; a
        chart or table is a word of its kind.
    """
    sheet = _Sheet(random.Random(f"look:{seed}:{page}"))
    left, top = sheet.random.randint(3, 8), sheet.random.randint(2, 6)
    sheet.write(f"{page.subject} {page.measure}", left, top, 14)
    sheet.write(page.month, left, top + 20, 13)
    sheet.canvas.line((left, top + 40, WIDTH - left, top + 40), fill=sheet.colors[0], width=2)
    _DRAWN[page.kind](sheet, page, left, top + 48)
    return sheet.image, sheet.words


def _text(sheet: _Sheet, page: Page, left: float, top: float) -> None:
    for row, (place, verb) in enumerate(zip(page.places, page.verbs, strict=True)):
        sheet.write(f"{place} {verb}", left, top + 28 * row + 4, 13)


def _table(sheet: _Sheet, page: Page, left: float, top: float) -> None:
    right, bottom = WIDTH - left, top + 84
    for row, (place, value) in enumerate(zip(page.places, page.values, strict=True)):
        sheet.write(place, left + 3, top + 28 * row + 4, 13)
        sheet.write(str(value), right - 24, top + 28 * row + 4, 13)
    for y in (top, top + 28, top + 56, bottom):
        sheet.canvas.line((left, y, right, y), fill=sheet.ink)
    for x in (left, right - 28, right):
        sheet.canvas.line((x, top, x, bottom), fill=sheet.ink)
    sheet.mark("table", right - 34, top, right, bottom)


def _bars(sheet: _Sheet, page: Page, left: float, top: float) -> None:
    start = left + 70
    for row, (place, value) in enumerate(zip(page.places, page.values, strict=True)):
        sheet.write(place, left, top + 28 * row + 4, 13)
        end = start + (WIDTH - start - 4) * value / 99
        box = (start, top + 28 * row + 2, end, top + 28 * row + 22)
        sheet.canvas.rectangle(box, fill=sheet.colors[1])
        sheet.mark("bars", *box)


def _line(sheet: _Sheet, page: Page, left: float, top: float) -> None:
    """A line of three points; their places stand to its right, in the order of the points."""
    x, bottom = left + 70, top + 80
    places = [(x + 4 + 26 * i, bottom - 4 - 0.7 * value) for i, value in enumerate(page.values)]
    sheet.canvas.line((x, top, x, bottom, WIDTH - 4, bottom), fill=sheet.ink, width=2)
    sheet.canvas.line(places, fill=sheet.colors[1], width=3)
    sheet.mark("line", x, top, WIDTH - 4, bottom)
    for row, place in enumerate(page.places):
        sheet.write(place, left, top + 28 * row + 4, 13)


def _pie(sheet: _Sheet, page: Page, left: float, top: float) -> None:
    """A pie, and the places behind their colours."""
    box = (left + 74, top + 10, left + 128, top + 64)
    angle = -90.0
    for row, (place, value) in enumerate(zip(page.places, page.values, strict=True)):
        turn = 360 * value / sum(page.values)
        sheet.canvas.pieslice(box, angle, angle + turn, fill=sheet.colors[row])
        angle += turn
        y = top + 28 * row + 4
        sheet.canvas.rectangle((left, y + 3, left + 6, y + 13), fill=sheet.colors[row])
        sheet.write(place, left + 10, y, 13)
    sheet.mark("pie", *box)


_DRAWN = {"bars": _bars, "line": _line, "pie": _pie, "table": _table, "text": _text}
