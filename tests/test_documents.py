"""Documents say what is so: their links lead somewhere, what is made from code is current, their lines are short."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from embedge.runtime.bundle import manifest
from tests.helpers.documents import CODE, DOCUMENTS, FOLDERS, NOTES, ROOT, prose, read, without_code

READ_ALOUD = [
    name
    for name in DOCUMENTS
    if (name.startswith("docs/") and name not in NOTES)
    or name in {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"}
]

LONGEST_LINE = 120
LONGEST_README = 150
MOST_WORDS = 25
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
FORBIDDEN = re.compile(r"(?<![\w.])/(work|root|home)/|\bpypi\.org/simple")


# -- form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lines_are_short(name: str) -> None:
    long = [
        f"{number}: {line}"
        for number, line in enumerate(read(name).splitlines(), 1)
        if len(line) > LONGEST_LINE
    ]
    assert long == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_speak_to_strangers(name: str) -> None:
    assert FORBIDDEN.findall(read(name)) == []


def test_the_readme_is_short_and_lists_no_files() -> None:
    lines = read("README.md").splitlines()
    assert len(lines) <= LONGEST_README
    assert not [line for line in lines if "├" in line or "└" in line]


@pytest.mark.parametrize("name", READ_ALOUD)
def test_sentences_are_short(name: str) -> None:
    assert [s for s in sentences(prose(name)) if len(s.split()) > MOST_WORDS] == []


def sentences(text: str) -> Iterator[str]:
    """Sentences of paragraphs and list entries; tables and headings are none."""
    text = re.sub(r"^---\n.*?^---\n", "", text, flags=re.M | re.S)
    text = CODE.sub("code", re.sub(r"<!--.*?-->", "", text, flags=re.S))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        ends = not line.strip() or re.match(r"\s*(\||#|:::)", line)
        if ends or re.match(r"\s*([-*]|\d+\.)\s", line):
            joined = " ".join(paragraph)
            yield from re.split(r"(?<=[.!?:;])\s+(?=\S)", joined)
            paragraph = []
        if not ends:
            paragraph.append(re.sub(r"^\s*([-*]|\d+\.)\s+", "", line).strip())


# -- links and paths ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    broken = []
    for target in LINK.findall(re.sub(r"`[^`]*`", "", prose(name))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / name).parent / path if path else ROOT / name
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert broken == []


def anchors(path: Path) -> set[str]:
    """What a heading is called in a link, as code hosts and the site make it."""
    text = without_code(path.read_text("utf-8"))
    headings = re.findall(r"^#+ +(.+?)\s*$", text, flags=re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize(
    "name", [name for name in DOCUMENTS if name not in {*NOTES, "CHANGELOG.md"}]
)
def test_paths_exist(name: str) -> None:
    """What stands in code and begins with a folder of the root is a file there."""
    missing = [
        path
        for code in CODE.findall(prose(name))
        for path in PATH.findall(code)
        if not (ROOT / path).exists() and not list(ROOT.glob(path + "*"))
    ]
    placeholders = re.compile("NAME|NN-TITLE|^examples/data")
    assert [path for path in missing if not placeholders.search(path)] == []


@pytest.mark.parametrize(
    "name", sorted((ROOT / "docs" / "figures").glob("*.svg")), ids=lambda p: p.name
)
def test_figures_are_used_and_say_what_they_show(name: Path) -> None:
    text = name.read_text("utf-8")
    assert 'role="img" aria-label="' in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert any(f"figures/{name.name}" in read(document) for document in DOCUMENTS)


# -- pages that are made ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("documents_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page", ["reference/command-line.md", "reference/supported-models.md", "lab-notes/index.md"]
)
def test_pages_that_are_made_are_current(hooks: ModuleType, page: str) -> None:
    pytest.importorskip("matplotlib")  # the bench's options
    made = hooks.MADE[page]()
    assert read(f"docs/{page}") == made, "run python docs/hooks.py"


@pytest.mark.parametrize(
    "record",
    [
        manifest.Manifest,
        manifest.Producer,
        manifest.Source,
        manifest.Model,
        manifest.ImageSettings,
        manifest.TokenizerSettings,
        manifest.Task,
        manifest.Adapter,
        manifest.Precision,
        manifest.TaskMaps,
        manifest.ActivationConstant,
        manifest.FileEntry,
    ],
)
def test_the_format_is_shown_with_every_field(record: Any) -> None:
    page = read("docs/reference/bundle-format.md")
    names = [field.name for field in dataclasses.fields(record)]
    assert [name for name in names if f'"{name}"' not in page] == []


@pytest.mark.parametrize("name", NOTES)
def test_a_lab_note_has_its_parts(hooks: ModuleType, name: str) -> None:
    note = hooks.front_matter(ROOT / name)
    assert list(note) == ["number", "date", "question", "decision", "heading"]
    assert Path(name).name.startswith(f"{int(note['number']):02d}-")
    assert date.fromisoformat(note["date"])
    assert note["question"].endswith("?")
    assert note["decision"].partition(":")[0] in {"kept", "dropped", "kept in part", "measured"}
    parts = re.findall(r"^\*\*(Question|Set-up|Result|Decision)\.\*\*", read(name), flags=re.M)
    assert parts == ["Question", "Set-up", "Result", "Decision"]


def test_lab_notes_are_numbered_without_gaps() -> None:
    numbers = sorted(int(Path(name).name[:2]) for name in NOTES)
    assert numbers == list(range(1, len(numbers) + 1))


def test_code_cites_lab_notes_that_exist() -> None:
    cited = {
        (path.relative_to(ROOT).as_posix(), int(number))
        for folder in ("bench", "export", "quant", "runtime")
        for path in (ROOT / folder).rglob("*.py")
        for number in re.findall(r"lab note\s+(\d+)", path.read_text("utf-8"))
    }
    assert {path for path, _ in cited} > {"quant/rotation.py", "runtime/encode/batch_size.py"}
    assert [place for place in sorted(cited) if not 1 <= place[1] <= len(NOTES)] == []


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("index.html"))
    assert len(pages) > len([name for name in DOCUMENTS if name.startswith("docs/")]) - 1
    for page in pages:
        outside = re.findall(r'(?:src|href)="(https?://[^"]+)"', page.read_text("utf-8"))
        scripts = [url for url in outside if re.search(r"\.(js|css|woff2?)\b", url)]
        assert scripts == [], page


class TestTheTestsThemselves:
    def test_fences_and_sentences(self, tmp_path: Path) -> None:
        text = "One two. Three\nfour; five\n\n- six `a b`\n\n| a | b |\n"
        assert [s for s in sentences(text) if s] == ["One two.", "Three four;", "five", "six code"]
        document = tmp_path / "x.md"
        document.write_text("# A `b`: c–d, [e](f)\n```sh\n# no heading\n```\n")
        assert anchors(document) == {"a-b-cd-e"}
