"""What is added to a bundle comes from the model that the rest of it comes from, or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedge.export import export_bundle
from embedge.runtime import Embedder
from embedge.runtime.errors import EmbedgeValueError
from tests.helpers.models import make_model, save, write_json

Change = Callable[[Path], None]
PROMPTS = {"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": None}


def edit(name: str, **changes: Any) -> Change:
    """Sets keys of a JSON file of the model's folder."""

    def change(model: Path) -> None:
        content = json.loads((model / name).read_text())
        write_json(model / name, {**content, **changes})

    return change


def other_dense(model: Path) -> None:
    file = model / "2_Dense/model.safetensors"
    save_file({k: torch.roll(v, 1, 0) for k, v in load_file(file).items()}, file)


def no_normalize(model: Path) -> None:
    modules = json.loads((model / "modules.json").read_text())
    write_json(model / "modules.json", [m for m in modules if "Normalize" not in m["type"]])


def lower_case(model: Path) -> None:
    edit("tokenizer.json", normalizer={"type": "Lowercase"})(model)


def make(name: str, folder: Path) -> Path:
    source = save(make_model(name), folder, dense=[(16, "Tanh")])
    write_json(source / "config_sentence_transformers.json", PROMPTS)
    return source


def add(source: Path, out: Path, *, precision: str) -> Path:
    return export_bundle(
        source, adapters={"task": None}, precisions=[precision], calibration="none", out=out
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A model and its bundle by the model's name, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            source = make(name, root / "tiny")
            made[name] = source, add(source, root / "out", precision="fp32")
        return made[name]

    return get


COMPUTES = "tiny now computes something else from the same weights: its config.json"
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SENTENCES = "config_sentence_transformers.json"
CHANGES: dict[str, tuple[str, Change, str]] = {
    "heads": ("bert", edit("config.json", num_attention_heads=8), COMPUTES),
    "activation": ("bert", edit("config.json", hidden_act="relu"), COMPUTES),
    "epsilon": ("bert", edit("config.json", layer_norm_eps=1e-3), COMPUTES),
    "epsilon of RMSNorm": ("llama", edit("config.json", rms_norm_eps=1e-3), COMPUTES),
    "rotary base": (
        "modernbert",
        edit("config.json", global_rope_theta=5000.0, rope_parameters=BASES),
        COMPUTES,
    ),
    "rotary scaling": (
        "llama",
        edit("config.json", rope_parameters=ROPE, rope_scaling=ROPE),
        COMPUTES,
    ),
    "window": ("mistral", edit("config.json", sliding_window=3), COMPUTES),
    "layer types": (
        "modernbert",
        edit("config.json", global_attn_every_n_layers=2, layer_types=None),
        COMPUTES,
    ),
    "Dense weights": ("bert", other_dense, "its Dense layers are others than those of tiny now"),
    "Dense activation": (
        "bert",
        edit("2_Dense/config.json", activation_function="torch.nn.modules.activation.ReLU"),
        "its Dense layers are others",
    ),
    "normalization": ("bert", no_normalize, "has normalize True, this export False"),
    "pooling": (
        "bert",
        edit("1_Pooling/config.json", pooling_mode="cls"),
        "has pooling mean, this export cls",
    ),
    "prompts that are pooled": (
        "bert",
        edit("1_Pooling/config.json", include_prompt=False),
        "has include prompt True, this export False",
    ),
    "length": (
        "bert",
        edit("sentence_bert_config.json", max_seq_length=40),
        "has max length 64, this export 40",
    ),
    "similarity": (
        "bert",
        edit(SENTENCES, similarity_fn_name="dot"),
        "has similarity cosine, this export dot",
    ),
    "tokenizer": ("bert", lower_case, r"its tokenizer\.json is another than that of tiny now"),
    "prompts": (
        "bert",
        edit(SENTENCES, prompts={"query": "zzz: ", "document": ""}),
        "its task task has other prompts query than tiny now",
    ),
    "default prompt": (
        "bert",
        edit(SENTENCES, default_prompt_name="query"),
        "its task task has other default prompt than tiny now",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_a_source_that_gives_other_vectors_by_now_is_refused_by_what_differs(
    what: str, sources: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    name, change, message = CHANGES[what]
    source, bundle = sources(name)
    source, out = (shutil.copytree(p, tmp_path / p.name) for p in (source, bundle))
    change(source)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(EmbedgeValueError, match=f"{message}.*choose another --out, or --overwrite"):
        add(source, out, precision="int8")
    assert (out / "manifest.json").read_bytes() == before
    assert not (out / "int8").exists()


def test_all_that_differs_is_named_at_once(
    sources: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, bundle = sources("bert")
    source = shutil.copytree(source, tmp_path / "tiny")
    no_normalize(source)
    lower_case(source)
    with pytest.raises(EmbedgeValueError, match=r"has normalize True.*; its tokenizer\.json is"):
        add(source, bundle, precision="int8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "modernbert"])
def test_a_source_saved_again_is_the_same(
    name: str, sources: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, bundle = sources(name)
    source = shutil.copytree(source, tmp_path / "other-name")
    out = shutil.copytree(bundle, tmp_path / "out")
    edit("config.json", transformers_version="5.9", use_cache=False, dtype="bfloat16")(source)
    file = source / "model.safetensors"
    save_file(dict(reversed(load_file(file).items())), file, metadata={"format": "pt"})
    add(source, out, precision="int8")
    for precision in ("fp32", "int8"):
        Embedder(out, precision=precision, verify="full").encode("ab")


@pytest.mark.slow
def test_the_same_positions_said_in_another_way_are_the_same(
    sources: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, bundle = sources("qwen2")
    source = shutil.copytree(source, tmp_path / "tiny")
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    edit("config.json", rope_parameters=parameters, rope_scaling=None)(source)
    out = shutil.copytree(bundle, tmp_path / "out")
    add(source, out, precision="int8")
    Embedder(out, precision="int8", verify="full").encode("ab")


def test_a_bundle_that_does_not_say_what_its_graphs_compute_is_not_added_to(
    sources: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, bundle = sources("bert")
    out = shutil.copytree(bundle, tmp_path / "out")
    document = json.loads((out / "manifest.json").read_text())
    del document["source"]["graph_sha256"], document["source"]["dense_sha256"]
    write_json(out / "manifest.json", document)
    Embedder(out).encode("ab")
    with pytest.raises(EmbedgeValueError, match="found none: an earlier embedge wrote it"):
        add(source, out, precision="int8")
