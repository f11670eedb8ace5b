"""Graphs for GPUs use nothing that ONNX Runtime's CUDA provider lacks, and compute what fp32 computes.

No GPU is needed for that: nodes are checked against the kernels that ONNX Runtime publishes
(``cuda_kernels.tsv``), and its CPU provider computes, in float32 where it has no float16 kernel. No
node is excepted: the few that compute shapes, which ONNX Runtime may still place on the CPU, have
kernels as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError, export_bundle
from embedge.runtime import Embedder
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.host.processor import has_amx
from embedge.runtime.sessions.device import cuda_problem
from tests.export.families.test_multi_vector_head import make_source
from tests.helpers.cuda_kernels import CONTRIB, FILE, Kernel, Problems, from_markdown, read
from tests.helpers.jina_v4 import write_checkpoint
from tests.helpers.models import CONFIGS, DECODERS, cosines, make_model, random_texts, save

PRECISIONS = ("fp16", "int4-fp16")
KERNELS = read(FILE.read_text("utf-8"))
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "Sigmoid", "GELU", "SiLU")
# Of single vectors and of rows, by what is encoded. A random model of 64 channels enlarges what is lost
# in an image: .99999 without AMX, .9990 on a Xeon that has it, and at 4 bits no more than a floor.
LOWEST_V4 = {
    ("fp16", "encode"): (0.9999, 0.9999),
    ("fp16", "encode_image"): (0.998, 0.95) if has_amx() else (0.9999, 0.9999),
    ("int4-fp16", "encode"): (0.7, 0.6),
    ("int4-fp16", "encode_image"): (0.7, 0.6),
}
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "gain": 0.6}
# Of random weights, 4-bit ones: see test_precisions.py.
LOWEST = {"fp16": 0.99999, "int4-fp16": 0.93}

Export = Callable[[str], Path]

needs_cuda = pytest.mark.skipif(
    cuda_problem() is not None, reason="needs ONNX Runtime's CUDA provider and a GPU"
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Gemma's values exceed float16: reading.py refuses these precisions
    **{name: (name, {}) for name in CONFIGS if "gemma" not in name},
    "bert with relu": ("bert", {"hidden_act": "relu"}),
    "bert with gelu_new": ("bert", {"hidden_act": "gelu_new"}),
    # 96 channels are 3 blocks of 32, whose 4-bit zero points end within a byte
    "bert of 96": ("bert", {"hidden_size": 96}),
    "qwen2 of 96": ("qwen2", {"hidden_size": 96}),
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a random model for GPUs, at fp32 and int4, once."""
    root = tmp_path_factory.mktemp("cuda")

    def run(name: str) -> Path:
        out = root / f"{name}-bundle"
        if out.exists():
            return out
        if name == "jina-v4":
            source, adapters = write_checkpoint(root / name), None
        elif name == "multi-vector head":
            source, adapters = make_source("qwen2", root / name), {"task": None}
        else:
            kind, changes = MODELS[name]
            pooling = "lasttoken" if kind in DECODERS else "cls" if name == "roberta" else "mean"
            dense = [(24, activation) for activation in ACTIVATIONS] if name == "mpnet" else ()
            model = make_model(kind, **{**WIDE, **changes})
            source = save(model, root / name, pooling=pooling, dense=dense)
            adapters = {"task": None}
        return export_bundle(
            source,
            adapters=adapters,
            precisions=["fp32", "int4", *PRECISIONS],
            out=out,
            calibration="none",
        )

    return run


def graphs(bundle: Path, precision: str) -> list[onnx.ModelProto]:
    files = sorted((bundle / precision).glob("*.onnx"))
    return [onnx.load(file, load_external_data=False) for file in files]


def run(file: Path, feeds: dict[str, NDArray[Any]], provider: str = "CPU") -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        file, options, providers=[f"{provider}ExecutionProvider"]
    )
    wanted = {i.name for i in session.get_inputs()}
    vectors: NDArray[Any] = session.run(["embedding"], {n: feeds[n] for n in wanted})[0]
    return vectors


def batch() -> dict[str, NDArray[Any]]:
    """Rows of four lengths, one of them a single token."""
    ids = np.random.default_rng(0).integers(4, 90, (4, 40))
    mask = (np.arange(40) < np.array([[40], [25], [3], [1]])).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


