"""Every key of a config.json is used, harmless or refused: changed one at a time against transformers."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from embedge.export import CheckpointError, export_bundle
from embedge.export.families.config_keys import _ELSEWHERE, _FIXED, _HARMLESS, KEYS
from embedge.runtime import Embedder, EmbedgeWarning
from tests.helpers.bidirectional import NATIVE
from tests.helpers.models import cosines, make_model, random_texts, save, write_json

# A short and a long one: windows and positions show in the long one.
TEXTS = sorted(random_texts(3, longest=30), key=len)[1:]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model type whose keys are changed.

    Attributes:
        model: its entry in ``CONFIGS``, where its own name is none.
        settings: of the tiny model beyond that entry.
        values: what its keys are changed to, beyond ``VALUES``.
        causal: whether tokens see only what is before them.
        around: keys of config.json beside ``text_config``, which has the model's own; ``None`` without one.
    """

    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    causal: bool = False
    around: Mapping[str, Any] | None = None


EMBEDDING_GEMMA2: dict[str, Sequence[Any]] = {
    "hidden_size_per_layer_input": [16],
    "per_layer_config": [{}, None, {"1": {"head_dim": 8}}, {"0": {"head_dim": 4}}],
    "embedding_dim": [24],
    "global_head_dim": [8],
    "num_global_key_value_heads": [2],
    "sliding_window": [0, 9, None],
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
# Types that this version of transformers has no class for are left out: add yours in any case.
KINDS: dict[str, Kind] = {
    "bert": Kind(),
    "roberta": Kind(),
    "xlm-roberta": Kind(),
    "camembert": Kind(model="roberta"),
    "mpnet": Kind(),
    "distilbert": Kind(
        values={
            "activation": ["relu", "gelu_new", "quick_gelu"],
            "dim": [16, 64],
            "n_heads": [2, 8],
            "n_layers": [1, 3],
            "hidden_dim": [40],
        }
    ),
    "nomic_bert": Kind(
        values={
            "n_positions": [64, 40],
            "rotary_scaling_factor": [2.0],
            "rotary_emb_fraction": [1.0, 0.5],
            "activation_function": ["swiglu", "geglu", "gelu"],
            "qkv_proj_bias": [True, False],
            "n_embd": [32, 64],
            "rotary_emb_base": [1000, 50.0],
        }
    ),
    "jina_embeddings_v3": Kind(),
    "embedding_gemma2_text": Kind(values=EMBEDDING_GEMMA2),
    "embedding_gemma2": Kind(
        model="embedding_gemma2_text",
        values=EMBEDDING_GEMMA2
        | {"image_token_id": [60, None], "audio_config": [], "vision_config": []},
        around={"image_token_id": 40, "video_token_id": 41, "audio_token_id": 42},
    ),
    "gte": Kind(values={"layer_norm_type": ["rms_norm"], "pack_qkv": [False]}),
    "modernbert": Kind(
        settings={"num_hidden_layers": 3},
        values={"layer_types": [["sliding_attention", "full_attention", "full_attention"], "all"]},
    ),
    "eurobert": Kind(),
    "llama": Kind(settings={"rope_scaling": None}, causal=True),
    "mistral": Kind(causal=True),
    "qwen2": Kind(settings=WINDOWED, causal=True),
    "qwen3": Kind(settings=WINDOWED, causal=True),
    "gemma3_text": Kind(
        values={
            "sliding_window_pattern": [1, 3],
            "rope_local_base_freq": [50.0, None],
            "query_pre_attn_scalar": [7, 0, None],
        },
        causal=True,
    ),
    "qwen2_5_vl_text": Kind(
        settings={
            **WINDOWED,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]},
            "rope_theta": 1e4,
        },
        values={
            "rope_scaling": [
                {"type": "default", "mrope_section": [1, 1, 2]},
                {"rope_type": "linear", "factor": 3.0, "mrope_section": [2, 1, 1]},
                None,
            ],
            "image_token_id": [7],
            "vision_start_token_id": [7],
        },
        causal=True,
    ),
}
KINDS = {name: kind for name, kind in KINDS.items() if name in transformers.CONFIG_MAPPING}

