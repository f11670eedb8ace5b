"""nomic-bert and GTE: as transformers 5 saves them and as they were published."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from embedge.export import AdapterError, CheckpointError, export_bundle
from embedge.runtime import Embedder, EmbedgeWarning
from tests.helpers.exports import manifest
from tests.helpers.models import (
    Reference,
    cosines,
    random_texts,
    save,
    texts_of_lengths,
    write_json,
)
from tests.helpers.published_encoders import (
    NEW_CODE,
    NOMIC_CODE,
    gte_config,
    gte_tensors,
    make_encoder,
    nomic_config,
    nomic_tensors,
    rewrite,
    save_lora,
    spoil,
)

LENGTHS = (3, 4, 5, 9, 17, 31, 63, 64, 65, 90, 127, 128, 200, 300, 400, 511, 512, 513, 900, 1000)
TEXTS = texts_of_lengths(LENGTHS)
SHORT = texts_of_lengths((3, 7, 20, 40))
NTK = 8.0  # gte_config's factor, beside a theta of 20,000 and heads of 8 channels
# As transformers 5 says what gte_config says.
AS_LINEAR = {"rope_type": "linear", "rope_theta": 20000 * NTK, "factor": NTK ** (2 / 8)}
# By the model type, what turns transformers 5's layout into published ones.
PUBLISHED: dict[str, dict[str, Callable[[Path], Path]]] = {
    "nomic_bert": {
        "published": lambda source: rewrite(source, nomic_tensors, nomic_config),
        "with a prefix": lambda source: rewrite(
            source, partial(nomic_tensors, prefix="bert."), nomic_config
        ),
        "published tensors": lambda source: rewrite(source, nomic_tensors, dict),
    },
    "gte": {
        "published": lambda source: rewrite(source, gte_tensors, gte_config),
        "with a prefix": lambda source: rewrite(
            source, partial(gte_tensors, prefix="new."), gte_config
        ),
        "published tensors": lambda source: rewrite(source, gte_tensors, dict),
    },
}
NATIVE: dict[str, dict[str, Any]] = {
    "nomic_bert": {},
    "gte": {"rope_parameters": AS_LINEAR},
    "gte without types": {"type_vocab_size": 0},
}
POOLING = {"gte": "cls"}
LAYOUTS = [
    ("nomic_bert", "native"),
    *(("nomic_bert", layout) for layout in PUBLISHED["nomic_bert"]),
    ("gte", "native"),
    *(("gte", layout) for layout in PUBLISHED["gte"]),
    ("gte without types", "native"),
]

needs_5 = pytest.mark.skipif(
    "nomic_bert" not in transformers.CONFIG_MAPPING,
    reason="needs transformers 5, whose classes are the reference",
)


def exported(source: Path, out: Path, adapter: Path | None = None, **options: Any) -> Embedder:
    chosen: dict[str, Any] = {"precisions": ["fp32"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "adapter 'task' was trained on")
        export_bundle(source, adapters={"task": adapter}, out=out, **chosen)
    return Embedder(out, precision=chosen["precisions"][-1], threads=1)


def encoder(folder: Path, name: str, layout: str = "published", **changes: Any) -> Path:
    kind = name.partition(" ")[0]
    model = make_encoder(kind, **NATIVE[name], **changes)
    source = save(model, folder, max_length=1024, pooling=POOLING.get(kind, "mean"))
    return source if layout == "native" else PUBLISHED[kind][layout](source)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {(n, layout): encoder(root / n / layout, n, layout) for n, layout in LAYOUTS}


@pytest.fixture(scope="module")
def adapters(
    sources: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    return {n: save_lora(root / n, modules_of(sources[n, "native"])) for n in NATIVE}


@pytest.fixture(scope="module")
def expected(
    sources: dict[tuple[str, str], Path], adapters: dict[str, Path]
) -> Callable[[str], NDArray[Any]]:
    return cache(lambda name: Reference(sources[name, "native"], adapters[name]).encode(TEXTS))


@needs_5
@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_vectors_are_those_of_transformers_with_the_adapter_unmerged(
    name: str,
    layout: str,
    sources: dict[tuple[str, str], Path],
    adapters: dict[str, Path],
    expected: Callable[[str], NDArray[Any]],
    tmp_path: Path,
) -> None:
    model = exported(sources[name, layout], tmp_path / "out", adapters[name])
    theirs = expected(name)
    assert cosines(model.encode(TEXTS, batch_size=7), theirs).min() >= 0.999999
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    assert cosines(alone, theirs).min() >= 0.999999


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_all_layouts_give_one_vector(
    name: str, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    layouts = ("native", *PUBLISHED[name])
    native, *others = (exported(sources[name, n], tmp_path / n).encode(SHORT) for n in layouts)
    for other in others:
        assert cosines(native, other).min() > 0.9999999


def tensors_of(source: Path) -> dict[str, torch.Tensor]:
    return load_file(source / "model.safetensors")


def modules_of(source: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the Linears of layers by module."""
    return {
        key.removesuffix(".weight"): tuple(value.shape)
        for key, value in tensors_of(source).items()
        if key.startswith("layers.") and value.ndim == 2
    }


