"""Bundles: what lies where, what is shared, what is added, and what a failed export leaves."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError, ExportError, export_bundle
from embedge.export.writing import graph_files
from embedge.export.writing import precision as writer_module
from embedge.export.writing import weight_store as store_module
from embedge.export.writing.files import list_files
from embedge.runtime import Embedder, EmbedgeError
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.cli.main import main
from embedge.runtime.errors import BundleError, EmbedgeValueError
from tests.helpers.models import (
    Reference,
    cosines,
    linears,
    make_model,
    random_texts,
    save,
    save_adapter,
    write_json,
)
from tests.helpers.sessions import open_graph

PRECISIONS = ["fp32", "fp16", "int8", "int4"]
# Weights above 4096 bytes at every precision, so that they lie in files.
WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "gain": 0.6}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("bert", **WIDE), tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def adapters(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(source, root / name, target=["query", "value"], seed=seed)
        for seed, name in enumerate(("first", "second"), 20)
    }


@pytest.fixture(scope="module")
def bundle(
    source: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "out"
    return export_bundle(
        source, adapters=adapters, precisions=PRECISIONS, out=out, matryoshka_dims=[16, 32]
    )


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return shutil.copytree(bundle, tmp_path / "copy")


def small(source: Path, out: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "adapters": {"task": None},
        "precisions": ["int8"],
        "calibration": "none",
    }
    return export_bundle(source, out=out, **{**settings, **options})


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def manifest(bundle: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((bundle / "manifest.json").read_text("utf-8"))
    return document


def external(bundle: Path, graph: str) -> dict[str, tuple[str, int, int]]:
    """File, offset and length of every tensor outside a graph."""
    model = onnx.load(bundle / graph, load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            found[tensor.name] = (entry["location"], int(entry["offset"]), int(entry["length"]))
    return found


def endings(precision: str) -> list[str]:
    """Of the files that a task has at a precision."""
    unpacked = ["unpacked.onnx", "unpack.json"] if precision == "int4" else []
    return ["onnx", "bin", "layers.json", *unpacked]


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if out.name in p.name)


# -- layout -------------------------------------------------------------------------------------------


def test_a_bundle_holds_these_files_and_no_others(bundle: Path) -> None:
    expected = {"manifest.json", "README.md", "tokenizer.json"}
    for precision in PRECISIONS:
        names = ["shared.bin"]
        for task in ("first", "second"):
            names += [f"{task}.{end}" for end in endings(precision)]
        expected |= {f"{precision}/{name}" for name in names}
    assert contents(bundle).keys() == expected


def test_the_manifest_is_valid_and_names_every_file_with_its_hash(bundle: Path) -> None:
    parsed = Manifest.from_dict(manifest(bundle))
    stated = {name: entry.sha256 for name, entry in parsed.files.items()}
    found = contents(bundle)
    assert stated == {n: h for n, h in found.items() if n not in ("manifest.json", "README.md")}
    assert all((bundle / n).stat().st_size == e.size for n, e in parsed.files.items())


def test_the_full_check_passes(bundle: Path) -> None:
    Embedder(bundle, precision="int8", verify="full")


def test_matryoshka_dimensions_include_the_whole(bundle: Path) -> None:
    assert manifest(bundle)["model"]["matryoshka_dims"] == [16, 32, 96]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_offsets_are_aligned_and_tensors_do_not_overlap(bundle: Path, precision: str) -> None:
    pieces: dict[str, set[tuple[int, int]]] = {}
    for task in ("first", "second"):
        for file, offset, length in external(bundle, f"{precision}/{task}.onnx").values():
            assert offset % 4096 == 0
            pieces.setdefault(file, set()).add((offset, length))
    for file, spans in pieces.items():
        ends = 0
        for offset, length in sorted(spans):
            assert offset >= ends
            ends = offset + length
        assert ends == (bundle / precision / file).stat().st_size


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_tasks_share_lies_once_in_the_shared_file(bundle: Path, precision: str) -> None:
    first, second = (external(bundle, f"{precision}/{t}.onnx") for t in ("first", "second"))
    adapted = re.compile(r".*self\.(query|value)\.(weight|scales)$")
    for name, place in first.items():
        assert (place == second[name]) == (place[0] == "shared.bin")
        if adapted.match(name):
            assert place[0] == "first.bin"
        else:
            assert place[0] == "shared.bin", name
    assert any("intermediate.dense.weight" in name for name in first)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_bytes_are_stored_twice(bundle: Path, precision: str) -> None:
    seen = set()
    places = {
        place
        for task in ("first", "second")
        for place in external(bundle, f"{precision}/{task}.onnx").values()
    }
    for file, offset, length in places:
        data = (bundle / precision / file).read_bytes()[offset : offset + length]
        assert data not in seen
        seen.add(data)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnxruntime_loads_every_graph(bundle: Path, precision: str) -> None:
    for task in ("first", "second"):
        session = open_graph(bundle / precision / f"{task}.onnx")
        assert [o.name for o in session.get_outputs()] == ["embedding"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnx_checks_the_graphs_with_their_external_data(bundle: Path, precision: str) -> None:
    onnx.checker.check_model(str(bundle / precision / "first.onnx"))


# -- the same bytes -----------------------------------------------------------------------------------

EXPORT_AGAIN = """
import json, sys
from embedge.export import export_bundle
source, adapters, precisions, out = json.loads(sys.argv[1])
export_bundle(source, adapters=adapters, precisions=precisions, out=out, matryoshka_dims=[16, 32])
"""


def child(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_another_process_with_another_hash_seed_writes_the_same_bytes(
    source: Path, adapters: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    job = [str(source), {n: str(a) for n, a in adapters.items()}, PRECISIONS]
    process = child(
        EXPORT_AGAIN, json.dumps([*job, str(tmp_path / "again")]), PYTHONHASHSEED="12345"
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert contents(tmp_path / "again") == contents(bundle)


# -- adding -------------------------------------------------------------------------------------------

RENEWED = ("manifest.json", "README.md")  # the card follows the manifest


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


@pytest.mark.parametrize("values", [{"length": 1 << 40}, {"offset": 1 << 40}, {"location": "x"}])
def test_a_graph_that_reads_past_what_is_listed_is_not_added_to(
    values: dict[str, Any], source: Path, copy: Path
) -> None:
    graph = onnx.load(str(copy / "int8/first.onnx"), load_external_data=False)
    tensor = next(t for t in graph.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        entry.value = str(values.get(entry.key, entry.value))
    (copy / "int8/first.onnx").write_bytes(graph.SerializeToString())
    document = manifest(copy)
    document["files"] |= list_files(copy, ["int8/first.onnx"])
    write_json(copy / "manifest.json", document)
    with pytest.raises(BundleError, match=r"truncated|not list"):
        small(source, copy, adapters={"third": None})


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


# -- refusals ---------------------------------------------------------------------------------------------


def edit_config(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **changes})
    return folder


def test_long_texts_are_cut_on_the_side_that_the_tokenizer_says(
    source: Path, copy: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    write_json(other / "tokenizer_config.json", {**config, "truncation_side": "left"})
    out = small(other, tmp_path / "out", precisions=["fp32"])
    texts = [text[:90] for text in random_texts(3, longest=200)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    rows = tokenizer(["ab" + text for text in texts], truncation=True, max_length=64).input_ids
    model = Embedder(out)
    found = model.encode(texts, prompt="ab", on_truncate="ignore")
    expected = model.run_ids([np.array(row, np.int64) for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    assert max(map(len, rows)) == 64
    with pytest.raises(EmbedgeValueError, match="has truncation side right, this export left"):
        small(other, copy, adapters={"third": None}, matryoshka_dims=[16, 32])


def test_vectors_are_cut_to_the_dimension_that_the_source_cuts_to(
    source: Path, copy: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    write_json(other / "config_sentence_transformers.json", {"truncate_dim": 24})
    model = Embedder(small(other, tmp_path / "out", precisions=["fp32"]))
    assert model.dim == model.get_sentence_embedding_dimension() == 24
    texts = random_texts(3)
    whole = model.encode(texts, truncate_dim=96)
    assert whole.shape == (3, 96)
    cut = whole[:, :24] / np.linalg.norm(whole[:, :24], axis=1, keepdims=True)
    np.testing.assert_allclose(model.encode(texts), cut, atol=1e-6, rtol=0)
    with pytest.raises(EmbedgeValueError, match="has truncate_dim None, this export 24"):
        small(other, copy, adapters={"third": None}, matryoshka_dims=[16, 32])
    with pytest.raises(EmbedgeValueError, match="has truncate_dim 24, this export None"):
        small(source, tmp_path / "out", adapters={"third": None})
    write_json(other / "config_sentence_transformers.json", {"truncate_dim": 200})
    wide = small(other, tmp_path / "wide", precisions=["fp32"])
    assert Embedder(wide).encode(texts).shape == (3, 96)


def test_an_out_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(EmbedgeValueError, match="left alone, also with --overwrite"):
        small(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_folder_of_other_things_is_refused(
    name: str, overwrite: bool, source: Path, tmp_path: Path
) -> None:
    write_json(tmp_path / "out" / name, {"name": "a web page"})
    with pytest.raises(EmbedgeValueError, match=r"left alone, also with --overwrite"):
        small(source, tmp_path / "out", overwrite=overwrite)
    assert leftovers(tmp_path / "out") == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]


def test_a_broken_manifest_is_an_error_that_names_it(source: Path, copy: Path) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(EmbedgeError, match=r"manifest\.json"):
        small(source, copy, adapters={"third": None})


def test_an_empty_folder_is_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "manifest.json" in contents(small(source, tmp_path / "out"))


def test_nothing_to_add_is_an_error(source: Path, adapters: dict[str, Path], copy: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="already holds first at int8"):
        small(source, copy, adapters={"first": adapters["first"]})


def test_a_task_of_another_adapter_is_refused(
    source: Path, adapters: dict[str, Path], copy: Path
) -> None:
    with pytest.raises(EmbedgeValueError, match="already has a task first"):
        small(source, copy, adapters={"first": adapters["second"]})


def test_a_bundle_of_other_weights_is_refused(copy: Path, tmp_path: Path) -> None:
    other = save(make_model("bert", seed=5, **WIDE), tmp_path / "other")
    with pytest.raises(EmbedgeValueError, match="with other weights"):
        small(other, copy)


def test_a_bundle_of_other_dimensions_is_refused(source: Path, copy: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="matryoshka dimensions"):
        small(source, copy, adapters={"third": None}, matryoshka_dims=[8])


@pytest.mark.filterwarnings("ignore:.*pooling:embedge.runtime.EmbedgeWarning")
def test_a_bundle_of_another_pooling_is_refused(source: Path, copy: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="has pooling mean, this export cls"):
        small(source, copy, adapters={"third": None}, pooling="cls")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ["int7"]}, "'int7'"),
        ({"precisions": []}, "found none"),
        ({"adapters": {}}, "at least one task"),
        ({"adapters": {"a/b": None}}, "task 'a/b'"),
        ({"adapters": {"..": None}}, r"task '\.\.'"),
        ({"adapters": {"shared": None}}, "task 'shared'"),
        ({"adapters": {"base": None}}, "task 'base'"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"matryoshka_dims": [97]}, "dimension 97"),
        ({"matryoshka_dims": [0]}, "dimension 0"),
        ({"matryoshka_dims": [True]}, "dimension True"),
        ({"int4_block_size": 48}, "int4_block_size 48"),
        ({"keep": {"*": "int4"}}, r"keep '\*'='int4'"),
        ({"calibration": "no/such/file"}, "no/such/file"),
        ({"calibration": 5}, "calibration: expected a path, found 5"),
        ({"adapters": ["x"]}, r"adapters: expected .*'adapter folder'.*, found \['x'\]"),
        ({"adapters": {"t": 5}}, r"adapters\['t'\]: expected a path, found 5"),
        ({"keep": ["x"]}, r"keep: expected .*'fp32'.*, found \['x'\]"),
        ({"keep": {3: "fp32"}}, "keep: expected patterns of layer names, found 3"),
        ({"matryoshka_dims": 32}, "matryoshka_dims: expected a list of integers, found 32"),
        ({"matryoshka_dims": "32"}, "matryoshka_dims: expected a list of integers, found '32'"),
        ({"precisions": 8}, "precisions: expected a list of some of .*, found 8"),
    ],
    ids=lambda value: None if isinstance(value, dict) else re.sub(r"\W+", "-", value),
)
def test_a_bad_argument_is_named_and_nothing_is_written(
    options: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(EmbedgeValueError, match=message):
        small(source, tmp_path / "out", **options)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("out", [None, 5, "", b"out"])
@pytest.mark.parametrize("name", ["source", "out"])
def test_what_is_no_path_is_named(name: str, out: Any, source: Path, tmp_path: Path) -> None:
    call = {"source": source, "out": tmp_path / "out", name: out}
    with pytest.raises(EmbedgeValueError, match=f"^{name}: expected a path, found "):
        export_bundle(adapters={"task": None}, **call)
    assert leftovers(tmp_path / "out") == []


def test_a_model_without_pooling_asks_for_one(source: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(source, tmp_path / "bare")
    (bare / "modules.json").unlink()
    with pytest.raises(EmbedgeValueError, match="--pooling"):
        small(bare, tmp_path / "out")


def test_an_unknown_architecture_is_refused_with_the_known_ones(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="'deberta-v2' is not supported.*bert, .*xlm-roberta"):
        small(edit_config(source, tmp_path / "other", model_type="deberta-v2"), tmp_path / "out")


def test_tensors_that_the_architecture_lacks_are_refused_by_name(tmp_path: Path) -> None:
    extra = {"encoder.layer.0.adapter.weight": torch.ones(3, 3)}
    other = save(make_model("bert"), tmp_path / "other", extra=extra)
    with pytest.raises(CheckpointError, match=r"found encoder\.layer\.0\.adapter\.weight"):
        small(other, tmp_path / "out")


def test_more_layers_than_the_configuration_says_are_refused(source: Path, tmp_path: Path) -> None:
    other = edit_config(source, tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\."):
        small(other, tmp_path / "out")


def test_fewer_layers_than_the_configuration_says_are_refused(source: Path, tmp_path: Path) -> None:
    other = edit_config(source, tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"expected a tensor encoder\.layer\.2\."):
        small(other, tmp_path / "out")


POOLER = {"pooler.dense.weight": torch.randn(32, 32), "pooler.dense.bias": torch.randn(32)}


@pytest.mark.parametrize(
    "options",
    [
        {"target": "all-linear"},
        {"target": "all-linear", "use_dora": True},
        {"target": ["query"], "modules_to_save": ["pooler"]},
        {"target": ["query"], "bias": "all"},
    ],
    ids=str,
)
def test_what_an_adapter_changes_in_a_pooler_is_left_out(
    options: dict[str, Any], tmp_path: Path
) -> None:
    other = save(make_model("bert"), tmp_path / "other", extra=POOLER)
    folder = save_pooler_adapter(other, tmp_path / "lora", **options)
    with pytest.warns(UserWarning, match="left out what no vector depends on: pooler; if it was"):
        out = small(other, tmp_path / "out", adapters={"task": folder}, precisions=["fp32"])
    texts = random_texts(5)
    expected = Reference(other, folder).encode(texts)
    assert cosines(Embedder(out).encode(texts), expected).min() >= 0.999999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_untrained_dora_on_a_pooler_is_left_out_without_a_word(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    other = save(make_model("bert"), tmp_path / "other", extra=POOLER)
    folder = save_pooler_adapter(other, tmp_path / "lora", target="all-linear", use_dora=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}pooler.dense.lora_B.weight"].zero_()
    tensors[f"{PREFIX}pooler.dense.lora_magnitude_vector"] = POOLER["pooler.dense.weight"].norm(
        dim=1
    )
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    save_file(tensors, file)
    out = small(other, tmp_path / "out", adapters={"task": folder}, precisions=["fp32"])
    texts = random_texts(5)
    expected = Reference(other, folder).encode(texts)
    assert cosines(Embedder(out).encode(texts), expected).min() >= 0.999999


PREFIX = "base_model.model."


def save_pooler_adapter(source: Path, folder: Path, **options: Any) -> Path:
    """An adapter as PEFT saves it of a BertModel with its pooler, where one was trained too."""
    model = transformers.BertModel.from_pretrained(source)
    target = options.pop("target")
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=8, target_modules=target, **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad or name.endswith(".bias"):
            noise = torch.randn(parameter.shape, generator=generator)
            is_length = "magnitude" in name
            parameter.data = parameter.data * (1 + 0.1 * noise) if is_length else 0.2 * noise
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "key", ["encoder.layer.1.output.dense.weight", "encoder.layer.0.output.LayerNorm.bias"]
)
def test_nan_in_a_weight_is_named_and_nothing_is_left(
    key: str, precision: str, source: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[key].view(-1)[5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(key)):
        small(broken, tmp_path / "out", precisions=[precision], calibration="default")
    assert leftovers(tmp_path / "out") == []


def test_activations_that_overflow_are_refused_by_layer(source: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["encoder.layer.0.attention.self.value.weight"] *= 1e38
    tensors["encoder.layer.0.attention.output.dense.weight"] *= 1e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\..*overflow"):
        small(broken, tmp_path / "out", calibration="default")


# -- overwriting, foreign files -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared.2.bin", "third.onnx", "third.bin"])
def test_additions_do_not_write_through_links(name: str, source: Path, copy: Path) -> None:
    victim = copy.parent / "victim"
    (copy / "int8" / name).symlink_to(victim)
    with suppress(EmbedgeError):
        small(source, copy, adapters={"third": None})
    assert not victim.exists()


def test_a_precisions_folder_behind_a_link_is_not_added_to(source: Path, copy: Path) -> None:
    (copy / "int8").rename(copy.parent / "elsewhere")
    (copy / "int8").symlink_to(copy.parent / "elsewhere")
    before = contents(copy.parent / "elsewhere")
    with pytest.raises(EmbedgeError, match="link"):
        small(source, copy, adapters={"third": None})
    assert contents(copy.parent / "elsewhere") == before


def test_everything_listed_is_on_the_disk_before_the_manifest_is(
    source: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[tuple[int, int]] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        status = os.fstat(descriptor)
        flushed.add((status.st_dev, status.st_ino))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    before = contents(copy)
    small(source, copy, adapters={"third": None}, precisions=["int8", "int4"])
    out = small(source, tmp_path / "new")
    added = [copy / name for name in set(contents(copy)) - set(before)]
    for path in [*added, *out.rglob("*"), copy / "manifest.json", copy / "int8", copy, out]:
        assert (path.stat().st_dev, path.stat().st_ino) in flushed, path


def test_overwriting_replaces_the_whole_bundle(source: Path, copy: Path) -> None:
    small(source, copy, overwrite=True)
    assert list(manifest(copy)["tasks"]) == ["task"]
    assert not (copy / "int4").exists()
    assert leftovers(copy) == ["copy"]


def test_a_failed_overwrite_leaves_the_old_bundle(source: Path, copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(EmbedgeValueError):
        small(source, copy, overwrite=True, keep={"nothing": "fp32"})
    assert contents(copy) == before


def test_overwriting_deletes_what_embedge_itself_put_beside_the_bundles_files(
    source: Path, copy: Path
) -> None:
    assert main(["prepare", str(copy), "--precision", "int8", "--pack-only"]) == 0
    (copy / ".manifest.json.k3j2.tmp").write_text("of a killed bench --record")
    small(source, copy, overwrite=True)
    assert set(contents(copy)) - {"manifest.json", "README.md"} == manifest(copy)["files"].keys()
    Embedder(copy, precision="int8", verify="full").encode("ab")


@pytest.mark.parametrize("name", ["notes.txt", "int8/mine.bin", "int8/other.onnx", "deep/x/y"])
def test_overwriting_refuses_to_delete_a_foreign_file(name: str, source: Path, copy: Path) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text("mine")
    with pytest.raises(EmbedgeValueError, match=re.escape(name)):
        small(source, copy, overwrite=True)
    assert (copy / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", "int8/mine.bin", "int8/third.bin", "int8/a.onnx"])
def test_adding_leaves_a_foreign_file_and_does_not_list_it(
    name: str, source: Path, copy: Path
) -> None:
    (copy / name).write_text("mine")
    adapter = save_adapter(source, copy.parent / "lora", target=linears("bert"))
    small(source, copy, adapters={"third": adapter})
    assert (copy / name).read_text() == "mine"
    assert name not in manifest(copy)["files"]
    Embedder(copy, precision="int8", verify="full").encode("ab", task="third")


def test_a_failed_addition_leaves_a_foreign_file(source: Path, copy: Path) -> None:
    (copy / "int8/mine.bin").write_text("mine")
    before = contents(copy)
    with pytest.raises(EmbedgeValueError):
        small(source, copy, adapters={"third": None}, keep={"nothing": "fp32"})
    assert contents(copy) == before


def test_a_foreign_graph_of_the_new_tasks_name_is_refused(source: Path, copy: Path) -> None:
    (copy / "int8/third.onnx").write_text("mine")
    with pytest.raises(EmbedgeValueError, match=r"third\.onnx"):
        small(source, copy, adapters={"third": None})
    assert (copy / "int8/third.onnx").read_text() == "mine"


# -- faults -------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the weight files refuse bytes after some have been written."""

    def fill(free: int) -> None:
        class File:
            def __init__(self, path: Path, mode: str) -> None:
                self._file = path.open(mode)

            def write(self, data: Any) -> None:
                if self._file.tell() + len(data) > free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

        def open_(path: Path, mode: str) -> Any:
            return File(path, mode) if mode == "xb" else path.open(mode)

        monkeypatch.setattr(store_module, "open", open_, raising=False)

    return fill


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_full_disk_is_one_readable_error_and_leaves_nothing(
    precision: str, source: Path, tmp_path: Path, full_disk: Callable[[int], None]
) -> None:
    full_disk(20_000)
    with pytest.raises(ExportError, match="No space left on device.*nothing was left") as caught:
        small(source, tmp_path / "out", precisions=[precision])
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path / "out") == []


