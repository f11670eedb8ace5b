"""EmbeddingGemma 2's text model, whole and alone, against transformers 5."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError, export_bundle
from embedge.runtime import Embedder, EmbedgeValueError, EmbedgeWarning
from tests.helpers.gemma import (
    EMBEDDING_GEMMA2,
    change_tensors,
    embedding_gemma2_tensors,
    read_config,
    texts_of,
    write_pipeline,
)
from tests.helpers.models import Reference, cosines, save_adapter, write_json

pytestmark = pytest.mark.slow
has_class = importlib.util.find_spec("transformers.models.embedding_gemma2") is not None
needs_transformers_5 = pytest.mark.skipif(not has_class, reason="needs transformers 5")

BOUND = 0.999999
TEXTS = texts_of([2, 3, 4, 63, 64, 65, 511, 512, 513, 1000, *range(5, 45, 4)])
SHORT = texts_of([3, 9, 20, 31, 40, 77])
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "wide windows": {"sliding_window": 300},
    "biases": {"attention_bias": True, "sliding_window": 5},
    "large heads": {
        "head_dim": 256,
        "per_layer_config": {"2": {"head_dim": 512, "num_key_value_heads": 1}},
    },
}


def config_of(own: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(EMBEDDING_GEMMA2)
    config["text_config"] |= own
    return config


def write_source(folder: Path, own: dict[str, Any]) -> Path:
    """The published files, of random weights."""
    config = config_of(own)
    tensors = embedding_gemma2_tensors(config["text_config"])
    if own.get("attention_bias"):
        biased = [n.removesuffix(".weight") for n in tensors if "self_attn" in n and "proj" in n]
        draw = torch.Generator().manual_seed(3)
        for name in biased:
            tensors[f"{name}.bias"] = torch.randn(len(tensors[f"{name}.weight"]), generator=draw)
    folder.mkdir()
    whole = {f"language_model.{name}": value for name, value in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_pipeline(folder, config["text_config"]["embedding_dim"])
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: write_source(root / name, own) for name, own in SETTINGS.items()}


def exported(
    source: Path, out: Path, adapter: Path | None = None, precision: str = "fp32", **options: Any
) -> Embedder:
    export_bundle(source, adapters={"task": adapter}, precisions=[precision], out=out, **options)
    return Embedder(out, precision=precision, threads=1)


LINEARS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
    "embedding_projection",
)
TARGET = rf".*\.({'|'.join(LINEARS)})"


@needs_transformers_5
@pytest.mark.parametrize("name", SETTINGS)
def test_short_and_long_texts_alone_and_in_batches_match_peft(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[name]
    adapter = save_adapter(source, tmp_path / "adapter", target=TARGET)
    expected = Reference(source, adapter).encode(TEXTS)
    model = exported(source, tmp_path / "out", adapter)
    together = model.encode(TEXTS, batch_size=7)
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    assert together.shape == (len(TEXTS), 40)
    assert cosines(together, expected).min() >= BOUND
    assert cosines(alone, expected).min() >= BOUND


def text_alone(source: Path, folder: Path, **changes: Any) -> Path:
    """The text part of a model as a model of its own."""
    shutil.copytree(source, folder)
    config = {**read_config(source)["text_config"], "architectures": ["EmbeddingGemma2TextModel"]}
    write_json(folder / "config.json", {**config, **changes})
    tensors = load_file(source / "model.safetensors")
    own = {name.removeprefix("language_model."): value for name, value in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_text_part_alone_has_the_same_vectors(sources: dict[str, Path], tmp_path: Path) -> None:
    source = text_alone(sources["whole"], tmp_path / "text")
    alone = exported(source, tmp_path / "alone").encode(SHORT)
    whole = exported(sources["whole"], tmp_path / "whole").encode(SHORT)
    assert np.array_equal(alone, whole)


def test_sizes_of_full_layers_are_read_from_either_place(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    before = exported(sources["whole"], tmp_path / "before").encode(SHORT)
    source = text_alone(sources["whole"], tmp_path / "text")
    config = read_config(source)
    for key in ("per_layer_config", "layer_types", "rope_parameters"):
        del config[key]
    sizes = {"global_head_dim": 32, "num_global_key_value_heads": 1, "sliding_window_pattern": 3}
    write_json(source / "config.json", {**config, **sizes})
    assert np.array_equal(exported(source, tmp_path / "after").encode(SHORT), before)


@needs_transformers_5
def test_what_transformers_saves_again_means_the_same(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    import transformers

    source = shutil.copytree(sources["whole"], tmp_path / "source")
    transformers.AutoModel.from_pretrained(source).save_pretrained(source)
    expected = Reference(sources["whole"]).encode(SHORT)
    assert cosines(exported(source, tmp_path / "out").encode(SHORT), expected).min() >= BOUND


def test_a_model_of_many_positions_has_no_table_of_them(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    before = exported(sources["whole"], tmp_path / "before").encode(SHORT)
    many = 262_144  # as published
    source = text_alone(sources["whole"], tmp_path / "text", max_position_embeddings=many)
    write_json(source / "sentence_bert_config.json", {"max_seq_length": many})
    found = exported(source, tmp_path / "out").encode(SHORT)
    assert cosines(found, before).min() >= BOUND
    assert sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.bin")) < 1_000_000


NORMS = (
    *("q_norm", "k_norm", "input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm", "model.norm.weight"),
    *("post_per_layer_input_norm", "per_layer_projection_norm"),
)


def other(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros for a matrix, the weights of other channels for a norm, twice a number."""
    if tensor.ndim > 1:
        return torch.zeros_like(tensor)
    return tensor.flip(0) if len(tensor) > 1 else 2 * tensor


