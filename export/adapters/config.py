"""adapter_config.json: the fields of PEFT's LoraConfig that the merge uses, typed and checked.

Which fields refuse an adapter stands in :mod:`embedge.export.adapters.refused_options`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedge.export.adapters.refused_options import model_class, refuse_options
from embedge.export.errors import AdapterError
from embedge.export.source.json_files import read_json_object

__all__ = ["LoraSettings", "read_peft_config"]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The fields of LoraConfig that say where LoRA is put: what they do not name PEFT leaves out.

    Attributes:
        modules: ``target_modules``, a regular expression or ends of names; ``None`` where it says nothing.
        excluded: ``exclude_modules``, likewise.
        layers: ``layers_to_transform``, ``None`` for all.
        containers: ``layers_pattern``, names of what holds the layers; any where there are none.
    """

    modules: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...] | None
    layers: tuple[int, ...] | None
    containers: tuple[str, ...]

    def names(self, module: str) -> bool:
        """Return whether PEFT puts LoRA on ``module``, whatever wraps the model.

        The rule is PEFT's ``check_target_module_exists``.
        """
        if self.excluded is not None and _matches(self.excluded, [module]):
            return False
        if self.modules is None or self.modules == "all-linear":
            return True
        parts = module.split(".")
        paths = [".".join(parts[start:]) for start in range(len(parts))]
        if not _matches(self.modules, [*paths, f"model.{module}"]):
            return False
        if self.layers is None or isinstance(self.modules, str) or module in self.modules:
            return True
        for container in self.containers or (r"[^.]*",):
            if found := re.match(rf"(?:.*\.)?{container}\.(\d+)\.", module):
                return int(found[1]) in self.layers
        return False


def _matches(patterns: str | tuple[str, ...], paths: list[str]) -> bool:
    if isinstance(patterns, str):
        return any(re.fullmatch(patterns, path) for path in paths)
    return any(f".{paths[0]}".endswith(f".{end}") for end in patterns)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The fields of LoraConfig that decide what the merged weights are, under PEFT's names.

    Attributes:
        base_model: ``base_model_name_or_path``, ``None`` if not recorded.
        base_sha256: ``embedge_base_sha256``, the hash of the base's weights, ``None`` if not
            recorded.
        trainable_tokens: rows by the end of their table's name, "" for the table of the input tokens
            (``trainable_token_indices``).
        model_class: transformers' class that it was trained in, as far as it is recorded.
        targets: where PEFT puts LoRA.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    base_model: str | None
    base_sha256: str | None
    trainable_tokens: Mapping[str, tuple[int, ...]]
    model_class: str
    targets: Targets

    def rank(self, module: str) -> int:
        """Return the rank of ``module``, its path in the adapted model (``"layers.0.mlp.up"``)."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def scaling(self, module: str) -> float:
        """Return the factor on ``B·A`` for ``module``: alpha / rank, or alpha / √rank (rsLoRA)."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _pattern_key(patterns: Mapping[str, object], module: str) -> str:
    """Return the first pattern that matches ``module``, else ``module``: PEFT's
    ``get_pattern_key``.

    A pattern is a regular expression for the end of the path, from the start of a component on.
    """
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


def read_peft_config(file: Path) -> LoraSettings:
    """Read and judge an adapter_config.json; the weights are not looked at.

    Raises:
        AdapterError: if the file is missing or damaged, a field has an impossible value, or the
            adapter is of a kind that cannot be merged (named, with the reason).
    """
    config = read_json_object(file, AdapterError)
    refuse_options(file, config)
    fields = _Fields(file, config)
    settings = LoraSettings(
        r=fields.rank("r", config.get("r", 8)),
        lora_alpha=fields.number("lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern={
            p: fields.rank(f"rank_pattern[{p!r}]", v) for p, v in fields.patterns("rank_pattern")
        },
        alpha_pattern={
            p: fields.number(f"alpha_pattern[{p!r}]", v)
            for p, v in fields.patterns("alpha_pattern")
        },
        use_rslora=fields.flag("use_rslora"),
        use_dora=fields.flag("use_dora"),
        lora_bias=fields.flag("lora_bias"),
        modules_to_save=fields.names("modules_to_save"),
        base_model=fields.text("base_model_name_or_path"),
        base_sha256=fields.text("embedge_base_sha256"),
        trainable_tokens=fields.tokens("trainable_token_indices"),
        model_class=model_class(config),
        targets=Targets(
            modules=fields.modules("target_modules"),
            excluded=fields.modules("exclude_modules"),
            layers=fields.layers("layers_to_transform"),
            containers=fields.containers("layers_pattern"),
        ),
    )
    bias = config.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"{file}: bias is {bias!r}, expected none, all or lora_only")
    if settings.use_dora and settings.lora_bias:
        raise AdapterError(f"{file}: use_dora with lora_bias is not supported, by PEFT neither")
    return settings


@dataclass(frozen=True)
class _Fields:
    """Typed access to the fields of one config file; every error names the file and the field."""

    file: Path
    config: Mapping[str, Any]

    def _wrong(self, key: str, value: Any, expected: str) -> AdapterError:
        return AdapterError(f"{self.file}: {key} is {value!r}, expected {expected}")

    def rank(self, key: str, value: Any) -> int:
        if type(value) is not int or value <= 0:
            raise self._wrong(key, value, "a positive whole number")
        return value

    def number(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return value  # type: ignore[no-any-return]

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value not in (None, True, False):
            raise self._wrong(key, value, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        value = self.config.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value or None

    def names(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self._wrong(key, value, "a list of module names")
        return tuple(value)

    def modules(self, key: str) -> str | tuple[str, ...] | None:
        """A regular expression, or ends of names; ``None`` where there are none."""
        value = self.config.get(key)
        if not isinstance(value, str):
            return self.names(key) or None
        try:
            re.compile(value)
        except re.error as problem:
            raise self._wrong(key, value, f"a regular expression ({problem})") from problem
        return value or None

    def layers(self, key: str) -> tuple[int, ...] | None:
        value = self.config.get(key)
        layers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(layer) is int for layer in layers):
            raise self._wrong(key, value, "a layer's number, or a list of them")
        return tuple(layers) or None

    def containers(self, key: str) -> tuple[str, ...]:
        """Names of modules, also where there is one alone."""
        value = self.config.get(key)
        return (re.escape(value),) if isinstance(value, str) and value else self.names(key)

    def tokens(self, key: str) -> dict[str, tuple[int, ...]]:
        value = self.config.get(key)
        tables = value if isinstance(value, dict) else {"": value or []}
        for rows in tables.values():
            whole = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
            if not whole or len(set(rows)) != len(rows):
                raise self._wrong(
                    key, value, "a list of different token ids, or such lists by the table's name"
                )
        return {name: tuple(rows) for name, rows in tables.items() if rows}

    def patterns(self, key: str) -> list[tuple[str, Any]]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "a mapping from patterns to numbers")
        for pattern in value:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except re.error as problem:
                raise AdapterError(
                    f"{self.file}: {key} has the pattern {pattern!r}: {problem}"
                ) from problem
        return list(value.items())