def store(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def configured(source: Path, **changes: Any) -> None:
    file = source / "config.json"
    write_json(file, {**json.loads(file.read_text()), **changes})


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_reaches_the_vector(name: str, tmp_path: Path) -> None:
    source = encoder(tmp_path / "source", name)
    before = exported(source, tmp_path / "before").encode(SHORT)
    tensors = tensors_of(source)
    last = {re.sub(r"\.\d+\.", ".N.", key): key for key in tensors}  # one of each kind
    assert len(last) > 10
    for number, key in enumerate(last.values()):
        store(source, {k: v * 0 if k == key else v for k, v in tensors.items()})
        after = exported(source, tmp_path / str(number)).encode(SHORT)
        assert cosines(before, after).min() < 0.99999, key


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_part_of_an_adapter_reaches_the_vector(
    name: str, sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source, modules = sources[name, "published"], modules_of(sources[name, "native"])
    whole = exported(source, tmp_path / "out", save_lora(tmp_path / "all", modules)).encode(SHORT)
    kinds = {module.rpartition(".")[2] for module in modules}
    assert len(kinds) >= 6
    for kind in sorted(kinds):
        rest = {m: shape for m, shape in modules.items() if not m.endswith(kind)}
        less = save_lora(tmp_path / kind, rest)
        vectors = exported(source, tmp_path / f"out-{kind}", less).encode(SHORT)
        assert cosines(whole, vectors).min() < 0.9999, kind


def is_refused(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = encoder(tmp_path / "source", kind)
    configured(source, **changes)
    with pytest.raises(CheckpointError, match=message):
        exported(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
        (
            {"rotary_scaling_factor": 2.0, "max_trained_positions": 512.0},
            "max_trained_positions is 512.0",
        ),
        (
            {"rotary_scaling_factor": 2.0, "max_trained_positions": None},
            "max_trained_positions is None",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_nomic_bert_does_not_implement_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    is_refused("nomic_bert", changes, message, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logn_attention_scale": True}, "logn_attention_scale is true"),
        ({"logn_attention_clip1": True}, "logn_attention_clip1 is true"),
        ({"layer_norm_type": "rms_norm"}, "layer_norm_type is 'rms_norm'"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'"),
        ({"pack_qkv": False}, "pack_qkv is false"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling type is 'linear'"),
        ({"rope_scaling": {"type": "ntk", "factor": 0.5}}, "rope_scaling.factor is 0.5"),
        ({"rope_scaling": {"type": "ntk", "factor": 2, "mixed_b": 0.6}}, "expected no mixed_b"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_scaling.factor is None"),
        (
            {"rope_scaling": {"rope_type": "ntk", "type": "linear", "factor": 8.0}},
            "rope_scaling is .*nothing beside",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            "rope_parameters is .*nothing beside",
        ),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_parameters is"),
        ({"type_vocab_size": 0}, "found embeddings.token_type_embeddings.weight"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"is_causal": True}, "is_causal is true"),
        ({"auto_map": {**NEW_CODE, "AutoModel": "org/x--modeling.NewModel"}}, "auto_map names"),
        ({"intermediate_size": 128}, "expected shape"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_gte_does_not_implement_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    is_refused("gte", changes, message, tmp_path)


@pytest.mark.parametrize("key", ["activation_function", "rotary_emb_fraction", "qkv_proj_bias"])
def test_a_missing_key_counts_as_in_the_published_class(key: str, tmp_path: Path) -> None:
    source = encoder(tmp_path / "source", "nomic_bert")
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
    source = encoder(tmp_path / "source", "nomic_bert")
    tensors = tensors_of(source)
    if what == "missing":
        tensors.pop(name)
    else:
        tensors[name.replace(".1.", ".2.").replace("fc12", "fc13")] = torch.ones(32)
    store(source, tensors)
    with pytest.raises(CheckpointError, match="expected"):
        exported(source, tmp_path / "out")


def test_a_tensor_that_is_fused_and_there_alone_is_refused(tmp_path: Path) -> None:
    source = encoder(tmp_path / "source", "nomic_bert")
    alone = {"encoder.layers.0.self_attn.k_proj.weight": torch.ones(32, 32)}
    store(source, {**tensors_of(source), **alone})
    with pytest.raises(CheckpointError, match=r"k_proj.weight is there, and .*Wqkv.weight"):
        exported(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("Wqkv", r"layers\.1\.self_attn\.q_proj\.weight"),
        ("q_proj", r"layers\.1\.self_attn\.q_proj\.weight"),
        ("o_proj", r"layers\.1\.attn\.out_proj\.weight"),
        ("out_proj", r"layers\.1\.attn\.out_proj\.weight"),
    ],
)
def test_a_saved_module_that_an_adapter_lacks_is_missed_by_any_name(
    module: str, missing: str, tmp_path: Path
) -> None:
    source = encoder(tmp_path / "source", "nomic_bert")
    adapter = save_lora(tmp_path / "adapter", {})
    rows = 96 if module == "Wqkv" else 32
    part = "self_attn" if module in ("q_proj", "o_proj") else "attn"
    tensors = {f"base_model.model.layers.0.{part}.{module}.weight": torch.ones(rows, 32)}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", {**settings, "modules_to_save": [module]})
    with pytest.raises(AdapterError, match=f"{missing}: belongs to modules_to_save {module!r}"):
        exported(source, tmp_path / "out", adapter)


@pytest.mark.slow
def test_biases_are_read_where_config_json_has_them(tmp_path: Path) -> None:
    source = encoder(tmp_path / "source", "nomic_bert")
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
    source = encoder(tmp_path / "source", "nomic_bert")
    configured(source, rotary_scaling_factor=2.0, max_trained_positions=64)
    with pytest.warns(EmbedgeWarning, match="texts are cut at 64 tokens: beyond 64"):
        export_bundle(source, adapters={"t": None}, precisions=["fp32"], out=tmp_path / "out")
    assert manifest(tmp_path / "out")["model"]["max_length"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nomic_bert", "gte", "jina_embeddings_v3"])
def test_small_integers_stay_close_with_outlier_channels(kind: str, tmp_path: Path) -> None:
    wide: dict[str, Any] = {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "intermediate_size": 256,
        "gain": 0.8,
    }
    model = make_encoder(kind, **wide)
    spoil(model.tensors)
    pooling = POOLING.get(kind, "mean")
    source = save(model, tmp_path / "source", max_length=64, pooling=pooling)
    out, texts, file = tmp_path / "out", random_texts(40), tmp_path / "texts.txt"
    file.write_text("\n".join(random_texts(60, seed=9)), "utf-8")
    export_bundle(
        source,
        adapters={"t": None},
        precisions=["fp32", "int8", "int4"],
        out=out,
        calibration=file,
    )
    exact, int8, int4 = (
        Embedder(out, precision=precision, threads=1).encode(texts)
        for precision in ("fp32", "int8", "int4")
    )
    assert cosines(int8, exact).mean() >= 0.999 and cosines(int8, exact).min() >= 0.997
    assert cosines(int4, exact).mean() >= 0.98