@pytest.mark.parametrize(
    "part", [*(n for n in LINEARS if n != "embedding_projection"), *NORMS, "layer_scalar"]
)
def test_every_part_moves_the_vectors(part: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["whole"], tmp_path / "source")
    before = exported(sources["whole"], tmp_path / "before").encode(SHORT)
    change_tensors(source, part, other)
    found = exported(source, tmp_path / "out").encode(SHORT)
    assert cosines(found, before).min() < 0.9999
    if has_class:
        assert cosines(found, Reference(source).encode(SHORT)).min() >= BOUND


@needs_transformers_5
@pytest.mark.parametrize("kind", LINEARS)
def test_every_kind_of_adapter_moves_the_vectors(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["whole"]
    adapter = save_adapter(source, tmp_path / "adapter", target=TARGET)
    before = Reference(source, adapter).encode(SHORT)
    change_tensors(adapter, f"{kind}.lora_B", torch.zeros_like, weights="adapter_model")
    assert cosines(exported(source, tmp_path / "out", adapter).encode(SHORT), before).min() < 0.9999


@needs_transformers_5
def test_a_placeholder_in_a_text_has_the_state_that_transformers_gives_it(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["whole"]
    model, reference = exported(source, tmp_path / "out"), Reference(source).model
    for token in (290, 291, 292, 293):
        ids = np.array([2, 270, token, 271, 1])
        with torch.no_grad():
            states = reference(input_ids=torch.tensor(ids)[None])[0][0]
        assert cosines(model.run_ids([ids]), states.mean(0).numpy()[None]).min() >= BOUND


def test_towers_are_left_out_by_name(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["whole"], tmp_path / "source")
    config = read_config(source)
    towers = {"vision_config": {"hidden_size": 8, "rope_theta": 3.0}, "audio_config": {"window": 2}}
    write_json(source / "config.json", {**config, **towers})
    tensors = load_file(source / "model.safetensors")
    for name in (
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "embed_vision.embedding_projection.weight",
        "audio_tower.layers.0.norm.weight",
        "embed_audio.embedding_projection.weight",
    ):
        tensors[name] = torch.ones(3, 3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    before = exported(sources["whole"], tmp_path / "before").encode(SHORT)
    with pytest.warns(EmbedgeWarning, match="it embeds images and audio too"):
        found = exported(source, tmp_path / "out").encode(SHORT)
    assert np.array_equal(found, before)
    with pytest.raises(EmbedgeValueError, match="modality 'image'"):
        exported(source, tmp_path / "image", modality="image")
    tensors["language_model.layers.0.other.weight"] = torch.ones(3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"found layers\.0\.other\.weight"):
        exported(source, tmp_path / "other", modality="text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_layer_config": {"2": {"intermediate_size": 9}}}, "per_layer_config is"),
        ({"per_layer_config": {"7": {"head_dim": 9}}}, "layers 0 to 2"),
        ({"per_layer_config": {"0": {"head_dim": 32}}}, "the same heads in layer 1"),
        ({"per_layer_config": {}}, r"expected shape"),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "last layer"),
        ({"sliding_window": None}, "sliding_window: expected an integer"),
        ({"is_causal": True}, "is_causal is true"),
        ({"use_bidirectional_attention": False}, "use_bidirectional_attention is false"),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
        ({"embedding_dim": 48}, r"embedding_projection\.weight: expected shape"),
        ({"hidden_size_per_layer_input": 16}, r"expected shape"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"architectures": ["EmbeddingGemma2Causal"]}, "architectures names"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(
    changes: dict[str, Any], message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = text_alone(sources["whole"], tmp_path / "source", **changes)
    with pytest.raises(CheckpointError, match=message):
        exported(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["layer_scalar", "per_layer_projection.weight", "ple.per_layer_m"])
def test_a_missing_tensor_or_one_of_another_shape_is_refused_by_name(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(sources["whole"], tmp_path / "source")
    change_tensors(source, name, lambda tensor: torch.cat([tensor, tensor]))
    with pytest.raises(CheckpointError, match=f"{name}.*expected shape"):
        exported(source, tmp_path / "out")
    tensors = load_file(source / "model.safetensors")
    for key in [key for key in tensors if name in key]:
        del tensors[key]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}"):
        exported(source, tmp_path / "out")
