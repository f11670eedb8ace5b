"""nomic-bert: as transformers 5 saves it and as it was published."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError, export_bundle
from embedge.runtime import Embedder, EmbedgeWarning
from tests.helpers.exports import manifest
from tests.helpers.models import (
    Reference,
    cosines,
    linears,
    save,
    save_adapter,
    texts_of_lengths,
    write_json,
)
from tests.helpers.published_encoders import (
    NOMIC_CODE,
    make_encoder,
    nomic_config,
    nomic_tensors,
    rewrite,
    save_lora,
)

KIND = "nomic_bert"
LENGTHS = (3, 4, 5, 9, 17, 31, 63, 64, 65, 90, 127, 128, 200, 300, 400, 511, 512, 513, 900, 1000)
TEXTS = texts_of_lengths(LENGTHS)
SHORT = texts_of_lengths((3, 7, 20, 40))
LAYOUTS = ("native", "published", "with a prefix")

needs_5 = pytest.mark.skipif(
    KIND not in transformers.CONFIG_MAPPING,
    reason="needs transformers 5, whose NomicBertModel is the reference",
)


def exported(source: Path, out: Path, adapter: Path | None = None, **options: Any) -> Embedder:
    chosen: dict[str, Any] = {"precisions": ["fp32"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "adapter 'task' was trained on")
        export_bundle(source, adapters={"task": adapter}, out=out, **chosen)
    return Embedder(out, precision=chosen["precisions"][-1], threads=1)


def published(source: Path, prefix: str = "", **changes: Any) -> Path:
    return rewrite(source, lambda t: nomic_tensors(t, prefix), lambda c: nomic_config(c, **changes))


def encoder(folder: Path, layout: str = "published", **changes: Any) -> Path:
    source = save(make_encoder(KIND, **changes), folder, max_length=1024)
    prefix = "bert." if layout == "with a prefix" else ""
    return source if layout == "native" else published(source, prefix)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("nomic")
    return {layout: encoder(root / layout, layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def adapter(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(sources["native"], tmp_path_factory.mktemp("lora"), target=linears(KIND))


@pytest.fixture(scope="module")
def expected(sources: dict[str, Path], adapter: Path) -> NDArray[Any]:
    return Reference(sources["native"], adapter).encode(TEXTS)


@needs_5
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_are_those_of_transformers_with_the_adapter_unmerged(
    layout: str, sources: dict[str, Path], adapter: Path, expected: NDArray[Any], tmp_path: Path
) -> None:
    model = exported(sources[layout], tmp_path / "out", adapter)
    assert cosines(model.encode(TEXTS, batch_size=7), expected).min() >= 0.999999
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    assert cosines(alone, expected).min() >= 0.999999


@pytest.mark.slow
def test_both_layouts_give_one_vector(sources: dict[str, Path], tmp_path: Path) -> None:
    native, *others = (exported(sources[n], tmp_path / n).encode(SHORT) for n in LAYOUTS)
    for other in others:
        assert np.array_equal(native, other)


def tensors_of(source: Path) -> dict[str, torch.Tensor]:
    return load_file(source / "model.safetensors")


def store(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def configured(source: Path, **changes: Any) -> None:
    file = source / "config.json"
    write_json(file, {**json.loads(file.read_text()), **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("embeddings.token_type_embeddings", "emb_ln", "norm1", "norm2"),
        *("attn.Wqkv", "attn.out_proj", "mlp.fc11", "mlp.fc12", "mlp.fc2"),
    ],
)
def test_every_tensor_reaches_the_vector(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = encoder(tmp_path / "source")
    before = exported(source, tmp_path / "before").encode(SHORT)
    tensors = tensors_of(source)
    keys = [key for key in tensors if f"{name}." in key]
    assert keys
    store(source, {k: v * 0 if k == keys[-1] else v for k, v in tensors.items()})
    after = exported(source, tmp_path / "after").encode(SHORT)
    assert cosines(before, after).min() < 0.9999


@pytest.mark.slow
def test_every_part_of_an_adapter_reaches_the_vector(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    modules = [f"layers.{layer}.{name}" for layer in range(2) for name in names]
    shapes = {key: value.shape for key, value in tensors_of(sources["native"]).items()}
    lora = save_lora(tmp_path / "all", {m: tuple(shapes[f"{m}.weight"]) for m in modules})
    whole = exported(sources["published"], tmp_path / "out", lora).encode(SHORT)
    for name in names:
        less = save_lora(
            tmp_path / name, {m: tuple(shapes[f"{m}.weight"]) for m in modules if name not in m}
        )
        vectors = exported(sources["published"], tmp_path / f"out-{name}", less).encode(SHORT)
        assert cosines(whole, vectors).min() < 0.9999, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prenorm": True}, "prenorm is true"),
        ({"causal": True}, "causal is true"),
        ({"use_rms_norm": True}, "use_rms_norm is true"),
        ({"parallel_block": True}, "parallel_block is true"),
        ({"rotary_emb_fraction": 0.5}, "rotary_emb_fraction is 0.5"),
        ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved is true"),
        ({"rotary_emb_scale_base": 512}, "rotary_emb_scale_base is 512"),
        ({"activation_function": "glu"}, "activation_function is 'glu'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_experts": 8, "moe_every_n_layers": 2}, r"nomic-embed v2 \(moe\)"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"n_head": 5}, "num_attention_heads and hidden_size"),
        ({"n_embd": 64}, "expected shape"),
        ({"n_inner": 257}, "expected shape"),
        ({"hidden_size": 48}, "n_embd is 32 and hidden_size 48"),
        ({"qkv_proj_bias": True}, r"q_proj\.bias: expected this tensor"),
        ({"mlp_fc2_bias": None}, "mlp_fc2_bias is None"),
        (
            {"auto_map": {"AutoModel": "org/other--modeling_hf_nomic_bert.NomicBertModel"}},
            "auto_map",
        ),
        ({"auto_map": {**NOMIC_CODE, "AutoModel": "mine.NomicBertModel"}}, "auto_map names 'mine"),
        ({"architectures": ["NomicBertMoE"]}, "architectures names 'NomicBertMoE'"),
        ({"alibi": True}, "alibi is true"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_implemented_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = encoder(tmp_path / "source")
    configured(source, **changes)
    with pytest.raises(CheckpointError, match=message):
        exported(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["activation_function", "rotary_emb_fraction", "qkv_proj_bias"])
def test_a_missing_key_counts_as_in_the_published_class(key: str, tmp_path: Path) -> None:
    source = encoder(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {k: v for k, v in config.items() if k != key})
    with pytest.raises(CheckpointError, match="is 'gelu_new'|is 0.0|q_proj.bias"):
        exported(source, tmp_path / "out")


@pytest.mark.parametrize("what", ["missing", "unused"])
@pytest.mark.parametrize(
    "name", ["encoder.layers.1.norm2.bias", "encoder.layers.0.mlp.fc12.weight"]
)
def test_tensors_that_are_missing_or_unused_are_refused(
    what: str, name: str, tmp_path: Path
) -> None:
    source = encoder(tmp_path / "source")
    tensors = tensors_of(source)
    if what == "missing":
        tensors.pop(name)
    else:
        tensors[name.replace(".1.", ".2.").replace("fc12", "fc13")] = torch.ones(32)
    store(source, tensors)
    with pytest.raises(CheckpointError, match="expected"):
        exported(source, tmp_path / "out")


@pytest.mark.slow
def test_biases_are_read_where_config_json_has_them(tmp_path: Path) -> None:
    source = encoder(tmp_path / "source")
    before = exported(source, tmp_path / "before").encode(SHORT)
    tensors = tensors_of(source)
    flags = {"qkv_proj_bias": "attn.", "mlp_fc1_bias": "mlp.fc1", "mlp_fc2_bias": "mlp.fc2"}
    for flag, part in flags.items():
        biases = {
            k.replace("weight", "bias"): torch.randn(len(v))
            for k, v in tensors.items()
            if part in k
        }
        store(source, {**tensors, **biases})
        with pytest.raises(CheckpointError, match="expected no such tensor"):
            exported(source, tmp_path / "refused")
        configured(source, **{flag: True})
        after = exported(source, tmp_path / flag).encode(SHORT)
        configured(source, **{flag: False})
        assert cosines(before, after).min() < 0.999


def test_a_text_ends_where_frequencies_would_change_with_its_length(tmp_path: Path) -> None:
    source = encoder(tmp_path / "source")
    configured(source, rotary_scaling_factor=2.0, max_trained_positions=64)
    with pytest.warns(EmbedgeWarning, match="texts are cut at 64 tokens: beyond 64"):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")
    assert manifest(tmp_path / "out")["model"]["max_length"] == 64
