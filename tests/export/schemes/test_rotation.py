"""Rotating residual streams changes no vector, and what rotation and outlier channels buy at int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from embedge.export import export_bundle
from embedge.export.calibration.smoothing import rotated_constants
from embedge.export.calibration.statistics import InputStatistics
from embedge.export.errors import CheckpointError
from embedge.export.graph.builder import Graph
from embedge.export.graph.onnx_model import to_model
from embedge.export.graph.scheme import Scheme
from embedge.export.graph.values import LinearGroup, LinearRef, ScaleSink, Value
from embedge.export.schemes.floats import Float32Scheme
from embedge.export.schemes.int8 import Int8Scheme
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from embedge.export.weights.rotated import ResidualStream, RotatedWeights
from embedge.export.weights.tensors import NormRef
from embedge.quant.rotation import Rotation, block_rotation, rotate_blocks
from embedge.runtime import Embedder
from embedge.runtime.errors import EmbedgeValueError
from tests.helpers.models import cosines, linears, make_model, random_texts, save, save_adapter
from tests.helpers.sessions import open_graph

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


class Stored:
    """A few random tensors."""

    def __init__(self) -> None:
        draw = np.random.default_rng(1)
        self.tensors = {
            name: draw.normal(size=shape).astype(np.float32)
            for name, shape in (("table", (20, 8)), ("w.weight", (8, 6)), ("norm.weight", (8,)))
        }

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def absorbed(self, norm: str) -> bool:
        return False

    def version(self, name: str) -> str:
        return "task" if name == "norm.weight" else "base"

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        return self.tensors[name][rows or slice(None)].copy()


def test_rows_of_a_rotated_tensor_are_those_of_the_whole() -> None:
    stream = ResidualStream(width=8, tables=("table",), writers=("w",))
    weights = RotatedWeights(Stored(), [stream])
    for name in ("table", "w.weight"):
        part = weights.read(name, slice(2, 5))
        np.testing.assert_allclose(part, weights.read(name)[2:5], atol=1e-6)


def test_a_table_takes_the_norm_behind_it() -> None:
    stored = Stored()
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
    stored = Stored()
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


def test_norms_with_biases_are_not_rotated(tmp_path: Path) -> None:
    source = tmp_path / "model"
    save(make_model("modernbert-with-biases"), source, pooling="mean")
    exported(source, tmp_path / "b", precisions=["int8"])
    assert _manifest(tmp_path / "b").precisions["int8"].options["rotation"] is False


def test_norm_biases_that_the_config_does_not_know_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    save(make_model("modernbert-with-biases"), source, pooling="mean")
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps({**config, "norm_bias": False}), "utf-8")
    with pytest.raises(CheckpointError, match=r"found .*norm\.bias.*differs from what its config"):
        export_bundle(source, adapters={"task": None}, out=tmp_path / "b")


def spoil(source: Path) -> None:
    """Give a decoder what large ones have: loud residual channels, and one gated channel far above all."""
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
    """Loud channels of the stream, and of what MLPs multiply."""
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


@pytest.mark.parametrize(("model", "most"), [("spoilt", 0.5), ("spoilt_encoder", 0.65)])
def test_rotation_takes_the_error_of_loud_channels_down(
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


def model_of(g: Graph) -> onnx.ModelProto:
    """A graph with the tensors that its initializers make."""
    for output in g.outputs:
        output.type.tensor_type.ClearField("shape")
    tensors = [
        numpy_helper.from_array(array, spec.name)
        for initializer in g.initializers.values()
        for spec, array in zip(initializer.specs, initializer.compute(), strict=True)
    ]
    return to_model(g, tensors, "g", {})


def gated(loud: float) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Inputs ``[rows, 64]``, of which every tenth has a loud channel, and weights up and down."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200, 64)).astype(np.float32)
    up = np.eye(64, dtype=np.float32)
    down = draw.normal(size=(32, 64)).astype(np.float32)
    x[::10, 7] *= loud
    return x, up, down


def gated_input(*factors: Value, value: Value | None = None) -> LinearGroup:
    """What the last Linear of a gated MLP reads."""
    value = value or Value("product")
    value.factors = factors[0], factors[1]
    sink = ScaleSink(linear=LinearRef("up"))
    return LinearGroup(value=value, linears=(LinearRef("down"),), sink=sink)


def product_error(loud: float) -> tuple[float, int]:
    """Median error of the rows of an int8 product, relative to what the other channels make of it.

    Also how many channels were set apart.
    """
    x, up, down = gated(loud)
    stored = Stored()
    stored.tensors = {"up.weight": up, "down.weight": down}
    group = gated_input(Value("x"), Value("ones"))
    statistics = InputStatistics(group, 64, None)
    statistics.add(x)
    statistics.sample, statistics.matrices = [x.copy()], [down.T.copy()]
    plan = rotated_constants(statistics)
    assert plan.smooth is not None
    scheme = Int8Scheme({("down",): plan})
    g = Graph(weights=stored, scheme=scheme)
    factors = g.input("x", TensorProto.FLOAT, ["batch", "tokens", 64]), g.const(np.ones(64))
    (y,) = scheme.linears(g, gated_input(*factors, value=g.op("Mul", *factors)))
    g.output(y, "out", TensorProto.FLOAT, [])
    session = open_graph(model_of(g))
    # the producer would have divided by the smoothing
    (found,) = session.run(None, {"x": (x / plan.smooth)[None]})
    quiet = x.copy()
    quiet[:, 7] = 0
    errors = np.linalg.norm(found[0] - x @ down.T, axis=1)
    errors /= np.linalg.norm(quiet @ down.T, axis=1)
    return float(np.median(errors[::10])), 0 if plan.outliers is None else len(plan.outliers)


def test_loud_channels_are_set_apart_and_cost_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet, none = product_error(loud=1)
    assert none == 0
    loud, one = product_error(loud=1000)
    assert one == 1
    assert loud < 1.5 * quiet
    monkeypatch.setattr("embedge.export.calibration.smoothing.OUTLIER_RATIO", np.inf)
    assert product_error(loud=1000)[0] > 3 * loud


class Rows:
    """A gated MLP of random weights, and what int8 makes of it."""

    def __init__(self, inner: int, *, bias: bool = False) -> None:
        draw = np.random.default_rng(inner)
        self.tensors = {
            "gate.weight": draw.normal(size=(inner, 48)).astype(np.float32),
            "up.weight": draw.normal(size=(inner, 48)).astype(np.float32),
            "down.weight": draw.normal(size=(40, inner)).astype(np.float32),
        }
        if bias:
            self.tensors["up.bias"] = draw.normal(size=inner).astype(np.float32)
        self.inner = inner

    def run(self, x: NDArray[np.float32], scheme: Scheme | None = None) -> NDArray[np.float32]:
        stored = Stored()
        stored.tensors = self.tensors
        g = Graph(weights=stored, scheme=scheme or Int8Scheme({}))
        g.input("x", TensorProto.FLOAT, ["batch", "tokens", 48])
        gate, up, down = LinearRef("gate"), LinearRef("up"), LinearRef("down")
        y = g.gated("x", gate, up, "silu")
        (y,) = g.linears(y, [down])
        g.output(y, "out", TensorProto.FLOAT, [])
        self.graph = model_of(g)
        session = open_graph(self.graph)
        result: NDArray[np.float32] = session.run(None, {"x": x[None]})[0][0]
        return result

    def exact(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        gate, up, down = (
            self.tensors[f"{n}.weight"].astype(np.float64) for n in ("gate", "up", "down")
        )
        a, b = x @ gate.T, x @ up.T + self.tensors.get("up.bias", np.float64(0))
        product: NDArray[np.float64] = (a * expit(a) * b) @ down.T
        return product


def relative(found: NDArray[np.float32], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Error of each row relative to its length."""
    error: NDArray[np.float64] = np.linalg.norm(found - exact, axis=1)
    return error / np.linalg.norm(exact, axis=1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inner", [64, 60, 61])  # blocks of 16, of 15, and of one channel
def test_a_gated_mlp_at_int8_is_close_for_rows_of_any_size(inner: int, bias: bool) -> None:
    mlp = Rows(inner, bias=bias)
    x = np.random.default_rng(1).normal(size=(60, 48)).astype(np.float32)
    x *= np.float32(10) ** np.linspace(-3, 3, 60, dtype=np.float32)[:, None]
    assert relative(mlp.run(x, Float32Scheme()), mlp.exact(x)).max() < 1e-5
    errors = relative(mlp.run(x), mlp.exact(x))
    assert np.median(errors) < 0.02 and errors.max() < 0.05
    sizes = {t.name: tuple(t.dims) for t in mlp.graph.graph.initializer}
    rotations = [name for name, size in sizes.items() if size == block_rotation(inner).shape]
    assert len(rotations) == 1
    assert sizes["down.weight"] == (inner, 40)


def test_the_scale_of_a_product_that_is_multiplied_again_waits_for_the_next() -> None:
    for bias in (False, True):
        mlp = Rows(64, bias=bias)
        mlp.run(np.ones((2, 48), np.float32))
        (up,) = (n for n in mlp.graph.graph.node if n.name == "up")
        constants = {t.name for t in mlp.graph.graph.initializer}
        assert (up.input[2] in constants) is not bias  # the scale per row, or 1


def test_a_row_of_zeros_gives_zeros_and_a_constant_one_no_error() -> None:
    mlp = Rows(64)
    x = np.zeros((3, 48), np.float32)
    x[1] = 1
    result = mlp.run(x)
    assert not result[[0, 2]].any() and np.isfinite(result).all()
    mlp.tensors["gate.weight"][:] = mlp.tensors["gate.weight"][0]  # every product is the same
    mlp.tensors["up.weight"][:] = mlp.tensors["up.weight"][0]
    values = mlp.run(x[1:2])
    down = np.abs(mlp.tensors["down.weight"])
    rounding = (down.max(axis=1) / 127 / 2).sum()  # the weights' own
    assert np.abs(values - mlp.exact(x[1:2])).max() < rounding * np.abs(mlp.exact(x[1:2])).max()


def test_rotated_blocks_err_less_than_rows_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gated product has a few large values in a row."""
    mlp = Rows(512)
    x = np.random.default_rng(2).normal(size=(400, 48)).astype(np.float32)
    rotated = relative(mlp.run(x), mlp.exact(x)).mean()
    monkeypatch.setattr("embedge.export.schemes.int8.input_rotation", lambda g, group: None)
    assert rotated < 0.85 * relative(mlp.run(x), mlp.exact(x)).mean()


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


def test_a_hessian_is_that_of_the_rotated_inputs() -> None:
    """What GPTQ is told of an input: smoothed, without its outliers, each block rotated."""
    draw = np.random.default_rng(6)
    x = draw.normal(size=(200, 60)).astype(np.float32)
    smooth = draw.uniform(0.5, 2, 60).astype(np.float32)
    plan = SmoothingConstants(smooth=smooth, outliers=np.array([3, 59]))
    stored = Stored()
    stored.tensors = {"down.weight": draw.normal(size=(40, 60)).astype(np.float32)}
    assert plan.smooth is not None
    scheme = Int8Scheme({("down",): plan})
    g = Graph(weights=stored, scheme=scheme)
    group = gated_input(Value("x"), Value("ones"))
    hessian = x.T @ x
    scheme.smooth_hessian(g, group, hessian)
    kept = x / smooth
    kept[:, [3, 59]] = 0
    seen = rotate_blocks(kept, block_rotation(60))
    assert np.allclose(hessian, seen.T @ seen, atol=1e-2 * np.abs(hessian).max() * 1e-2)


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


def test_int8_decoders_do_not_depend_on_the_batch(spoilt: Path, tmp_path: Path) -> None:
    export_bundle(spoilt, adapters={"task": None}, precisions=["int8"], out=tmp_path / "b")
    model = Embedder(tmp_path / "b", threads=1)
    together = model.encode(TEXTS)
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    assert cosines(together, alone).min() > 0.999999


def test_the_manifest_records_method_and_rotation(spoilt: Path, tmp_path: Path) -> None:
    export_bundle(spoilt, adapters={"task": None}, precisions=["int8", "int4"], out=tmp_path / "b")
    options = {name: value.options for name, value in _manifest(tmp_path / "b").precisions.items()}
    assert options["int8"]["method"] == options["int4"]["method"] == "gptq"
    assert options["int8"]["rotation"] and options["int4"]["rotation"]


def _manifest(path: Path) -> Any:
    from embedge.runtime.bundle.folder import Bundle

    return Bundle(path).manifest


def test_a_bad_method_is_refused(spoilt: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="int8_method 'best': expected one of gptq, rtn"):
        export_bundle(spoilt, adapters={"task": None}, out=tmp_path / "b", int8_method="best")