# Values that a key is changed to; of others by their type.
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 33}
VALUES: dict[str, list[Any]] = {
    "hidden_act": ["relu", "gelu_new", "quick_gelu", "silu"],
    "hidden_activation": ["relu", "gelu_new", "quick_gelu"],
    "position_embedding_type": ["relative_key", "relative_key_query"],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 3.0},
        {"type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        YARN,
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
    "rope_parameters": [
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
        {"rope_type": "default", "rope_theta": 100.0},
        {"full_attention": {"rope_theta": 50.0, "rope_type": "default"}},
        {
            "full_attention": {"rope_theta": 50.0, "rope_type": "linear", "factor": 4.0},
            "sliding_attention": {"rope_theta": 20.0, "rope_type": "default"},
        },
    ],
    # version 4 does not read it: tests/export/families/test_bidirectional.py compares with a mask instead
    "is_causal": [True, 0, *([False] if NATIVE else [])],
    "rope_theta": [50.0, None],
    "global_rope_theta": [50.0],
    "local_rope_theta": [50.0, None],
    "layer_types": [["full_attention"], ["sliding_attention", "full_attention"], "all"],
    "sliding_window": [3, None],
    "local_attention": [2],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1],
    "global_attn_every_n_layers": [1, 2],
    "num_key_value_heads": [1, None],
    "num_attention_heads": [2, 8],
    "head_dim": [4, None],
    "max_position_embeddings": [64, 40],
    "pad_token_id": [0, 5, None],
    "type_vocab_size": [1, 3],
    "relative_attention_num_buckets": [16],
    "pruned_heads": [{"0": [1]}],
    "classifier_pooling": ["mean"],
    "classifier_activation": ["relu"],
    "hidden_size": [16, 64],
    "num_hidden_layers": [1, 3],
    "intermediate_size": [40],
    "vocab_size": [50, 200],
}
# Keys of other models and of fine-tuners' own classes: none may go by in silence.
FOREIGN: dict[str, Any] = {
    "attention_multiplier": 0.5,
    "attn_logit_softcapping": 30.0,
    "bidirectional": True,
    "embedding_multiplier": 2.0,
    "is_causal": "other way",
    "lora_rank": 4,
    "norm_type": "other",
    "partial_rotary_factor": 0.5,
    "pooling_type": "cls",
    "position_offset": 2,
    "query_pre_attn_scalar": 256,
    "residual_multiplier": 0.2,
    "rope_interleaved": True,
    "use_bidirectional_attention": "other way",
    "window_size": 3,
}


def keys_of(kind: str) -> set[str]:
    return set(transformers.CONFIG_MAPPING[kind]().to_dict())


class Sources(dict[str, Path]):
    """Tiny models by their type, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        kind = KINDS[name]
        model = make_model(kind.model or name, **kind.settings)
        self[name] = save(model, self.root / name, pooling="mean", max_length=40)
        if kind.around is not None:
            put_around(self[name], {"model_type": name, **kind.around})
        elif kind.model:
            change(self[name], model_type=name, architectures=None)
        return self[name]


def put_around(source: Path, around: Mapping[str, Any]) -> None:
    """Make a text model the ``language_model`` of one with these keys, and its keys ``text_config``."""
    config = json.loads((source / "config.json").read_text())
    config.pop("architectures")
    write_json(source / "config.json", {**around, "text_config": config})
    file = source / "model.safetensors"
    tensors = {f"language_model.{key}": value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


def copied(source: Path, folder: Path) -> Path:
    """A copy of a model to change config.json in; the other files are links."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name == "config.json":
            shutil.copy(file, folder)
        else:
            (folder / file.name).symlink_to(file)
    return folder


def change(source: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    file = source / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config")
    for key, value in changes.items():
        inner = isinstance(text, dict) and key not in config and key in known(text["model_type"])
        (text if inner else config)[key] = value
    for key in drop:
        for part in (config, text or {}):
            part.pop(key, None)
    write_json(file, config)


def known(kind: str) -> set[str]:
    """The keys that are known of a model type."""
    table = KEYS[kind]
    return {*table.used, *table.harmless, *table.fixed, *_HARMLESS, *_FIXED, *_ELSEWHERE}


def flat(source: Path) -> dict[str, Any]:
    """A config.json with the keys of its ``text_config`` beside its own."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    return {**config.get("text_config", {}), **config}


def theirs(source: Path) -> Any:
    """transformers' vectors, or ``None`` where it refuses, warns of other weights or fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = transformers.AutoConfig.from_pretrained(source)
            model, info = transformers.AutoModel.from_pretrained(
                source,
                config=config,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
            )
            missing = [k for k in info["missing_keys"] if not k.startswith("pooler")]
            if missing or info.get("mismatched_keys"):
                return None
            tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
            rows = []
            for encoding in tokenizer.encode_batch(TEXTS):
                ids = torch.tensor([encoding.ids])
                with torch.no_grad():
                    states = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]
                rows.append(states.mean(0).float().numpy())
    except Exception:  # whatever a class says to a value it does not take
        return None
    return np.stack(rows)


