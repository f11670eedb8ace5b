"""What transformers does to the tokenizer in tokenizer.json: tokens added, parts replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.json_files import read_optional
from embedge.export.source.tokenizer_classes import GENERIC
from embedge.export.source.tokenizer_settings import CONFIG, TokenizerSettings

__all__ = ["TokenizerBuilder"]

# A setting, the normalizer's field that it replaces, and its default.
_NORMALIZER = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


class TokenizerBuilder:
    """Changes a tokenizer, step by step, to what runs.

    Args:
        tokenizer: as tokenizer.json has it.
        settings: what lies beside it.
        content: tokenizer.json.

    Raises:
        CheckpointError: from every step, if a setting is not supported or contradicts tokenizer.json.
    """

    def __init__(
        self, tokenizer: Any, settings: TokenizerSettings, content: Mapping[str, Any]
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.settings = settings
        self.plain: set[str] = set()  # special tokens given as a text alone
        self.special = self._special_tokens(content)

    def add_tokens(self) -> None:
        """Add, or change the flags of, what the settings name."""
        there = self.tokenizer.get_added_tokens_decoder()
        same = {repr(token) for token in there.values()}
        tokens = [t for _, t in sorted(self._added(there).items()) if repr(t) not in same]
        known = {token.content for token in (*there.values(), *tokens)}
        for key, token in self.special.items():
            # version 4 changes the flags of those it knows more of
            changed = not self.settings.from_version_5 and key not in self.plain
            if token.content not in known or changed:
                tokens.append(token)
                known.add(token.content)
        special = {token.content for token in self.special.values()}
        for token in tokens:
            token.special = token.special or token.content in special
        self.tokenizer.add_tokens(tokens)

    def check_written(self) -> None:
        """Refuse settings beside a tokenizer.json of version 5 that say something else than it does."""
        settings = self.settings
        ids = self.tokenizer.encode("").ids
        does = {}
        if settings.name and not settings.named.lowers:
            does["add_prefix_space"] = self._starts_with_space()
        if settings.named.ends or not settings.name:
            for key, token, place in (
                ("add_bos_token", "bos_token", 0),
                ("add_eos_token", "eos_token", -1),
            ):
                text = self.special[token].content if token in self.special else ""
                does[key] = bool(ids) and ids[place] == self.tokenizer.token_to_id(text)
        for key, found in does.items():
            wanted = settings.get(key)
            if wanted is not None and key not in settings.overrides and bool(wanted) != found:
                raise settings.refuse(
                    key,
                    wanted,
                    f"{str(found).lower()}, as tokenizer.json does; delete it there, or save the tokenizer "
                    "with transformers as it should run",
                )

    def prefix_space(self) -> None:
        """Replace the pre-tokenizer where ``add_prefix_space`` says something else than it does."""
        wanted = self.settings.get("add_prefix_space")
        state = _state(self.tokenizer.pre_tokenizer)
        if not self.settings.kind.prefix:
            if state.get("add_prefix_space", bool(wanted)) != bool(wanted):
                state["add_prefix_space"] = bool(wanted)
                self.tokenizer.pre_tokenizer = _component("pre_tokenizers", state)
        elif wanted is not None and bool(wanted) != self._starts_with_space():
            raise self.settings.refuse(
                "add_prefix_space",
                wanted,
                f"{not wanted}, as tokenizer.json does; save the tokenizer with transformers as it "
                "should run",
            )

    def lower_case(self) -> None:
        """Replace the normalizer where ``do_lower_case`` and its kin say something else than it does."""
        settings, state = self.settings, _state(self.tokenizer.normalizer)
        lowers = settings.named.lowers
        if lowers and not state:
            raise CheckpointError(
                f"{settings.folder / 'tokenizer.json'}: normalizer is null, expected BertNormalizer for "
                f'the class in {CONFIG}; where texts need none, write "tokenizer_class": "{GENERIC[1]}" there'
            )
        wanted = {
            field: settings.get(key, default)
            for key, (field, default) in _NORMALIZER.items()
            if key in lowers and (key in settings.values or not settings.from_version_5)
        }
        if any(state.get(field, value) != value for field, value in wanted.items()):
            self.tokenizer.normalizer = _component("normalizers", state | wanted)

    def lower_first(self) -> None:
        """Lower-case texts before all else, as sentence-transformers does where nothing does it already."""
        from tokenizers import normalizers

        state = _state(self.tokenizer.normalizer)
        parts = state.get("normalizers", [state] if state else [])
        if any(part.get("type") == "Lowercase" for part in parts):
            return
        there = [] if self.tokenizer.normalizer is None else [self.tokenizer.normalizer]
        self.tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *there])

    def ends(self) -> None:
        """Replace the post-processor where the class, or a setting in version 5, asks for it."""
        from tokenizers import processors

        keys, settings = ("add_bos_token", "add_eos_token"), self.settings
        defaults = settings.kind.ends
        if settings.from_version_5 and any(key in settings.overrides for key in keys):
            defaults = (False, False)
        if defaults is None:
            return
        template, tokens = "$A:0", []
        for key, default, name, form in zip(
            keys, defaults, ("bos_token", "eos_token"), ("{0}:0 {1}", "{1} {0}:0"), strict=True
        ):
            asked = settings.get(key, default)
            if not asked:
                continue
            token = self.special.get(name)
            number = None if token is None else self.tokenizer.token_to_id(token.content)
            if token is None or number is None:
                raise settings.refuse(key, asked, f"false, or a {name} of the vocabulary")
            template = form.format(token.content, template)
            tokens.append((token.content, number))
        self.tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} $B:1", special_tokens=tokens
        )

    def result(self) -> dict[str, Any]:
        """The tokenizer.json that does all of this, without truncation and padding."""
        result: dict[str, Any] = json.loads(self.tokenizer.to_str())
        inputs = self.settings.get("model_input_names")
        if not (self.settings.kind.types if inputs is None else "token_type_ids" in inputs):
            _one_type(result.get("post_processor"))
        result["truncation"] = result["padding"] = None
        return result

    def pad_token_id(self) -> int:
        """The id of the padding token, else of the token at the end of texts, else 0."""
        names = [self.special[k].content for k in ("pad_token", "eos_token") if k in self.special]
        ids = (self.tokenizer.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), 0)

    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens that the settings name, by those names."""
        ids = {
            name: self.tokenizer.token_to_id(token.content) for name, token in self.special.items()
        }
        return {name: i for name, i in ids.items() if i is not None}

    def _special_tokens(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Name of each special token to its AddedToken."""
        from tokenizers import AddedToken

        settings, added = self.settings, self.settings.listed_tokens(content)
        result = {}
        for key, token in settings.special_tokens(content).items():
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str):
                raise settings.refuse(key, token, "a token's text, or an object with its content")
            if key in settings.values and text in added:
                result[key] = _added_token({**added[text], "special": True})
            elif isinstance(token, dict):
                result[key] = _added_token({**token, "special": True})
            else:
                remade = key in settings.kind.remade
                result[key] = AddedToken(text, special=True, lstrip=remade and key == "mask_token")
                if not remade:
                    self.plain.add(key)
        return result

    def _added(self, there: Mapping[int, Any]) -> dict[int, Any]:
        """AddedTokens that the settings name, by id; those of early files where tokenizer.json has none."""
        decoder = self.settings.get("added_tokens_decoder")
        if decoder is None:
            special = {token.content for token in self.special.values()}
            early = read_optional(self.settings.folder / "added_tokens.json")
            decoder = {
                i: {"content": text, "normalized": text not in special}
                for text, i in early.items()
                if i not in there
            }
        try:
            return {int(i): _added_token(token) for i, token in decoder.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self.settings.refuse("added_tokens_decoder", decoder, "ids to tokens") from None

    def _starts_with_space(self) -> bool:
        """Whether a text's first word gets a space before it."""
        text = "a"
        if self.tokenizer.normalizer is not None:
            text = self.tokenizer.normalizer.normalize_str(text)
        if self.tokenizer.pre_tokenizer is not None:
            pieces = self.tokenizer.pre_tokenizer.pre_tokenize_str(text)
            text = "".join(piece for piece, _ in pieces)
        return text[:1] != "a"


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


def _one_type(processor: Any) -> None:
    """Give all tokens of a text type 0: transformers passes no types to the model."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors") or []:
        _one_type(part)
    for piece in processor.get("single") or []:
        for value in piece.values():
            value["type_id"] = 0
