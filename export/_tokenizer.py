"""The bundle's ``tokenizer.json``: what transformers would run, without its truncation and padding."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedge.export._errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class BundleTokenizer:
    """A tokenizer as it is written to a bundle.

    Attributes:
        text: content of ``tokenizer.json``.
        pad_token_id: id that fills rows; padding is masked, so any valid id does.
        truncation_side: the end that a text which is too long loses, "right" or "left".
    """

    text: str
    pad_token_id: int
    truncation_side: str

    def encode(self, texts: list[str], max_length: int) -> list[list[int]]:
        """Token ids with special tokens, cut at ``max_length``."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.text)
        tokenizer.enable_truncation(max_length, direction=self.truncation_side)
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


@contextmanager
def _no_mistral_advice() -> Iterator[None]:
    """Without the warning about Mistral's regex that transformers gives for any large local vocabulary."""
    logger = logging.getLogger("transformers.tokenization_utils_base")

    def keep(record: logging.LogRecord) -> bool:
        return "fix_mistral_regex" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def read_tokenizer(folder: Path) -> BundleTokenizer:
    """Load a model's fast tokenizer through transformers, which patches some files when it reads them.

    Args:
        folder: where ``tokenizer.json`` and ``tokenizer_config.json`` lie.

    Raises:
        CheckpointError: there is no ``tokenizer.json``, or transformers cannot read it without running
            code from the folder.
    """
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: expected a tokenizer.json, found none; convert the slow tokenizer with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    from transformers import AutoTokenizer

    try:
        load: Any = AutoTokenizer.from_pretrained
        with _no_mistral_advice():
            tokenizer = load(
                str(folder), use_fast=True, local_files_only=True, trust_remote_code=False
            )
        text = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # whatever transformers or tokenizers raise for a bad file
        raise CheckpointError(
            f"{folder}/tokenizer.json: transformers could not load it ({error}); "
            "expected a fast tokenizer that needs no remote code"
        ) from error
    content = json.loads(text)
    content["truncation"] = None
    content["padding"] = None
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0
    return BundleTokenizer(
        text=json.dumps(content, ensure_ascii=False, separators=(",", ":")),
        pad_token_id=int(pad),
        truncation_side=tokenizer.truncation_side,
    )
