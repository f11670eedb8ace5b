"""A bundle's tokenizer gives the ids of transformers' tokenizer, whichever version wrote the files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from embedge.export.errors import CheckpointError
from embedge.export.source.tokenizer import BundleTokenizer, read_tokenizer
from embedge.export.source.tokenizer_classes import CLASSES
from tests.helpers.models import write_json

SPECIAL = ["<unk>", "[UNK]", "<pad>", "[PAD]", "<s>", "</s>", "[CLS]", "[SEP]", "<mask>", "[MASK]"]
SPECIAL += ["<|endoftext|>", "<bos>", "<eos>"]
WORDS = [*SPECIAL, *map(chr, range(33, 127)), "▁", "Ġ", "é"]
TEXTS = ["Ab é cD [MASK] <mask> x</s>y", "hello World [NEW] new1 zz", "<s>a", " lead  ", "中文 ab"]
VERSION = int(transformers.__version__.split(".", maxsplit=1)[0])


def write_tokenizer(
    folder: Path, settings: dict[str, Any], normalizer: Any = None, pre_tokenizer: Any = None
) -> Path:
    """A tokenizer of characters with the sentence `<s> text </s>`, and its tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>:1", special_tokens=[("<s>", 4), ("</s>", 5)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def encodings(tokenizer: BundleTokenizer) -> list[tuple[list[int], list[int]]]:
    backend = Tokenizer.from_str(tokenizer.text)
    return [(e.ids, e.type_ids) for e in backend.encode_batch(TEXTS)]


def assert_same(folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder, {"model_type": "bert"})
    expected = [theirs(text) for text in TEXTS]
    no_types = [[0] * len(e["input_ids"]) for e in expected]
    assert encodings(ours) == [
        (e["input_ids"], e.get("token_type_ids", n))
        for e, n in zip(expected, no_types, strict=True)
    ]
    assert ours.truncation_side == theirs.truncation_side
    if theirs.pad_token_id is not None:
        assert ours.pad_token_id == theirs.pad_token_id


ADDED = {"normalized": False, "rstrip": False, "single_word": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "cased": {"do_lower_case": False},
    "ends": {
        "add_bos_token": True,
        "add_eos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    },
    "prefix": {"add_prefix_space": True},
    "further": {"additional_special_tokens": ["[NEW]"], "pad_token": "<pad>"},
    "added": {
        "added_tokens_decoder": {
            "108": {"content": "new1", "lstrip": True, "special": False, **ADDED},
            "8": {"content": "<mask>", "lstrip": True, "special": True, **ADDED},
        },
        "mask_token": "<mask>",
    },
    "inputs": {"model_input_names": ["input_ids"], "strip_accents": True},
    "side": {"truncation_side": "left"},
}
PARTS: dict[str, tuple[Any, Any]] = {
    "plain": (None, None),
    "bert": (normalizers.BertNormalizer(lowercase=False), None),
    "lower": (normalizers.Lowercase(), pre_tokenizers.Metaspace()),
    "bytes": (normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)),
}


@pytest.mark.slow
@pytest.mark.skipif(VERSION > 4, reason="classes of transformers 5 build other tokenizers")
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["PreTrained", *CLASSES])
def test_every_class_and_setting_is_read_as_transformers_4_reads_it(
    name: str, parts: str, tmp_path: Path
) -> None:
    compared = 0
    for number, (settings, end) in enumerate(
        zip(SETTINGS.values(), itertools.cycle(("", "Fast")), strict=False)
    ):
        full = {"tokenizer_class": f"{name}Tokenizer{end}", **settings}
        folder = write_tokenizer(tmp_path / str(number), full, *PARTS[parts])
        try:
            transformers.AutoTokenizer.from_pretrained(folder)
        except (AttributeError, TypeError, ImportError, ValueError):
            continue  # BERT's classes want a normalizer; Llama's convert where a prefix is named
        assert_same(folder)
        compared += 1
    assert compared >= 7 or (parts == "plain" and CLASSES[name].lowers)


