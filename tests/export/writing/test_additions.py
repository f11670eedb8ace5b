"""Adding tasks and precisions to a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from embedge.export import export_bundle
from embedge.export.writing import graph_files
from embedge.export.writing import precision as writer_module
from embedge.export.writing.files import list_files
from embedge.runtime import Embedder
from embedge.runtime.errors import BundleError
from tests.helpers.exports import (
    PRECISIONS,
    contents,
    endings,
    external,
    manifest,
    small,
)
from tests.helpers.models import (
    random_texts,
    write_json,
)

RENEWED = ("manifest.json", "README.md")  # the card follows the manifest


@pytest.mark.slow
def test_a_task_is_added_without_touching_or_repeating_what_is_there(
    source: Path, adapters: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = {"first": adapters["first"]}
    options: dict[str, Any] = {"precisions": PRECISIONS, "out": out, "matryoshka_dims": [16, 32]}
    export_bundle(source, adapters=first, **options)
    before = contents(out)
    export_bundle(source, adapters={"second": adapters["second"]}, **options)
    after = contents(out)
    assert {n: h for n, h in after.items() if n in before and n not in RENEWED} == {
        n: h for n, h in before.items() if n not in RENEWED
    }
    assert (out / "README.md").read_text("utf-8") == (bundle / "README.md").read_text("utf-8")
    for precision in PRECISIONS:
        new = {n for n in after if n not in before and n.startswith(precision)}
        assert new == {f"{precision}/second.{end}" for end in endings(precision)}
        added = external(out, f"{precision}/second.onnx")
        assert added == external(bundle, f"{precision}/second.onnx")
    Embedder(out, precision="int8", verify="full")


@pytest.mark.slow
def test_added_tasks_give_the_vectors_of_one_export(
    source: Path, adapters: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    out = small(source, tmp_path / "out", adapters={"first": adapters["first"]})
    small(source, out, adapters={"second": adapters["second"]})
    at_once = small(source, tmp_path / "at-once", adapters=adapters)
    texts = random_texts(5)
    for task in adapters:
        apart = Embedder(out, precision="int8").encode(texts, task=task)
        assert np.array_equal(apart, Embedder(at_once, precision="int8").encode(texts, task=task))


@pytest.mark.slow
def test_a_precision_is_added_without_touching_what_is_there(
    source: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = small(source, tmp_path / "out", adapters=adapters)
    before = contents(out)
    small(source, out, adapters=adapters, precisions=["int8", "fp32"])
    after = contents(out)
    assert all(after[n] == h for n, h in before.items() if n not in RENEWED)
    assert after["README.md"] != before["README.md"]
    assert list(manifest(out)["precisions"]) == ["int8", "fp32"]
    Embedder(out, precision="fp32", verify="full")


@pytest.mark.slow
def test_the_same_dimensions_can_be_given_again(
    source: Path, adapters: dict[str, Path], copy: Path
) -> None:
    options: dict[str, Any] = {"calibration": "none", "matryoshka_dims": [32, 16]}
    small(source, copy, adapters={"third": None}, **options)
    assert set(manifest(copy)["tasks"]) == {"first", "second", "third"}


def flip(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(10)
        stream.write(b"\x55\xaa")


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5000)


def lose(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (flip, "int8/shared.bin", "expected SHA-256"),
        (flip, "int8/first.onnx", "expected SHA-256"),
        (shorten, "int8/shared.bin", r"expected \d+ bytes, found \d+"),
        (shorten, "fp32/shared.bin", r"expected \d+ bytes, found \d+"),
        (lose, "tokenizer.json", "missing"),
    ],
)
def test_nothing_is_added_to_a_damaged_bundle(
    damage: Callable[[Path], None], name: str, message: str, source: Path, copy: Path
) -> None:
    damage(copy / name)
    before = contents(copy)
    with pytest.raises(BundleError, match=f"{name}: ({message}).*export"):
        small(source, copy, adapters={"third": None})
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("length", 1 << 40, "has 1099511627776 bytes, not"),
        ("offset", 1 << 40, "truncated"),
        ("location", "x", "not list"),
    ],
)
def test_a_graph_that_reads_past_what_is_listed_is_not_added_to(
    key: str, value: object, message: str, source: Path, copy: Path
) -> None:
    graph = onnx.load(str(copy / "int8/first.onnx"), load_external_data=False)
    tensor = next(t for t in graph.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        entry.value = str(value) if entry.key == key else entry.value
    (copy / "int8/first.onnx").write_bytes(graph.SerializeToString())
    document = manifest(copy)
    document["files"] |= list_files(copy, ["int8/first.onnx"])
    write_json(copy / "manifest.json", document)
    with pytest.raises(BundleError, match=message):
        small(source, copy, adapters={"third": None})


@pytest.mark.slow
def test_tasks_of_other_options_keep_what_older_graphs_need(source: Path, tmp_path: Path) -> None:
    out = small(
        source, tmp_path / "out", precisions=["int4"], int4_block_size=64, keep={"*.value": "int8"}
    )
    before = manifest(out)["precisions"]["int4"]
    small(source, out, adapters={"other": None}, precisions=["int4"])
    after = manifest(out)["precisions"]["int4"]
    assert before["activation_constants"]
    assert after["activation_constants"] == before["activation_constants"]
    assert after["row_multiple"] % before["row_multiple"] == 0
    assert after["devices"] == ["cpu"]
    assert after["options"]["block_size"] == 64
    assert after["options"]["by_task"]["other"]["block_size"] == 32


def test_figures_of_bench_survive_an_addition(source: Path, copy: Path) -> None:
    document = manifest(copy)
    document["precisions"]["int8"]["fidelity"] = {"first": {"cosine": 0.5}}
    write_json(copy / "manifest.json", document)
    small(source, copy, adapters={"third": None})
    assert manifest(copy)["precisions"]["int8"]["fidelity"] == {"first": {"cosine": 0.5}}


def test_figures_that_bench_records_during_an_addition_survive_it(
    source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = graph_files.write_graph

    def record_and_write(*arguments: Any) -> None:
        document = manifest(copy)
        document["precisions"]["int8"]["fidelity"] = {"first": {"cosine": 0.5}}
        write_json(copy / "manifest.json", document)
        write(*arguments)

    monkeypatch.setattr(writer_module, "write_graph", record_and_write)
    small(source, copy, adapters={"third": None})
    assert manifest(copy)["precisions"]["int8"]["fidelity"] == {"first": {"cosine": 0.5}}
    assert "third" in manifest(copy)["tasks"]