def test_a_full_disk_leaves_an_older_bundle_as_it_was(
    source: Path, adapters: dict[str, Path], tmp_path: Path, full_disk: Callable[[int], None]
) -> None:
    out = small(source, tmp_path / "out", adapters={"first": adapters["first"]})
    before = contents(out)
    full_disk(2_000)
    with pytest.raises(ExportError, match="No space left"):
        small(source, out, adapters={"second": adapters["second"]}, precisions=["int8", "fp32"])
    assert contents(out) == before
    assert [p.name for p in sorted(out.iterdir()) if p.is_dir()] == ["int8"]


SLOW_EXPORT = """
import json, sys, time
from embedge.export.writing import weight_store
from embedge.export import export_bundle
put = weight_store.TensorStore.put
def slowly(self, *arguments):
    put(self, *arguments)
    for file in self._open.values():
        file.flush()
    if self._open:
        time.sleep(0.2)
weight_store.TensorStore.put = slowly
source, task, out = sys.argv[1:]
export_bundle(source, adapters={task: None}, out=out, calibration="none", precisions=["fp32"])
"""


def wait_for_weights(process: subprocess.Popen[str], watched: Path) -> None:
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in watched.glob("fp32/*.bin")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def killed_export(source: Path, task: str, out: Path, watched: Path) -> None:
    process = child(SLOW_EXPORT, str(source), task, str(out))
    wait_for_weights(process, watched)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_export_leaves_nothing_under_the_name_and_a_second_run_succeeds(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed_export(source, "task", out, tmp_path / ".out.partial")
    assert not out.exists()
    small(source, out)
    assert leftovers(out) == ["out"]
    Embedder(out, precision="int8", verify="full")


def test_a_killed_addition_leaves_the_bundle_usable_and_a_second_run_succeeds(
    source: Path, copy: Path
) -> None:
    without_fp32(copy)
    (copy / "int8/mine.bin").write_text("mine")
    killed_export(source, "third", copy, copy)
    Embedder(copy, precision="int8", verify="full").encode("ab", task="first")
    small(source, copy, adapters={"fourth": None}, precisions=["int8"])
    assert not (copy / "fp32").exists()
    assert set(contents(copy)) - {"manifest.json", "README.md"} == {
        *manifest(copy)["files"],
        "int8/mine.bin",
    }


def test_a_killed_int4_addition_leaves_no_file_that_stops_the_next(
    source: Path, copy: Path
) -> None:
    document = manifest(copy)
    left = copy / "int4/third.unpack.json"
    write_json(copy / ".export.partial", sorted(document["files"]))
    left.write_text("{}")
    small(source, copy, adapters={"third": None}, precisions=["int4"])
    assert json.loads(left.read_text())
    Embedder(copy, precision="int4-unpacked", verify="full").encode("ab", task="third")


# -- two exports at once --------------------------------------------------------------------------------


@contextmanager
def running_export(source: Path, task: str, out: Path, watched: Path) -> Iterator[int]:
    """An export of another process, stopped while it writes; yields its number."""
    process = child(SLOW_EXPORT, str(source), task, str(out))
    try:
        wait_for_weights(process, watched)
        process.send_signal(signal.SIGSTOP)
        yield process.pid
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    finally:
        process.kill()


def without_fp32(bundle: Path) -> None:
    shutil.rmtree(bundle / "fp32")
    document = manifest(bundle)
    del document["precisions"]["fp32"]
    document["files"] = {n: e for n, e in document["files"].items() if "fp32" not in n}
    write_json(bundle / "manifest.json", document)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_export_to_the_same_new_folder_is_refused_and_harms_nothing(
    overwrite: bool, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (
        running_export(source, "task", out, tmp_path / ".out.partial") as number,
        pytest.raises(ExportError, match=rf"no other export .*found process {number} "),
    ):
        small(source, out, overwrite=overwrite)
    assert leftovers(out) == ["out"]
    Embedder(out, precision="fp32", verify="full").encode("ab")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_addition_at_the_same_time_is_refused_and_both_can_follow_each_other(
    overwrite: bool, source: Path, copy: Path
) -> None:
    without_fp32(copy)
    with (
        running_export(source, "third", copy, copy) as number,
        pytest.raises(ExportError, match=rf"no other export .*found process {number} "),
    ):
        small(source, copy, adapters={"fourth": None}, overwrite=overwrite)
    small(source, copy, adapters={"fourth": None})
    assert {"first", "second", "third", "fourth"} == manifest(copy)["tasks"].keys()
    assert set(contents(copy)) - {"manifest.json", "README.md"} == manifest(copy)["files"].keys()
    assert leftovers(copy) == ["copy"]
    Embedder(copy, precision="fp32", verify="full").encode("ab", task="third")
    Embedder(copy, precision="int8", verify="full").encode("ab", task="fourth")


@pytest.mark.parametrize("name", [".out.lock", ".out.partial", ".out.replaced"])
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_what_somebody_put_beside_the_bundle_is_refused_and_left_alone(
    kind: str, name: str, source: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    if kind == "link":
        (tmp_path / name).symlink_to(victim)
    else:
        os.mkfifo(tmp_path / name)
    with pytest.raises(EmbedgeError, match=rf"{name}: expected .*, found a {kind}.*move it away"):
        small(source, tmp_path / "out")
    assert victim.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "victim"])


def test_an_export_that_is_refused_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        small(tmp_path / "nowhere", tmp_path / "a/b/out")
    assert list(tmp_path.iterdir()) == []


# -- refusals of the operating system -------------------------------------------------------------------


REFUSALS = {
    errno.ENOSPC: r"No space left on device \(\d+ MB free there\); .*: free some space",
    errno.EROFS: "Read-only file system; .*: choose an --out that this user can write to",
    errno.EACCES: "Permission denied; .*: choose an --out that this user can write to",
    errno.ENOENT: "No such file or directory; .*: make sure that nothing else moves or deletes",
}


@pytest.mark.parametrize("number", REFUSALS)
def test_what_the_system_refuses_comes_with_advice_that_helps(
    number: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number), "there")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ExportError, match=f"there: {REFUSALS[number]}") as caught:
        small(source, tmp_path / "out")
    assert ("space" in str(caught.value)) == (number == errno.ENOSPC)
    monkeypatch.undo()
    monkeypatch.setattr(writer_module, "write_graph", refuse)
    with pytest.raises(ExportError, match=f"there: {REFUSALS[number]}"):
        small(source, tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


def test_a_bundle_whose_parent_cannot_be_written_gains_a_task_all_the_same(
    source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def open_(path: Any, *arguments: Any) -> int:
        if Path(path).parent == copy.parent:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return really(path, *arguments)

    monkeypatch.setattr(os, "open", open_)
    small(source, copy, adapters={"third": None})
    assert "third" in manifest(copy)["tasks"]
    assert ".export.lock" not in contents(copy)


def test_a_failed_addition_says_that_the_bundle_is_as_it_was(
    source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module, "write_graph", refuse)
    with pytest.raises(ExportError, match="the bundle that was there is as it was"):
        small(source, copy, adapters={"third": None})


def test_the_working_folder_is_not_replaced(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    with pytest.raises(EmbedgeValueError, match="is the working folder, or holds it.*`cd` out"):
        export_bundle(source, adapters={"a": None}, precisions=["fp32"], out=".")
    assert not list(inner.iterdir())
    made = export_bundle(source, adapters={"a": None}, precisions=["fp32"], out="no/../made")
    assert (made / "manifest.json").is_file()
    monkeypatch.chdir(made)
    with pytest.raises(EmbedgeValueError, match="`cd` out"):
        export_bundle(source, adapters={"a": None}, precisions=["fp32"], out=made, overwrite=True)
    assert export_bundle(source, adapters={"b": None}, precisions=["fp32"], out=".") == Path(".")


@pytest.mark.skipif(sys.platform == "win32", reason="a working folder stays there")
def test_a_deleted_working_folder_is_named(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ExportError, match="the working folder was deleted or moved; `cd` to one"):
        export_bundle(source, adapters={"a": None}, precisions=["fp32"], out="made")
