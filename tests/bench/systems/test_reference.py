"""The reference equals a model merged and pooled by hand, and sentence-transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertModel, LlamaConfig, LlamaModel

from embedge.bench import Reference
from embedge.bench.errors import BenchError
from embedge.bench.systems.source import read_source
from embedge.bench.systems.tokens import TextTokens

TEXTS = ["a", "hello world", "the quick brown fox jumps over", "zz y x w v u t s r q p o n m l k j"]
SAME = 1e-6  # float32 rounding through two layers


def by_hand(model: Path, adapter: Path | None, text: str, pooling: str) -> np.ndarray:
    """One text alone: ids letter by letter, B·A added with alpha / rank, pooling spelled out."""
    bert = BertModel.from_pretrained(model).eval()
    if adapter is not None:
        stored = load_file(adapter / "adapter_model.safetensors")
        for key in [k for k in stored if ".lora_A." in k]:
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            product = stored[key.replace("lora_A", "lora_B")] @ stored[key]
            bert.get_parameter(name).data += 5 / 3 * product
    ids = [2]
    for word in text.split():
        ids += [ord(word[0]) - 97 + 4, *(ord(letter) - 97 + 30 for letter in word[1:])]
    ids = [*ids[:23], 3]
    with torch.inference_mode():
        hidden = bert(input_ids=torch.tensor([ids])).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
    return (vector / vector.norm()).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_vectors_in_a_padded_batch_equal_those_made_by_hand(
    pooling: str, make_model: Callable[[str], Path]
) -> None:
    model = make_model(pooling)

    found = Reference(model).encode(TEXTS, batch_size=3)

    expected = np.stack([by_hand(model, None, text, pooling) for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=SAME)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_the_adapter_is_added_with_alpha_over_rank(
    merged: bool, model: Path, adapter: Path
) -> None:
    found = Reference(model, adapter, merged=merged).encode(TEXTS)

    expected = np.stack([by_hand(model, adapter, text, "mean") for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=SAME)
    assert np.abs(found - Reference(model).encode(TEXTS)).max() > 0.01


@pytest.mark.slow
def test_modules_beside_an_adapter_are_its_own(
    make_model: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    model = make_model("mean")
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    for name in ("modules.json", "1_Pooling", "sentence_bert_config.json"):
        part = make_model("cls") / name
        shutil.copytree(part, folder / name) if part.is_dir() else shutil.copy(part, folder)
    settings = {"prompts": {"find": "find "}, "default_prompt_name": "find"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))

    reference = Reference(model, folder)

    expected = np.stack([by_hand(model, adapter, text, "cls") for text in TEXTS])
    np.testing.assert_allclose(reference.encode(TEXTS, prompt=""), expected, atol=SAME)
    assert reference.source.prompt() == "find "
    np.testing.assert_array_equal(
        reference.encode(TEXTS), reference.encode(["find " + t for t in TEXTS], prompt="")
    )


def test_the_bare_reference_equals_sentence_transformers(model: Path) -> None:
    library = pytest.importorskip("sentence_transformers")

    theirs = library.SentenceTransformer(str(model), device="cpu").encode(TEXTS)

    np.testing.assert_allclose(Reference(model).encode(TEXTS), theirs, atol=SAME)


@pytest.mark.parametrize(
    "flag",
    [
        *("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens"),
        *("weightedmean_tokens", "lasttoken"),
    ],
)
@pytest.mark.parametrize("ends", [True, False], ids=["with an end", "without"])
def test_a_prompt_that_is_not_pooled_is_left_out_as_sentence_transformers_does(
    flag: str, ends: bool, model: Path, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    pooling = {"word_embedding_dimension": 32, f"pooling_mode_{flag}": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps({**pooling, "include_prompt": False}))
    if not ends:  # the prompt is all there is of a text without characters
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    reference = Reference(folder)
    theirs = library.SentenceTransformer(str(folder), device="cpu")

    for prompt in ("q ", "find this: ", ""):
        texts = [*TEXTS, *([""] if prompt and ends else [])]
        found = reference.encode(texts, batch_size=3, prompt=prompt)
        np.testing.assert_allclose(found, theirs.encode(texts, prompt=prompt), atol=SAME)
    pooled = reference.encode(["q fox"], prompt="")
    if flag != "lasttoken":
        assert np.abs(pooled - reference.encode(["fox"], prompt="q ")).max() > 0.001


def test_a_prompt_is_put_before_the_text(model: Path) -> None:
    reference = Reference(model)

    found = reference.encode(["fox"], prompt=reference.source.prompt("query"))

    np.testing.assert_allclose(found, reference.encode(["q fox"]), atol=SAME)


@pytest.mark.parametrize(
    ("role", "text"), [("query", "q "), ("document", "p "), (None, "")], ids=str
)
def test_each_role_has_its_prompt(role: str | None, text: str, model: Path) -> None:
    assert read_source(model).prompt(role) == text


def test_bfloat16_is_near_and_not_equal(model: Path) -> None:
    exact, near = Reference(model).encode(TEXTS), Reference(model, dtype="bfloat16").encode(TEXTS)

    cosines = (exact * near).sum(1)
    assert near.dtype == np.float32
    assert (cosines > 0.99).all()  # 8 bits of mantissa through two layers
    assert (cosines < 1 - 1e-7).any()


@pytest.mark.slow
def test_adapter_keys_of_a_model_with_a_head_are_placed(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model."
    renamed = {prefix + "model." + k.removeprefix(prefix): v for k, v in stored.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())

    found = Reference(model, tmp_path).encode(TEXTS)

    np.testing.assert_allclose(found, Reference(model, adapter).encode(TEXTS), atol=SAME)


class WithHead(torch.nn.Module):
    def __init__(self, model: LlamaModel) -> None:
        super().__init__()
        self.model, self.multi_vector_projector = model, torch.nn.Linear(32, 5)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_an_adapter_that_reaches_the_multi_vector_head_is_placed(
    merged: bool, model: Path, tmp_path: Path
) -> None:
    source, adapter = tmp_path / "source", tmp_path / "adapter"
    shutil.copytree(model, source)
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 60}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    whole = WithHead(LlamaModel(config))
    config.multi_vector_projector_dim = 5
    config.save_pretrained(source)
    save_file(whole.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", "multi_vector_projector"])
    adapted = get_peft_model(whole, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(adapter)

    found = Reference(source, adapter, merged=merged).encode(TEXTS)

    expected = []
    for ids in TextTokens(read_source(source))(TEXTS):
        with torch.inference_mode():
            inner = adapted.base_model.model.model  # adapted in place
            mean = inner(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        expected.append((mean / mean.norm()).numpy())
    np.testing.assert_allclose(found, np.stack(expected), atol=SAME)
    assert np.abs(found - Reference(source).encode(TEXTS)).max() > 0.01


def test_an_adapter_tensor_without_a_place_is_named(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    lost = "base_model.model.encoder.layer.7.attention.self.query.lora_A.weight"
    save_file({**stored, lost: torch.zeros(3, 32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())

    with pytest.raises(BenchError, match=r"1 tensors of the adapter .*layer\.7"):
        Reference(model, tmp_path)


def test_a_model_without_a_pooling_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())

    with pytest.raises(BenchError, match="the pooling is not named by any file"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("offline", "reason"),
    [
        (True, "in the hub's cache, and HF_HUB_OFFLINE is set: unset it, or name a folder"),
        (False, "a model that the hub gave: no route; check the name and the network"),
    ],
)
def test_a_reference_that_cannot_be_had_comes_with_one_advice(
    monkeypatch: pytest.MonkeyPatch, offline: bool, reason: str
) -> None:
    def fail(hub_id: str) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    with pytest.raises(BenchError) as caught:
        read_source("some-organization/no-such-model")

    expected = f"--reference some-organization/no-such-model: neither a folder nor {reason}"
    assert str(caught.value) == expected


def test_the_length_limit_is_the_models_and_not_the_tokenizer_files(model: Path) -> None:
    tokens = TextTokens(read_source(model))

    rows = tokens(["a b c d e f g h i j k l m n o p q r s t u v w x y z", "a"])

    assert [len(row) for row in rows] == [24, 3]
    assert rows[0][-1] == 3  # the cut text still ends with [SEP]


def test_exact_batches_are_different_rows_of_real_tokens(model: Path) -> None:
    tokens = TextTokens(read_source(model))

    ids, mask = tokens.exact(["the quick brown fox", "jumps over", "lazy dogs"], 16, 12)

    assert ids.shape == mask.shape == (16, 12)
    assert mask.all()
    assert set(ids[:, 0]) == {2}
    assert set(ids[:, -1]) == {3}
    assert len({row.tobytes() for row in ids}) == 16
