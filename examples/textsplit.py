"""Stable splits, normal forms and clipping of text: everything that keeps held-out data apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

_SPACES = re.compile(r"\s+")
_NON_WORDS = re.compile(r"[^a-z0-9]+")


def bucket(key: str, salt: str = "embedge") -> int:
    """Return the bucket, 0 to 99, of a document, package, module or synset.

    Args:
        key: Name of the unit that must stay whole on one side of a split.
        salt: Separates unrelated splits of the same names.
    """
    return int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8], "big") % 100


def squeeze(text: str) -> str:
    """Return ``text`` on one line, with every run of white space as one space."""
    return _SPACES.sub(" ", text).strip()


def normal_form(text: str) -> str:
    """Return the form in which two texts count as equal: lower-case words and digits only."""
    return _NON_WORDS.sub(" ", text.lower()).strip()


def clip(text: str, limit: int) -> str:
    """Return at most ``limit`` characters of ``text``, cut at white space where there is some."""
    if len(text) <= limit:
        return text
    head = text[: limit + 1]
    cut = max(head.rfind(" "), head.rfind("\n"))
    return text[: cut if cut > limit // 2 else limit].rstrip()


def first_sentence(text: str, limit: int = 200) -> str:
    """Return the first sentence of ``text`` on one line, clipped to ``limit`` characters."""
    line = squeeze(text)
    end = re.search(r"(?<=[a-z0-9)\]'\"`])[.!?](?= [A-Z`'\"]|$)", line)
    return clip(line[: end.start()] if end else line, limit)


class SeenTexts:
    """Normal forms already used, to keep a text from turning up twice."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """Start with ``texts`` as already used."""
        self._forms = {normal_form(text) for text in texts}

    def __contains__(self, text: str) -> bool:
        """Tell whether ``text`` was used."""
        return normal_form(text) in self._forms

    def add_new(self, *texts: str) -> bool:
        """Add ``texts`` if none of them was used and none is empty; tell whether it was done."""
        forms = [normal_form(text) for text in texts]
        if any(not form or form in self._forms for form in forms):
            return False
        self._forms.update(forms)
        return True


class Shingles:
    """Runs of eight words of held-out texts, to find training texts that nearly repeat them."""

    def __init__(self, texts: Iterable[str], width: int = 8) -> None:
        """Index ``texts`` by runs of ``width`` words."""
        self._width = width
        self._known = {run for text in texts for run in self._runs(text)}

    def _runs(self, text: str) -> list[int]:
        words = normal_form(text).split()
        last = len(words) - self._width + 1
        return [hash(tuple(words[i : i + self._width])) for i in range(last)]

    def overlap(self, text: str) -> float:
        """Return the share of the runs of ``text``, 0 to 1, that a held-out text has too."""
        runs = self._runs(text)
        return sum(run in self._known for run in runs) / len(runs) if runs else 0.0
