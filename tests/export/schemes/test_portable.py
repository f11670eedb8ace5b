"""Portable int8: exact in any session of ONNX Runtime; other int8 graphs stop where products saturate.

The processor without VNNI is this one, masked (``tests/processors``), or one that saturates itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from embedge.export import export_bundle
from embedge.export.graph.saturation import ADVICE
from embedge.runtime import Embedder
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.host import saturation
from embedge.runtime.sessions import session as sessions
from tests.helpers.command import program
from tests.helpers.exports import manifest
from tests.helpers.masked_processor import environment_as_avx2
from tests.helpers.models import Reference, cosines, make_model, save
from tests.helpers.plain_onnxruntime import TASK, plain

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["ab", "a", "hello world, how are you?", "x" * 50, "0123456789 !", "one two three"]
MODELS = {"bert": "mean", "qwen2": "lasttoken"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("sources")
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "gain": 0.6}
    return {
        name: save(make_model(name, **wide), place / name, pooling=pooling)
        for name, pooling in MODELS.items()
    }


@pytest.fixture(scope="module")
def bundles(
    sources: dict[str, Path], few_texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Of each model, portable and not."""
    place = tmp_path_factory.mktemp("bundles")
    return {
        f"{name} {kind}": export_bundle(
            source,
            adapters={TASK: None},
            precisions=["int8"],
            calibration=few_texts,
            out=place / f"{name}-{kind}",
            portable=kind == "portable",
        )
        for name, source in sources.items()
        for kind in ("portable", "usual")
    }


@pytest.fixture(scope="module")
def on_avx2(
    bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, package_path: Path
) -> dict[str, dict[str, Any]]:
    """What :mod:`tests.helpers.plain_onnxruntime` found where products saturate, by bundle."""
    variables = environment_as_avx2(tmp_path_factory.mktemp("mask"))
    variables |= {"EMBEDGE_KERNELS": "onnxruntime", "PYTHONPATH": f"{package_path}:{ROOT}"}
    asked = {"bundles": {name: str(path) for name, path in bundles.items()}, "texts": TEXTS}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.plain_onnxruntime", json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
        env=variables,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["saturates"]
    assert not found["kernels"]
    vectors: dict[str, dict[str, Any]] = found["vectors"]
    return vectors


# -- where products saturate --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_portable_graph_gives_embedges_vectors_without_an_option(
    name: str, on_avx2: dict[str, dict[str, Any]], sources: dict[str, Path]
) -> None:
    found = {kind: np.array(rows) for kind, rows in on_avx2[f"{name} portable"].items()}
    assert set(found) == {"embedge", "asked", "plain", "prepared"}  # no guard, and no error
    for kind in ("embedge", "asked", "prepared"):
        assert np.abs(found["plain"] - found[kind]).max() < 1e-4, kind
    assert cosines(found["plain"], Reference(sources[name]).encode(TEXTS)).min() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_another_graph_says_what_it_needs_instead_of_giving_wrong_vectors(
    name: str, on_avx2: dict[str, dict[str, Any]], sources: dict[str, Path]
) -> None:
    found = on_avx2[f"{name} usual"]
    assert "plain" not in found
    assert ADVICE in found["error"]
    exact, wrong = np.array(found["embedge"]), np.array(found["without guard"])
    assert np.abs(exact - np.array(found["asked"])).max() < 1e-4
    assert np.abs(exact - np.array(found["prepared"])).max() < 1e-4
    assert cosines(exact, Reference(sources[name]).encode(TEXTS)).min() > 0.99
    assert np.abs(exact - wrong).max() > 1e-2  # so the comparison of portable vectors can fail


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["portable", "usual"])
@pytest.mark.parametrize("name", MODELS)
def test_vectors_from_there_are_those_of_this_processor(
    name: str, kind: str, on_avx2: dict[str, dict[str, Any]], bundles: dict[str, Path]
) -> None:
    bundle = bundles[f"{name} {kind}"]
    here = Embedder(bundle).encode(TEXTS)
    assert cosines(np.array(on_avx2[bundle.name.replace("-", " ")]["asked"]), here).min() > 0.995


# -- on any processor ---------------------------------------------------------------------------------------


