"""What an export refuses before it writes anything."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from embedge.export import CheckpointError, export_bundle
from embedge.runtime import Embedder, EmbedgeError
from embedge.runtime.errors import EmbedgeValueError
from tests.helpers.exports import (
    PRECISIONS,
    WIDE,
    contents,
    leftovers,
    small,
)
from tests.helpers.models import (
    Reference,
    cosines,
    make_model,
    random_texts,
    save,
    write_json,
)


def edit_config(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **changes})
    return folder


@pytest.mark.slow
def test_long_texts_are_cut_on_the_side_that_the_tokenizer_says(
    source: Path, copy: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    write_json(other / "tokenizer_config.json", {**config, "truncation_side": "left"})
    out = small(other, tmp_path / "out", precisions=["fp32"])
    texts = [text[:90] for text in random_texts(3, longest=200)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    rows = tokenizer(["ab" + text for text in texts], truncation=True, max_length=64).input_ids
    model = Embedder(out)
    found = model.encode(texts, prompt="ab", on_truncate="ignore")
    expected = model.run_ids([np.array(row, np.int64) for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    assert max(map(len, rows)) == 64
    with pytest.raises(EmbedgeValueError, match="has truncation side right, this export left"):
        small(other, copy, adapters={"third": None}, matryoshka_dims=[16, 32])


@pytest.mark.slow
def test_vectors_are_cut_to_the_dimension_that_the_source_cuts_to(
    source: Path, copy: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    write_json(other / "config_sentence_transformers.json", {"truncate_dim": 24})
    model = Embedder(small(other, tmp_path / "out", precisions=["fp32"]))
    assert model.dim == model.get_sentence_embedding_dimension() == 24
    texts = random_texts(3)
    whole = model.encode(texts, truncate_dim=96)
    assert whole.shape == (3, 96)
    cut = whole[:, :24] / np.linalg.norm(whole[:, :24], axis=1, keepdims=True)
    np.testing.assert_allclose(model.encode(texts), cut, atol=1e-6, rtol=0)
    with pytest.raises(EmbedgeValueError, match="has truncate_dim None, this export 24"):
        small(other, copy, adapters={"third": None}, matryoshka_dims=[16, 32])
    with pytest.raises(EmbedgeValueError, match="has truncate_dim 24, this export None"):
        small(source, tmp_path / "out", adapters={"third": None})
    write_json(other / "config_sentence_transformers.json", {"truncate_dim": 200})
    wide = small(other, tmp_path / "wide", precisions=["fp32"])
    assert Embedder(wide).encode(texts).shape == (3, 96)


def test_an_out_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(EmbedgeValueError, match="left alone, also with --overwrite"):
        small(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_folder_of_other_things_is_refused(
    name: str, overwrite: bool, source: Path, tmp_path: Path
) -> None:
    write_json(tmp_path / "out" / name, {"name": "a web page"})
    with pytest.raises(EmbedgeValueError, match=r"left alone, also with --overwrite"):
        small(source, tmp_path / "out", overwrite=overwrite)
    assert leftovers(tmp_path / "out") == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.slow
def test_a_broken_manifest_is_an_error_that_names_it(source: Path, copy: Path) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(EmbedgeError, match=r"manifest\.json"):
        small(source, copy, adapters={"third": None})


def test_an_empty_folder_is_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "manifest.json" in contents(small(source, tmp_path / "out"))


@pytest.mark.slow
def test_nothing_to_add_is_an_error(source: Path, adapters: dict[str, Path], copy: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="already holds first at int8"):
        small(source, copy, adapters={"first": adapters["first"]})


def test_a_task_of_another_adapter_is_refused(
    source: Path, adapters: dict[str, Path], copy: Path
) -> None:
    with pytest.raises(EmbedgeValueError, match="already has a task first"):
        small(source, copy, adapters={"first": adapters["second"]})


def test_a_bundle_of_other_weights_is_refused(copy: Path, tmp_path: Path) -> None:
    other = save(make_model("bert", seed=5, **WIDE), tmp_path / "other")
    with pytest.raises(EmbedgeValueError, match="with other weights"):
        small(other, copy)


def test_a_bundle_of_other_dimensions_is_refused(source: Path, copy: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="matryoshka dimensions"):
        small(source, copy, adapters={"third": None}, matryoshka_dims=[8])


@pytest.mark.filterwarnings("ignore:.*pooling:embedge.runtime.EmbedgeWarning")
def test_a_bundle_of_another_pooling_is_refused(source: Path, copy: Path) -> None:
    with pytest.raises(EmbedgeValueError, match="has pooling mean, this export cls"):
        small(source, copy, adapters={"third": None}, pooling="cls")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ["int7"]}, "'int7'"),
        ({"precisions": []}, "found none"),
        ({"adapters": {}}, "at least one task"),
        ({"adapters": {"a/b": None}}, "task 'a/b'"),
        ({"adapters": {"..": None}}, r"task '\.\.'"),
        ({"adapters": {"shared": None}}, "task 'shared'"),
        ({"adapters": {"base": None}}, "task 'base'"),
        ({"pooling": "median"}, "pooling 'median': expected one of mean, cls"),
        ({"pooling": "cls+cls"}, r"pooling 'cls\+cls': .*each once"),
        ({"matryoshka_dims": [97]}, "dimension 97"),
        ({"matryoshka_dims": [0]}, "dimension 0"),
        ({"matryoshka_dims": [True]}, "dimension True"),
        ({"int4_block_size": 48}, "int4_block_size 48"),
        ({"keep": {"*": "int4"}}, r"keep '\*'='int4'"),
        ({"calibration": "no/such/file"}, "no/such/file"),
        ({"calibration": 5}, "calibration: expected a path, found 5"),
        ({"adapters": ["x"]}, r"adapters: expected .*'adapter folder'.*, found \['x'\]"),
        ({"adapters": {"t": 5}}, r"adapters\['t'\]: expected a path, found 5"),
        ({"keep": ["x"]}, r"keep: expected .*'fp32'.*, found \['x'\]"),
        ({"keep": {3: "fp32"}}, "keep: expected patterns of layer names, found 3"),
        ({"matryoshka_dims": 32}, "matryoshka_dims: expected a list of integers, found 32"),
        ({"matryoshka_dims": "32"}, "matryoshka_dims: expected a list of integers, found '32'"),
        ({"precisions": 8}, "precisions: expected a list of some of .*, found 8"),
    ],
    ids=lambda value: None if isinstance(value, dict) else re.sub(r"\W+", "-", value),
)
def test_a_bad_argument_is_named_and_nothing_is_written(
    options: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(EmbedgeValueError, match=message):
        small(source, tmp_path / "out", **options)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("out", [None, 5, "", b"out"])
@pytest.mark.parametrize("name", ["source", "out"])
def test_what_is_no_path_is_named(name: str, out: Any, source: Path, tmp_path: Path) -> None:
    call = {"source": source, "out": tmp_path / "out", name: out}
    with pytest.raises(EmbedgeValueError, match=f"^{name}: expected a path, found "):
        export_bundle(adapters={"task": None}, **call)
    assert leftovers(tmp_path / "out") == []


def test_a_model_without_pooling_asks_for_one(source: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(source, tmp_path / "bare")
    (bare / "modules.json").unlink()
    with pytest.raises(EmbedgeValueError, match="--pooling"):
        small(bare, tmp_path / "out")


def test_an_unknown_architecture_is_refused_with_the_closest_one(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="'deberta-v2' is not supported; the closest .* bert"):
        small(edit_config(source, tmp_path / "other", model_type="deberta-v2"), tmp_path / "out")


def test_tensors_that_the_architecture_lacks_are_refused_by_name(tmp_path: Path) -> None:
    extra = {"encoder.layer.0.adapter.weight": torch.ones(3, 3)}
    other = save(make_model("bert"), tmp_path / "other", extra=extra)
    with pytest.raises(CheckpointError, match=r"found encoder\.layer\.0\.adapter\.weight"):
        small(other, tmp_path / "out")


def test_more_layers_than_the_configuration_says_are_refused(source: Path, tmp_path: Path) -> None:
    other = edit_config(source, tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\."):
        small(other, tmp_path / "out")


def test_fewer_layers_than_the_configuration_says_are_refused(source: Path, tmp_path: Path) -> None:
    other = edit_config(source, tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"expected a tensor encoder\.layer\.2\."):
        small(other, tmp_path / "out")


POOLER = {"pooler.dense.weight": torch.randn(32, 32), "pooler.dense.bias": torch.randn(32)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"target": "all-linear"},
        {"target": "all-linear", "use_dora": True},
        {"target": ["query"], "modules_to_save": ["pooler"]},
        {"target": ["query"], "bias": "all"},
    ],
    ids=str,
)
def test_what_an_adapter_changes_in_a_pooler_is_left_out(
    options: dict[str, Any], tmp_path: Path
) -> None:
    other = save(make_model("bert"), tmp_path / "other", extra=POOLER)
    folder = save_pooler_adapter(other, tmp_path / "lora", **options)
    with pytest.warns(UserWarning, match="left out what no vector depends on: pooler; if it was"):
        out = small(other, tmp_path / "out", adapters={"task": folder}, precisions=["fp32"])
    texts = random_texts(5)
    expected = Reference(other, folder).encode(texts)
    assert cosines(Embedder(out).encode(texts), expected).min() >= 0.999999


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_untrained_dora_on_a_pooler_is_left_out_without_a_word(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    other = save(make_model("bert"), tmp_path / "other", extra=POOLER)
    folder = save_pooler_adapter(other, tmp_path / "lora", target="all-linear", use_dora=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}pooler.dense.lora_B.weight"].zero_()
    tensors[f"{PREFIX}pooler.dense.lora_magnitude_vector"] = POOLER["pooler.dense.weight"].norm(
        dim=1
    )
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    save_file(tensors, file)
    out = small(other, tmp_path / "out", adapters={"task": folder}, precisions=["fp32"])
    texts = random_texts(5)
    expected = Reference(other, folder).encode(texts)
    assert cosines(Embedder(out).encode(texts), expected).min() >= 0.999999


PREFIX = "base_model.model."


def save_pooler_adapter(source: Path, folder: Path, **options: Any) -> Path:
    """An adapter as PEFT saves it of a BertModel with its pooler, where one was trained too."""
    model = transformers.BertModel.from_pretrained(source)
    target = options.pop("target")
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=8, target_modules=target, **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad or name.endswith(".bias"):
            noise = torch.randn(parameter.shape, generator=generator)
            is_length = "magnitude" in name
            parameter.data = parameter.data * (1 + 0.1 * noise) if is_length else 0.2 * noise
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "key", ["encoder.layer.1.output.dense.weight", "encoder.layer.0.output.LayerNorm.bias"]
)
def test_nan_in_a_weight_is_named_and_nothing_is_left(
    key: str, precision: str, source: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[key].view(-1)[5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(key)):
        small(broken, tmp_path / "out", precisions=[precision], calibration="default")
    assert leftovers(tmp_path / "out") == []


@pytest.mark.slow
def test_activations_that_overflow_are_refused_by_layer(source: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["encoder.layer.0.attention.self.value.weight"] *= 1e38
    tensors["encoder.layer.0.attention.output.dense.weight"] *= 1e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\..*overflow"):
        small(broken, tmp_path / "out", calibration="default")