@pytest.mark.skipif(VERSION > 4, reason="classes of transformers 5 build other tokenizers")
def test_early_files_name_special_and_added_tokens(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, {"tokenizer_class": "RobertaTokenizer"})
    mask = {"content": "<mask>", "lstrip": True, **ADDED}
    write_json(folder / "special_tokens_map.json", {"mask_token": mask, "pad_token": "[PAD]"})
    write_json(folder / "added_tokens.json", {"new1": 111})
    assert_same(folder)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_folder_saved_by_the_installed_transformers_gives_its_ids(
    settings: str, tmp_path: Path
) -> None:
    source = {"tokenizer_class": "PreTrainedTokenizerFast", **SETTINGS[settings]}
    folder = write_tokenizer(tmp_path / "first", source)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert_same(tmp_path / "saved")


@pytest.mark.parametrize(
    "written",
    [
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "LlamaTokenizer"},  # version 4 would end no text with </s>
        {"tokenizer_class": "BertTokenizer"},  # version 4 would lower-case
        {"tokenizer_class": "SomeNewTokenizer"},
        {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": ["<s>", "</s>"]},
    ],
    ids=lambda value: value["tokenizer_class"],
)
def test_files_of_transformers_5_hold_what_runs(written: dict[str, Any], tmp_path: Path) -> None:
    settings = {**written, "backend": "tokenizers", "is_local": True, "unk_token": "<unk>"}
    folder = write_tokenizer(
        tmp_path, settings, normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    )
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.add_special_tokens(["<unk>"])
    ours = encodings(read_tokenizer(folder, {"model_type": "bert"}))
    assert [ids for ids, _ in ours] == [e.ids for e in plain.encode_batch(TEXTS)]


def test_a_decoders_closing_token_is_kept_under_any_version(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}
    folder = write_tokenizer(tmp_path, settings)
    assert all(
        (ids[0], ids[-1]) == (4, 5)
        for ids, _ in encodings(read_tokenizer(folder, {"model_type": "mistral"}))
    )


def test_settings_given_by_sentence_transformers_come_first(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "truncation_side": "right"}
    folder = write_tokenizer(tmp_path, settings)
    ours = read_tokenizer(folder, {"model_type": "bert"}, overrides={"truncation_side": "left"})
    assert ours.truncation_side == "left"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "BertweetTokenizer"}, "tokenizer_class is 'BertweetTokenizer'"),
        ({"split_special_tokens": True}, "split_special_tokens is True"),
        ({"fix_mistral_regex": True}, "fix_mistral_regex is True"),
        ({"auto_map": {"AutoTokenizer": ["code.Mine", None]}}, "auto_map"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle', expected 'right' or 'left'"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is"),
        ({"unk_token": 3}, "unk_token is 3"),
        (
            {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True},
            "add_prefix_space is True",
        ),
        (
            {"tokenizer_class": "GemmaTokenizer", "bos_token": None},
            "add_bos_token is True, expected false, or a bos_token",
        ),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else None,
)
def test_what_cannot_be_read_is_refused_by_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_tokenizer(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tokenizer(folder, {"model_type": "llama"})
    assert "tokenizer_config.json" in str(caught.value)


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE"}}', "[]", "{", '{"model": 3}'])
def test_a_damaged_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, {})
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_tokenizer(folder, {"model_type": "bert"})


def test_an_id_far_beyond_any_vocabulary_is_refused(tmp_path: Path) -> None:
    """The library visits every id up to the last when it writes."""
    file = write_tokenizer(tmp_path, {}) / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["model"]["vocab"]["é"] = 2**31 - 1
    write_json(file, content)
    with pytest.raises(CheckpointError, match="'é' has the id 2147483647, expected ids below"):
        read_tokenizer(tmp_path, {"model_type": "bert"})


def test_no_tokenizer_at_all_says_what_to_install(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})
    with pytest.raises(CheckpointError, match="sentencepiece"):
        read_tokenizer(tmp_path, {})