def weights(bundle: Path) -> dict[str, np.ndarray[Any, np.dtype[np.int8]]]:
    """The int8 weights that a graph multiplies, ``[in, out]``."""
    model = onnx.load(str(bundle / "int8" / f"{TASK}.onnx"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.input[1]: numpy_helper.to_array(tensors[node.input[1]])
        for node in model.graph.node
        if node.op_type.startswith("MatMulIntegerToFloat")
    }


def most_of_two_products(weight: np.ndarray[Any, np.dtype[np.int8]]) -> int:
    """The largest magnitude that ``vpmaddubsw`` adds up: of uint8 times rows 2i and 2i + 1 of a weight."""
    wide = weight.astype(np.int64)
    pairs = wide[: len(wide) // 2 * 2].reshape(-1, 2, wide.shape[1])
    above = np.maximum(pairs, 0).sum(axis=1).max(initial=0) * 255
    below = np.minimum(pairs, 0).sum(axis=1).min(initial=0) * 255
    return int(max(above, -below))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_two_products_of_portable_weights_exceed_16_bits(
    name: str, bundles: dict[str, Path]
) -> None:
    portable, usual = (weights(bundles[f"{name} {kind}"]) for kind in ("portable", "usual"))
    assert len(portable) >= 8
    assert max(map(most_of_two_products, portable.values())) <= 32767
    assert max(map(most_of_two_products, usual.values())) > 32767


@pytest.mark.slow
def test_what_a_bundle_says_of_it(bundles: dict[str, Path]) -> None:
    for kind, expected in (("portable", True), ("usual", False)):
        bundle = bundles[f"bert {kind}"]
        said = manifest(bundle)["precisions"]["int8"]
        assert said.get("portable", False) is expected
        assert said["options"].get("portable", False) is expected
        notes = {
            entry.key: entry.value
            for entry in onnx.load(
                str(bundle / "int8" / f"{TASK}.onnx"), load_external_data=False
            ).metadata_props
        }
        assert ("embedge.portable" in notes) is expected
        assert ("embedge.session_config" in notes) is not expected
        card = (bundle / "README.md").read_text("utf-8")
        assert ("x64quantprecision" in card) is not expected
        shown = " ".join(
            program(["inspect", str(bundle)], stdout=subprocess.PIPE).stdout.decode().split()
        )
        assert (" as it is task" in shown) is expected
        assert ("x64quantprecision=1" in shown) is not expected


@pytest.mark.slow
def test_embedge_asks_for_exact_products_of_others_alone(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(options: Any) -> None:
        asked.append("asked")
        saturation.ask_for_exact_matmuls(options)

    monkeypatch.setattr(sessions, "keep_matmuls_exact", ask)
    monkeypatch.setattr(saturation, "saturates_u8s8", lambda: True)
    monkeypatch.setattr(sessions, "own_kernels", lambda: False)  # whose products are exact
    for kind, expected in (("portable", []), ("usual", ["asked"])):
        asked.clear()
        Embedder(bundles[f"bert {kind}"], threads=1).encode("a b c")
        assert sorted(set(asked)) == expected


@pytest.mark.slow
def test_plain_onnx_runtime_gives_embedges_vectors_here(bundles: dict[str, Path]) -> None:
    for bundle in bundles.values():
        graph = bundle / "int8" / f"{TASK}.onnx"
        given = plain(bundle, graph, TEXTS, exact=True)
        ours = Embedder(bundle).encode(TEXTS)
        assert cosines(given, ours).min() > 0.999


@pytest.mark.slow
def test_tasks_of_a_precision_are_portable_together(
    sources: dict[str, Path], bundles: dict[str, Path], few_texts: Path
) -> None:
    options: dict[str, Any] = {"precisions": ["int8"], "calibration": few_texts}
    for kind, advice in (("portable", "add --portable"), ("usual", "leave out --portable")):
        out = bundles[f"bert {kind}"]
        with pytest.raises(EmbedgeValueError, match=advice):
            export_bundle(
                sources["bert"],
                adapters={"more": None},
                out=out,
                portable=kind != "portable",
                **options,
            )
        assert list(Bundle(out).manifest.tasks) == [TASK]


@pytest.mark.slow
def test_eight_bit_layers_of_int4_are_portable_too(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    out = export_bundle(
        sources["qwen2"],
        adapters={TASK: None},
        precisions=["int4"],
        calibration="none",
        keep={"*down_proj*": "int8"},
        out=tmp_path / "out",
        portable=True,
    )
    model = onnx.load(str(out / "int4" / f"{TASK}.onnx"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = [
        numpy_helper.to_array(tensors[node.input[1]])
        for node in model.graph.node
        if node.op_type.startswith("MatMulIntegerToFloat")
    ]
    assert kept
    assert max(map(most_of_two_products, kept)) <= 32767
    assert manifest(out)["precisions"]["int4"]["portable"] is True
    assert "portable" not in manifest(out)["precisions"]["int4-unpacked"]


def test_portable_is_about_integers_alone(tmp_path: Path) -> None:
    with pytest.raises(EmbedgeValueError, match=r"portable: it is about 8-bit weights, and fp32"):
        export_bundle(tmp_path, precisions=["fp32"], out=tmp_path / "out", portable=True)
    with pytest.raises(EmbedgeValueError, match="portable: expected True or False, found 'yes'"):
        export_bundle(tmp_path, precisions=["int8"], out=tmp_path / "out", portable="yes")  # type: ignore[arg-type]
