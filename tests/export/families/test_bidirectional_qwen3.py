"""Qwen3 without a causal mask as pplx-embed-v1 and voyage-4-nano publish it, against the published rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError
from tests.helpers.bidirectional import (
    BOUND,
    LONG,
    TEXTS,
    adapted,
    assert_parity,
    change,
    exported,
    long_model,
    vectors,
)
from tests.helpers.models import LINEARS, cosines, save, save_adapter, write_json

# -- pplx-embed-v1: whole numbers ----------------------------------------------------------------------

PPLX = {
    "architectures": ["PPLXQwen3Model"],
    "auto_map": {
        "AutoConfig": "configuration.PPLXQwen3Config",
        "AutoModel": "modeling.PPLXQwen3Model",
    },
    "model_type": "bidirectional_pplx_qwen3",
    "use_bidirectional_attention": True,
}


def write_pplx(folder: Path) -> tuple[Any, Path]:
    """Qwen3's weights in the published files: the quantizer is the model's own class, without a folder."""
    base = long_model("qwen3")
    source = save(base, folder, pooling="mean", normalize=False, max_length=LONG)
    change(source, **PPLX)
    modules = json.loads((source / "modules.json").read_text())
    quantizer = {"idx": 2, "name": "2", "path": "", "type": "st_quantize.FlexibleQuantizer"}
    write_json(source / "modules.json", [*modules, {**quantizer, "kwargs": ["quantization"]}])
    return base, source


@pytest.mark.slow
def test_pplx_gives_whole_numbers_by_the_published_rule(tmp_path: Path) -> None:
    base, source = write_pplx(tmp_path / "source")
    means = vectors(base, source, TEXTS, pooling="mean", normalize=False)
    expected = torch.round(torch.tanh(torch.from_numpy(means)) * 127).numpy()
    model = exported(source, tmp_path / "out")
    found = model.encode(TEXTS)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.round(found)) and np.abs(found).max() <= 127
    assert np.abs(found - expected).max() <= 1  # a mean in another order may lie beyond a half
    assert (found != expected).mean() < 0.01
    assert np.array_equal(model.encode(TEXTS, truncate_dim=8), found[:, :8])
    lengths = np.linalg.norm(model.encode(TEXTS, normalize_embeddings=True), axis=1)
    assert np.abs(lengths - 1).max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.PPLXQwen3ContextualModel"}}, "never run"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"use_bidirectional_attention": False}, "use_bidirectional_attention is false"),
        ({"model_type": "qwen3", **dict.fromkeys(("architectures", "auto_map"))},
         "use_bidirectional_attention is true"),
    ],
    ids=str,
)  # fmt: skip
def test_pplx_of_another_kind_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, source = write_pplx(tmp_path / "source")
    change(source, **changes)
    with pytest.raises(CheckpointError, match=message):
        exported(source, tmp_path / "out")


def test_the_quantizer_is_known_of_that_model_alone_and_does_not_follow_normalize(
    tmp_path: Path,
) -> None:
    _, source = write_pplx(tmp_path / "source")
    modules = json.loads((source / "modules.json").read_text())
    normalize = {
        "idx": 9,
        "name": "9",
        "path": "9",
        "type": "sentence_transformers.models.Normalize",
    }
    write_json(source / "modules.json", [*modules[:2], normalize, modules[2]])
    with pytest.raises(CheckpointError, match="not supported in this order"):
        exported(source, tmp_path / "out")
    write_json(source / "modules.json", modules)
    change(source, **{"model_type": "qwen3", **dict.fromkeys(PPLX.keys() - {"model_type"}, ...)})
    with pytest.raises(CheckpointError, match=r"st_quantize\.FlexibleQuantizer is not supported"):
        exported(source, tmp_path / "out")
    (source / "modules.json").unlink()
    change(source, **PPLX)
    with pytest.raises(ValueError, match="does not say how tokens become a vector"):
        exported(source, tmp_path / "out")


# -- voyage-4-nano: states are projected --------------------------------------------------------------

VOYAGE = {  # beside Qwen3's keys
    "architectures": ["Qwen3ForCausalLM"],
    "auto_map": {"AutoModel": "modeling_qwen3_bidirectional.Qwen3BidirectionalModel"},
    "num_labels": 48,
    "use_bidirectional_attention": True,
}


def write_voyage(folder: Path) -> tuple[Any, torch.Tensor, Path]:
    """Qwen3, the projection, and the published layout."""
    base = long_model("qwen3")
    source = save(base, folder, pooling="mean", max_length=LONG)
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(9)) / 32**0.5
    set_projection(source, weight)
    return base, weight, change(source, **VOYAGE)


def set_projection(source: Path, weight: torch.Tensor | None) -> None:
    file = source / "model.safetensors"
    kept = {n.removeprefix("model."): t for n, t in load_file(file).items() if n != "linear.weight"}
    tensors = {f"model.{name}": tensor for name, tensor in kept.items()}
    if weight is not None:
        tensors["linear.weight"] = weight
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.slow
def test_voyage_averages_projected_states(tmp_path: Path) -> None:
    plain = save(long_model("qwen3"), tmp_path / "source")
    adapter = save_adapter(plain, tmp_path / "adapter", target=rf".*({LINEARS['decoder']})")
    base, weight, source = write_voyage(tmp_path / "source")
    means = vectors(adapted(source, adapter, base), source, TEXTS, pooling="mean", normalize=False)
    projected = torch.nn.functional.linear(torch.from_numpy(means), weight)
    expected = torch.nn.functional.normalize(projected, dim=-1).numpy()
    model = exported(source, tmp_path / "out", adapters={"task": adapter})
    assert model.encode("a").shape == (48,)
    assert_parity(model, expected)
    set_projection(source, weight * torch.linspace(0.9, 1.1, 48)[:, None])
    other = exported(source, tmp_path / "other", adapters={"task": adapter})
    assert cosines(other.encode(TEXTS), expected).max() < BOUND


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": ...}, "num_labels is None"),
        ({"num_labels": 40}, r"linear\.weight: expected shape \[40, 32\]"),
        ({"auto_map": {"AutoModel": "modeling_qwen3.Other"}}, "never run"),
        ({"auto_map": ...}, "use_bidirectional_attention is true"),
        ({"auto_map": ..., "use_bidirectional_attention": ..., "is_causal": False},
         "found linear.weight"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
    ],
    ids=str,
)  # fmt: skip
def test_voyage_of_another_kind_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, _, source = write_voyage(tmp_path / "source")
    change(source, **changes)
    with pytest.raises(CheckpointError, match=message):
        exported(source, tmp_path / "out")


def test_voyage_with_a_bias_of_its_projection_is_refused(tmp_path: Path) -> None:
    _, _, source = write_voyage(tmp_path / "source")
    file = source / "model.safetensors"
    bias = {"linear.bias": torch.ones(48)}
    save_file({**load_file(file), **bias}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"linear\.bias: expected no such tensor"):
        exported(source, tmp_path / "out")


def test_voyage_without_its_projection_is_refused(tmp_path: Path) -> None:
    _, _, source = write_voyage(tmp_path / "source")
    set_projection(source, None)
    with pytest.raises(CheckpointError, match=r"expected a tensor linear\.weight"):
        exported(source, tmp_path / "out")
