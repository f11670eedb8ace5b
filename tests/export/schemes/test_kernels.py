"""Exported graphs have close vectors with embedge's kernels and without, the same prepared or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge.export import export_bundle
from embedge.runtime import Embedder, EmbedgeWarning
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.cli.main import main
from embedge.runtime.kernels.repack import PANELS
from embedge.runtime.sessions.prepared_graphs import PreparedGraphs, machine_name
from embedge.runtime.tuning.prepack_graphs import prepack_graph
from tests.helpers.jina_v4 import write_checkpoint
from tests.helpers.kernel import layouts_seen, needs_kernel, without_kernel
from tests.helpers.models import cosines, make_model, random_texts, save

pytestmark = [needs_kernel, pytest.mark.slow]

Vectors = NDArray[np.float32]

TEXTS = random_texts(24)
UNPACKED = "int4-unpacked"
# Cosine of random tiny models' vectors with embedge's kernels and without: attention in bfloat16, another
# ``silu`` and another order of sums at 4 bits turn some roundings of the activations the other way.
CLOSE = 0.9999
GRAPHS = [("bert", "int8"), ("bert", UNPACKED), ("qwen2", "int8"), ("qwen2", UNPACKED)]
INT4 = [("bert", "int4"), ("qwen2", "int4")]
MIXED = [("mixed", "int4"), ("mixed", UNPACKED)]  # the second layer is kept at int8
IMAGES = [
    np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    for number, (width, height) in enumerate([(28, 28), (113, 111), (56, 140)])
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles whose weights lie in files; 520 columns do not fill their panels."""
    root = tmp_path_factory.mktemp("products")
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 520, "gain": 0.6}
    for name in ("bert", "qwen2"):
        save(make_model(name, **shape), root / name, pooling="mean")
    options: dict[str, Any] = {"adapters": {"task": None}, "calibration": "none"}
    bundles = {
        name: export_bundle(
            root / name, precisions=["int8", "int4"], out=root / f"{name}-bundle", **options
        )
        for name in ("bert", "qwen2")
    }
    bundles["mixed"] = export_bundle(
        root / "qwen2",
        precisions=["int4"],
        keep={"*layers.1.*": "int8"},
        out=root / "mixed-bundle",
        **options,
    )
    return bundles


@pytest.fixture
def bundle(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[request.param], tmp_path / "bundle"))


def encode(bundle: Path, precision: str) -> list[Vectors]:
    """Vectors alone, in a batch, and in batches at the same time."""
    model = Embedder(bundle, precision=precision, threads=2)
    return [model.encode(TEXTS[:1]), model.encode(TEXTS[:8]), model.encode(TEXTS, batch_size=4)]


