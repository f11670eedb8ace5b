"""Documents say what is so: their links lead somewhere, their code runs, their lines are short.

Rules for a document's code:
    * Every block of ``python``, ``sh`` and ``console`` in the README, the tutorial, the guides and the reference runs.
      Blocks of one document run in order, in one folder, and share Python's names.
    * ``<!-- not run: REASON -->`` above a block leaves it out.
    * ``<!-- output -->`` above a block of ``text`` compares it with what the block before it printed;
      ``…`` stands for anything within a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from embedge.runtime.bundle import manifest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "docs", "examples", "export", "quant", "runtime", "tests")
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
    ]
)
NOTES = [name for name in DOCUMENTS if re.match(r"docs/lab-notes/\d", name)]
RUN = [
    name
    for name in DOCUMENTS
    if name in {"README.md", "docs/index.md", "docs/tutorial.md"}
    or name.startswith(("docs/guides/", "docs/reference/", "docs/explanation/"))
]
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
CODE = re.compile(r"`([^`]+)`")
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```",
    re.M | re.S,
)
FORBIDDEN = re.compile(
    r"(?<![\w.])/(work|root|home)/|\bpypi\.org/simple|\bAI\b|\bChatGPT\b|\bClaude\b"
)


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def prose(name: str) -> str:
    """A document without its blocks of code."""
    return FENCE.sub("", read(name))


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
    text = FENCE.sub("", path.read_text("utf-8"))
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


@pytest.mark.parametrize("page", ["reference/command-line.md", "lab-notes/index.md"])
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


# -- code ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of code, the remark above it, and where it begins."""

    language: str
    mark: str
    body: str
    line: int


def blocks(name: str) -> list[Block]:
    text = read(name)
    return [
        Block(
            fence["language"],
            fence["mark"] or "",
            re.sub(rf"^{fence['indent']}", "", fence["body"], flags=re.M),
            text.count("\n", 0, fence.start("body")) + 1,
        )
        for fence in FENCE.finditer(text)
    ]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_that_do_not_run_say_why(name: str) -> None:
    for block in blocks(name):
        if block.mark.startswith("not run"):
            assert re.fullmatch(r"not run: \w[^>]{10,}", block.mark), f"{name}:{block.line}"
        if name in RUN:
            known = {"python", "sh", "console", "text", "c", "json"}
            assert block.language in known, f"{name}:{block.line}: {block.language!r}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents' examples name: MODEL, adapters, bundle, v4, texts, pages."""
    for needed in ("peft", "PIL", "torch", "transformers"):
        pytest.importorskip(needed)
    place = tmp_path_factory.mktemp("workshop")
    make_workshop(place)
    return place


