"""int8 and int4 of Gemma's models: outlier channels in the stream, heads of 256 and 512, any kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from embedge.export import export_bundle
from embedge.runtime import Embedder
from tests.export.families import test_embedding_gemma2, test_gemma3
from tests.helpers.gemma import texts_of, with_outliers
from tests.helpers.kernel import without_kernel
from tests.helpers.models import cosines

pytestmark = pytest.mark.slow

WIDTH = 128
TEXTS = texts_of([2, 3, 9, 20, 31, 40, 77, 150, 300, *range(10, 130, 8)])
LONG = texts_of([2, 60, 511, 512, 513, 1000])
PRECISIONS = ["fp32", "int8", "int4"]
MEAN = {"int8": 0.999, "int4": 0.98, "int4-unpacked": 0.98}
LOWEST = {"int8": 0.997, "int4": 0.9, "int4-unpacked": 0.9}
GEMMA3 = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2}
GEMMA2 = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "embedding_dim": WIDTH}
LARGE = {"2": {"head_dim": 512, "num_key_value_heads": 1}}
MODELS: dict[str, tuple[Callable[[Path, dict[str, Any]], Path], float, dict[str, Any]]] = {
    "EmbeddingGemma": (test_gemma3.write_source, 1.0, {**GEMMA3, "head_dim": 256}),
    "causal": (
        test_gemma3.write_source,
        1.0,
        {**GEMMA3, "head_dim": 256, "use_bidirectional_attention": False},
    ),
    "EmbeddingGemma 2": (
        test_embedding_gemma2.write_source,
        0.0,
        {
            **GEMMA2,
            "hidden_size_per_layer_input": WIDTH,
            "head_dim": 256,
            "per_layer_config": LARGE,
        },
    ),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("bundles"), {}
    calibration = root / "texts.txt"
    calibration.write_text("\n".join(texts_of([40] * 48, seed=5)), "utf-8")
    for name, (write, offset, settings) in MODELS.items():
        source = write(root / name, settings)
        file = source / "model.safetensors"
        tensors = with_outliers(load_file(file), width=WIDTH, norm_offset=offset)
        save_file(tensors, file, metadata={"format": "pt"})
        made[name] = export_bundle(
            source,
            adapters={"task": None},
            precisions=PRECISIONS,
            calibration=calibration,
            out=root / f"{name}-out",
        )
    return made


def vectors(bundle: Path, precision: str, texts: list[str]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = Embedder(bundle, precision=precision, threads=1).encode(texts)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_outlier_channels_leave_vectors_close(name: str, bundles: dict[str, Path]) -> None:
    exact = vectors(bundles[name], "fp32", TEXTS)
    for precision, mean in MEAN.items():
        close = cosines(exact, vectors(bundles[name], precision, TEXTS))
        assert close.mean() >= mean, precision
        assert close.min() >= LOWEST[precision], precision


def test_a_budget_gives_8_bits_to_layers_with_a_third_sublayer(tmp_path: Path) -> None:
    source = test_embedding_gemma2.write_source(tmp_path / "source", {})
    (tmp_path / "texts.txt").write_text("\n".join(texts_of([40] * 40)), "utf-8")
    options: dict[str, Any] = {"adapters": {"task": None}, "calibration": tmp_path / "texts.txt"}
    close = {}
    for budget in (None, "320 KB"):
        out = export_bundle(
            source,
            precisions=["fp32", "int4"],
            out=tmp_path / f"out-{budget}",
            budget=budget,
            **options,
        )
        exact, found = (vectors(out, precision, TEXTS) for precision in ("fp32", "int4"))
        close[budget] = cosines(exact, found).mean()
    assert close["320 KB"] > close[None]


@pytest.mark.parametrize("kernels", ["own", "onnxruntime"])
@pytest.mark.parametrize("name", MODELS)
def test_large_heads_run_with_any_kernels_on_short_and_long_texts(
    name: str, kernels: str, bundles: dict[str, Path]
) -> None:
    exact = vectors(bundles[name], "fp32", LONG)
    with nullcontext() if kernels == "own" else without_kernel():
        for precision, lowest in LOWEST.items():
            model = Embedder(bundles[name], precision=precision, threads=1)
            together = model.encode(LONG)
            alone = np.concatenate([model.encode([text]) for text in LONG])
            assert cosines(exact, together).min() >= lowest, precision
            assert cosines(alone, together).min() >= 0.999999, precision