# -- kernels ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [*MODELS, "multi-vector head", "jina-v4"])
def test_every_node_has_a_cuda_kernel(name: str, precision: str, export: Export) -> None:
    found = graphs(export(name), precision)
    assert len(found) == (4 if name == "jina-v4" else 1)  # three tasks and the vision tower
    for graph in found:
        assert list(Problems(graph, KERNELS)) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_and_attention_are_float16(precision: str, export: Export) -> None:
    """What makes a GPU fast: nothing of a layer's products is left in float32."""
    for name in ("bert", "qwen2"):
        [graph] = graphs(export(name), precision)
        problems = Problems(graph, KERNELS)
        assert list(problems) == []
        heavy = [
            n
            for n in graph.graph.node
            if "Attention" in n.op_type or ".layer" in n.name or "layers." in n.name
        ]
        assert len(heavy) >= 2 * 7
        assert {problems.types[n.output[0]] for n in heavy} == {"float16"}


@pytest.mark.slow
def test_graphs_for_the_cpu_would_not_do(export: Export) -> None:
    """The check finds what was wrong with them: float32 attention, and versions without a kernel."""
    graph, _ = graphs(export("qwen2"), "int4")  # and the unpacked one
    text = "\n".join(Problems(inliner.inline_local_functions(graph), KERNELS))
    assert "(GroupQueryAttention): no kernel for {'T': 'float'" in text
    assert "(Cast): no kernel of version 24; there are 23+, 21-22" in text
    [graph] = graphs(export("bert"), "fp32")
    assert "(Shape): no kernel of version 24" in "\n".join(Problems(graph, KERNELS))


@pytest.mark.parametrize(
    ("op", "inputs", "domain", "attributes", "why"),
    [
        ("Cos", "f", "", {}, "no kernel of version 22; there are 7+"),
        ("Einsum", "ff", "", {"equation": "a,a"}, "no kernel of version 12; there are none"),
        ("Add", "fh", "", {}, "T is float and float16"),
        ("QuickGelu", "i", CONTRIB, {}, "no kernel for {'T': 'int64'}"),
        ("Unheard", "f", CONTRIB, {}, "no kernel, and no definition"),
        (
            "GroupQueryAttention",
            "hhhhh",
            CONTRIB,
            {"num_heads": 4, "kv_num_heads": 3},
            "key heads do not divide",
        ),
        (
            "RotaryEmbedding",
            "hihh",
            CONTRIB,
            {"is_packed_batching": 1},
            "is_packed_batching: expected nothing",
        ),
    ],
)
def test_a_node_without_a_kernel_is_found(
    op: str, inputs: str, domain: str, attributes: dict[str, Any], why: str
) -> None:
    kinds = {"f": TensorProto.FLOAT, "h": TensorProto.FLOAT16, "i": TensorProto.INT64}
    values = [helper.make_tensor_value_info(f"x{i}", kinds[k], [4]) for i, k in enumerate(inputs)]
    node = helper.make_node(op, [v.name for v in values], ["y"], "n", domain=domain, **attributes)
    graph = helper.make_graph([node], "one", values, [])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    assert why in "\n".join(Problems(model, KERNELS))


def test_the_table_is_read_from_the_published_page() -> None:
    page = """
## Operators implemented by CPUExecutionProvider
|**Operator Domain:** *ai.onnx*||||
|Cos|*in* input:**T**<br> *out* output:**T**|22+|**T** = tensor(float)|

## Operators implemented by CUDAExecutionProvider

| Op Name | Parameters | OpSet Version | Types Supported |
|---------|------------|---------------|-----------------|
|**Operator Domain:** *ai.onnx*||||
|Cos|*in* input:**T**<br> *out* output:**T**|7+|**T** = tensor(double), tensor(float)|
|Shape|*in* data:**T**<br> *out* x:**T1**|19+|**T** = seq(tensor(int8)), tensor(bool)|
|||[13, 18]|**T** = tensor(float)<br/> **T1** = tensor(int64)|
|||[1, 12]|**T** = tensor(float)<br/> **T1** = tensor(int64)|
|Sin|*in* input:**T**<br> *out* output:**T**|7+|**T** = tensor(float)|
| |
|**Operator Domain:** *com.microsoft*||||
|Gelu|*in* X:**T**<br> *out* Y:**T**|1+|**T** = tensor(float), tensor(float16)|

## Operators implemented by DmlExecutionProvider
|Cos|*in* input:**T**<br> *out* output:**T**|22+|**T** = tensor(float16)|
"""
    kernels = from_markdown(page, [("", "Cos"), ("", "Shape"), (CONTRIB, "Gelu")])
    assert kernels == [
        Kernel("", "Cos", 7, None, {"T": ("double", "float")}),
        Kernel("", "Shape", 19, None, {"T": ("bool",)}),
        Kernel("", "Shape", 13, 18, {"T": ("float",), "T1": ("int64",)}),
        Kernel(CONTRIB, "Gelu", 1, None, {"T": ("float", "float16")}, ("T",), ("T",)),
    ]
    assert read("\n".join(["# a note", *(k.line() for k in kernels)])) == kernels
    assert [kernels[0].serves(version) for version in (7, 22)] == [True, False]
    assert [kernels[2].serves(version) for version in (13, 15, 19)] == [True, True, False]


