"""The bundle's ids are those of the tokenizer that transformers makes of a folder, class by class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from embedge.export.errors import CheckpointError
from embedge.export.source.tokenizer import read_tokenizer
from tests.helpers.models import write_json

VERSION = int(transformers.__version__.split(".", maxsplit=1)[0])
CORPUS = [
    "hello world the embedding of a model, running unhappiness cafe uber paris",
    "Hello World Café über Zürich don't can't it's naïve code: def f(x): return x",
    "中文 字符 日本語 한국어 emoji 😀 1234 3.14 ÉCOLE strasse",
]
TEXTS = [
    *("", " ", "\n", "\t", "hello world", " Hello", "Hello ", "  two  spaces ", "HELLO ÉCOLE"),
    *(
        "café naïve",
        "cafe\u0301 e\u0300\u0301",
        "中文字符",
        "日本語 한국어",
        "😀 👩‍👩‍👧 x",
        "ﬁ ½ ²",
        "İstanbul ı ß",
    ),
    *(
        "[CLS] a [SEP] b [MASK] c [PAD] [UNK]",
        "<s> a </s> b <mask> c <pad> <unk>",
        "a<mask>b",
        " <mask> x",
    ),
    *(
        "a<|endoftext|>b",
        "a <|endoftext|> <|im_end|>",
        "<bos> a <eos>",
        "x[MASK]y",
        "[mask] <MASK>",
    ),
    *("new1", "a new1 b", "anew1b", "[NEW]", "a [NEW] b", "a[NEW]b", "[new]", "<image>", "x [PAD]"),
    *(
        "a\x00\x01b",
        "zero\u200bwidth",
        "\ufeffbom",
        "nbsp\u00a0here",
        "soft\u00adhyphen",
        "\ud7a3 \u1100\u1161",
    ),
    *(
        "one\ntwo\r\nthree",
        "1234567890",
        "a.b,c!d?",
        "foo_bar-baz",
        "ａｂｃ ＡＢＣ",
        "▁ Ġ ##ing",
        "▁▁a",
    ),
    *(
        "word " * 30,
        "x" * 90,
        "é" * 20,
        "\n\n\n",
        "def f(x):\n    return x+1\n",
        "שלום العربية हिन्दी ไทย",
    ),
]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def ends(tokenizer: Tokenizer, first: str, last: str) -> Tokenizer:
    tokens = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=tokens
    )
    return tokenizer


def word_pieces(special: list[str], unk: str, first: str, last: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=unk))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return ends(tokenizer, first, last)


def byte_pairs(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def roberta() -> Tokenizer:
    tokenizer = byte_pairs(ROBERTA)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    return tokenizer


def qwen2() -> Tokenizer:
    tokenizer = byte_pairs(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    )
    pattern += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="$A <|endoftext|>",
                pair="$A $B <|endoftext|>",
                special_tokens=[("<|endoftext|>", 0)],
            ),
        ]
    )
    return tokenizer


def pieces(special: list[str], first: str, last: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return ends(tokenizer, first, last)


def llama() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    return ends(Tokenizer.from_str(json.dumps(state)), "<s>", "</s>")


CAMEMBERT = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>", "<mask>"]
NAMES = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
# by class: model_type, the tokenizer, tokenizer_config.json
KINDS: dict[str, tuple[str, Callable[[], Tokenizer], dict[str, Any]]] = {
    "Bert": ("bert", lambda: word_pieces(BERT, "[UNK]", "[CLS]", "[SEP]"), {}),
    "PreTrained": ("modernbert", lambda: ends(byte_pairs(BERT), "[CLS]", "[SEP]"), NAMES),
    "Roberta": ("roberta", roberta, {}),
    "XLMRoberta": ("xlm-roberta", lambda: pieces(ROBERTA, "<s>", "</s>"), {}),
    "Camembert": ("camembert", lambda: pieces(CAMEMBERT, "<s>", "</s>"), {}),
    "MPNet": (
        "mpnet",
        lambda: word_pieces(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], "[UNK]", "<s>", "</s>"),
        {},
    ),
    "Llama": ("mistral", llama, {"add_eos_token": True, "pad_token": "</s>"}),
    "Qwen2": ("qwen3", qwen2, {"bos_token": None, "unk_token": None, "eos_token": "<|im_end|>"}),
}
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def padding(name: str) -> Callable[[dict[str, Any]], None]:
    entry = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 8}
    entry |= {"pad_id": 1, "pad_type_id": 1, "pad_token": name}
    return lambda state: state.update(padding=entry)


def alone(state: dict[str, Any]) -> None:
    for token in state["added_tokens"]:
        token["single_word"] = True


CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "cased": {"settings": {"do_lower_case": False, "strip_accents": True}},
    "not Chinese": {"settings": {"tokenize_chinese_chars": False}},
    "special tokens new": {"settings": {"mask_token": "[NEW]", "cls_token": "new1"}},
    "special tokens exchanged": {"settings": {"bos_token": "</s>", "eos_token": "<s>"}},
    "a mask that is an object": {
        "settings": {
            "mask_token": {"content": "<mask>", **PLAIN, "lstrip": True, "__type": "AddedToken"}
        }
    },
    "further": {"settings": {"additional_special_tokens": ["[NEW]", "new1"]}},
    "named further": {"settings": {"extra_special_tokens": {"image_token": "<image>"}}},
    "no side": {"settings": {"padding_side": "left", "truncation_side": "left"}},
    "early files": {
        "map": {"pad_token": "[NEW]", "additional_special_tokens": ["<image>"]},
        "added": {"new1": 400},
    },
    "tokens that match alone": {"state": alone},
    "no added tokens": {"state": lambda state: state.update(added_tokens=[])},
    "padding": {"state": padding("[PAD]")},
    "truncation": {
        "state": lambda state: state.update(
            truncation={
                "direction": "Left",
                "max_length": 5,
                "strategy": "LongestFirst",
                "stride": 2,
            }
        )
    },
}


def write(folder: Path, kind: str, change: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    model_type, make, settings = KINDS[kind]
    folder.mkdir()
    state = json.loads(make().to_str())
    change.get("state", lambda _: None)(state)
    write_json(folder / "tokenizer.json", state)
    settings = {"tokenizer_class": f"{kind}Tokenizer{'Fast' * (kind == 'PreTrained')}", **settings}
    write_json(folder / "tokenizer_config.json", settings | change.get("settings", {}))
    write_json(folder / "config.json", {"model_type": model_type})
    for name, key in (("special_tokens_map.json", "map"), ("added_tokens.json", "added")):
        if key in change:
            write_json(folder / name, change[key])
    return folder, {"model_type": model_type}


def assert_same(folder: Path, config: dict[str, Any]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder, config)
    assert ours.truncation_side == theirs.truncation_side
    if theirs.pad_token_id is not None:
        assert ours.pad_token_id == theirs.pad_token_id
    for length in (7, 512):
        expected = theirs(TEXTS, truncation=True, max_length=length)["input_ids"]
        assert dict(zip(TEXTS, ours.encode(TEXTS, length), strict=True)) == dict(
            zip(TEXTS, expected, strict=True)
        )


@pytest.mark.skipif(VERSION > 4, reason="classes of transformers 5 build other tokenizers")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_transformers(kind: str, change: str, tmp_path: Path) -> None:
    assert_same(*write(tmp_path / "source", kind, CHANGES[change]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_what_the_installed_transformers_saved_are_its_own(
    kind: str, tmp_path: Path
) -> None:
    folder, config = write(tmp_path / "source", kind, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("new1", lstrip=True), AddedToken("[NEW]", special=True)])
    tokenizer.save_pretrained(tmp_path / "saved")
    write_json(tmp_path / "saved" / "config.json", config)
    assert_same(tmp_path / "saved", config)


WRITTEN = {"backend": "tokenizers", "is_local": True}  # by version 5


def encode(folder: Path, config: dict[str, Any], text: str) -> list[int]:
    [ids] = read_tokenizer(folder, config).encode([text], 64)
    return ids


def test_files_of_version_5_are_lower_cased_as_their_settings_say(tmp_path: Path) -> None:
    lower = write(tmp_path / "lower", "Bert", {"settings": {**WRITTEN, "do_lower_case": True}})
    cased = write(tmp_path / "cased", "Bert", {"settings": {**WRITTEN, "do_lower_case": False}})
    unknown = BERT.index("[UNK]")
    assert unknown not in encode(*lower, "HELLO")
    assert unknown in encode(*cased, "HELLO")


def test_a_list_of_special_tokens_takes_the_place_of_the_additional_ones(tmp_path: Path) -> None:
    both = {"extra_special_tokens": ["[NEW]"], "additional_special_tokens": ["new1"]}
    folder, config = write(tmp_path / "source", "Roberta", {"settings": both})
    added = json.loads(read_tokenizer(folder, config).text)["added_tokens"]
    assert {"[NEW]", "new1"} & {token["content"] for token in added} == {"[NEW]"}


def test_tokens_of_names_of_their_own_are_special_in_version_5(tmp_path: Path) -> None:
    settings = {**WRITTEN, "image_token": "<image>", "model_max_length": 9}
    folder, config = write(tmp_path / "source", "Qwen2", {"settings": settings})
    assert len(encode(folder, config, "<image>")) == 2  # with <|endoftext|>


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("Qwen2", {"settings": {**WRITTEN, "add_prefix_space": True}}, "add_prefix_space is True"),
        (
            "XLMRoberta",
            {"settings": {**WRITTEN, "add_prefix_space": False}},
            "expected true, as tokenizer.json does",
        ),
        (
            "Llama",
            {"settings": {**WRITTEN, "eos_token": "</s>", "add_eos_token": False}},
            "add_eos_token is False",
        ),
        ("PreTrained", {"settings": {**WRITTEN, "add_bos_token": True}}, "add_bos_token is True"),
        ("Bert", {"state": lambda s: s.update(normalizer=None)}, "normalizer is null"),
        (
            "Bert",
            {"settings": {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "tokenizer.json"]}},
            "fast_tokenizer_files is",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_say_something_else_are_refused_by_name(
    kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(*write(tmp_path / "source", kind, change))
