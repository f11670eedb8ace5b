"""The bundle's ``tokenizer.json``: what transformers would run, without its truncation and padding.

Read without transformers, whose versions make different tokenizers of the same files (5 builds Llama's
and Qwen's anew from their vocabularies). Files written by version 5, known by ``backend``, hold what
runs: settings beside them that say something else are refused, but for those of BERT's normalizer, which
both versions apply. For all others tokenizer_config.json has the last word, as in version 4: the class that
it names decides which of its settings change tokenizer.json (:data:`CLASSES`). A class that is not listed
is refused by name.
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.json_files import parse_object, read_bytes
from embedge.export.source.tokenizer_builder import TokenizerBuilder
from embedge.export.source.tokenizer_settings import CONFIG, TokenizerSettings
from embedge.runtime.errors import EmbedgeWarning

__all__ = ["BundleTokenizer", "read_tokenizer"]

_MOST_TOKENS = 1 << 24  # 64 times the largest vocabulary of the families here


@dataclass(frozen=True, kw_only=True)
class BundleTokenizer:
    """A tokenizer as it is written to a bundle.

    Attributes:
        text: content of ``tokenizer.json``.
        pad_token_id: id that fills rows; padding is masked, so any valid id does.
        truncation_side: the end that a text which is too long loses, "right" or "left".
        padding_side: the end that the source pads, likewise; bundles pad on the right.
        special: ids of the special tokens that the settings name, by those names.
        table_rows: rows of the model's table, where the tokenizer has tokens beyond it.
    """

    text: str
    pad_token_id: int
    truncation_side: str
    padding_side: str = "right"
    special: Mapping[str, int] = field(default_factory=dict)
    table_rows: int | None = None

    @property
    def special_ids(self) -> list[int]:
        """Transformers' ``all_special_ids``, ascending."""
        return sorted(set(self.special.values()))

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, ``None`` for one that there is not."""
        from tokenizers import Tokenizer

        found: int | None = Tokenizer.from_str(self.text).token_to_id(token)
        return found

    def with_markers(self, markers: Iterable[str]) -> BundleTokenizer:
        """The tokenizer that gives some texts as one special token, where it has a token for them.

        Source: sentence-transformers' ``MultiVectorEncoder._register_prefix_tokens``.

        Args:
            markers: a text each; its first word is tried where there is no token for all of it.
        """
        from tokenizers import AddedToken, Tokenizer

        tokenizer, added = Tokenizer.from_str(self.text), []
        for marker in markers:
            texts = [marker, *marker.split()[:1]] if marker.split() else []
            known = [text for text in texts if tokenizer.token_to_id(text) is not None][:1]
            for text in known:
                if tokenizer.encode(text, add_special_tokens=False).tokens != [text]:
                    added.append(AddedToken(text, normalized=False, special=True))
        if not added:
            return self
        tokenizer.add_special_tokens(added)
        content = json.loads(tokenizer.to_str())
        return replace(self, text=_written(content))

    def encode(self, texts: list[str], max_length: int) -> list[list[int]]:
        """Token ids with special tokens, cut at ``max_length``."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.text)
        tokenizer.enable_truncation(max_length, direction=self.truncation_side)
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    def with_table(self, rows: int) -> BundleTokenizer:
        """The tokenizer of a model whose table has ``rows``; a warning names tokens beyond it."""
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_str(self.text).get_vocab(with_added_tokens=True)
        beyond = sorted((i, token) for token, i in vocabulary.items() if i >= rows)
        if not beyond:
            return self
        shown = ", ".join(f"{token!r} (id {i})" for i, token in beyond[:5])
        more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        warnings.warn(
            f"tokenizer.json has tokens beyond the {rows} rows of the model's table: {shown}{more}; "
            "embedding a text with one of them will raise an error. Resize and train the table, or take "
            "the tokens out of the tokenizer's files",
            EmbedgeWarning,
            stacklevel=4,
        )
        pad = self.pad_token_id if self.pad_token_id < rows else 0
        return replace(self, pad_token_id=pad, table_rows=rows)


def read_tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    lowercase: bool = False,
) -> BundleTokenizer:
    """Read a model's fast tokenizer as transformers does.

    Args:
        folder: where ``tokenizer.json`` and ``tokenizer_config.json`` lie.
        config: config.json, which says the class where tokenizer_config.json does not.
        overrides: settings that sentence-transformers gives to the tokenizer.
        lowercase: whether sentence-transformers lower-cases texts first.

    Raises:
        CheckpointError: there is no ``tokenizer.json``, it is damaged, or a setting is not supported.
    """
    try:
        return _read(folder, config, overrides or {}, lowercase)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder}: the tokenizer's files ({CONFIG} and what lies beside it) hold something else than "
            f"expected ({type(error).__name__}: {error}); fetch or save them again"
        ) from error


def _read(
    folder: Path, config: Mapping[str, Any], overrides: Mapping[str, Any], lowercase: bool
) -> BundleTokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(_no_tokenizer(folder))
    data = read_bytes(file)
    content = parse_object(data, file)
    settings = TokenizerSettings(folder, config, overrides)
    builder = TokenizerBuilder(_parse(data, file), settings, content)
    builder.add_tokens()
    if settings.from_version_5:
        builder.check_written()
    else:
        builder.prefix_space()
    builder.lower_case()
    builder.ends()
    if lowercase:
        builder.lower_first()
    result = builder.result()
    truncation = (content.get("truncation") or {}).get("direction", "right")
    side = settings.get("truncation_side", str(truncation).lower())
    if side not in ("right", "left"):
        raise settings.refuse("truncation_side", side, "'right' or 'left'")
    return BundleTokenizer(
        text=_written(result),
        pad_token_id=builder.pad_token_id(),
        special=builder.special_ids(),
        truncation_side=side,
        padding_side=_padding_side(settings, content),
    )


def _padding_side(settings: TokenizerSettings, content: Mapping[str, Any]) -> str:
    """The end that transformers pads: by the settings, by tokenizer.json, or by the tokenizer's class."""
    by_class = "left" if settings.named.left else "right"
    own = (content.get("padding") or {}).get("direction", by_class)
    return str(settings.get("padding_side") or own).lower()


def _written(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _parse(data: bytes, file: Path) -> Any:
    """The tokenizer in tokenizer.json; ids that no model has are refused."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise CheckpointError(
            f"{file}: tokenizers could not read it ({error}); fetch or save the file again"
        ) from error
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if last >= _MOST_TOKENS:  # writing a vocabulary visits every id up to it
        raise CheckpointError(
            f"{file}: the token {token[:40]!r} has the id {last}, expected ids below {_MOST_TOKENS:,}; "
            "fetch or save the file again"
        )
    return tokenizer


def _no_tokenizer(folder: Path) -> str:
    code = (
        "import sys, transformers as t; p = sys.argv[1]; "
        "t.AutoTokenizer.from_pretrained(p).save_pretrained(p)"
    )
    return (
        f"{folder}: expected a tokenizer.json, found none; convert the slow tokenizer where you "
        "trust the folder: pip install transformers sentencepiece protobuf tiktoken, then "
        f"python -c {shlex.quote(code)} {shlex.quote(str(folder))}; what transformers has in "
        "Python alone gets none and cannot be exported"
    )