def assert_same_or_refused(source: Path, out: Path) -> str:
    try:
        export_bundle(
            source,
            adapters={"t": None},
            precisions=["fp32"],
            out=out,
            calibration="none",
            modality="text",
        )
    except CheckpointError:
        return "refused"
    found = Embedder(out, precision="fp32", threads=1).encode(TEXTS, on_truncate="ignore")
    expected = theirs(source)
    if expected is None:
        return "theirs fails"
    assert cosines(found, expected).min() >= 0.99999
    return "same"


def outcome(source: Path, work: Path, drop: tuple[str, ...] = (), **changes: Any) -> str:
    """What becomes of a changed config.json: an error's text where it is none of the three allowed."""
    copy = copied(source, work / "source")
    change(copy, drop, **changes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", EmbedgeWarning
            )  # what it warns of is compared all the same
            return assert_same_or_refused(copy, work / "out")
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        for folder in (copy, work / "out"):
            shutil.rmtree(folder, ignore_errors=True)


def others(kind: str, key: str, value: Any) -> list[Any]:
    """Other values of a key."""
    values = {**VALUES, **KINDS[kind].values}
    if key in values:
        return [v for v in values[key] if v != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value * 3 + 0.01]
    return [True, "other"] if value is None else []


@pytest.mark.parametrize("kind", [*KINDS, "qwen2_5_vl"])
def test_every_key_of_transformers_class_has_a_meaning(kind: str) -> None:
    assert keys_of(kind) - known(kind) == set()
    if kind == "qwen2_5_vl":
        vision = transformers.CONFIG_MAPPING[kind]().vision_config.to_dict()
        assert set(vision) - known("vision") - {"model_type"} == set()


