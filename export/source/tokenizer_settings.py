"""tokenizer_config.json and what lies beside it: the settings of a tokenizer, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.json_files import read_optional
from embedge.export.source.tokenizer_classes import (
    BY_MODEL_TYPE,
    CLASSES,
    GENERIC,
    NAMED,
    TokenizerClass,
)

__all__ = ["CONFIG", "TokenizerSettings"]

CONFIG = "tokenizer_config.json"
_MORE = "additional_special_tokens"


class TokenizerSettings:
    """What the files of a tokenizer say beside tokenizer.json.

    Args:
        folder: where the files lie.
        config: config.json, which says the class where tokenizer_config.json does not.
        overrides: what sentence-transformers gives to the tokenizer, in place of the files' settings.

    Attributes:
        values: the settings.
        from_version_5: whether version 5 of transformers wrote them, beside a tokenizer.json that holds
            what runs.
        name: the tokenizer's class without ``Tokenizer`` and ``Fast``, "" for the general ones.
        named: what that class does.
        kind: what of that is done to tokenizer.json.

    Raises:
        CheckpointError: if a setting is not supported.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.overrides = overrides
        self.values = read_optional(folder / CONFIG)
        if "added_tokens_decoder" not in self.values:
            early = read_optional(folder / "special_tokens_map.json")
            joined = [*(self.get(_MORE) or []), *(early.get(_MORE) or [])]
            self.values |= early | ({_MORE: joined} if joined else {})
        self.values |= overrides
        self._check()
        self.from_version_5 = "backend" in self.values
        self.name = self._class_name(config)
        self.named = self.kind = CLASSES.get(self.name, TokenizerClass())
        if self.from_version_5:  # which gives no types by default
            self.kind = TokenizerClass(types=self.named.types and bool(self.name))

    def get(self, key: str, default: Any = None) -> Any:
        """A setting, ``default`` where there is none."""
        return self.values.get(key, default)

    def refuse(self, key: str, found: object, expected: str) -> CheckpointError:
        """The error about a setting, which names the file that it comes from."""
        file = "sentence_bert_config.json" if key in self.overrides else CONFIG
        return CheckpointError(f"{self.folder / file}: {key} is {found!r}, expected {expected}")

    def special_tokens(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """What the settings say of each special token by its name; further ones are numbered.

        Args:
            content: tokenizer.json.
        """
        names = zip(NAMED, self.kind.tokens.split(), strict=False)
        defaults = {k: None if token == "-" else token for k, token in names}
        if defaults.get("pad_token") is None:
            defaults["pad_token"] = (content.get("padding") or {}).get("pad_token")
        found = {k: self.get(k, defaults.get(k)) for k in NAMED}
        found |= {f"token {number}": token for number, token in enumerate(self._further())}
        return {key: token for key, token in found.items() if token is not None}

    def listed_tokens(self, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The added tokens that the settings describe, else those of tokenizer.json, by their text."""
        listed = content.get("added_tokens") or []
        if "added_tokens_decoder" in self.values:
            listed = getattr(self.values["added_tokens_decoder"], "values", list)()
        return {t["content"]: t for t in listed if isinstance(t, dict) and "content" in t}

    def _further(self) -> list[Any]:
        """Special tokens without a name of their own."""
        extra = self.get("extra_special_tokens") or []
        more = [*(self.get(_MORE) or self.kind.more)]
        if isinstance(extra, dict):
            more += extra.values()
        elif extra:  # a list, which version 5 alone reads, takes the place of the others
            more = [*extra]
        if self.from_version_5:
            own = [k for k in self.values if k.endswith("_token") and k not in NAMED]
            more += [self.values[k] for k in own if isinstance(self.values[k], str)]
        return more

    def _check(self) -> None:
        """Refuse what makes another tokenizer than the one in tokenizer.json."""
        for key in ("split_special_tokens", "fix_mistral_regex", "from_slow"):
            if self.get(key):
                raise self.refuse(
                    key, self.values[key], "false; save the tokenizer as it should run"
                )
        if self.get("fast_tokenizer_files", ["tokenizer.json"]) != ["tokenizer.json"]:
            raise self.refuse(
                "fast_tokenizer_files",
                self.values["fast_tokenizer_files"],
                "['tokenizer.json']; delete it, and the files for single versions of transformers",
            )
        if self.get("use_fast") is False:
            raise self.refuse("use_fast", False, "true, the tokenizer in tokenizer.json")
        code = self.get("auto_map")
        code = code.get("AutoTokenizer") if isinstance(code, dict) else code
        if code:
            raise self.refuse(
                "auto_map",
                code,
                "no code of the model's own, which is never run; where tokenizer.json alone says how "
                "texts become tokens, delete auto_map there",
            )

    def _class_name(self, config: Mapping[str, Any]) -> str:
        class_name = self.get("tokenizer_class") or config.get("tokenizer_class")
        if class_name is None:
            return BY_MODEL_TYPE.get(str(config.get("model_type")), "")
        name = str(class_name).removesuffix("Fast").removesuffix("Tokenizer")
        if class_name in GENERIC or (name not in CLASSES and self.from_version_5):
            return ""
        if name not in CLASSES:
            known = ", ".join(f"{n}Tokenizer" for n in CLASSES)
            raise self.refuse(
                "tokenizer_class",
                class_name,
                f"{GENERIC[1]}, {GENERIC[2]} or one of {known}; where tokenizer.json alone says how "
                f'texts become tokens, write "tokenizer_class": "{GENERIC[1]}" there',
            )
        return name
