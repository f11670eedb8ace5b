"""EmbeddingGemma 300m and its relatives, in the published layout and as transformers 5 saves it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from embedge.export import CheckpointError, export_bundle
from embedge.runtime import Embedder, EmbedgeValueError, EmbedgeWarning
from tests.helpers.gemma import (
    EMBEDDING_GEMMA,
    PROMPTS,
    change_tensors,
    read_config,
    texts_of,
    write_pipeline,
)
from tests.helpers.models import (
    Reference,
    cosines,
    linears,
    randomize,
    save_adapter,
    write_json,
)

pytestmark = pytest.mark.slow

BOUND = 0.999999
CAUSAL = {"use_bidirectional_attention": False}
# Windows: in blocks, and as a mask of the whole text.
SETTINGS: dict[str, dict[str, Any]] = {
    "both ways": {},
    "both ways, wide": {"sliding_window": 600},
    "both ways, biases": {"sliding_window": 34, "attention_bias": True},
    "causal": CAUSAL,
}


TEXTS = texts_of([2, 3, 4, 63, 64, 65, 511, 512, 513, 1000, *range(5, 45, 4)])
SHORT = texts_of([3, 9, 20, 31, 40, 77])


def other(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros for a matrix, the weights of other channels for a norm."""
    return tensor.flip(0) if tensor.ndim == 1 else torch.zeros_like(tensor)


def write_source(folder: Path, settings: dict[str, Any]) -> Path:
    """The published files, of random weights."""
    config = {**EMBEDDING_GEMMA, **settings}
    model = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**config))
    randomize(model, seed=0, gain=1.6)
    folder.mkdir()
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_pipeline(folder, config["hidden_size"], 80, 48)
    return folder