def test_no_key_has_two_meanings() -> None:
    for table in KEYS.values():
        assert not table.used & table.harmless
        assert not table.used & set(table.fixed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_changes_the_vector_as_in_transformers_or_is_refused(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    config = flat(sources[kind])
    table = KEYS[kind]
    outcomes = {}
    for key in sorted(table.used | set(table.fixed)):
        for value in others(kind, key, config.get(key)):
            outcomes[key, str(value)] = outcome(sources[kind], tmp_path, **{key: value})
    assert {k: v for k, v in outcomes.items() if v not in ("same", "refused", "theirs fails")} == {}
    assert len([v for v in outcomes.values() if v == "same"]) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_key_has_the_default_of_transformers(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    config = flat(sources[kind])
    outcomes = {}
    for key in sorted(set(config) & KEYS[kind].used):
        outcomes[key] = outcome(sources[kind], tmp_path, drop=(key,))
    assert {k: v for k, v in outcomes.items() if v not in ("same", "refused", "theirs fails")} == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bookkeeping_of_all_sorts_locks_nobody_out(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    source = copied(sources[kind], tmp_path / "source")
    notes: dict[str, Any] = {
        "wandb_run": "a1",
        "dataset": ["x"],
        "unsloth_version": "1",
        "converted_from": "y",
    }
    defaults = transformers.CONFIG_MAPPING[kind]().to_dict()
    plain = _HARMLESS - KEYS[kind].used - {"model_type", "vocab_size", "intermediate_size"}
    change(source, **{key: value for key, value in defaults.items() if key in plain})
    harmless = {
        key: others(kind, key, defaults.get(key))
        for key in KEYS[kind].harmless - {"reference_compile"}
    }
    change(
        source,
        **{key: values[0] for key, values in harmless.items() if values},
        **notes,
        dtype="bfloat16",
        torch_dtype="float16",
        transformers_version="9.9",
        id2label={"0": "a"},
        attention_dropout=0.3,
        initializer_range=7.0,
        use_cache=False,
        tie_word_embeddings=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assert_same_or_refused(source, tmp_path / "out") != "refused"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_whose_name_is_about_the_vector_is_refused_by_name(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    source = copied(sources[kind], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for key in FOREIGN.keys() - KEYS[kind].used:
        value = FOREIGN[key]
        if value == "other way":
            value = KINDS[kind].causal is (key == "use_bidirectional_attention")
        write_json(source / "config.json", {**config, key: value})
        with pytest.raises(CheckpointError, match=f"{key} is") as caught:
            export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")
        assert str(source / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.MistralEncoder"}}, "auto_map names 'modeling.Mist"),
        ({"auto_map": {"AutoModel": "org/name--modeling.LlamaModel"}}, "auto_map names"),
        ({"auto_map": {"AutoConfig": "configuration.Mine"}}, "as AutoConfig"),
        ({"architectures": ["LlamaBiModel"]}, "architectures names 'LlamaBiModel'"),
        ({"architectures": ["LlamaModel", "Other"]}, "architectures names 'Other'"),
        ({"architectures": ["Qwen2Model"]}, "architectures names 'Qwen2Model'"),
    ],
    ids=str,
)
def test_code_of_the_models_own_is_refused_by_name(
    changes: dict[str, Any], message: str, sources: Sources, tmp_path: Path
) -> None:
    source = copied(sources["llama"], tmp_path / "source")
    change(source, **changes)
    with pytest.raises(CheckpointError, match=message):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": None},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
    ],
    ids=str,
)
def test_classes_of_transformers_are_known(
    changes: dict[str, Any], sources: Sources, tmp_path: Path
) -> None:
    source = copied(sources["llama"], tmp_path / "source")
    change(source, **changes)
    assert assert_same_or_refused(source, tmp_path / "out") == "same"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "layers.0.self_attn.q_proj.bias"),
        ("llama", "layers.1.mlp.up_proj.bias"),
        ("llama", "layers.0.self_attn.q_norm.weight"),
        ("qwen2", "layers.0.self_attn.o_proj.bias"),
        ("qwen3", "layers.0.self_attn.k_proj.bias"),
        ("mistral", "layers.0.mlp.down_proj.bias"),
        ("modernbert", "layers.1.attn.Wqkv.bias"),
        ("modernbert", "layers.1.mlp.Wo.bias"),
    ],
)
def test_tensors_that_transformers_would_leave_out_are_refused_by_name(
    kind: str, name: str, tmp_path: Path
) -> None:
    model = make_model(kind, **KINDS[kind].settings)
    source = save(model, tmp_path / "source", extra={name: torch.ones(32)})
    with pytest.raises(CheckpointError, match=name):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("bert", {}, "encoder.layer.1.attention.self.query.bias"),
        ("distilbert", {}, "transformer.layer.0.ffn.lin1.bias"),
        ("mpnet", {}, "encoder.layer.0.attention.attn.o.bias"),
        pytest.param(
            *("modernbert-with-biases", {}, "layers.1.attn.Wqkv.bias"), marks=pytest.mark.slow
        ),
        ("llama", {"attention_bias": True}, "layers.0.self_attn.q_proj.bias"),
        ("llama", {"mlp_bias": True}, "layers.0.mlp.gate_proj.bias"),
        ("qwen2", {}, "layers.1.self_attn.k_proj.bias"),
        ("qwen3", {"attention_bias": True}, "layers.0.self_attn.q_proj.bias"),
        ("gemma3_text", {"attention_bias": True}, "layers.0.self_attn.q_proj.bias"),
    ],
    ids=str,
)
def test_a_missing_bias_is_refused_by_name(
    kind: str, settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    source = save(make_model(kind), tmp_path / "source")
    file = source / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if not k.endswith(name)}
    save_file(tensors, file, metadata={"format": "pt"})
    change(source, **settings)
    said = ".*".join([re.escape(name), "expected this tensor", *settings])
    with pytest.raises(CheckpointError, match=said):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_a_text_config_that_the_class_does_not_read_is_refused(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    eps = {"bert": "layer_norm_eps", "qwen3": "rms_norm_eps"}[kind]
    result = outcome(sources[kind], tmp_path, drop=(eps,), text_config={eps: 0.5})
    assert result == "refused"
    assert outcome(sources[kind], tmp_path, text_config=None) == "same"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["bert", "mpnet", "modernbert-with-biases", "llama-with-biases", "qwen2", "qwen3"]
)
def test_a_tensor_of_another_shape_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    source = save(make_model(kind), tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    changed = [key for key in sorted(tensors) if ".1." not in key and "position_ids" not in key]
    for key in changed:
        value = tensors[key]
        others = [value[:-1]] if value.ndim == 1 else [value[:, :-1], value[:-1], value.T]
        for other in others:
            table = key.endswith(("word_embeddings.weight", "tok_embeddings.weight"))
            is_table = table or key.endswith("embed_tokens.weight")
            if other.shape == value.shape or (is_table and other.shape[1] == value.shape[1]):
                continue
            save_file({**tensors, key: other.contiguous()}, file, metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match="expected shape .* found") as caught:
                export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "o")
            module = key.removeprefix("model.").rpartition(".")[0]
            assert module in str(caught.value) or "mlp" in key or "dense" in key
            assert not (tmp_path / "o").exists()


def test_a_dense_layer_that_does_not_follow_the_vector_is_refused(tmp_path: Path) -> None:
    source = save(make_model("bert"), tmp_path / "source", dense=((24, "Tanh"),))
    settings = json.loads((source / "2_Dense/config.json").read_text())
    write_json(source / "2_Dense/config.json", {**settings, "in_features": 16})
    weights = load_file(source / "2_Dense/model.safetensors")
    weights["linear.weight"] = weights["linear.weight"][:, :16].contiguous()
    save_file(weights, source / "2_Dense/model.safetensors")
    with pytest.raises(CheckpointError, match="Dense layer 1 has in_features 16, expected 32"):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "o")
