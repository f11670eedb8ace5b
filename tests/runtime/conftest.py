"""Tiny real bundles: graphs with external data, and a tokenizer of a few words.

The graph embeds ids with a table (``shared.bin``), multiplies by the task's matrix
(``<task>.bin``), averages over attended tokens and normalizes, so that expected vectors are a few
lines of NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from embedge.runtime.bundle.contract import FORMAT_VERSION
from embedge.runtime.bundle.manifest import IMAGE_INPUTS
from embedge.runtime.sessions.session import GraphSession
from tests.helpers.files_of import file_entries
from tests.helpers.image_graphs import (
    PATCH_VALUES,
    TINY,
    of_image,
    of_text,
    write_task,
    write_vision,
)
from tests.helpers.int8_graph import write_int8_bundle

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60)), "query:", "passage:")
DIM, MULTI_DIM, MAX_LENGTH = 8, 4, 16
FP32_SEED = 7

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TinyBundle:
    """A bundle on disk with the weights it was made from.

    Attributes:
        table: float32 ``[words, DIM]``.
        matrices: float32 ``[DIM, DIM]`` by task.
        projection: float32 ``[PATCH_VALUES, DIM]`` of the vision graph.
    """

    path: Path
    table: NDArray[np.float32]
    matrices: Mapping[str, NDArray[np.float32]]
    projection: NDArray[np.float32]

    def expected(self, task: str, ids: Sequence[int]) -> NDArray[np.float32]:
        """The vector of some token ids, float32 ``[DIM]``."""
        pooled = (self.table[list(ids)] @ self.matrices[task]).mean(axis=0)
        vector: NDArray[np.float32] = (pooled / np.linalg.norm(pooled)).astype(np.float32)
        return vector

    def of_text(self, task: str, ids: Sequence[int]) -> tuple[Array, Array]:
        """Vector and multi-vectors of token ids, from a bundle with images."""
        return of_text(self.table, self.matrices[task], ids)

    def of_image(self, task: str, image: Any, **pixels: int) -> tuple[Array, Array]:
        """Vector and multi-vectors of an image."""
        return of_image(self.table, self.matrices[task], self.projection, image, **pixels)

    def manifest(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return document

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Rewrites the manifest after a change in place."""
        document = self.manifest()
        change(document)
        (self.path / "manifest.json").write_text(json.dumps(document))


@dataclass
class Initializers:
    """Tensors of a graph; those named go to an external file at aligned offsets."""

    folder: Path
    tensors: list[TensorProto] = field(default_factory=list)

    def inline(self, name: str, value: Array) -> str:
        self.tensors.append(numpy_helper.from_array(value, name))
        return name

    def external(self, name: str, value: Array, location: str) -> str:
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(value.dtype),
            dims=value.shape,
            data_location=TensorProto.EXTERNAL,
        )
        entries = {"location": location, "offset": "4096", "length": str(value.nbytes)}
        for key, text in entries.items():
            tensor.external_data.add(key=key, value=text)
        self.tensors.append(tensor)
        (self.folder / location).write_bytes(bytes(4096) + value.tobytes())
        return name


def write_graph(
    path: Path,
    table: NDArray[np.float32],
    matrix: NDArray[np.float32],
    *,
    multi_vector: bool = False,
    token_type_ids: bool = False,
) -> None:
    """Writes a task's graph with its external data beside it."""
    data = Initializers(path.parent)
    data.external("table", table, "shared.bin")
    data.external("matrix", matrix, f"{path.stem}.bin")
    data.inline("last", np.array([-1], np.int64))
    data.inline("tokens_axis", np.array([1], np.int64))
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "matrix"], ["states"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["states", "mask3"], ["attended"]),
        helper.make_node("ReduceSum", ["attended", "tokens_axis"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "tokens_axis"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["pooled"]),
        helper.make_node("ReduceL2", ["pooled", "last"], ["norm"], keepdims=1),
        helper.make_node("Div", ["pooled", "norm"], ["embedding"]),
    ]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM])]
    if multi_vector:
        data.inline("start", np.array([0], np.int64))
        data.inline("stop", np.array([MULTI_DIM], np.int64))
        nodes.append(
            helper.make_node("Slice", ["states", "start", "stop", "last"], ["token_embeddings"])
        )
        outputs.append(
            helper.make_tensor_value_info(
                "token_embeddings", TensorProto.FLOAT, ["batch", "tokens", MULTI_DIM]
            )
        )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if token_type_ids else [])]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
        for name in names
    ]
    write_model(path, nodes, inputs, outputs, data.tensors)


def write_model(path: Path, nodes: Any, inputs: Any, outputs: Any, tensors: Any) -> None:
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    )


def write_tokenizer(path: Path, *, special_tokens: bool = True) -> None:
    """A word per token; the file's own limits are wrong on purpose, as real files' often are."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(path))


def write_layers(path: Path) -> None:
    layers = [
        {"name": "small", "shape": [8, 8], "format": "int8", "bytes": 64, "output_error": 0.001},
        {"name": "worst", "shape": [8, 8], "format": "int4", "bytes": 32, "output_error": 0.25},
    ]
    path.write_text(json.dumps({"layers": layers}))


MakeBundle = Callable[..., TinyBundle]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Writes bundles: ``make_bundle(name, tasks=…, precisions=…, special_tokens=…, model=…)``."""
    return bundles_in(tmp_path)


