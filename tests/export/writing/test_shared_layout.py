"""The layout "shared": one graph for all tasks, what differs by task in files of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from embedge.export import export_bundle
from embedge.export.errors import AdapterError
from embedge.export.schemes.branch import default_branch_rank
from embedge.runtime import Embedder, subset_bundle
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.task_tensors import read_task_tensors
from embedge.runtime.errors import BundleError, EmbedgeValueError
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs
from embedge.runtime.tuning.prepack_graphs import prepack_graph
from tests.helpers.exports import WIDE, contents, manifest
from tests.helpers.models import (
    Reference,
    cosines,
    linears,
    make_model,
    random_texts,
    save,
    save_adapter,
)

TEXTS = random_texts(24)
TASKS = ("first", "second", "third")
RENEWED = ("manifest.json", "README.md")
SHARED = {"shared.onnx", "shared.bin", "shared.layers.json", "shared.constants.safetensors"}


@pytest.fixture(scope="module", params=["bert", "qwen3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pooling = "mean" if kind == "bert" else "lasttoken"
    place = tmp_path_factory.mktemp("model") / kind
    return save(make_model(kind, **WIDE), place, pooling=pooling)


@pytest.fixture(scope="module")
def loras(kind: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    return {
        name: save_adapter(model, root / name, target=linears(kind), seed=seed, size=0.5)
        for seed, name in enumerate(TASKS, 30)
    }


@pytest.fixture(scope="module")
def shared(
    model: Path, loras: dict[str, Path], few_texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return export_bundle(
        model,
        adapters=loras,
        precisions=["int8", "int4"],
        calibration=few_texts,
        layout="shared",
        branch_rank=16,
        out=tmp_path_factory.mktemp("shared") / "out",
    )


@pytest.fixture
def copy(shared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shared, tmp_path / "copy")


def vectors(bundle: Path, precision: str, task: str, texts: list[str] = TEXTS) -> NDArray[Any]:
    with Embedder(bundle, precision=precision) as embedder:
        return embedder.encode(texts, task=task)


@pytest.mark.slow
def test_one_graph_serves_all_tasks(shared: Path, kind: str) -> None:
    listed = manifest(shared)["precisions"]
    for precision in ("int8", "int4"):
        files = {path.name for path in (shared / precision).iterdir()}
        assert files == SHARED | {f"{task}.safetensors" for task in TASKS}
        assert set(listed[precision]["graphs"].values()) == {f"{precision}/shared.onnx"}
        assert listed[precision]["options"]["layout"] == "shared"
        assert listed[precision]["options"]["branch_rank"] == 16
    assert set(listed) == {"int8", "int4"}  # int4-unpacked has no branches
    Embedder(shared, precision="int8", verify="full")


@pytest.mark.slow
def test_int4_has_more_ranks_where_none_is_named(
    model: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    name = TASKS[0]
    out = export_bundle(
        model,
        adapters={name: loras[name]},
        precisions=["int8", "int4"],
        calibration="none",
        layout="shared",
        out=tmp_path / "out",
    )
    listed = manifest(out)["precisions"]
    ranks = {precision: of["options"]["branch_rank"] for precision, of in listed.items()}
    assert ranks == {"int8": 16, "int4": 64}


@pytest.mark.parametrize(
    ("width", "at_8_bits", "at_4_bits"),
    [(384, 16, 64), (511, 16, 64), (512, 32, 96), (2048, 32, 96)],
)
def test_ranks_grow_with_the_width(width: int, at_8_bits: int, at_4_bits: int) -> None:
    assert default_branch_rank(width, "int8") == at_8_bits
    assert default_branch_rank(width, "int4") == at_4_bits


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "least"), [("int8", 0.998), ("int4", 0.95)])
def test_vectors_are_those_of_torch_with_the_adapter_unmerged(
    precision: str, least: float, shared: Path, model: Path, loras: dict[str, Path]
) -> None:
    bare = Reference(model).encode(TEXTS)
    for task, folder in loras.items():
        expected = Reference(model, folder).encode(TEXTS)
        found = cosines(vectors(shared, precision, task), expected)
        assert found.mean() > least, (task, found.mean())
        assert cosines(bare, expected).mean() < 0.8  # the adapters matter


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_branches_are_closer_than_the_merged_graph(
    precision: str,
    shared: Path,
    model: Path,
    loras: dict[str, Path],
    few_texts: Path,
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"adapters": {"first": loras["first"]}, "precisions": [precision]}
    plain = export_bundle(model, calibration=few_texts, out=tmp_path / "plain", **options)
    both = export_bundle(
        model, calibration=few_texts, branch_rank=32, out=tmp_path / "both", **options
    )
    expected = Reference(model, loras["first"]).encode(TEXTS)
    lost = {
        name: 1 - cosines(vectors(bundle, precision, "first"), expected).mean()
        for name, bundle in (("plain", plain), ("both", both))
    }
    assert lost["both"] < 0.9 * lost["plain"], lost
    assert "int4-unpacked" not in manifest(both)["precisions"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_vector_depends_neither_on_its_batch_nor_on_other_tasks(
    precision: str, shared: Path
) -> None:
    with Embedder(shared, precision=precision) as embedder:
        whole = {task: embedder.encode(TEXTS, task=task) for task in TASKS}
        for index in (0, 7, 23):
            for task in TASKS:
                alone = embedder.encode([TEXTS[index]], task=task)[0]
                np.testing.assert_allclose(alone, whole[task][index], rtol=0, atol=1e-6)
        backwards = embedder.encode(TEXTS[::-1], task="second", batch_size=5)
        np.testing.assert_allclose(backwards[::-1], whole["second"], rtol=0, atol=1e-6)
        assert embedder._graphs._pool.names == ("first",)  # one session of one graph


@pytest.mark.slow
def test_an_added_task_changes_nothing_and_is_that_of_one_export(
    model: Path, loras: dict[str, Path], few_texts: Path, shared: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "precisions": ["int8", "int4"],
        "calibration": few_texts,
        "layout": "shared",
        "branch_rank": 16,
        "out": tmp_path / "out",
    }
    export_bundle(model, adapters={t: loras[t] for t in ("first", "second")}, **options)
    before = contents(tmp_path / "out")
    export_bundle(model, adapters={"third": loras["third"]}, **options)
    after = contents(tmp_path / "out")
    kept = {name: digest for name, digest in before.items() if name not in RENEWED}
    assert {name: after[name] for name in kept} == kept
    new = {f"{precision}/third.safetensors" for precision in ("int8", "int4")}
    assert set(after) - set(before) == new
    assert {n: d for n, d in after.items() if n not in RENEWED} == {
        n: d for n, d in contents(shared).items() if n not in RENEWED
    }
    assert manifest(tmp_path / "out")["precisions"] == manifest(shared)["precisions"]


@pytest.mark.slow
def test_subset_prepare_and_fingerprints(shared: Path, tmp_path: Path) -> None:
    small = subset_bundle(shared, tmp_path / "small", tasks=["third"], precisions=["int8"])
    assert not list(small.rglob("first*"))
    expected = vectors(shared, "int8", "third")
    np.testing.assert_array_equal(vectors(small, "int8", "third"), expected)
    prepared = PreparedGraphs(Bundle(small))
    prepack_graph(prepared, "int8", "third")
    assert prepared.count == 1
    np.testing.assert_array_equal(vectors(small, "int8", "third"), expected)
    with Embedder(shared, precision="int8") as embedder:
        prints = {embedder.fingerprint(task=task) for task in TASKS}
        assert len(prints) == len(TASKS)
    with Embedder(small, precision="int8") as embedder:
        assert embedder.fingerprint(task="third") in prints


@pytest.mark.slow
def test_tensors_of_another_kind_are_refused(copy: Path) -> None:
    file = copy / "int8/second.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if name.endswith("branch_down"))
    whole = file.read_bytes()
    damages: dict[str, bytes] = {
        r"its tensors end at byte \d+, the file has \d+": whole[:-5],
        "the header should be": whole[:100],
        "it holds 0 bytes": b"",
        "its tensors end at byte .* has": whole + b"more",
        "expected none, as first has": safetensors.numpy.save(
            {**tensors, "extra": np.zeros(3, "f4")}
        ),
        "found none": safetensors.numpy.save({n: t for n, t in tensors.items() if n != name}),
        "as first has": safetensors.numpy.save({**tensors, name: tensors[name][:, :1].copy()}),
        "found F64": safetensors.numpy.save({**tensors, name: np.zeros(2)}),
    }
    for message, content in damages.items():
        file.write_bytes(content)
        with (
            Embedder(copy, precision="int8", verify="none") as embedder,
            pytest.raises(BundleError, match=message),
        ):
            embedder.encode("text", task="second")
    file.write_bytes(whole)
    assert read_task_tensors(file).nbytes > 0


def test_a_header_that_is_no_json_or_no_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "task.safetensors"
    for header in (b"nonsense", b"[1, 2]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [-1]}}'):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(BundleError, match=r"task\.safetensors"):
            read_task_tensors(file)
    overlapping = {
        name: {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]} for name in ("one", "other")
    }
    for entries, size, message in (
        (overlapping, 4, "tensor 'other' begins at byte"),
        ({"a": {"dtype": "I8", "shape": [1] * 5, "data_offsets": [0, 1]}}, 1, "at most 4 axes"),
        ({"a": {"dtype": "I8", "shape": [0, 1 << 61], "data_offsets": [0, 0]}}, 0, "no sense"),
        ({"a": {"dtype": "I8", "shape": [0, 1 << 40], "data_offsets": [0, 0]}}, 0, "of shape"),
    ):
        header = json.dumps(entries).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        with pytest.raises(BundleError, match=message):
            read_task_tensors(file)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a precision without branches": ({"precisions": ["int8", "fp32"]}, "fp32 has none"),
    "kept layers": ({"keep": {"*": "fp32"}}, "keep"),
    "a budget": ({"precisions": ["int4"], "budget": "1GB", "calibration": "default"}, "budget"),
    "a layout of no such name": ({"layout": "mixed"}, "expected one of merged, shared"),
    "an odd rank": ({"branch_rank": 20}, "expected a multiple of 16"),
    "a rank of none": ({"branch_rank": 0}, "expected a multiple of 16"),
    "a rank that is no number": ({"branch_rank": True}, "expected a multiple of 16"),
    "a rank at fp32": (
        {"layout": "merged", "branch_rank": 16, "precisions": ["fp32"]},
        "fp32 has none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_branches_is_refused(case: str, source: Path, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    settings: dict[str, Any] = {
        "precisions": ["int8"],
        "layout": "shared",
        "calibration": "none",
        **options,
    }
    with pytest.raises(EmbedgeValueError, match=message):
        export_bundle(source, adapters={"task": None}, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"query\.weight \(not by LoRA alone\)"),
    "a saved module": ({"modules_to_save": ["key"]}, r"key\.weight \(not by LoRA alone\)"),
    "a norm": ({"modules_to_save": ["LayerNorm"]}, "LayerNorm"),
    "the embeddings": ({"target": ["query", "word_embeddings"]}, "word_embeddings"),
    "a rank above the branches'": ({"r": 20}, "or give 32 or more"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_branches_cannot_hold_is_refused(
    case: str, source: Path, tmp_path: Path
) -> None:
    options, message = ADAPTERS[case]
    settings: dict[str, Any] = {"target": ["query", "value"], **options}
    adapter = save_adapter(source, tmp_path / "adapter", **settings)
    with pytest.raises(AdapterError, match=message):
        export_bundle(
            source,
            adapters={"task": adapter},
            precisions=["int8"],
            layout="shared",
            branch_rank=16,
            calibration="none",
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tasks_are_added_as_the_others_were_written(
    source: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"precisions": ["int8"], "calibration": "none", "out": out}
    shared: dict[str, Any] = {"layout": "shared", "branch_rank": 16}
    export_bundle(source, adapters={"first": adapters["first"]}, **options, **shared)
    before = contents(out)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "has the layout shared"),
        ({"layout": "shared", "branch_rank": 32}, "branch_rank 16"),
        ({**shared, "portable": True}, "portable"),
    )
    for changed, message in cases:
        with pytest.raises(EmbedgeValueError, match=message):
            export_bundle(source, adapters={"second": adapters["second"]}, **options, **changed)
        assert contents(out) == before
    export_bundle(source, adapters={"second": adapters["second"]}, **options, **shared)
    assert vectors(out, "int8", "second").shape == (len(TEXTS), 96)


@pytest.mark.slow
def test_biases_that_an_adapter_trains_are_a_tasks_own(source: Path, tmp_path: Path) -> None:
    adapter = save_adapter(source, tmp_path / "adapter", target=["query", "value"], bias="all")
    with pytest.raises(AdapterError, match="LayerNorm"):  # "all" trains those of norms too
        export_bundle(
            source,
            adapters={"task": adapter},
            layout="shared",
            calibration="none",
            out=tmp_path / "a",
        )
    adapter = save_adapter(source, tmp_path / "own", target=["query", "value"], bias="lora_only")
    out = export_bundle(
        source,
        adapters={"task": adapter, "bare": None},
        layout="shared",
        calibration="none",
        out=tmp_path / "b",
    )
    for task, folder in (("task", adapter), ("bare", None)):
        expected = Reference(source, folder).encode(TEXTS)
        assert cosines(vectors(out, "int8", task), expected).min() > 0.995


@pytest.mark.slow
def test_the_rank_holds_the_adapters_and_stays_that_of_the_graph(
    source: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    wide = save_adapter(source, tmp_path / "wide", target=["query"], r=20)
    options: dict[str, Any] = {"layout": "shared", "calibration": "none", "out": tmp_path / "out"}
    export_bundle(source, adapters={"wide": wide}, **options)
    tensors = read_task_tensors(tmp_path / "out/int8/wide.safetensors").arrays
    ranks = {n: len(array) for n, array in tensors.items() if n.endswith("branch_down_scale")}
    assert {n: r for n, r in ranks.items() if r != 16} == {
        f"encoder.layer.{i}.attention.self.query.branch_down_scale": 32 for i in (0, 1)
    }
    export_bundle(source, adapters={"first": adapters["first"]}, **options)  # of rank 3
    assert vectors(tmp_path / "out", "int8", "first").shape == (len(TEXTS), 96)
    widest = save_adapter(source, tmp_path / "widest", target=["query"], r=40)
    with pytest.raises(AdapterError, match="or give 48 or more"):
        export_bundle(source, adapters={"widest": widest}, **options)


@pytest.mark.slow
def test_a_part_of_a_bundle_is_added_to_as_the_whole(
    source: Path, adapters: dict[str, Path], few_texts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"layout": "shared", "calibration": few_texts}
    first, second = ({name: adapters[name]} for name in ("first", "second"))
    whole = export_bundle(
        source, adapters={**first, "bare": None}, out=tmp_path / "whole", **options
    )
    part = subset_bundle(whole, tmp_path / "part", tasks=["first"])
    for bundle in (whole, part):
        export_bundle(source, adapters=second, out=bundle, **options)
    name = "int8/second.safetensors"
    assert (part / name).read_bytes() == (whole / name).read_bytes()
    np.testing.assert_array_equal(vectors(part, "int8", "second"), vectors(whole, "int8", "second"))
    document = manifest(part)
    del document["files"]["int8/shared.constants.safetensors"]
    (part / "manifest.json").write_text(json.dumps(document), "utf-8")
    (part / "int8/shared.constants.safetensors").unlink()
    with pytest.raises(EmbedgeValueError, match="copy the whole bundle again"):
        export_bundle(source, adapters={"bare": None}, out=part, **options)


@pytest.mark.slow
def test_each_precision_keeps_its_own_constants(
    source: Path, adapters: dict[str, Path], few_texts: Path, tmp_path: Path
) -> None:
    """Two precisions that were exported apart, with other texts in files of one name."""
    other = tmp_path / "other" / few_texts.name
    other.parent.mkdir()
    other.write_text("one two three\nab ab ab\n" * 10, "utf-8")
    first, second = ({name: adapters[name]} for name in ("first", "second"))
    together, apart = tmp_path / "together", tmp_path / "apart"
    for out in (together, apart):
        for precision, texts in (("int8", few_texts), ("int4", other)):
            export_bundle(
                source,
                adapters=first,
                precisions=[precision],
                calibration=texts,
                layout="shared",
                out=out,
            )
    options: dict[str, Any] = {"adapters": second, "calibration": few_texts, "layout": "shared"}
    export_bundle(source, precisions=["int8", "int4"], out=together, **options)
    for precision in ("int4", "int8"):
        export_bundle(source, precisions=[precision], out=apart, **options)
    assert {n: d for n, d in contents(together).items() if n not in RENEWED} == {
        n: d for n, d in contents(apart).items() if n not in RENEWED
    }


@pytest.mark.slow
def test_branches_of_what_no_adapter_changes_are_the_backbones(
    source: Path, adapters: dict[str, Path], few_texts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"branch_rank": 16, "calibration": few_texts}
    orders = {"one": ("first", "second"), "other": ("second", "first")}
    for name, order in orders.items():
        tasks = {task: adapters[task] for task in order}
        export_bundle(source, adapters=tasks, out=tmp_path / name, **options)
    for task in adapters:
        np.testing.assert_array_equal(
            vectors(tmp_path / "one", "int8", task), vectors(tmp_path / "other", "int8", task)
        )