# -- vectors, on the CPU --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_vectors_stay_close_to_fp32(name: str, precision: str, export: Export) -> None:
    bundle, feeds = export(name), batch()
    exact = run(bundle / "fp32/task.onnx", feeds)
    assert cosines(exact, run(bundle / precision / "task.onnx", feeds)).min() > LOWEST[precision]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen2-sliding", "qwen3", "bert of 96"])
def test_int4_on_gpus_has_the_weights_of_int4(name: str, export: Export) -> None:
    bundle, feeds = export(name), batch()
    cpu, gpu = (run(bundle / p / "task.onnx", feeds) for p in ("int4", "int4-fp16"))
    # activations of 8 bits on one side, 8-bit tables of odd widths on the other
    assert cosines(cpu, gpu).min() > (0.999 if name == "bert of 96" else 0.9998)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_images_and_multi_vectors_stay_close_to_fp32(precision: str, export: Export) -> None:
    bundle = on_the_cpu(export("jina-v4"))
    pictures = [
        np.random.default_rng(i).integers(0, 256, size, np.uint8)
        for i, size in enumerate([(28, 28, 3), (113, 111, 3), (40, 300, 3)])
    ]
    exact, half = (Embedder(bundle, precision=p, threads=1) for p in ("fp32", precision))
    for encode in ("encode", "encode_image"):
        items = random_texts(8) if encode == "encode" else pictures
        single, multi = (
            [getattr(m, encode)(items, task="code", multi_vector=many) for m in (exact, half)]
            for many in (False, True)
        )
        lowest, lowest_rows = LOWEST_V4[precision, encode]
        assert cosines(*single).min() > lowest
        rows = [cosines(a, b).mean() for a, b in zip(*multi, strict=True)]
        assert min(rows) > lowest_rows


