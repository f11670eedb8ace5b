"""Texts to token ids, by the bundle's own ``tokenizer.json``.

The file's truncation and padding are replaced: texts are cut at the model's limit, at the side that
the manifest names, with their special tokens kept, and padded later, per batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedge.runtime.bundle.files import TOKENIZER_BYTES, read_regular_file
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.manifest import TokenizerSettings
from embedge.runtime.encode.sequences import TokenIds
from embedge.runtime.errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["TextTokenizer", "is_library_error", "read_tokenizer", "without_surrogates"]

# tokenizers' own objects take some 100 bytes a token, so they are dropped after this many texts.
_CHUNK_TEXTS = 512


class TextTokenizer:
    """A tokenizer file with the model's limit; safe to use from several threads.

    Args:
        file: path of ``tokenizer.json``.
        settings: what the manifest says about it.
        max_length: most tokens of a text, special tokens included.
        other_lengths: limits for :meth:`cut_at`, whose tokenizers are read now as well.

    Raises:
        BundleError: if the file is not a tokenizer, or cannot keep to the limit.
    """

    def __init__(
        self,
        file: Path,
        settings: TokenizerSettings,
        max_length: int,
        other_lengths: Iterable[int] = (),
    ) -> None:
        self._eos = settings.append_eos_token_id
        self._special = frozenset(settings.special_token_ids)
        self._file = file
        limit = max_length - (self._eos is not None)
        self._side = settings.truncation_side
        self._tokenizer = _load(file, limit, self._side)
        others = sorted(set(other_lengths) - {max_length})
        self._by_length = {n: TextTokenizer(file, settings, n) for n in others} | {max_length: self}

    def cut_at(self, max_length: int) -> TextTokenizer:
        """The same tokenizer with another limit, one of those that it was opened with."""
        return self._by_length[max_length]

    @property
    def special_tokens(self) -> int:
        """How many tokens every text has besides its own."""
        special: int = self._tokenizer.num_special_tokens_to_add(False)
        return special + (self._eos is not None)

    def at_limit(self, max_length: int) -> TextTokenizer:
        """The same tokenizer, which cuts at fewer tokens; its file is not read again."""
        from tokenizers import Tokenizer

        other = copy.copy(self)
        other._tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        limit = max_length - (self._eos is not None)
        other._tokenizer.enable_truncation(limit, direction=self._side)
        other._by_length = {max_length: other}
        return other

    def prompt_tokens(self, prompt: str) -> int:
        """How many of the first tokens of a text are its prompt's: those of the prompt alone.

        A special token that ends them is the text's. Source: sentence-transformers'
        ``Transformer._get_prompt_length``.
        """
        if not prompt:
            return 0
        [tokens] = self([prompt])
        ends = bool(len(tokens)) and int(tokens.ids[-1]) in self._special
        return len(tokens) - ends

    def __call__(self, texts: Sequence[str], unpooled: int = 0) -> list[TokenIds]:
        """Token ids of each text; lone surrogates are read as U+FFFD.

        Args:
            texts: with their prompts.
            unpooled: how many of the first tokens of each pooling leaves out.

        Raises:
            BundleError: if the tokenizer fails on one of them.
        """
        result = []
        for start in range(0, len(texts), _CHUNK_TEXTS):
            chunk = [without_surrogates(text) for text in texts[start : start + _CHUNK_TEXTS]]
            for encoding in self._encode(chunk):
                ids, types = encoding.ids, encoding.type_ids
                if self._eos is not None:
                    ids, types = [*ids, self._eos], [*types, types[-1] if types else 0]
                result.append(
                    TokenIds(
                        np.array(ids, np.int64),
                        np.array(types, np.int64),
                        bool(encoding.overflowing),
                        unpooled,
                    )
                )
        return result

    def count(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text if it were not cut."""
        special = self._tokenizer.num_special_tokens_to_add(False)
        result = []
        for start in range(0, len(texts), _CHUNK_TEXTS):
            chunk = [without_surrogates(text) for text in texts[start : start + _CHUNK_TEXTS]]
            for encoding in self._encode(chunk):
                rest = sum(len(part) - special for part in encoding.overflowing)
                result.append(len(encoding) + rest + (self._eos is not None))
        return result

    def token_name(self, token_id: int) -> str:
        """A token as messages have it."""
        name = self._tokenizer.id_to_token(token_id)
        return f"the id {token_id}" if name is None else repr(name)

    def _encode(self, texts: list[str]) -> list[Encoding]:
        try:
            encodings: list[Encoding] = self._tokenizer.encode_batch_fast(texts)
            return encodings
        except BaseException as error:
            if not is_library_error(error):
                raise
            raise BundleError(
                f"{self._file}: the tokenizer failed on {_shown(texts)}: {error}; copy or export the bundle "
                "again"
            ) from error


def read_tokenizer(bundle: Bundle) -> TextTokenizer:
    """The tokenizer of a bundle, at the lengths of all roles; nothing of its file is read later.

    Raises:
        BundleError: as :class:`TextTokenizer`, or if the file is not the bundle's any more.
    """
    settings, model = bundle.manifest.tokenizer, bundle.manifest.model
    rules = model.late_interaction
    lengths = [] if rules is None else [rules.length(role) for role in (None, "query", "document")]
    with bundle.reading([settings.file]):
        return TextTokenizer(bundle.root / settings.file, settings, model.max_length, lengths)


def is_library_error(error: BaseException) -> bool:
    """Whether a library failed; a panic of Rust code, which pyo3 makes no ``Exception``, included."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _shown(texts: list[str]) -> str:
    return repr(texts[0][:40]) if len(texts) == 1 else f"one of {len(texts)} texts"


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates as U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _load(file: Path, max_length: int, side: str) -> Tokenizer:
    # Imported here because `import embedge.runtime` has to stay cheap.
    from tokenizers import Tokenizer

    try:
        content = read_regular_file(file, TOKENIZER_BYTES)
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror or error}") from error
    try:
        tokenizer = Tokenizer.from_str(content.decode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.enable_truncation(max_length, direction=side)
        # Where the special tokens alone pass the limit, tokenizers does not cut at all.
        if len(tokenizer.encode("a").ids) > max_length:
            raise ValueError("its special tokens leave no room for a text")
    except BaseException as error:  # tokenizers raises bare Exception
        if not is_library_error(error):
            raise
        raise BundleError(
            f"{file}: not a tokenizer that cuts at {max_length} tokens ({error}); copy or export "
            "the bundle again"
        ) from error
    return tokenizer