def exported(
    source: Path, out: Path, adapter: Path | None = None, precision: str = "fp32", **options: Any
) -> Embedder:
    export_bundle(source, adapters={"task": adapter}, precisions=[precision], out=out, **options)
    return Embedder(out, precision=precision, threads=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: write_source(root / name, own) for name, own in SETTINGS.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_short_and_long_texts_alone_and_in_batches_match_peft(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[name]
    adapter = save_adapter(source, tmp_path / "adapter", target=linears("gemma3_text"))
    expected = Reference(source, adapter).encode(TEXTS)
    model = exported(source, tmp_path / "out", adapter)
    together = model.encode(TEXTS, batch_size=7)
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    assert together.shape == (len(TEXTS), 48)
    assert cosines(together, expected).min() >= BOUND
    assert cosines(alone, expected).min() >= BOUND


def test_a_file_that_transformers_5_saves_means_the_same(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    before = exported(sources["both ways"], tmp_path / "before").encode(SHORT)
    source = shutil.copytree(sources["both ways"], tmp_path / "source")
    config = read_config(source)
    thetas = {
        "full_attention": config.pop("rope_theta"),
        "sliding_attention": config.pop("rope_local_base_freq"),
    }
    del config["rope_scaling"], config["_sliding_window_pattern"]
    ropes = {k: {"rope_theta": theta, "rope_type": "default"} for k, theta in thetas.items()}
    write_json(source / "config.json", {**config, "rope_parameters": ropes})
    tensors = load_file(source / "model.safetensors")
    save_file({f"model.{k}": v for k, v in tensors.items()}, source / "model.safetensors")
    assert np.array_equal(exported(source, tmp_path / "after").encode(SHORT), before)


@pytest.mark.filterwarnings("ignore:.*odd as transformers 4 leaves it")
def test_a_model_that_transformers_saves_again_is_the_one_that_it_loads(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(sources["both ways"], tmp_path / "source")
    transformers.AutoModel.from_pretrained(source).save_pretrained(source)
    expected = Reference(source).encode(SHORT)
    assert cosines(exported(source, tmp_path / "out").encode(SHORT), expected).min() >= BOUND


def test_the_window_of_files_that_say_none_of_this_is_that_of_transformers(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(sources["causal"], tmp_path / "source")
    config = read_config(source)
    for key in ("layer_types", "use_bidirectional_attention", "rope_theta", "rope_local_base_freq"):
        del config[key]
    write_json(source / "config.json", {**config, "sliding_window_pattern": 3})
    expected = Reference(source).encode(TEXTS)
    assert cosines(exported(source, tmp_path / "out").encode(TEXTS), expected).min() >= BOUND


def test_yarn_is_of_layers_that_see_all(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["both ways"], tmp_path / "source")
    write_json(
        source / "config.json",
        {
            **read_config(source),
            "rope_theta": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        },
    )
    expected = Reference(source).encode(SHORT)
    assert cosines(exported(source, tmp_path / "out").encode(SHORT), expected).min() >= BOUND


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = (
    *("q_norm", "k_norm", "input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm", "norm.weight"),
)


@pytest.mark.parametrize("part", [*LINEARS, *NORMS])
def test_every_part_moves_the_vectors(part: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["both ways"], tmp_path / "source")
    before = Reference(source).encode(SHORT)
    change_tensors(source, part, other)
    found = exported(source, tmp_path / "out").encode(SHORT)
    assert cosines(found, Reference(source).encode(SHORT)).min() >= BOUND
    assert cosines(found, before).min() < 0.9999


@pytest.mark.parametrize("kind", LINEARS)
def test_every_kind_of_adapter_moves_the_vectors(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["both ways"]
    adapter = save_adapter(source, tmp_path / "adapter", target=linears("gemma3_text"))
    before = Reference(source, adapter).encode(SHORT)
    change_tensors(adapter, f"{kind}.lora_B", torch.zeros_like, weights="adapter_model")
    assert cosines(exported(source, tmp_path / "out", adapter).encode(SHORT), before).min() < 0.9999


def test_prompts_and_ids_are_those_of_the_tokenizer(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["both ways"]
    model = exported(source, tmp_path / "out")
    texts = ["the inn", "in  the\nfjord", "é ☃", ""]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ours = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert [ours.encode(text).ids for text in texts] == tokenizer(texts)["input_ids"]
    for name, prompt in PROMPTS.items():
        expected = Reference(source).encode([prompt + text for text in texts])
        found = model.encode(texts, prompt_name=name)
        assert cosines(found, expected).min() >= BOUND


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, expected null"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"sliding_window": None}, "sliding_window: expected an integer of at least 0, found None"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0.0"),
        ({"is_causal": False}, "is_causal is false"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}}, "rope_local_base_freq"),
        ({"head_dim": 16}, r"proj\.weight: expected shape"),
        ({"architectures": ["BidirectionalGemma3"]}, "architectures names"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(
    changes: dict[str, Any], message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(sources["both ways"], tmp_path / "source")
    write_json(source / "config.json", {**read_config(source), **changes})
    with pytest.raises(CheckpointError, match=message):
        exported(source, tmp_path / "out")


@pytest.mark.parametrize("window", [0, 1, 5, 8])
def test_a_window_means_what_it_means_to_the_loader_however_often_it_was_saved(
    window: int, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source", {"sliding_window": window})
    for times in range(3):
        expected, found = Reference(source).encode(TEXTS[5:]), read_config(source)["sliding_window"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EmbedgeWarning)
            model = exported(source, tmp_path / f"out-{times}")
        assert cosines(model.encode(TEXTS[5:]), expected).min() >= BOUND
        said = [str(w.message) for w in caught if "sliding_window" in str(w.message)]
        assert len(said) == (found > 1 and found % 2)
        assert all(f"write {2 * (found - 1)} there" in line for line in said)
        transformers.AutoModel.from_pretrained(source).save_pretrained(source)


def test_what_the_warning_of_a_halved_window_says_to_write_gives_the_trained_model_back(
    tmp_path: Path,
) -> None:
    source = write_source(tmp_path / "source", {"sliding_window": 16})
    trained = Reference(source).encode(SHORT)
    write_json(source / "config.json", {**read_config(source), "sliding_window": 9})  # by 4.57
    with pytest.warns(EmbedgeWarning, match=r"sliding_window is 9, .* write 16 there"):
        halved = exported(source, tmp_path / "halved").encode(SHORT)
    assert cosines(halved, trained).min() < 0.9999
    write_json(source / "config.json", {**read_config(source), "sliding_window": 16})
    assert cosines(exported(source, tmp_path / "out").encode(SHORT), trained).min() >= BOUND


def test_a_window_of_none_is_refused_where_attention_is_causal(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(sources["causal"], tmp_path / "source")
    write_json(source / "config.json", {**read_config(source), "sliding_window": 0})
    with pytest.raises(CheckpointError, match="sliding_window: expected a positive integer"):
        exported(source, tmp_path / "out")


def test_pooling_is_asked_for_where_no_file_names_one(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(sources["causal"], tmp_path / "source")
    (source / "modules.json").unlink()
    with pytest.raises(ValueError, match="does not say how tokens become a vector"):
        exported(source, tmp_path / "out")
    model = exported(source, tmp_path / "out", pooling="lasttoken")
    assert model.encode(["the"]).shape == (1, 48)


@pytest.mark.parametrize("precision", ["fp16", "int4-fp16"])
def test_precisions_of_float16_are_refused(
    precision: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        EmbedgeValueError, match=f"precisions {precision}: .* above float16's"
    ) as caught:
        exported(sources["both ways"], tmp_path / "out", precision=precision)
    assert caught.value.arguments == ("precisions",)
