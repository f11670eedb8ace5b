"""The bundle's ``tokenizer.json``: what transformers would run, without its truncation and padding.

Read without transformers, whose versions make different tokenizers of the same files (5 builds Llama's
and Qwen's anew from their vocabularies). Files written by version 5, known by ``backend``, hold what
runs: settings beside them that say something else are refused, but for those of BERT's normalizer, which
both versions apply. For all others tokenizer_config.json has the last word, as in version 4: the class that
it names decides which of its settings change tokenizer.json (:data:`_CLASSES`). A class that is not listed
is refused by name.
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.json_files import read_json_object, read_optional
from embedge.runtime.errors import EmbedgeWarning

_CONFIG = "tokenizer_config.json"
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_GENERIC = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")

_MOST_TOKENS = 1 << 24  # 64 times the largest vocabulary of the families here


@dataclass(frozen=True, kw_only=True)
class _Class:
    """What a tokenizer class of transformers 4 does beyond reading its files.

    Attributes:
        tokens: special tokens where the files name none, in the order of ``_NAMED``, "" for none.
        more: further special tokens.
        remade: special tokens that it matches in its own way where the files do not say how, the mask with
            the space before it.
        lowers: whether ``do_lower_case`` and its kin replace the normalizer's.
        ends: whether ``add_bos_token`` and ``add_eos_token`` replace the post-processor, and their defaults.
        prefix: whether ``add_prefix_space`` makes it convert the slow tokenizer.
        types: whether the model is given token types.
    """

    tokens: str = ""
    more: tuple[str, ...] = ()
    remade: tuple[str, ...] = ()
    lowers: tuple[str, ...] = ()
    ends: tuple[bool, bool] | None = None
    prefix: bool = False
    types: bool = True


_LOWERS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
_PLAIN = _Class()
_BERT = _Class(tokens="- - [UNK] [SEP] [PAD] [CLS] [MASK]", lowers=_LOWERS)
_MASK = ("mask_token",)
_ROBERTA = _Class(tokens="<s> </s> <unk> </s> <pad> <s> <mask>", remade=_MASK, types=False)
_GPT2 = _Class(tokens="<|endoftext|> <|endoftext|> <|endoftext|>", types=False)
_CLASSES: Mapping[str, _Class] = {
    **dict.fromkeys(("Bert", "Electra", "MobileBert", "ConvBert"), _BERT),
    "DistilBert": replace(_BERT, types=False),
    "MPNet": _Class(
        tokens="<s> </s> [UNK] </s> <pad> <s> <mask>",
        remade=_NAMED,
        lowers=_LOWERS[:2],
        types=False,
    ),
    **dict.fromkeys(("Roberta", "XLMRoberta", "Bart", "Barthez", "Longformer"), _ROBERTA),
    "Camembert": replace(_ROBERTA, more=("<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED")),
    "Herbert": _Class(tokens="- - <unk> </s> <pad> <s> <mask>"),
    "DebertaV2": _Class(tokens="[CLS] [SEP] [UNK] [SEP] [PAD] [CLS] [MASK]"),
    "Albert": _Class(tokens="[CLS] [SEP] <unk> [SEP] <pad> [CLS] [MASK]", remade=_MASK),
    "GPT2": _GPT2,
    "GPTNeoX": replace(_GPT2, ends=(False, False)),
    "Llama": _Class(tokens="<s> </s> <unk>", ends=(True, False), prefix=True, types=False),
    "Gemma": _Class(tokens="<bos> <eos> <unk> - <pad>", ends=(True, False), types=False),
    "Qwen2": _Class(
        tokens="- <|endoftext|> <|endoftext|> - <|endoftext|>",
        remade=("bos_token", "eos_token", "unk_token", "pad_token"),
        types=False,
    ),
}
# tokenizer_class where tokenizer_config.json names none
_BY_MODEL = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "mpnet": "MPNet",
    "llama": "Llama",
    "mistral": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
    "qwen2_5_vl": "Qwen2",
}


@dataclass(frozen=True, kw_only=True)
class BundleTokenizer:
    """A tokenizer as it is written to a bundle.

    Attributes:
        text: content of ``tokenizer.json``.
        pad_token_id: id that fills rows; padding is masked, so any valid id does.
        truncation_side: the end that a text which is too long loses, "right" or "left".
        table_rows: rows of the model's table, where the tokenizer has tokens beyond it.
    """

    text: str
    pad_token_id: int
    truncation_side: str
    table_rows: int | None = None

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
        return _Reader(folder, config, dict(overrides or {})).read(lowercase)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder}: the tokenizer's files ({_CONFIG} and what lies beside it) hold something else than "
            f"expected ({type(error).__name__}: {error}); fetch or save them again"
        ) from error


@dataclass
class _Reader:
    """The files of one tokenizer."""

    folder: Path
    model: Mapping[str, Any]
    overrides: dict[str, Any]
    settings: dict[str, Any] = field(init=False)
    special: dict[str, Any] = field(init=False)
    plain: set[str] = field(init=False, default_factory=set)  # those given as a text alone

    def read(self, lowercase: bool) -> BundleTokenizer:
        from tokenizers import Tokenizer

        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(self._no_tokenizer())
        content = read_json_object(file, CheckpointError)
        self.settings = self._settings()
        name = self._class_name()
        named = _CLASSES.get(name, _PLAIN)
        kind = named
        if "backend" in self.settings:
            kind = _Class(types=named.types and bool(name))  # no types by default in version 5
        try:
            tokenizer = Tokenizer.from_str(file.read_text("utf-8"))
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
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.special = self._special_tokens(kind, content)
        self._add_tokens(tokenizer)
        if "backend" in self.settings:
            self._check_written(tokenizer, named, name)
        else:
            self._prefix_space(tokenizer, kind)
        self._lower_case(tokenizer, named)
        self._ends(tokenizer, kind)
        if lowercase:
            _lower_first(tokenizer)
        result = json.loads(tokenizer.to_str())
        truncation = (content.get("truncation") or {}).get("direction", "right")
        side = self.settings.get("truncation_side", str(truncation).lower())
        if side not in ("right", "left"):
            raise self._refuse("truncation_side", side, "'right' or 'left'")
        inputs = self.settings.get("model_input_names")
        if not (kind.types if inputs is None else "token_type_ids" in inputs):
            _one_type(result.get("post_processor"))
        result["truncation"] = result["padding"] = None
        return BundleTokenizer(
            text=json.dumps(result, ensure_ascii=False, separators=(",", ":")),
            pad_token_id=self._padding(tokenizer),
            truncation_side=side,
        )

    # -- the files ------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """tokenizer_config.json with the files of early versions and sentence-transformers' arguments."""
        settings: dict[str, Any] = self._optional(_CONFIG)
        if "added_tokens_decoder" not in settings:
            early = self._optional("special_tokens_map.json")
            more = "additional_special_tokens"
            joined = [*(settings.get(more) or []), *(early.get(more) or [])]
            settings |= early | ({more: joined} if joined else {})
        settings |= self.overrides
        for key in ("split_special_tokens", "fix_mistral_regex", "from_slow"):
            if settings.get(key):
                raise self._refuse(key, settings[key], "false; save the tokenizer as it should run")
        if settings.get("fast_tokenizer_files", ["tokenizer.json"]) != ["tokenizer.json"]:
            raise self._refuse(
                "fast_tokenizer_files",
                settings["fast_tokenizer_files"],
                "['tokenizer.json']; delete it, and the files for single versions of transformers",
            )
        if settings.get("use_fast") is False:
            raise self._refuse("use_fast", False, "true, the tokenizer in tokenizer.json")
        code = settings.get("auto_map")
        code = code.get("AutoTokenizer") if isinstance(code, dict) else code
        if code:
            raise self._refuse(
                "auto_map",
                code,
                "no code of the model's own, which is never run; where tokenizer.json alone says how "
                "texts become tokens, delete auto_map there",
            )
        return settings

    def _optional(self, name: str) -> dict[str, Any]:
        return read_optional(self.folder / name, CheckpointError)

    def _class_name(self) -> str:
        """The tokenizer's class without ``Tokenizer`` and ``Fast``, "" for the general ones."""
        named = self.settings.get("tokenizer_class") or self.model.get("tokenizer_class")
        if named is None:
            return _BY_MODEL.get(str(self.model.get("model_type")), "")
        name = str(named).removesuffix("Fast").removesuffix("Tokenizer")
        if named in _GENERIC or (name not in _CLASSES and "backend" in self.settings):
            return ""
        if name not in _CLASSES:
            known = ", ".join(f"{n}Tokenizer" for n in _CLASSES)
            raise self._refuse(
                "tokenizer_class",
                named,
                f"{_GENERIC[1]}, {_GENERIC[2]} or one of {known}; where tokenizer.json alone says how "
                f'texts become tokens, write "tokenizer_class": "{_GENERIC[1]}" there',
            )
        return name

    def _refuse(self, key: str, found: object, expected: str) -> CheckpointError:
        file = "sentence_bert_config.json" if key in self.overrides else _CONFIG
        return CheckpointError(f"{self.folder / file}: {key} is {found!r}, expected {expected}")

    def _no_tokenizer(self) -> str:
        code = (
            "import sys, transformers as t; p = sys.argv[1]; "
            "t.AutoTokenizer.from_pretrained(p).save_pretrained(p)"
        )
        return (
            f"{self.folder}: expected a tokenizer.json, found none; convert the slow tokenizer where you "
            "trust the folder: pip install transformers sentencepiece protobuf tiktoken, then "
            f"python -c {shlex.quote(code)} {shlex.quote(str(self.folder))}; what transformers has in "
            "Python alone gets none and cannot be exported"
        )

    # -- what the class does with them ------------------------------------------------------------------

    def _special_tokens(self, kind: _Class, content: dict[str, Any]) -> dict[str, Any]:
        """Name of each special token to its AddedToken; further ones are numbered."""
        from tokenizers import AddedToken

        listed = content.get("added_tokens") or []
        if "added_tokens_decoder" in self.settings:
            listed = getattr(self.settings["added_tokens_decoder"], "values", list)()
        added = {t["content"]: t for t in listed if isinstance(t, dict) and "content" in t}
        names = zip(_NAMED, kind.tokens.split(), strict=False)
        defaults = {k: None if token == "-" else token for k, token in names}
        if defaults.get("pad_token") is None:
            defaults["pad_token"] = (content.get("padding") or {}).get("pad_token")
        found = {k: self.settings.get(k, defaults.get(k)) for k in _NAMED}
        found |= {f"token {number}": token for number, token in enumerate(self._further(kind))}
        result = {}
        for key, token in found.items():
            if token is None:
                continue
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str):
                raise self._refuse(key, token, "a token's text, or an object with its content")
            if key in self.settings and text in added:
                result[key] = _added_token({**added[text], "special": True})
            elif isinstance(token, dict):
                result[key] = _added_token({**token, "special": True})
            else:
                remade = key in kind.remade
                result[key] = AddedToken(text, special=True, lstrip=remade and key == "mask_token")
                if not remade:
                    self.plain.add(key)
        return result

    def _further(self, kind: _Class) -> list[Any]:
        """Special tokens without a name of their own."""
        extra = self.settings.get("extra_special_tokens") or []
        more = [*(self.settings.get("additional_special_tokens") or kind.more)]
        if isinstance(extra, dict):
            more += extra.values()
        elif extra:  # a list, which version 5 alone reads, takes the place of the others
            more = [*extra]
        if "backend" in self.settings:
            own = [k for k in self.settings if k.endswith("_token") and k not in _NAMED]
            more += [self.settings[k] for k in own if isinstance(self.settings[k], str)]
        return more

    def _added(self, there: Mapping[int, Any]) -> dict[int, Any]:
        """AddedTokens that the settings name, by id; those of early files where tokenizer.json has none."""
        decoder = self.settings.get("added_tokens_decoder")
        if decoder is None:
            special = {token.content for token in self.special.values()}
            early = self._optional("added_tokens.json")
            decoder = {
                i: {"content": t, "normalized": t not in special}
                for t, i in early.items()
                if i not in there
            }
        try:
            return {int(i): _added_token(token) for i, token in decoder.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._refuse("added_tokens_decoder", decoder, "ids to tokens") from None

    def _add_tokens(self, tokenizer: Any) -> None:
        """Add, or change the flags of, what the settings name."""
        there = tokenizer.get_added_tokens_decoder()
        same = {repr(token) for token in there.values()}
        tokens = [t for _, t in sorted(self._added(there).items()) if repr(t) not in same]
        known = {token.content for token in (*there.values(), *tokens)}
        firm = (
            "backend" not in self.settings
        )  # version 4 changes the flags of those it knows more of
        for key, token in self.special.items():
            if token.content not in known or (firm and key not in self.plain):
                tokens.append(token)
                known.add(token.content)
        special = {token.content for token in self.special.values()}
        for token in tokens:
            token.special = token.special or token.content in special
        tokenizer.add_tokens(tokens)

    def _check_written(self, tokenizer: Any, named: _Class, name: str) -> None:
        """Refuse settings beside a tokenizer.json of version 5 that say something else than it does."""
        ids = tokenizer.encode("").ids
        does = {}
        if name and not named.lowers:
            does["add_prefix_space"] = _starts_with_space(tokenizer)
        if named.ends or not name:
            for key, token, place in (
                ("add_bos_token", "bos_token", 0),
                ("add_eos_token", "eos_token", -1),
            ):
                text = self.special[token].content if token in self.special else ""
                does[key] = bool(ids) and ids[place] == tokenizer.token_to_id(text)
        for key, found in does.items():
            wanted = self.settings.get(key)
            if wanted is not None and key not in self.overrides and bool(wanted) != found:
                raise self._refuse(
                    key,
                    wanted,
                    f"{str(found).lower()}, as tokenizer.json does; delete it there, or save the tokenizer "
                    "with transformers as it should run",
                )

    def _prefix_space(self, tokenizer: Any, kind: _Class) -> None:
        wanted = self.settings.get("add_prefix_space")
        state = _state(tokenizer.pre_tokenizer)
        if not kind.prefix:
            if state.get("add_prefix_space", bool(wanted)) != bool(wanted):
                state["add_prefix_space"] = bool(wanted)
                tokenizer.pre_tokenizer = _component("pre_tokenizers", state)
        elif wanted is not None and bool(wanted) != _starts_with_space(tokenizer):
            raise self._refuse(
                "add_prefix_space",
                wanted,
                f"{not wanted}, as tokenizer.json does; save the tokenizer with transformers as it "
                "should run",
            )

    def _lower_case(self, tokenizer: Any, kind: _Class) -> None:
        state = _state(tokenizer.normalizer)
        if kind.lowers and not state:
            raise CheckpointError(
                f"{self.folder / 'tokenizer.json'}: normalizer is null, expected BertNormalizer for the "
                f'class in {_CONFIG}; where texts need none, write "tokenizer_class": "{_GENERIC[1]}" there'
            )
        defaults = dict(zip(_LOWERS, (True, None, True), strict=True))
        if "backend" in self.settings:
            defaults = {k: v for k, v in defaults.items() if k in self.settings}
        fields = dict(
            zip(_LOWERS, ("lowercase", "strip_accents", "handle_chinese_chars"), strict=True)
        )
        wanted = {
            fields[k]: self.settings.get(k, defaults[k]) for k in kind.lowers if k in defaults
        }
        if any(state.get(k, v) != v for k, v in wanted.items()):
            tokenizer.normalizer = _component("normalizers", state | wanted)

    def _ends(self, tokenizer: Any, kind: _Class) -> None:
        """Replace the post-processor where the class, or a setting in version 5, asks for it."""
        from tokenizers import processors

        keys = ("add_bos_token", "add_eos_token")
        defaults = kind.ends
        if "backend" in self.settings and any(key in self.overrides for key in keys):
            defaults = (False, False)
        if defaults is None:
            return
        template, tokens = "$A:0", []
        for key, default, name, form in zip(
            keys, defaults, ("bos_token", "eos_token"), ("{0}:0 {1}", "{1} {0}:0"), strict=True
        ):
            if not self.settings.get(key, default):
                continue
            token = self.special.get(name)
            number = None if token is None else tokenizer.token_to_id(token.content)
            if token is None or number is None:
                raise self._refuse(
                    key, self.settings.get(key, default), f"false, or a {name} of the vocabulary"
                )
            template = form.format(token.content, template)
            tokens.append((token.content, number))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} $B:1", special_tokens=tokens
        )

    def _padding(self, tokenizer: Any) -> int:
        names = [self.special[k].content for k in ("pad_token", "eos_token") if k in self.special]
        return next((i for n in names if (i := tokenizer.token_to_id(n)) is not None), 0)