def bundles_in(place: Path) -> MakeBundle:
    """What :func:`make_bundle` is, for a folder."""

    def make(
        name: str = "bundle",
        *,
        tasks: Sequence[str] = ("retrieval",),
        precisions: Mapping[str, Mapping[str, Any]] | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
        special_tokens: bool = True,
        eos: int | None = None,
        multi_vector: bool = False,
        token_type_ids: bool = False,
        images: bool = False,
        model: Mapping[str, Any] | None = None,
    ) -> TinyBundle:
        folder = place / name
        folder.mkdir()
        generator = np.random.default_rng(FP32_SEED)
        table = generator.normal(size=(len(WORDS), DIM)).astype(np.float32)
        matrices = {task: generator.normal(size=(DIM, DIM)).astype(np.float32) for task in tasks}
        projection = generator.normal(size=(PATCH_VALUES, DIM)).astype(np.float32)
        write_tokenizer(folder / "tokenizer.json", special_tokens=special_tokens)
        settings = precisions or {"fp32": {}}
        for precision in settings:
            (folder / precision).mkdir()
            if images:
                write_vision(folder / precision / "vision.onnx", projection)
            for task in tasks:
                graph = folder / precision / f"{task}.onnx"
                if images:
                    write_task(graph, table, matrices[task])
                else:
                    write_graph(
                        graph,
                        table,
                        matrices[task],
                        multi_vector=multi_vector,
                        token_type_ids=token_type_ids,
                    )
                write_layers(folder / precision / f"{task}.layers.json")
        of_images = {
            "max_length": 64,
            "multi_vector_dim": MULTI_DIM,
            "modalities": ["text", "image"],
            "inputs": ["input_ids", "attention_mask", *IMAGE_INPUTS],
            "image": TINY.to_dict(),
        }
        manifest = {
            "format_version": FORMAT_VERSION,
            "producer": {"name": "embedge", "version": "0.1.0"},
            "source": {"name": "tiny", "model_type": "bert", "license": None, "sha256": "0" * 64},
            "model": {
                "dim": DIM,
                "pooling": "mean",
                "normalize": True,
                "max_length": MAX_LENGTH,
                "matryoshka_dims": None,
                "truncate_dim": None,
                "multi_vector_dim": MULTI_DIM if multi_vector else None,
                "modalities": ["text"],
                "inputs": ["input_ids", "attention_mask"]
                + (["token_type_ids"] if token_type_ids else []),
                "similarity": "cosine",
                "image": None,
                **(of_images if images else {}),
                **(model or {}),
            },
            "tokenizer": {
                "file": "tokenizer.json",
                "pad_token_id": 0,
                "append_eos_token_id": eos,
                "truncation_side": "right",
            },
            "tasks": {
                task: {
                    "prompts": dict(prompts or {}),
                    "default_prompt": default_prompt,
                    "adapter": {"name": f"{task}-lora", "sha256": "1" * 64, "base_model": "tiny"},
                }
                for task in tasks
            },
            "precisions": {
                precision: {
                    "graphs": {task: f"{precision}/{task}.onnx" for task in tasks},
                    "vision": f"{precision}/vision.onnx" if images else None,
                    "devices": ["cpu"],
                    "row_multiple": 1,
                    "activation_constants": {},
                    "options": {},
                    "layers": {task: f"{precision}/{task}.layers.json" for task in tasks},
                    "fidelity": {},
                    **changes,
                }
                for precision, changes in settings.items()
            },
            "files": file_entries(folder),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
        return TinyBundle(path=folder, table=table, matrices=matrices, projection=projection)

    return make


@pytest.fixture
def with_images(make_bundle: MakeBundle) -> TinyBundle:
    """Two tasks and a vision tower, prompts and multi-vectors."""
    return make_bundle(
        "images",
        tasks=("retrieval", "code"),
        images=True,
        prompts={"query": "query: "},
        default_prompt="query",
        model={"matryoshka_dims": [4, 8]},
    )


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> TinyBundle:
    """One task, one precision, no prompts."""
    return make_bundle()


@pytest.fixture
def two_tasks(make_bundle: MakeBundle) -> TinyBundle:
    """Two tasks at two precisions, with prompts and declared dimensions."""
    return make_bundle(
        "two",
        tasks=("retrieval", "code"),
        precisions={"fp32": {}, "int4": {"row_multiple": 2}},
        prompts={"query": "query: ", "passage": "passage: "},
        default_prompt="query",
        model={"matryoshka_dims": [2, 4, 8]},
    )


@pytest.fixture
def int8_bundle(make_bundle: MakeBundle) -> tuple[Path, Any]:
    """A bundle whose vectors are int8 products, and the exact ones."""
    tiny = make_bundle(precisions={"int8": {}}, special_tokens=False)
    exact = write_int8_bundle(tiny)
    return tiny.path, exact


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ``(batch, tokens)`` of every run."""
    seen: list[tuple[int, int]] = []
    run = GraphSession.run

    def recording(self: GraphSession, output: str, inputs: Any) -> Any:
        seen.append(inputs["input_ids"].shape)
        return run(self, output, inputs)

    monkeypatch.setattr(GraphSession, "run", recording)
    return seen


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The ``(graph, threads)`` of every session, in the order of their opening."""
    seen: list[tuple[str, int]] = []
    init = GraphSession.__init__

    def recording(self: GraphSession, file: Path, session: Any, **options: Any) -> None:
        seen.append((file.stem, options["threads"]))
        init(self, file, session, **options)

    monkeypatch.setattr(GraphSession, "__init__", recording)
    return seen
