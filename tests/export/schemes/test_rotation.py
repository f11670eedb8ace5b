"""Rotating residual streams changes no vector, and what rotation and outlier channels buy at int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from embedge.export import export_bundle
from embedge.export.errors import CheckpointError
from embedge.export.graph.scheme import Scheme
from embedge.export.weights.rotated import ResidualStream, RotatedWeights
from embedge.export.weights.tensors import NormRef
from embedge.quant.rotation import Rotation, block_rotation, rotate_blocks
from embedge.runtime import Embedder
from embedge.runtime.errors import EmbedgeValueError
from tests.helpers.models import cosines, linears, make_model, random_texts, save, save_adapter
from tests.helpers.weights import StoredWeights

pytestmark = pytest.mark.slow

TEXTS = random_texts(24)
MODELS = ("modernbert", "llama", "llama-with-biases", "mistral", "qwen2", "qwen2-sliding", "qwen3")
GENTLE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 136, "gain": 0.6}


@pytest.mark.parametrize("width", [1, 2, 24, 64, 128, 576, 1280, 1536, 2048])
def test_a_rotation_is_orthogonal_and_spreads_every_channel(width: int) -> None:
    matrix = Rotation(width).matrix().astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=2e-6)
    odd = width // (width & -width)
    limit = np.sqrt((2 if odd > 1 else 1) / width)
    assert np.abs(matrix).max() <= limit * 1.0001


@pytest.mark.parametrize("width", [1, 2, 24, 64, 384, 768, 1024])
def test_a_rotation_that_keeps_means_commutes_with_layer_norm(width: int) -> None:
    rotation = Rotation(width, keeps_mean=True)
    matrix = rotation.matrix().astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=2e-6)
    np.testing.assert_allclose(np.ones(width) @ matrix, np.ones(width), atol=2e-5)
    np.testing.assert_allclose(matrix @ np.ones(width), np.ones(width), atol=2e-5)
    odd = width // (width & -width)
    if width > 2:  # which have no other direction to spread to
        assert np.abs(matrix).max() <= 2.1 * np.sqrt((2 if odd > 1 else 1) / width)

    def normalized(x: NDArray[np.float64]) -> NDArray[np.float64]:
        x = x - x.mean(axis=1, keepdims=True)
        return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5)

    x = np.random.default_rng(0).normal(1, 3, (5, width))
    np.testing.assert_allclose(normalized(x @ matrix), normalized(x) @ matrix, atol=1e-5)


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_rows_and_columns_are_products_with_the_matrix(keeps_mean: bool) -> None:
    rotation = Rotation(96, keeps_mean=keeps_mean)
    values = np.random.default_rng(0).normal(size=(3, 5, 96))
    assert (rotation.mirror is not None) == keeps_mean
    matrix = rotation.matrix().astype(np.float64)
    rows = rotation.rows(values.astype(np.float32))
    np.testing.assert_allclose(rows, values @ matrix, atol=1e-5)
    columns = rotation.columns(values.reshape(15, 96).T.astype(np.float32))
    np.testing.assert_allclose(columns, matrix.T @ values.reshape(15, 96).T, atol=1e-5)
    bias = rotation.columns(values[0, 0].astype(np.float32))
    np.testing.assert_allclose(bias, matrix.T @ values[0, 0], atol=1e-5)


def stored_tensors() -> StoredWeights:
    """A few random tensors."""
    draw = np.random.default_rng(1)
    shapes = {"table": (20, 8), "w.weight": (8, 6), "norm.weight": (8,)}
    tensors = {n: draw.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    return StoredWeights(tensors, adapted=("norm.weight",))


def test_rows_of_a_rotated_tensor_are_those_of_the_whole() -> None:
    stream = ResidualStream(width=8, tables=("table",), writers=("w",))
    weights = RotatedWeights(stored_tensors(), [stream])
    for name in ("table", "w.weight"):
        part = weights.read(name, slice(2, 5))
        np.testing.assert_allclose(part, weights.read(name)[2:5], atol=1e-6)


def test_a_table_takes_the_norm_behind_it() -> None:
    stored = stored_tensors()
    norm = NormRef(name="norm", epsilon=1e-5)
    stream = ResidualStream(width=8, tables=("table",), table_norm=norm, centred=True)
    weights = RotatedWeights(stored, [stream])
    table = torch.from_numpy(stored.tensors["table"])
    states = torch.nn.functional.layer_norm(
        table, (8,), torch.from_numpy(stored.tensors["norm.weight"])
    )
    turned = states.numpy() @ Rotation(8, keeps_mean=True).matrix()
    np.testing.assert_allclose(weights.read("table"), turned, atol=1e-5)
    np.testing.assert_allclose(weights.read("table", slice(3, 9)), turned[3:9], atol=1e-5)
    assert weights.absorbed("norm.weight") and not weights.absorbed("table")
    assert weights.version("table") == "task"  # of the norm


def test_a_reader_belongs_to_the_task_that_changes_its_norm() -> None:
    stored = stored_tensors()
    stored.tensors["r.weight"] = np.ones((3, 8), np.float32)
    weights = RotatedWeights(
        stored, [ResidualStream(width=8, readers={"r": "norm.weight"}, output="norm.weight")]
    )
    assert weights.version("r.weight") == "task"
    assert weights.version("table") == "base"
    np.testing.assert_array_equal(weights.read("norm.weight"), np.ones(8))


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_model_gives_the_same_vectors(
    name: str, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, adapter = tmp_path / "model", tmp_path / "lora"
    save(make_model(name, hidden_size=48, intermediate_size=56), source, pooling=pooling)
    save_adapter(source, adapter, target=linears(name))

    def vectors(out: Path) -> NDArray[Any]:
        export_bundle(source, adapters={"task": adapter}, precisions=["fp32"], out=out)
        return Embedder(out, threads=1).encode(TEXTS)

    plain = vectors(tmp_path / "plain")
    monkeypatch.setattr(Scheme, "rotates", True)
    turned = vectors(tmp_path / "turned")
    graphs = [(tmp_path / n / "fp32" / "task.bin").read_bytes() for n in ("plain", "turned")]
    assert graphs[0] != graphs[1]
    assert cosines(plain, turned).min() > 0.9999999


def test_norms_that_a_task_saved_are_rotated_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, bundle = tmp_path / "model", tmp_path / "b"
    save(make_model("modernbert", **GENTLE), source, pooling="cls")
    save_adapter(source, tmp_path / "a", target=linears("modernbert"))
    saved = ["norm", "final_norm", "mlp_norm", "tok_embeddings"]
    save_adapter(source, tmp_path / "s", target=["Wqkv"], modules_to_save=saved, seed=4)
    adapters = {"plain": None, "lora": tmp_path / "a", "saved": tmp_path / "s"}
    export_bundle(source, adapters=adapters, precisions=["fp32"], out=bundle)
    model = Embedder(bundle, threads=1)
    expected = {task: model.encode(TEXTS, task=task) for task in adapters}
    monkeypatch.setattr(Scheme, "rotates", True)
    export_bundle(source, adapters=adapters, precisions=["fp32"], out=bundle, overwrite=True)
    monkeypatch.undo()
    export_bundle(source, adapters=adapters, precisions=["int8"], out=tmp_path / "i")
    model, model8 = Embedder(bundle, threads=1), Embedder(tmp_path / "i", threads=1)
    for task, vectors in expected.items():
        turned = model.encode(TEXTS, task=task)
        assert cosines(vectors, turned).min() > 0.9999999, task
        assert cosines(vectors, model8.encode(TEXTS, task=task)).mean() > 0.998, task
        assert task == "plain" or cosines(vectors, expected["plain"]).max() < 0.999


def test_norms_with_biases_are_not_rotated(tmp_path: Path, few_texts: Path) -> None:
    source = tmp_path / "model"
    save(make_model("modernbert-with-biases"), source, pooling="mean")
    exported(source, tmp_path / "b", precisions=["int8"], calibration=few_texts)
    assert _manifest(tmp_path / "b").precisions["int8"].options["rotation"] is False


def test_norm_biases_that_the_config_does_not_know_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    save(make_model("modernbert-with-biases"), source, pooling="mean")
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps({**config, "norm_bias": False}), "utf-8")
    with pytest.raises(CheckpointError, match=r"found .*norm\.bias.*differs from what its config"):
        export_bundle(source, adapters={"task": None}, out=tmp_path / "b")


def spoil(source: Path) -> None:
    """Give a decoder what large ones have: outlier residual channels, and one gated channel far above all."""
    tensors = load_file(source / "model.safetensors")
    table = next(n for n in tensors if n.endswith("embed_tokens.weight"))
    tensors[table][:, [3, 40]] *= 40
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor[7] *= 30
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("spoilt") / "model"
    save(make_model("qwen2", **GENTLE, num_hidden_layers=3), source, pooling="mean")
    spoil(source)
    return source


def exported(source: Path, out: Path, **options: Any) -> NDArray[Any]:
    export_bundle(source, adapters={"task": None}, out=out, **options)
    vectors: NDArray[Any] = Embedder(out, threads=1).encode(TEXTS)
    return vectors


@pytest.fixture(scope="module")
def spoilt_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outlier channels of the stream, and of what MLPs multiply."""
    source = tmp_path_factory.mktemp("spoilt-encoder") / "model"
    wide = {**GENTLE, "hidden_size": 192, "intermediate_size": 288}
    save(make_model("modernbert", **wide), source, pooling="mean")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("embeddings.norm.weight"):
            tensor[[3, 40]] *= 20
        if name.endswith("mlp.Wi.weight"):
            tensor[[7, 7 + len(tensor) // 2]] *= 6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


# of the encoder without rotation, a mean row apart takes some of the error away already
@pytest.mark.parametrize(("model", "most"), [("spoilt", 0.5), ("spoilt_encoder", 0.7)])
def test_rotation_takes_the_error_of_outlier_channels_down(
    model: str,
    most: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    source = request.getfixturevalue(model)
    exact = exported(source, tmp_path / "exact", precisions=["fp32"])
    options: dict[str, Any] = {"precisions": ["int8"], "int8_method": "rtn"}
    rotated = 1 - cosines(exact, exported(source, tmp_path / "a", **options)).mean()
    monkeypatch.setattr("embedge.export.schemes.int8.Int8Scheme.rotates", False)
    plain = 1 - cosines(exact, exported(source, tmp_path / "b", **options)).mean()
    assert rotated < most * plain


@pytest.mark.parametrize(
    ("width", "size"), [(11008, 16), (1536, 16), (3420, 15), (61, 1), (20, 10), (7, 7), (1, 1)]
)
def test_a_blocks_rotation_is_orthogonal_and_spreads_a_channel(width: int, size: int) -> None:
    rotation = block_rotation(width)
    assert rotation.shape == (size, size) and rotation.dtype == np.float32
    assert np.allclose(rotation @ rotation.T, np.eye(size), atol=1e-6)
    assert np.abs(rotation).max() <= np.sqrt(2 / size) + 1e-6 or size == 1
    values = np.random.default_rng(width).normal(size=(2, 3, width)).astype(np.float32)
    found = rotate_blocks(values, rotation)
    assert found.shape == values.shape
    for block in range(0, width, size):
        expected = values[..., block : block + size] @ rotation
        assert np.allclose(found[..., block : block + size], expected, atol=1e-5)


def test_gptq_takes_the_error_of_int8_weights_down(spoilt: Path, tmp_path: Path) -> None:
    exact = exported(spoilt, tmp_path / "exact", precisions=["fp32"])
    errors = {
        method: 1
        - cosines(
            exact,
            exported(spoilt, tmp_path / method, precisions=["int8"], int8_method=method),
        ).mean()
        for method in ("rtn", "gptq")
    }
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_int8_decoders_do_not_depend_on_the_batch(
    spoilt: Path, tmp_path: Path, few_texts: Path
) -> None:
    options: dict[str, Any] = {"precisions": ["int8"], "calibration": few_texts}
    export_bundle(spoilt, adapters={"task": None}, out=tmp_path / "b", **options)
    model = Embedder(tmp_path / "b", threads=1)
    together = model.encode(TEXTS)
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    assert cosines(together, alone).min() > 0.999999


def test_the_manifest_records_method_and_rotation(
    spoilt: Path, tmp_path: Path, few_texts: Path
) -> None:
    given: dict[str, Any] = {"precisions": ["int8", "int4"], "calibration": few_texts}
    export_bundle(spoilt, adapters={"task": None}, out=tmp_path / "b", **given)
    options = {name: value.options for name, value in _manifest(tmp_path / "b").precisions.items()}
    assert options["int8"]["method"] == options["int4"]["method"] == "gptq"
    assert options["int8"]["rotation"] and options["int4"]["rotation"]


def _manifest(path: Path) -> Any:
    from embedge.runtime.bundle.folder import Bundle

    return Bundle(path).manifest


def test_a_bad_method_is_refused(spoilt: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="int8_method 'best': expected one of gptq, rtn"):
        export_bundle(spoilt, adapters={"task": None}, out=tmp_path / "b", int8_method="best")