def make_workshop(place: Path) -> None:
    import numpy as np
    from PIL import Image

    from embedge.export import export_bundle
    from tests.helpers.jina_v4 import write_checkpoint
    from tests.helpers.models import linears, make_model, save, save_adapter

    shape = {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 1}
    save(make_model("bert", gain=0.8, **shape), place / "MODEL", max_length=48)
    (place / "MODEL" / "README.md").write_text("# tiny-bert\n")
    for task in ("code", "retrieval"):
        folder = save_adapter(place / "MODEL", place / "adapters" / task, target=linears("bert"))
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        config["base_model_name_or_path"] = "organization/tiny-bert"
        (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    export_bundle(
        place / "MODEL",
        adapters={task: place / "adapters" / task for task in ("code", "retrieval")},
        precisions=["int8", "int4"],
        int4_method="rtn",
        calibration="none",
        out=place / "bundle",
    )
    pretend_that_it_was_measured(place / "bundle" / "manifest.json")
    published = write_checkpoint(place / "jinaai" / "jina-embeddings-v4")
    export_bundle(published, out=place / "v4", calibration="none")
    for page in (1, 2):
        pixels = np.random.default_rng(page).integers(0, 255, (96, 64, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"page-{page}.png")
    lines = ["how do I sort a dict", "def f(d): return dict(sorted(d.items()))"]
    (place / "lines.txt").write_text("\n".join(lines) + "\n")
    (place / "texts.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    (place / "bin").mkdir()
    command = place / "bin" / "embedge"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m embedge "$@"\n')
    command.chmod(0o755)
    (place / "examples").symlink_to(ROOT / "examples")


def pretend_that_it_was_measured(manifest: Path) -> None:
    """What ``embedge bench --record`` would have stored of each precision's vectors."""
    document = json.loads(manifest.read_text("utf-8"))
    for precision in document["precisions"].values():
        precision["fidelity"] = {
            task: {"dims": {"384": {"cosine_mean": 0.99}}} for task in precision["graphs"]
        }
    manifest.write_text(json.dumps(document), "utf-8")


def has_code(name: str) -> bool:
    return any(
        block.language in {"python", "sh", "console"} and not block.mark.startswith("not run")
        for block in blocks(name)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUN if has_code(name)])
def test_code_runs(
    name: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "here"
    shutil.copytree(workshop, place, symlinks=True)
    if "--out v4 " in read(name):
        shutil.rmtree(place / "v4")  # it makes its own
    monkeypatch.chdir(place)
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    run_blocks(blocks(name), f"{name}:", environment)


def run_blocks(found: list[Block], where: str, environment: dict[str, str]) -> None:
    """Runs the blocks of one document, and compares their outputs."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in found:
        if block.mark == "output":
            assert matches(block.body, printed), (
                f"{where}{block.line} says\n{block.body}\nand this was printed:\n{printed}"
            )
        elif block.mark.startswith("not run"):
            printed = ""
        elif block.language == "python":
            # lines are those of the document
            code = compile("\n" * (block.line - 1) + block.body, where.rstrip(":"), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, names)
            printed = output.getvalue()
        elif block.language == "sh":
            printed = run_shell(block.body, f"{where}{block.line}", environment)
        elif block.language == "console":
            for command, expected in console(block.body):
                printed = run_shell(command, f"{where}{block.line}", environment)
                assert matches(expected, printed), f"{where}{block.line}: {command}\n{printed}"


def run_shell(code: str, where: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{where}: {code}\n{done.stderr}"
    return done.stdout


def console(body: str) -> Iterator[tuple[str, str]]:
    """Commands after ``$``, each with the output below it."""
    for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def matches(expected: str, printed: str) -> bool:
    """Whether the lines are the same, where ``…`` stands for anything within one."""
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("…"))
    lines = "\n".join(line.rstrip() for line in printed.strip().splitlines())
    return re.fullmatch(pattern, lines) is not None


class TestTheTestsThemselves:
    def test_wrong_code_and_wrong_output_are_seen(self) -> None:
        def block(language: str, body: str, mark: str = "") -> Block:
            return Block(language, mark, body, 1)

        here = dict(os.environ)
        run_blocks([block("python", "print(1)"), block("text", "1\n", "output")], "x:", here)
        run_blocks([block("python", "raise", "not run: it would fail")], "x:", here)
        run_blocks([block("console", "$ echo a b\na …\n")], "x:", here)
        with pytest.raises(AssertionError, match=r"x:1 says\s+2\s+and this was printed:\s+1"):
            run_blocks([block("python", "print(1)"), block("text", "2\n", "output")], "x:", here)
        with pytest.raises(NameError):
            run_blocks([block("python", "no_such_name")], "x:", here)
        with pytest.raises(AssertionError, match="x:1"):
            run_blocks([block("sh", "true\nfalse\ntrue\n")], "x:", here)
        with pytest.raises(AssertionError, match="echo a"):
            run_blocks([block("console", "$ echo a\nb\n")], "x:", here)

    def test_anything_is_within_a_line(self) -> None:
        assert matches("a…c\nd", "abc  \nd\n")
        assert not matches("a…d", "ab\ncd")

    def test_fences_and_sentences(self, tmp_path: Path) -> None:
        text = "One two. Three\nfour; five\n\n- six `a b`\n\n| a | b |\n"
        assert [s for s in sentences(text) if s] == ["One two.", "Three four;", "five", "six code"]
        assert list(console("$ a\nb\n$ c\n")) == [("a", "b\n"), ("c", "")]
        document = tmp_path / "x.md"
        document.write_text("# A `b`: c–d, [e](f)\n```sh\n# no heading\n```\n")
        assert anchors(document) == {"a-b-cd-e"}