def _added_token(token: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken

    flags = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized") if k in token}
    return AddedToken(token["content"], special=bool(token.get("special")), **flags)


def _state(part: Any) -> dict[str, Any]:
    """The settings of a tokenizer's part, empty for one that has none."""
    state = {} if part is None else json.loads(part.__getstate__())
    return state if isinstance(state, dict) else {}


def _component(module: str, state: dict[str, Any]) -> Any:
    import tokenizers

    kind = state.pop("type")
    return getattr(getattr(tokenizers, module), kind)(**state)


def _starts_with_space(tokenizer: Any) -> bool:
    """Whether a text's first word gets a space before it."""
    text = "a"
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return text[:1] != "a"


def _lower_first(tokenizer: Any) -> None:
    """Lower-case texts before all else, as sentence-transformers does where nothing does it already."""
    from tokenizers import normalizers

    state = _state(tokenizer.normalizer)
    parts = state.get("normalizers", [state] if state else [])
    if any(part.get("type") == "Lowercase" for part in parts):
        return
    there = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *there])


def _one_type(processor: Any) -> None:
    """Give all tokens of a text type 0: transformers passes no types to the model."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors") or []:
        _one_type(part)
    for piece in processor.get("single") or []:
        for value in piece.values():
            value["type_id"] = 0