def on_the_cpu(bundle: Path) -> Path:
    """The bundle, its graphs for GPUs declared to run on the CPU as well."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text("utf-8"))
    for precision in PRECISIONS:
        assert manifest["precisions"][precision]["devices"] in (["cuda"], ["cuda", "cpu"])
        manifest["precisions"][precision]["devices"] = ["cuda", "cpu"]
    file.write_text(json.dumps(manifest), "utf-8")
    return bundle


def test_precisions_say_where_they_run(export: Export) -> None:
    manifest = json.loads((export("bert") / "manifest.json").read_text("utf-8"))
    devices = {name: entry["devices"] for name, entry in manifest["precisions"].items()}
    on_cpu, on_gpu = ("fp32", "int4", "int4-unpacked"), ("fp16", "int4-fp16")
    expected = {name: ["cpu"] for name in on_cpu} | {name: ["cuda"] for name in on_gpu}
    assert devices == expected


# -- what float16 cannot hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [70000.0, -1e6])
@pytest.mark.parametrize(
    ("tensor", "precision"),
    [
        ("encoder.layer.1.output.dense.weight", "fp16"),
        ("embeddings.word_embeddings.weight", "fp16"),
    ],
)
def test_a_weight_beyond_float16_is_refused_by_name(
    tensor: str, precision: str, value: float, tmp_path: Path
) -> None:
    source = save(make_model("bert", **WIDE), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[tensor][3, 5] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"^{tensor}: expected magnitudes of at most 65504"):
        export_bundle(source, adapters={"task": None}, precisions=[precision], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_at_float16s_limit_is_taken(tmp_path: Path) -> None:
    model = make_model("bert", **WIDE)
    model.encoder.layer[0].output.dense.weight.data[0, 0] = 65504
    out = export_bundle(
        save(model, tmp_path / "source"),
        adapters={"task": None},
        precisions=["fp16"],
        out=tmp_path / "out",
    )
    assert np.isfinite(run(out / "fp16/task.onnx", batch())).all()


def test_int8_layers_cannot_be_kept_in_a_graph_for_gpus(tmp_path: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="int8 matmuls run on the CPU"):
        export_bundle(
            tmp_path,
            adapters={"task": None},
            precisions=["int4", "int4-fp16"],
            out=tmp_path / "out",
            keep={"*.output.dense": "int8"},
        )


def test_layers_kept_at_fp32_have_kernels_too(tmp_path: Path) -> None:
    source = save(make_model("bert", **WIDE), tmp_path / "source")
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=["int4-fp16"],
        out=tmp_path / "out",
        keep={"*.output.dense": "fp32"},
        calibration="none",
    )
    [graph] = graphs(out, "int4-fp16")
    assert list(Problems(graph, KERNELS)) == []


# -- on a GPU -----------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_gives_the_vectors_of_the_cpu(name: str, precision: str, export: Export) -> None:
    bundle, feeds = export(name), batch()
    file = bundle / precision / "task.onnx"
    assert cosines(run(file, feeds), run(file, feeds, "CUDA")).min() > 0.9999


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [*MODELS, "multi-vector head"])
def test_every_float_is_computed_on_the_gpu(
    name: str, precision: str, export: Export, tmp_path: Path
) -> None:
    """What ONNX Runtime leaves to the processor computes shapes."""
    [graph] = graphs(export(name), precision)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    [file] = (export(name) / precision).glob("*.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CUDAExecutionProvider"])
    feeds = {value.name: batch()[value.name] for value in session.get_inputs()}
    session.run(["embedding"], feeds)
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    ran = {
        event["name"].removesuffix("_kernel_time"): event["args"]["provider"]
        for event in events
        if event["name"].endswith("_kernel_time") and "provider" in event["args"]
    }
    types = Problems(graph, KERNELS)
    assert list(types) == []
    floats = {
        node.name
        for node in graph.graph.node
        if types.types[node.output[0]] in ("float", "float16") and node.name in ran
    }
    assert len(floats) > 20
    assert {ran[node] for node in floats} == {"CUDAExecutionProvider"}


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen2"])
def test_on_a_gpu_a_vector_does_not_depend_on_its_batch(
    name: str, precision: str, export: Export
) -> None:
    model = Embedder(export(name), precision=precision, device="cuda")
    texts = random_texts(40)
    together = model.encode(texts, task="task")
    alone = np.concatenate([model.encode([text], task="task") for text in texts])
    shuffled = np.random.default_rng(0).permutation(len(texts))
    mixed = model.encode([texts[i] for i in shuffled], task="task", batch_size=7)
    assert cosines(together, alone).min() > 0.999999
    assert cosines(together[shuffled], mixed).min() > 0.999999


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_images_and_multi_vectors_on_a_gpu_are_those_of_the_cpu(
    precision: str, export: Export
) -> None:
    bundle = on_the_cpu(export("jina-v4"))
    pictures = [
        np.random.default_rng(i).integers(0, 256, size, np.uint8)
        for i, size in enumerate([(28, 28, 3), (113, 111, 3), (40, 300, 3)])
    ]
    cpu, gpu = (
        Embedder(bundle, precision=p, device=d)
        for p, d in (("fp32" if precision == "fp16" else precision, "cpu"), (precision, "cuda"))
    )
    for encode in ("encode", "encode_image"):
        items = random_texts(8) if encode == "encode" else pictures
        single, multi = (
            [getattr(m, encode)(items, task="code", multi_vector=many) for m in (cpu, gpu)]
            for many in (False, True)
        )
        lowest, lowest_rows = LOWEST_V4["fp16", encode]
        assert cosines(*single).min() > lowest
        rows = [cosines(a, b).mean() for a, b in zip(*multi, strict=True)]
        assert min(rows) > lowest_rows


@needs_cuda
def test_auto_takes_the_gpu_and_a_precision_that_runs_there(export: Export) -> None:
    model = Embedder(export("bert"), precision="auto", device="auto")
    assert (model.device, model.precision) == ("cuda", "fp16")
