"""Collects the training pairs into ``data/`` and writes the held-out sets of ``eval/``."""

from __future__ import annotations

import argparse
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from graded_pairs import package_pairs, page_pairs, wordnet_pairs
from jsonl import write_jsonl
from sources.debian import Package, read_packages
from sources.downloads import debian_package, npm_package
from sources.other_code import read_commented_functions
from sources.other_docs import Page, read_cmake_help, read_man_pages, read_pod
from sources.python_code import Function, read_functions
from sources.wordnet import WordNet, read_wordnet
from textsplit import SeenTexts, Shingles, bucket, clip, normal_form, squeeze

HERE = Path(__file__).resolve().parent
SEED = 20240611
PASSAGE_LIMIT = 500
CODE_LIMIT = 700
HELD_OUT_PACKAGES = 8
HELD_OUT_MODULES = 30
HELD_OUT_SYNSETS = 15
MAN_PACKAGES = (
    "manpages",
    "manpages-dev",
    "coreutils",
    "util-linux",
    "git-man",
    "procps",
    "e2fsprogs",
    "iproute2",
)
NPM_PACKAGES = ("lodash@4.17.21", "async@3.2.6", "ramda@0.29.1", "npm@10.8.2")

Row = dict[str, Any]


def _sample(rows: Iterable[Row], count: int, name: str) -> list[Row]:
    found = list(rows)
    random.Random(f"{SEED}:{name}").shuffle(found)
    if len(found) < count:
        print(f"{name}: wanted {count}, found {len(found)}")
    return found[:count]


def _unique(rows: Iterable[Row], fields: Sequence[str]) -> Iterator[Row]:
    seen = [SeenTexts() for _ in fields]
    for row in rows:
        if all(normal_form(row[f]) and row[f] not in s for f, s in zip(fields, seen, strict=True)):
            for field, known in zip(fields, seen, strict=True):
                known.add_new(row[field])
            yield row


def _package_rows(packages: Iterable[Package]) -> Iterator[Row]:
    for package in packages:
        passage = clip(package.description, PASSAGE_LIMIT)
        if len(package.synopsis.split()) >= 3 and len(passage.split()) >= 12:
            yield {"query": package.synopsis, "passage": passage}


def _function_rows(functions: Iterable[Function]) -> Iterator[Row]:
    for function in functions:
        query = clip(squeeze(function.docstring.split("\n\n")[0]), 200)
        if len(query.split()) >= 3:
            yield {"query": query, "passage": clip(function.code, CODE_LIMIT)}


def _docstring_rows(functions: Iterable[Function]) -> Iterator[Row]:
    for function in functions:
        head, _, rest = function.docstring.partition("\n\n")
        if len(head.split()) >= 3 and len(rest.split()) >= 20:
            yield {"query": clip(squeeze(head), 200), "passage": clip(squeeze(rest), PASSAGE_LIMIT)}


def _gloss_rows(net: WordNet, pool: Iterable[str]) -> Iterator[Row]:
    for key in pool:
        synset = net.synsets[key]
        if len(synset.definition.split()) >= 6:
            yield {"query": ", ".join(synset.lemmas[:3]), "passage": synset.definition}


def _page_rows(pages: Iterable[Page]) -> Iterator[Row]:
    for page in pages:
        if len(page.summary.split()) >= 3 and len(page.body.split()) >= 15:
            yield {"query": clip(page.summary, 200), "passage": clip(page.body, PASSAGE_LIMIT)}


def _code_rows(pairs: Iterable[tuple[str, str]]) -> Iterator[Row]:
    for query, code in pairs:
        yield {"query": query, "passage": clip(code, 600)}


def _held_out(function: Function) -> bool:
    unit = function.module.split("/")[0].removesuffix(".py")
    return bucket(unit, "module") < HELD_OUT_MODULES


class Sources:
    """Everything that is read, each source split by document where it is split at all."""

    def __init__(self, data: Path, wordnet: Path) -> None:
        """Read the sources.

        Args:
            data: Folder that downloads are kept in.
            wordnet: Folder of the WordNet database.
        """
        debs = data / "debs"
        packages = read_packages(data / "apt")
        self.packages = [p for p in packages if bucket(p.source, "source") >= HELD_OUT_PACKAGES]
        self.held_packages = [p for p in packages if bucket(p.source, "source") < HELD_OUT_PACKAGES]
        library = list(read_functions(Path(sysconfig.get_path("stdlib"))))
        self.held_functions = [f for f in library if _held_out(f)]
        self.functions = [f for f in library if not _held_out(f)]
        self.functions += read_functions(Path(sysconfig.get_path("purelib")))
        self.net = read_wordnet(wordnet)
        self.synsets = [k for k in self.net.synsets if bucket(k, "synset") >= HELD_OUT_SYNSETS]
        self.held_synsets = [k for k in self.net.synsets if bucket(k, "synset") < HELD_OUT_SYNSETS]
        self.pod = list(read_pod(debian_package("perl-modules-5.36", debs)))
        self.man: list[Page] = []
        for name in MAN_PACKAGES:
            self.man.extend(read_man_pages(debian_package(name, debs), name))
        self.cmake = list(read_cmake_help(debian_package("cmake-data", debs)))
        self.code = {
            "go": list(read_commented_functions(debian_package("golang-1.19-src", debs), "go")),
            "perl": list(
                read_commented_functions(debian_package("perl-modules-5.36", debs), "perl")
            ),
            "ruby": list(read_commented_functions(debian_package("libruby3.1", debs), "ruby")),
            "javascript": [
                pair
                for spec in NPM_PACKAGES
                for pair in read_commented_functions(npm_package(spec, data / "npm"), "javascript")
            ],
        }


