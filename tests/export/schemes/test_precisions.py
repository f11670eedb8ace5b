"""Quantized graphs stay close to fp32, independent of the batch, and store what they should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from safetensors.numpy import load_file, save_file

from embedge.export import export_bundle
from embedge.export.schemes.int8_inputs import ACTIVATION_CONSTANTS
from embedge.runtime import Embedder
from embedge.runtime.errors import EmbedgeValueError
from tests.helpers.models import (
    WORDS,
    cosines,
    linears,
    make_model,
    random_texts,
    save,
    save_adapter,
)
from tests.helpers.sessions import open_graph, session_options

pytestmark = pytest.mark.slow

TEXTS = random_texts(24)
MODELS = ("bert", "mpnet", "modernbert", "modernbert-with-biases", "qwen2", "qwen3")
# Gentle gains: attention of a few sharp peaks would turn any rounding into another vector.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "gain": 0.6}
EXACT = 0.999999
# Of random weights, whose vectors rounding moves more than those of trained ones.
MEAN = {"int8": 0.999, "int4": 0.94, "int4-unpacked": 0.94}
LOWEST = {"int8": 0.995, "int4": 0.7, "int4-unpacked": 0.7}
QUANTIZED = ["int8", "int4", "int4-unpacked"]

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precisions")


@pytest.fixture(scope="module")
def export(root: Path, few_texts: Path) -> Export:
    """Exports a random model with a random LoRA once per combination of arguments."""
    made: dict[str, Path] = {}

    def source_of(name: str) -> tuple[Path, Path]:
        source, adapter = root / name, root / f"{name}-lora"
        if not source.exists():
            pooling = "lasttoken" if name.startswith("qwen") else "mean"
            save(make_model(name, **WIDE), source, pooling=pooling)
            save_adapter(source, adapter, target=linears(name), size=0.4)
        return source, adapter

    def run(name: str, precision: str, **options: Any) -> Path:
        precision = precision.removesuffix("-unpacked")  # an int4 export has both
        key = json.dumps([name, precision, options], default=str)
        if key not in made:
            source, adapter = source_of(name)
            made[key] = root / f"bundle{len(made)}"
            export_bundle(
                source,
                adapters={"task": adapter},
                precisions=[precision],
                out=made[key],
                **{"calibration": few_texts, **options},
            )
        return made[key]

    return run


def vectors(bundle: Path, precision: str, texts: list[str] = TEXTS, **options: Any) -> NDArray[Any]:
    encoded: NDArray[Any] = Embedder(bundle, precision=precision, threads=1).encode(
        texts, **options
    )
    return encoded


def assert_close(exact: NDArray[Any], quantized: NDArray[Any], precision: str) -> None:
    close = cosines(exact, quantized)
    assert np.isfinite(quantized).all()
    assert close.mean() > MEAN[precision]
    assert close.min() > LOWEST[precision]


def graph_of(bundle: Path, precision: str, task: str = "task") -> onnx.ModelProto:
    return onnx.load(bundle / precision / f"{task}.onnx", load_external_data=False)


def initializers(bundle: Path, precision: str) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in graph_of(bundle, precision).graph.initializer}


def feeds(session: ort.InferenceSession, ids: NDArray[Any], mask: NDArray[Any]) -> dict[str, Any]:
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {i.name: values[i.name] for i in session.get_inputs()}


# -- closeness ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("name", MODELS)
def test_vectors_stay_close_to_fp32(name: str, precision: str, export: Export) -> None:
    exact = vectors(export(name, "fp32"), "fp32")
    assert_close(exact, vectors(export(name, precision), precision), precision)


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_vectors_stay_close_without_calibration(name: str, precision: str, export: Export) -> None:
    exact = vectors(export(name, "fp32"), "fp32")
    quantized = vectors(export(name, precision, calibration="none"), precision)
    assert_close(exact, quantized, precision)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_vectors_stay_close_with_the_packages_calibration_texts(
    precision: str, export: Export
) -> None:
    exact = vectors(export("bert", "fp32"), "fp32")
    quantized = vectors(export("bert", precision, calibration="default"), precision)
    assert_close(exact, quantized, precision)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_vectors_stay_close_with_a_file_of_calibration_texts(
    precision: str, export: Export, root: Path
) -> None:
    file = root / "texts.txt"
    file.write_text("\n".join(random_texts(60, seed=9)), "utf-8")
    exact = vectors(export("bert", "fp32"), "fp32")
    quantized = vectors(export("bert", precision, calibration=file), precision)
    assert_close(exact, quantized, precision)


@pytest.mark.parametrize("name", MODELS)
def test_fp16_arithmetic_stays_close_to_fp32(name: str, export: Export) -> None:
    exact, half = export(name, "fp32"), export(name, "fp16")
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 90, (4, 40))
    mask = (np.arange(40) < np.array([[40], [25], [3], [1]])).astype(np.int64)
    results = []
    for bundle, precision in ((exact, "fp32"), (half, "fp16")):
        session = open_graph(bundle / precision / "task.onnx")
        results.append(session.run(None, feeds(session, ids, mask))[0])
    assert cosines(*results).min() > 0.9999


def test_gptq_is_closer_than_rounding_on_the_texts_it_saw(export: Export, root: Path) -> None:
    file = root / "seen.txt"
    file.write_text("\n".join(TEXTS * 4), "utf-8")
    exact = vectors(export("bert", "fp32"), "fp32")
    calibrated = cosines(exact, vectors(export("bert", "int4", calibration=file), "int4"))
    rounded = cosines(exact, vectors(export("bert", "int4", calibration="none"), "int4"))
    assert calibrated.mean() > rounded.mean()


def test_an_encoders_int8_weights_are_rounded_by_gptq(export: Export, root: Path) -> None:
    file = root / "seen.txt"
    file.write_text("\n".join(TEXTS * 4), "utf-8")
    exact = vectors(export("bert", "fp32"), "fp32")
    bundle = export("bert", "int8", calibration=file)
    to_nearest = export("bert", "int8", calibration=file, int8_method="rtn")
    stated = json.loads((bundle / "manifest.json").read_text())["precisions"]["int8"]
    assert stated["options"]["method"] == "gptq"
    lost = [1 - cosines(exact, vectors(b, "int8")).mean() for b in (bundle, to_nearest)]
    assert lost[0] < lost[1]


def test_outlier_channels_do_not_spoil_int8(tmp_path: Path, few_texts: Path) -> None:
    model = make_model("qwen2", **WIDE)
    for layer in model.layers:  # the same function, computed through large values
        layer.input_layernorm.weight.data[:3] *= 60
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data[:, :3] /= 60
        layer.mlp.up_proj.weight.data[5] *= 60
        layer.mlp.down_proj.weight.data[:, 5] /= 60
    source = save(model, tmp_path / "source", pooling="lasttoken")
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=["fp32", "int8"],
        out=tmp_path / "out",
        calibration=few_texts,
    )
    assert_close(vectors(out, "fp32"), vectors(out, "int8"), "int8")


# -- batches ------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {}),
    "int8": ("int8", {}),
    "int8 without calibration": ("int8", {"calibration": "none"}),
    "int4": ("int4", {}),
    "int4 rounded to nearest": ("int4", {"int4_method": "rtn"}),
    "int4 in blocks of 16": ("int4", {"int4_block_size": 16, "calibration": "none"}),
    "int4 in blocks of 64": ("int4", {"int4_block_size": 64, "calibration": "none"}),
    "int4 in blocks of 128": ("int4", {"int4_block_size": 128, "calibration": "none"}),
    "int4 unpacked": ("int4-unpacked", {}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert", "modernbert-with-biases", "qwen2"])
def test_a_text_alone_and_in_a_batch_have_one_vector(
    name: str, setting: str, export: Export
) -> None:
    precision, options = SETTINGS[setting]
    bundle = export(name, precision, **options)
    model = Embedder(bundle, precision=precision, threads=1)
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    together = model.encode(TEXTS, batch_size=len(TEXTS))
    backwards = model.encode(TEXTS[::-1], batch_size=5)[::-1]
    assert cosines(alone, together).min() >= EXACT
    assert cosines(alone, backwards).min() >= EXACT


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_padding_gives_numbers_and_changes_no_other_row(
    name: str, precision: str, export: Export
) -> None:
    bundle = export(name, precision)
    session = open_graph(bundle / precision / "task.onnx")
    ids = np.random.default_rng(0).integers(4, 90, (2, 30))
    mask = np.ones_like(ids)
    mask[0, 4:] = 0
    mask[1] = 0
    both = session.run(None, feeds(session, ids, mask))[0]
    alone = session.run(None, feeds(session, ids[:1, :4], mask[:1, :4]))[0]
    assert np.isfinite(both).all()
    # padding changes a float32 sum in its last bits; a level of a quantized input may flip by that
    bound = {"fp16": 0.9999, "int4": 0.99999}.get(precision, EXACT)
    assert cosines(both[:1], alone).min() > bound


@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_token_of_zeros_gives_no_nan(precision: str, tmp_path: Path, few_texts: Path) -> None:
    model = make_model("qwen2", **WIDE)
    model.embed_tokens.weight.data[[5, 7]] = 0
    source = save(model, tmp_path / "source", pooling="mean")
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=["fp32", precision.removesuffix("-unpacked")],
        out=tmp_path / "out",
        calibration=few_texts,
    )
    zero, other = (WORDS[i - 4] for i in (5, 7))
    texts = [zero + other + zero, zero, "ab" + zero + "cd" + other]
    exact, quantized = vectors(out, "fp32", texts), vectors(out, precision, texts)
    assert np.isfinite(quantized).all()
    assert_close(exact, quantized, precision)


# -- layers kept --------------------------------------------------------------------------------------


def types_of_linears(bundle: Path, precision: str) -> dict[str, int]:
    return {
        name.removesuffix(".weight"): t.data_type
        for name, t in initializers(bundle, precision).items()
        if name.endswith(".weight") and len(t.dims) > 1 and name.startswith(("encoder.", "layers."))
    }


KEEPS = {
    "output projection": {"encoder.layer.*.attention.output.dense": "fp32"},
    "value's layer": {"*.attention.self.*": "fp32"},
    "one layer": {"encoder.layer.0.*": "fp32"},
}


@pytest.mark.parametrize("kept", KEEPS)
def test_layers_kept_at_fp32_and_only_those_are_float(kept: str, export: Export) -> None:
    keep = KEEPS[kept]
    from fnmatch import fnmatchcase

    [pattern] = keep
    types = types_of_linears(export("bert", "int8", keep=keep), "int8")
    floats = {n for n, kind in types.items() if kind == TensorProto.FLOAT}
    assert floats == {n for n in types if fnmatchcase(n, pattern)}
    assert floats


@pytest.mark.parametrize("name", ["bert", "qwen2"])
@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize(
    "part", ["o_proj|attention.output.dense", "v_proj|self.value", "down_proj"]
)
def test_a_kept_layer_leaves_the_vectors_as_close(
    name: str, precision: str, part: str, export: Export
) -> None:
    if name == "bert" and "|" not in part:
        part = "*|intermediate.dense"
    decoder, _, encoder = part.partition("|")
    keep = {f"*{encoder if name == 'bert' else decoder}": "fp32"}
    exact = vectors(export(name, "fp32"), "fp32")
    quantized = vectors(export(name, precision, keep=keep), precision)
    assert_close(exact, quantized, precision)


@pytest.mark.parametrize("name", ["bert", "qwen2"])
@pytest.mark.parametrize("part", ["out", "value", "mlp"])
def test_layers_kept_at_int8_leave_int4_as_close(name: str, part: str, export: Export) -> None:
    pattern = {
        ("bert", "out"): "*.attention.output.dense",
        ("bert", "value"): "*.self.value",
        ("bert", "mlp"): "*.layer.?.output.dense",
        ("qwen2", "out"): "*.o_proj",
        ("qwen2", "value"): "*.v_proj",
        ("qwen2", "mlp"): "*.up_proj",
    }[name, part]
    bundle = export(name, "int4", keep={pattern: "int8"})
    assert TensorProto.INT8 in types_of_linears(bundle, "int4").values()
    exact = vectors(export(name, "fp32"), "fp32")
    assert_close(exact, vectors(bundle, "int4"), "int4")
    assert_close(exact, vectors(bundle, "int4-unpacked"), "int4-unpacked")


def test_a_kept_embedding_table_is_float(export: Export) -> None:
    bundle = export("bert", "int8", keep={"embeddings.word_embeddings": "fp32"})
    table = initializers(bundle, "int8")["embeddings.word_embeddings.weight"]
    assert table.data_type == TensorProto.FLOAT


def test_a_layer_is_kept_by_the_name_that_the_report_shows(export: Export) -> None:
    report = json.loads((export("bert", "int8") / "int8/task.layers.json").read_text())
    name = next(row["name"] for row in report["layers"] if "output.dense" in row["name"])
    types = types_of_linears(export("bert", "int8", keep={name: "fp32"}), "int8")
    assert types[name.removesuffix(".weight")] == TensorProto.FLOAT


def test_the_first_pattern_decides_also_where_it_keeps_the_precision(export: Export) -> None:
    keep = {"encoder.layer.0.*": "int8", "encoder.layer.*": "fp32"}
    for name, kind in types_of_linears(export("bert", "int8", keep=keep), "int8").items():
        first = name.startswith("encoder.layer.0.")
        assert kind == (TensorProto.INT8 if first else TensorProto.FLOAT)


@pytest.mark.parametrize(
    ("precision", "kept"),
    [("int8", "fp32"), ("int8", "int8"), ("int4", "int8"), ("fp32", "fp32"), ("fp16", "fp32")],
)
def test_a_pattern_that_matches_nothing_is_an_error(
    precision: str, kept: str, export: Export
) -> None:
    with pytest.raises(EmbedgeValueError, match=r"keep pattern 'encoder\.layer\.9\.\*'"):
        export("bert", precision, keep={"encoder.layer.9.*": kept})


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_pattern_that_changes_nothing_leaves_the_bytes(precision: str, export: Export) -> None:
    kept = export("bert", precision, keep={"encoder.layer.0.*": "fp32"})
    for name in ("task.onnx", "shared.bin"):
        file = f"{precision}/{name}"
        assert (kept / file).read_bytes() == (export("bert", precision) / file).read_bytes()


def test_a_bundle_with_int8_layers_kept_runs_on_the_cpu_alone(export: Export) -> None:
    bundle = export("bert", "int4", keep={"*.attention.output.dense": "int8"})
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["precisions"]["int4"]["devices"] == ["cpu"]
    assert manifest["precisions"]["int4"]["activation_constants"]


# -- what is stored -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "kind", "columns"),
    [
        ("int8", TensorProto.UINT8, 64),
        ("int4", TensorProto.UINT8, 32),
        ("fp16", TensorProto.FLOAT16, 64),
    ],
)
def test_the_embedding_table_is_stored_small(
    precision: str, kind: int, columns: int, export: Export
) -> None:
    table = initializers(export("qwen2", precision), precision)["embed_tokens.weight"]
    assert table.data_type == kind
    assert list(table.dims) == [96, columns]


def test_int8_reports_the_error_of_every_linear(export: Export) -> None:
    bundle = export("bert", "int8")
    rows = json.loads((bundle / "int8/task.layers.json").read_text())["layers"]
    reported = {r["name"].removesuffix(".weight"): r for r in rows}
    for name in types_of_linears(bundle, "int8"):
        assert reported[name]["sqnr_db"] > 30


def test_int4_reports_the_output_error_that_gptq_measured(export: Export) -> None:
    rows = json.loads((export("bert", "int4") / "int4/task.layers.json").read_text())["layers"]
    errors = [r["output_error"] for r in rows if r["name"].startswith("encoder.")]
    assert len(errors) == 12
    assert all(0 < e < 0.2 for e in errors)


def test_a_layer_of_zeros_is_exported_with_strict_json(tmp_path: Path, few_texts: Path) -> None:
    model = make_model("bert", **WIDE)
    model.encoder.layer[0].output.dense.weight.data[:] = 0
    out = export_bundle(
        save(model, tmp_path / "source"),
        adapters={"task": None},
        precisions=["fp32", "int8", "int4"],
        out=tmp_path / "out",
        calibration=few_texts,
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for file in out.rglob("*.json"):
        json.loads(file.read_text("utf-8"), parse_constant=refuse)
    for precision in ("int8", "int4"):
        assert_close(vectors(out, "fp32"), vectors(out, precision), precision)


def test_unpacked_int4_loses_little_more_than_its_weights_have_lost(export: Export) -> None:
    for name in MODELS:
        exact, bundle = vectors(export(name, "fp32"), "fp32"), export(name, "int4")
        lost = {p: 1 - cosines(exact, vectors(bundle, p)).mean() for p in ("int4", "int4-unpacked")}
        assert lost["int4-unpacked"] < 1.1 * lost["int4"] + 1 - MEAN["int8"]


def test_unpacked_int4_adds_a_graph_and_constants_but_no_weights(export: Export) -> None:
    bundle = export("qwen2", "int4", calibration="none")  # nothing smoothed
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["precisions"]["int4-unpacked"]["graphs"] == {"task": "int4/task.unpacked.onnx"}
    assert manifest["precisions"]["int4-unpacked"]["devices"] == ["cpu"]
    graph = onnx.load(bundle / "int4/task.unpacked.onnx", load_external_data=False)
    assert not [n for n in graph.graph.node if n.op_type == "MatMulNBits"]
    places: dict[str, set[str]] = {}
    for name, tensor in {t.name: t for t in graph.graph.initializer}.items():
        entry = {e.key: e.value for e in tensor.external_data}
        places.setdefault(entry.get("location", ""), set()).add(name)
    listed = json.loads((bundle / "int4/task.unpack.json").read_text())["weights"]
    made = {f"{n}.{k}" for n in listed for k in ("weight", "scales")}
    assert places["unpacked"] == made
    assert len(listed) == 14  # two layers' seven


def test_a_task_may_not_be_called_as_the_unpacked_graph_of_another(export: Export) -> None:
    with pytest.raises(EmbedgeValueError, match=r"not ending in \.unpacked"):
        export_bundle("nowhere", adapters={"a.unpacked": None}, precisions=["int4"], out="nowhere")


# -- activation constants -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_activation_constants_are_the_same_in_graph_and_manifest(name: str, export: Export) -> None:
    bundle = export(name, "int8")
    stated = json.loads((bundle / "manifest.json").read_text())["precisions"]["int8"]
    held = {n: t for n, t in initializers(bundle, "int8").items() if n.startswith("embedge.")}
    assert held.keys() == stated["activation_constants"].keys()
    for constant, value in stated["activation_constants"].items():
        array = numpy_helper.to_array(held[constant])
        assert array.dtype == value["dtype"]
        assert array == np.asarray(value["full"], value["dtype"])


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_seven_bit_activations_give_close_vectors(name: str, export: Export) -> None:
    bundle = export(name, "int8")
    held = initializers(bundle, "int8")
    options = session_options(threads=1)
    replaced = []
    for constant, value in ACTIVATION_CONSTANTS.items():
        if constant in held:
            tensor = np.asarray(value["reduced"], value["dtype"])
            replaced.append(ort.OrtValue.ortvalue_from_numpy(tensor))
            options.add_initializer(constant, replaced[-1])
    graph = bundle / "int8/task.onnx"
    reduced = open_graph(graph, options)
    full = open_graph(graph)
    ids = np.random.default_rng(1).integers(4, 90, (6, 30))
    data = feeds(full, ids, np.ones_like(ids))
    close = cosines(reduced.run(None, data)[0], full.run(None, data)[0])
    assert 0.998 < close.min() < 1 - 1e-9


# -- exactness of what int8 moves around ----------------------------------------------------------------
def test_int8_loses_no_bias_to_the_shift_of_its_inputs(tmp_path: Path, few_texts: Path) -> None:
    """Large biases: a dropped, doubled or unscaled one would move every vector."""
    model = make_model("bert", **WIDE)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "LayerNorm" not in name:
            parameter.data *= 5
        elif name.endswith("LayerNorm.bias"):
            parameter.data += 2
    source = save(model, tmp_path / "source")
    adapter = save_adapter(source, tmp_path / "lora", target=linears("bert"), bias="all", size=0.4)
    out = export_bundle(
        source,
        adapters={"task": adapter},
        precisions=["fp32", "int8"],
        out=tmp_path / "out",
        calibration=few_texts,
    )
    assert_close(vectors(out, "fp32"), vectors(out, "int8"), "int8")


@pytest.mark.parametrize("saved", ["attention.output.LayerNorm", "output.LayerNorm"])
def test_int8_follows_norms_that_an_adapter_replaces(
    saved: str, tmp_path: Path, few_texts: Path
) -> None:
    source = save(make_model("bert", **WIDE), tmp_path / "source")
    adapter = save_adapter(
        source, tmp_path / "lora", target=["query", "value"], modules_to_save=[saved], seed=11
    )
    out = export_bundle(
        source,
        adapters={"bare": None, "task": adapter},
        precisions=["fp32", "int8"],
        out=tmp_path / "out",
        calibration=few_texts,
    )
    for task in ("bare", "task"):
        exact = vectors(out, "fp32", task=task)
        assert_close(exact, vectors(out, "int8", task=task), "int8")


@pytest.mark.parametrize(
    "name", ["qwen2", "llama-with-biases", "modernbert", "modernbert-with-biases"]
)
def test_smoothing_folded_into_producers_is_exact(
    name: str, tmp_path: Path, few_texts: Path
) -> None:
    """Weights on an int8 grid that survives smoothing by powers of two would be lossless; here the
    folded graph is compared with one that keeps the consumers' inputs unsmoothed."""
    model = make_model(name, **WIDE)
    source = save(model, tmp_path / "source", pooling="mean")
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(0)
    for key, value in tensors.items():  # channels of values and gated products of very unlike size
        if key.endswith(("v_proj.weight", "up_proj.weight", "v_proj.bias", "up_proj.bias")):
            factors = np.exp(rng.normal(0, 1.5, len(value))).astype(np.float32)
            tensors[key] = value * (factors[:, None] if value.ndim > 1 else factors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=["fp32", "int8"],
        out=tmp_path / "out",
        calibration=few_texts,
    )
    assert_close(vectors(out, "fp32"), vectors(out, "int8"), "int8")
