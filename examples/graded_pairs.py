"""Graded pairs for symmetric similarity, from WordNet and from Debian's descriptions."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from sources.debian import Package
from sources.other_docs import Page
from sources.wordnet import Synset, WordNet
from textsplit import clip, first_sentence

Row = dict[str, Any]

_PACKAGE_SCORES = (("same", 1.0), ("source", 0.7), ("section", 0.3), ("any", 0.0))
_PAGE_SCORES = (("topic", 1.0), ("page", 0.6), ("group", 0.3), ("any", 0.0))


def _row(text1: str, text2: str, score: float, kind: str) -> Row:
    return {"text1": text1, "text2": text2, "score": round(score, 4), "kind": kind}


def _wording(synset: Synset, rng: random.Random) -> str:
    names = ", ".join(synset.lemmas[:3])
    form = rng.random()
    if form < 0.6:
        return synset.definition
    return f"{names}: {synset.definition}" if form < 0.85 else names


def _relatives(net: WordNet, key: str, levels: int) -> list[str]:
    """Return what hangs below the ancestor ``levels`` above ``key``, as far below it again."""
    level = {key}
    for _ in range(levels):
        level = {parent for k in level for parent in net.synsets[k].parents}
    for _ in range(levels):
        level = {child for k in level for child in net.children.get(k, ())}
    return sorted(level - {key})


def wordnet_pairs(net: WordNet, pool: Sequence[str], seed: int, count: int) -> Iterator[Row]:
    """Yield pairs of meanings scored with Lin's similarity; pairs of one meaning score 1.

    A fifth each: the same meaning, parent and child, siblings, cousins, any two.

    Args:
        net: WordNet.
        pool: Keys of the synsets that may be used.
        seed: Seed of the draw.
        count: Number of pairs.
    """
    rng = random.Random(seed)
    members = set(pool)
    by_part = {part: [k for k in pool if k[0] == part and net.synsets[k].parents] for part in "nv"}
    made = 0
    while made < count:
        key = rng.choice(pool)
        synset = net.synsets[key]
        relation = rng.choice(("same", "parent", "sibling", "cousin", "random"))
        if relation == "same":
            names = synset.lemmas[:4]
            sides = [", ".join(names), synset.definition]
            if len(names) > 1 and rng.random() < 0.3:
                sides = rng.sample(names, 2)
            rng.shuffle(sides)
            yield _row(sides[0], sides[1], 1.0, "wordnet")
            made += 1
            continue
        if key[0] not in by_part or not synset.parents:
            continue
        if relation == "random":
            others = [rng.choice(by_part[key[0]])]
        elif relation == "parent":
            others = list(synset.parents)
        else:
            others = _relatives(net, key, 1 if relation == "sibling" else 2)
        others = [other for other in others if other in members and other != key]
        if not others:
            continue
        other = rng.choice(others)
        texts = [_wording(synset, rng), _wording(net.synsets[other], rng)]
        if texts[0] == texts[1]:
            continue
        rng.shuffle(texts)
        yield _row(texts[0], texts[1], net.similarity(key, other), "wordnet")
        made += 1


def package_pairs(packages: Sequence[Package], seed: int, count: int) -> Iterator[Row]:
    """Yield pairs of package texts: 1 same package, 0.7 same source, 0.3 same section, 0 neither.

    Args:
        packages: Packages that may be used.
        seed: Seed of the draw.
        count: Number of pairs.
    """
    rng = random.Random(seed)
    by_source: defaultdict[str, list[Package]] = defaultdict(list)
    by_section: defaultdict[str, list[Package]] = defaultdict(list)
    for package in packages:
        by_source[package.source].append(package)
        by_section[package.section].append(package)
    made = 0
    while made < count:
        one = rng.choice(packages)
        relation, score = rng.choice(_PACKAGE_SCORES)
        if relation == "same":
            texts = [one.synopsis, first_sentence(one.description)]
        else:
            pools = {"source": by_source[one.source], "section": by_section[one.section]}
            other = rng.choice(pools.get(relation, packages))
            same_source = other.source == one.source
            if same_source != (relation == "source") or other.synopsis == one.synopsis:
                continue
            if relation == "any" and other.section == one.section:
                continue
            wording = rng.random() < 0.5
            texts = [p.synopsis if wording else first_sentence(p.description) for p in (one, other)]
        if texts[0] == texts[1] or min(len(text.split()) for text in texts) < 2:
            continue
        rng.shuffle(texts)
        yield _row(texts[0], texts[1], score, "debian")
        made += 1


def page_pairs(pages: Sequence[Page], seed: int, count: int) -> Iterator[Row]:
    """Yield pairs of page texts: 1 one topic, 0.6 one page, 0.3 one group, 0 neither.

    Args:
        pages: Pages of documentation.
        seed: Seed of the draw.
        count: Number of pairs.
    """
    rng = random.Random(seed)
    by_group: defaultdict[str, list[Page]] = defaultdict(list)
    sentences: dict[str, list[str]] = {}
    for page in pages:
        by_group[page.group].append(page)
        parts = [part.strip() for part in clip(page.body, 900).split(". ")]
        sentences[page.name] = [part for part in parts if 6 <= len(part.split()) <= 30]
    usable = [page for page in pages if len(sentences[page.name]) >= 2]
    made = 0
    while made < count:
        one = rng.choice(usable)
        relation, score = rng.choice(_PAGE_SCORES)
        if relation == "topic":
            texts = [one.summary, sentences[one.name][0]]
        elif relation == "page":
            texts = rng.sample(sentences[one.name], 2)
        else:
            other = rng.choice(by_group[one.group] if relation == "group" else usable)
            if other.name == one.name or not sentences[other.name]:
                continue
            if relation == "any" and other.group == one.group:
                continue
            texts = [rng.choice(sentences[p.name]) for p in (one, other)]
        if texts[0] != texts[1]:
            yield _row(texts[0], texts[1], score, "pages")
            made += 1