def held_out_sets(sources: Sources) -> dict[str, list[Row]]:
    """Return the rows of every file of ``eval/`` by file name without its ending.

    Args:
        sources: What was read.
    """
    pair = ("query", "passage")
    texts = ("text1", "text2")
    retrieval = _unique(_package_rows(sources.held_packages), pair)
    code = _unique(_function_rows(sources.held_functions), pair)
    graded = [
        *wordnet_pairs(sources.net, sources.held_synsets, SEED, 1400),
        *package_pairs(sources.held_packages, SEED, 400),
    ]
    sets = {
        "retrieval": _sample(retrieval, 1200, "retrieval"),
        "code": _sample(code, 1200, "code"),
        "text-matching": _sample(_unique(graded, texts), 1500, "text-matching"),
    }
    pages = {"dev-pod": sources.pod, "test-man": sources.man, "test-cmake": sources.cmake}
    for name, found in pages.items():
        rows = _unique(_page_rows(found), pair)
        sets[f"other-docs-{name}"] = _sample(rows, 350, name)
    groups = {"go": "dev", "perl": "dev", "javascript": "test", "ruby": "test"}
    for language, group in groups.items():
        rows = _unique(_code_rows(sources.code[language]), pair)
        sets[f"other-code-{group}-{language}"] = _sample(rows, 300, language)
    for name, found in {"dev-pod": sources.pod, "test-man": sources.man}.items():
        rows = _unique(page_pairs(found, SEED, 600), texts)
        sets[f"other-graded-{name}"] = _sample(rows, 400, name)
    return sets


def training_sets(sources: Sources, allowed: Callable[[str], bool]) -> dict[str, list[Row]]:
    """Return the rows of every training file of ``data/`` by file name without its ending.

    Args:
        sources: What was read.
        allowed: Tells whether a text may be trained on.
    """

    def kept(rows: Iterable[Row], fields: Sequence[str]) -> Iterator[Row]:
        return (row for row in rows if all(allowed(row[field]) for field in fields))

    pair = ("query", "passage")
    texts = ("text1", "text2")
    packages = list(_unique(kept(_package_rows(sources.packages), pair), pair))
    docstrings = list(_unique(kept(_docstring_rows(sources.functions), pair), pair))
    glosses = list(_unique(kept(_gloss_rows(sources.net, sources.synsets), pair), pair))
    code = list(_unique(kept(_function_rows(sources.functions), pair), pair))
    graded = [
        *wordnet_pairs(sources.net, sources.synsets, SEED + 1, 60_000),
        *package_pairs(sources.packages, SEED + 1, 15_000),
    ]
    mixed = [row["passage"] for row in packages + docstrings + glosses + code]
    mixed += [row["query"] for row in packages + docstrings + code]
    mixed = list(dict.fromkeys(mixed))
    return {
        "retrieval": packages,
        "docstrings": docstrings,
        "glosses": glosses,
        "code": code,
        "text-matching": list(kept(graded, texts)),
        "mixed": _sample(({"text": text} for text in mixed), 40_000, "mixed"),
    }


def main() -> None:
    """Build everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE / "data", help="training data go here")
    parser.add_argument("--eval", type=Path, default=HERE / "eval", help="held-out sets go here")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    options = parser.parse_args()
    sources = Sources(options.data, options.wordnet)
    held_out = held_out_sets(sources)
    for name, rows in held_out.items():
        print(f"eval/{name}.jsonl: {write_jsonl(options.eval / f'{name}.jsonl', rows)}")
    fields = ("query", "passage", "text1", "text2")
    texts = [row[f] for rows in held_out.values() for row in rows for f in fields if f in row]
    exact, near = SeenTexts(texts), Shingles(texts)
    trained = training_sets(sources, lambda text: text not in exact and near.overlap(text) < 0.5)
    for name, rows in trained.items():
        print(f"data/{name}.jsonl: {write_jsonl(options.data / f'{name}.jsonl', rows)}")


if __name__ == "__main__":
    main()
