"""Questions to pages, and which pages answer them; descriptions of pages; code, and what asks for it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from page_search.pages import Page
from page_search.words import KINDS, MEASURES, MONTHS, PLACES, SUBJECTS

CHARTS = {"bars": "bar chart", "line": "line chart", "pie": "pie chart"}
NAMES = {**CHARTS, "table": "table", "text": "report"}
IMAGE_PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n"
)


@dataclass(frozen=True)
class Question:
    """A question, and what a page has to say to answer it.

    Attributes:
        text: the question.
        kind: what it asks by: one of ASKED.
        subject, measure, month, drawn: words of the page; ``drawn`` is its kind. None asks for none.
        places: all of them are on the page.
        top: this place has the largest value, and the page shows values.
        move: a place and a verb; the page says that.
    """

    text: str
    kind: str
    subject: str | None = None
    measure: str | None = None
    month: str | None = None
    drawn: str | None = None
    places: frozenset[str] = frozenset()
    top: str | None = None
    move: tuple[str, str] | None = None

    def answered_by(self, page: Page) -> bool:
        """Return whether a page answers the question."""
        words = ("subject", "measure", "month")
        same = all(getattr(self, name) in (None, getattr(page, name)) for name in words)
        told = page.kind == "text" and self.move in {*zip(page.places, page.verbs, strict=True)}
        return (
            same
            and self.drawn in (None, page.kind)
            and self.places <= set(page.places)
            and (self.top is None or (page.kind != "text" and page.top == self.top))
            and (self.move is None or told)
        )


ASKED = ("chart", "place", "month", "places", "top", "move")


def ask(page: Page, draw: random.Random, kind: str | None = None) -> Question:
    """Return a question that a page answers.

    Args:
        page: what is asked for.
        draw: source of words.
        kind: one of ASKED, drawn by default; "top" becomes "move" where a page is a text, and
            "move" becomes "top" elsewhere.
    """
    kind = kind or draw.choice(ASKED)
    if kind in ("top", "move"):
        kind = "move" if page.kind == "text" else "top"
    title, name = f"{page.subject} {page.measure}", NAMES[page.kind]
    about: dict[str, Any] = {"subject": page.subject, "measure": page.measure}
    first, second, third = draw.sample(page.places, 3)
    if kind == "chart":
        text = draw.choice(
            (f"{name} of {title}", f"{title} as a {name}", f"a {name} about {title}")
        )
        return Question(text, kind, **about, drawn=page.kind)
    if kind == "place":
        text = draw.choice((f"{title} in {first}", f"what are the {title} of {first}?"))
        return Question(text, kind, **about, places=frozenset([first]))
    if kind == "month":
        text = draw.choice((f"{title} in {page.month}", f"which page shows {page.month} {title}?"))
        return Question(text, kind, **about, month=page.month)
    if kind == "places":
        text = draw.choice(
            (
                f"compare {first}, {second} and {third}",
                f"which page has {first}, {second}, {third}?",
            )
        )
        return Question(text, kind, places=frozenset(page.places))
    if kind == "top":
        text = draw.choice((f"{title} highest in {page.top}", f"{page.top} leads in {title}"))
        return Question(text, kind, **about, top=page.top)
    verb = dict(zip(page.places, page.verbs, strict=True))[first]
    text = draw.choice((f"{title} {verb} in {first}", f"where in {first} {title} {verb}"))
    return Question(text, kind, **about, move=(first, verb))


def transcribe(page: Page) -> str:
    """Return a page as a text, line by line."""
    said = page.verbs if page.kind == "text" else page.values
    lines = [f"{place} {word}" for place, word in zip(page.places, said, strict=True)]
    return "\n".join([f"{page.subject} {page.measure}", page.month, NAMES[page.kind], *lines])


def describe(page: Page, draw: random.Random) -> str:
    """Return one sentence on a page."""
    first, second, third = draw.sample(page.places, 3)
    title, name = f"{page.subject} {page.measure}", NAMES[page.kind]
    return draw.choice(
        (
            f"{name} of {page.month} {title} in {first}, {second} and {third}",
            f"{first}, {second}, {third}: {title} in {page.month}, a {name}",
            f"a {name} about {title} of {first}, {second} and {third}, {page.month}",
        )
    )


def relative(page: Page, draw: random.Random) -> Page:
    """Return a page that shares some of what another says: each word with a chance drawn before."""
    kept = draw.random()

    def word(old: str, all_words: tuple[str, ...]) -> str:
        return old if draw.random() < kept else draw.choice(all_words)

    places: list[str] = []
    for old in page.places:
        new = word(old, PLACES)
        while new in places or (new != old and new in page.places):
            new = draw.choice(PLACES)
        places.append(new)
    return replace(
        page,
        subject=word(page.subject, SUBJECTS),
        measure=word(page.measure, MEASURES),
        month=word(page.month, MONTHS),
        kind=word(page.kind, KINDS),
        places=tuple(places),
    )


def alike(first: Page, second: Page) -> float:
    """Return how much two pages share, 0 to 1: half of it the title."""
    title = 0.3 * (first.subject == second.subject) + 0.2 * (first.measure == second.measure)
    rest = 0.1 * (first.month == second.month) + 0.1 * (first.kind == second.kind)
    return title + rest + 0.1 * len({*first.places} & {*second.places})


OPERATIONS = {
    "max": ("largest", "highest", "most"),
    "min": ("smallest", "lowest", "least"),
    "sum": ("total", "all together", "sum of"),
    "mean": ("average", "typical", "mean"),
    "sorted": ("sorted", "in order", "ranking of"),
    "len": ("how many", "number of", "count"),
}


@dataclass(frozen=True)
class Snippet:
    """A line or two of Python over a table, by what they compute.

    Attributes:
        subject, measure, place: what is taken from the table.
        operation: one of OPERATIONS.
    """

    subject: str
    measure: str
    place: str
    operation: str

    def code(self, draw: random.Random) -> str:
        """Return the source."""
        rows = f'{self.subject}["{self.place}"]'
        return draw.choice(
            (
                f"def {self.subject}_{self.measure}(table):\n"
                f'    return {self.operation}(table["{self.place}"])',
                f"{self.measure} = {rows}\nprint({self.operation}({self.measure}))",
                f"{self.operation}(row.{self.measure} for row in {rows})",
            )
        )

    def question(self, draw: random.Random) -> str:
        """Return a text that asks for it."""
        word = draw.choice(OPERATIONS[self.operation])
        title = f"{self.subject} {self.measure}"
        return draw.choice((f"{word} {title} in {self.place}", f"{self.place}: {title}, {word}"))


def draw_snippet(page: Page, draw: random.Random) -> Snippet:
    """Return a snippet on a page's subject, measure and first place."""
    return Snippet(page.subject, page.measure, page.places[0], draw.choice(list(OPERATIONS)))