def same(found: list[Vectors], expected: list[Vectors]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def prepared(bundle: Path, precision: str, name: str = "task") -> Path | None:
    return PreparedGraphs(Bundle(bundle)).find(precision, name)


def close(found: list[Vectors], expected: list[Vectors]) -> bool:
    return all((cosines(*pair) > CLOSE).all() for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(("bundle", "precision"), GRAPHS + INT4 + MIXED, indirect=["bundle"])
def test_vectors_are_close_with_and_without_the_kernel(bundle: Path, precision: str) -> None:
    with layouts_seen() as seen:
        found = encode(bundle, precision)
    assert set(seen) == {precision == UNPACKED}
    with without_kernel(), layouts_seen() as seen:
        expected = encode(bundle, precision)
    assert seen == []
    assert close(found, expected)


def test_a_graph_without_integer_products_does_without_it(tmp_path: Path) -> None:
    precision = "fp32"
    source = save(make_model("bert"), tmp_path / "model")
    out = export_bundle(
        source,
        adapters={"task": None},
        precisions=[precision],
        calibration="none",
        out=tmp_path / "b",
    )
    with layouts_seen() as seen:
        encode(out, precision)
        prepack_graph(PreparedGraphs(Bundle(out)), precision, "task")
        encode(out, precision)
    assert seen == []


@pytest.mark.parametrize(("bundle", "precision"), GRAPHS + INT4 + MIXED, indirect=["bundle"])
def test_a_prepared_graph_is_opened_in_place_and_gives_the_same_vectors(
    bundle: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encode(bundle, precision)
    assert main(["prepare", str(bundle), "--precision", precision, "--pack-only"]) == 0
    file = prepared(bundle, precision)
    assert file is not None

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("laid out again")

    monkeypatch.setattr("embedge.runtime.sessions.unpack.in_panels", refuse)
    with layouts_seen() as seen:
        found = encode(bundle, precision)
    assert set(seen) == {True}
    assert same(found, expected)


@pytest.mark.parametrize(("bundle", "precision"), GRAPHS + INT4, indirect=["bundle"])
def test_a_prepared_graph_has_its_weights_once(bundle: Path, precision: str) -> None:
    opened = Bundle(bundle)
    stored = opened.matmul_weights(precision, "task").values()
    weights = sum(weight.nbytes for weight in stored)
    prepack_graph(PreparedGraphs(opened), precision, "task")
    file = prepared(bundle, precision)
    assert file is not None
    most = 1.6 if precision == "int4" else 1.3  # with the scales and zero points of the blocks
    assert weights < file.with_name("graph.bin").stat().st_size < most * weights
    with without_kernel():
        prepack_graph(PreparedGraphs(opened), precision, "task")
        packed = prepared(bundle, precision)
    assert packed is not None and packed != file
    assert packed.with_name("graph.bin").stat().st_size > 1.8 * weights


@pytest.mark.parametrize(("bundle", "precision"), GRAPHS[2:], indirect=["bundle"])
def test_a_graph_prepared_with_the_kernel_is_not_used_without_it(
    bundle: Path, precision: str
) -> None:
    expected = encode(bundle, precision)
    prepack_graph(PreparedGraphs(Bundle(bundle)), precision, "task")
    name = machine_name()
    with without_kernel():
        assert machine_name() != name
        assert prepared(bundle, precision) is None
        assert close(encode(bundle, precision), expected)
    assert prepared(bundle, precision) is not None


@pytest.mark.parametrize(("bundle", "precision"), GRAPHS[2:], indirect=["bundle"])
def test_a_graph_prepared_without_the_kernel_is_not_used_with_it(
    bundle: Path, precision: str
) -> None:
    expected = encode(bundle, precision)
    with without_kernel():
        prepack_graph(PreparedGraphs(Bundle(bundle)), precision, "task")
        assert close(encode(bundle, precision), expected)
    assert prepared(bundle, precision) is None
    with layouts_seen() as seen:
        assert same(encode(bundle, precision), expected)
    assert set(seen) == {precision == UNPACKED}


@pytest.mark.parametrize(("bundle", "precision"), INT4, indirect=["bundle"])
def test_a_graph_whose_weights_are_laid_out_otherwise_is_left_out(
    bundle: Path, precision: str
) -> None:
    expected = encode(bundle, precision)
    prepack_graph(PreparedGraphs(Bundle(bundle)), precision, "task")
    record = PreparedGraphs(Bundle(bundle)).folders.inside / precision / "task" / "prepared.json"
    found = json.loads(record.read_text())
    assert found["layout"] == PANELS
    record.write_text(json.dumps({**found, "layout": "panels of 16 x 4"}))
    with pytest.warns(EmbedgeWarning, match="not used: weights laid out as panels of 16 x 4, not"):
        assert same(encode(bundle, precision), expected)


@pytest.mark.parametrize(("bundle", "precision"), GRAPHS[2:3], indirect=["bundle"])
def test_a_graph_prepared_for_other_operators_is_not_used(
    bundle: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It calls operators that the library may not have any more, and has no bodies of its functions."""
    prepack_graph(PreparedGraphs(Bundle(bundle)), precision, "task")
    assert prepared(bundle, precision) is not None
    monkeypatch.setattr("embedge.runtime.sessions.prepared_graphs.OPERATORS", "1")
    assert prepared(bundle, precision) is None


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a vision tower."""
    source = write_checkpoint(tmp_path_factory.mktemp("images") / "jina-embeddings-v4")
    return export_bundle(
        source,
        adapters={"code": source / "adapters"},
        precisions=["fp32", "int8", "int4"],
        calibration="none",
        out=source.parent / "bundle",
    )


def vectors_of_images(bundle: Path, precision: str) -> list[Vectors]:
    model = Embedder(bundle, precision=precision, threads=2)
    rows = model.encode(["a text", IMAGES[1]], multi_vector=True)
    return [model.encode_image(IMAGES), model.encode(["a", IMAGES[0], "two words"]), *rows]


def mean_error(found: list[Vectors], exact: list[Vectors]) -> float:
    pairs = zip(found, exact, strict=True)
    return float(np.concatenate([1 - cosines(*pair) for pair in pairs]).mean())


@pytest.mark.parametrize("precision", ["int8", UNPACKED])
def test_vectors_of_images_err_no_more_with_the_kernel(precision: str, with_images: Path) -> None:
    """Both err much in so small a model: by .1 to .3, and half as much between the two."""
    exact = vectors_of_images(with_images, "fp32")
    with_it = mean_error(vectors_of_images(with_images, precision), exact)
    with without_kernel():
        without = mean_error(vectors_of_images(with_images, precision), exact)
    assert with_it < 1.1 * without


@pytest.mark.parametrize("precision", ["int8", UNPACKED])
def test_vectors_of_images_are_the_same_prepared(
    precision: str, with_images: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(with_images, tmp_path / "bundle"))
    expected = vectors_of_images(bundle, precision)
    assert main(["prepare", str(bundle), "--precision", precision, "--pack-only"]) == 0
    assert all(prepared(bundle, precision, name) is not None for name in ("code", "vision"))
    with layouts_seen() as seen:
        assert same(vectors_of_images(bundle, precision), expected)
    assert set(seen) == {True}
