"""WordNet's synsets, and a graded similarity of two of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_PARTS = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes:
        key: Part of speech and offset, e.g. ``"n00002684"``; the unit of the split.
        lemmas: Words that carry the meaning.
        definition: The gloss without its examples.
        parents: Keys of the direct hypernyms.
    """

    key: str
    lemmas: tuple[str, ...]
    definition: str
    parents: tuple[str, ...]


def _parse(line: str) -> Synset:
    data, gloss = line.split(" | ", 1)
    words = data.split()
    kind = "a" if words[2] == "s" else words[2]
    count = int(words[3], 16)
    lemmas = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in words[4 : 4 + 2 * count : 2]]
    start = 5 + 2 * count
    pointers = [words[i : i + 4] for i in range(start, start + 4 * int(words[start - 1]), 4)]
    parents = tuple(p[2] + p[1] for p in pointers if p[0] in ("@", "@i"))
    definition = re.split(r';\s*"', gloss.strip())[0].strip().strip(";").strip()
    return Synset(kind + words[0], tuple(lemmas), definition, parents)


@dataclass(frozen=True)
class WordNet:
    """Every synset by key, with the relations that the pairs are drawn from."""

    synsets: dict[str, Synset] = field(repr=False)

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Keys of the direct hyponyms of each synset that has some."""
        found: dict[str, list[str]] = {}
        for synset in self.synsets.values():
            for parent in synset.parents:
                found.setdefault(parent, []).append(synset.key)
        return found

    def ancestors(self, key: str) -> set[str]:
        """Return the keys of ``key`` and of everything above it."""
        found: set[str] = set()
        todo = [key]
        while todo:
            current = todo.pop()
            if current not in found:
                found.add(current)
                todo.extend(self.synsets[current].parents)
        return found

    @cached_property
    def information(self) -> dict[str, float]:
        """Intrinsic information content of each synset, 0 at the root and 1 at a leaf.

        Seco, Veale and Hayes (2004): ``1 - log(hyponyms + 1) / log(synsets)``.
        """
        below = dict.fromkeys(self.synsets, 0)
        for key in self.synsets:
            for ancestor in self.ancestors(key):
                below[ancestor] += 1
        total = math.log(len(self.synsets))
        return {key: 1.0 - math.log(count) / total for key, count in below.items()}

    def similarity(self, first: str, second: str) -> float:
        """Return Lin's similarity of two synsets, from 0 (unrelated) to 1 (the same).

        Args:
            first: Key of one synset.
            second: Key of the other.
        """
        if first == second:
            return 1.0
        common = self.ancestors(first) & self.ancestors(second)
        if not common:
            return 0.0
        shared = max(self.information[key] for key in common)
        total = self.information[first] + self.information[second]
        return 2.0 * shared / total if total else 0.0


def read_wordnet(folder: Path) -> WordNet:
    """Return the WordNet database of ``folder`` (Debian's package ``wordnet-base``).

    Args:
        folder: Holds ``data.noun``, ``data.verb``, ``data.adj`` and ``data.adv``.
    """
    synsets: dict[str, Synset] = {}
    for part in _PARTS:
        path = folder / f"data.{part}"
        if not path.is_file():
            raise FileNotFoundError(
                f"WordNet: expected {path}, found no such file; install Debian's wordnet-base"
            )
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                synset = _parse(line)
                synsets[synset.key] = synset
    return WordNet(synsets)
