"""The keys of an adapter file, sorted by what they are.

What PEFT's ``save_pretrained`` writes, below ``base_model.model.``:

    X.lora_A.weight   X.lora_B.weight   X.lora_B.bias    LoRA on a Linear or Conv1D
    X.lora_embedding_A   X.lora_embedding_B              LoRA on an embedding
    X.lora_magnitude_vector                              DoRA
    X.base_layer.bias   X.base_layer.weight              full tensors of a module that has LoRA
    X.token_adapter.trainable_tokens_delta               rows of an embedding, trained alone
    X.weight   X.bias                                    full tensors of other modules
    X.modules_to_save.bias   X.original_module.bias      doubles of those

Full tensors come from ``modules_to_save``, ``bias="all"`` or ``"lora_only"`` and from saved
embedding layers; the doubles where ``bias="all"`` meets ``modules_to_save``.

A raw ``state_dict`` has the adapter's name in it (``X.lora_A.default.weight``); that is read too. A file
with several names, one per task (``X.lora_A.retrieval.weight``, as jina-embeddings-v4 has it), holds that
many adapters: only the keys of the wanted one are sorted, and all have to cover the same modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

__all__ = ["PREFIX", "AdapterKeys", "sort_keys"]

PREFIX = "base_model.model."  # PEFT's own; keys may be given without
_LORA = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<factor>lora_A|lora_B)(?:\.(?P<adapter>[^.]+))?\.(?P<parameter>weight|bias)"
    r"|(?P<embedding>lora_embedding_A|lora_embedding_B)(?:\.[^.]+)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+?)??(?:\.weight)?"
    r")"
)
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<parameter>.+)")
_ORIGINAL = re.compile(r"(?P<module>.+)\.original_module\.(?P<parameter>.+)")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_TRAINING_ONLY = re.compile(r".+\.lora_velora_embed(?:\.[^.]+)?")


@dataclass(frozen=True, kw_only=True)
class AdapterKeys:
    """The keys of an adapter file by role; module paths are without ``base_model.model.``.

    Attributes:
        lora: module path → part (``"lora_A"``, ``"lora_B"``, ``"lora_B.bias"``,
            ``"lora_embedding_A"``, ``"lora_embedding_B"``, ``"lora_magnitude_vector"``) → key.
        tokens: module path → key of the rows that ``trainable_token_indices`` names.
        full: parameter paths that a full tensor may be meant for, the likelier first → keys.
        originals: parameter path → key of a copy of the base's tensor that PEFT does not use.
        problems: one text for every key that is not understood.
        others: keys of the file that are none of these, of other adapters in it for example.
    """

    lora: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    full: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    others: frozenset[str] = frozenset()

    def without(self, dropped: Collection[str]) -> AdapterKeys:
        """Return them with the keys ``dropped`` among the others."""
        dropped = self.others.union(dropped)
        return replace(
            self,
            others=dropped,
            lora={m: p for m, p in self.lora.items() if not dropped.issuperset(p.values())},
            full={t: s for t, s in self.full.items() if not dropped.issuperset(s)},
            originals={p: k for p, k in self.originals.items() if k not in dropped},
            tokens={m: k for m, k in self.tokens.items() if k not in dropped},
        )


def sort_keys(keys: Iterable[str], name: str) -> AdapterKeys:
    """Sort the ``keys`` of an adapter file by what they are; ``name`` chooses among several adapters."""
    keys = sorted(keys)
    problems, others = _other_adapters(keys, name)
    sorted_keys = AdapterKeys(problems=problems, others=others)
    rest = []
    for key in keys:
        if key in others:
            continue
        if match := _LORA.fullmatch(key.removeprefix(PREFIX)):
            part = match["factor"] or match["embedding"] or match["magnitude"]
            part += ".bias" if match["parameter"] == "bias" else ""
            parts = sorted_keys.lora.setdefault(match["module"], {})
            if part == "lora_A.bias":
                sorted_keys.problems.append(f"{key}: not a key that PEFT's LoRA has")
            elif part in parts:
                sorted_keys.problems.append(
                    f"{key}: a second {part} beside {parts[part]}; is it another adapter's?"
                )
            else:
                parts[part] = key
        else:
            rest.append(key)
    for key in rest:
        _sort_full_tensor(key, sorted_keys)
    return sorted_keys


def _other_adapters(keys: Iterable[str], name: str) -> tuple[list[str], frozenset[str]]:
    """What is wrong with a file of several adapters, and the keys that are not those of ``name``."""
    by_adapter: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _LORA.fullmatch(key.removeprefix(PREFIX))
        if match and match["adapter"]:
            part = f"{match['module']}.{match['factor']}.{match['parameter']}"
            by_adapter.setdefault(match["adapter"], {})[part] = key
    if len(by_adapter) < 2:
        return [], frozenset()
    if name not in by_adapter:
        found = ", ".join(sorted(by_adapter))
        return [f"the file holds the adapters {found}, expected {name} among them"], frozenset()
    everything = set().union(*by_adapter.values())
    problems = [
        f"{part}: the adapter {adapter} has none, others in the file do"
        for adapter, parts in sorted(by_adapter.items())
        for part in sorted(everything - set(parts))
    ]
    others = (k for a, parts in by_adapter.items() if a != name for k in parts.values())
    return problems, frozenset(others)


def _sort_full_tensor(key: str, sorted_keys: AdapterKeys) -> None:
    path = key.removeprefix(PREFIX)
    if _TRAINING_ONLY.fullmatch(path):
        return
    if match := _TOKENS.fullmatch(path):
        known = sorted_keys.tokens.setdefault(match["module"], key)
        if known != key:
            sorted_keys.problems.append(f"{key}: a second one beside {known}")
        return
    if match := _ORIGINAL.fullmatch(path):
        sorted_keys.originals[f"{match['module']}.{match['parameter']}"] = key
        return
    targets: tuple[str, ...] = (path,)
    if match := _BASE_LAYER.fullmatch(path):
        if match["module"] not in sorted_keys.lora:
            sorted_keys.problems.append(
                f"{key}: a base layer's tensor, but the file has no LoRA for {match['module']}"
            )
            return
        targets = (f"{match['module']}.{match['parameter']}",)
    elif match := _SAVED.fullmatch(path):
        # The first component may be the adapter's name.
        _, _, without_name = match["parameter"].partition(".")
        targets = (f"{match['module']}.{match['parameter']}",)
        if without_name:
            targets += (f"{match['module']}.{without_name}",)
    elif any(part.startswith("lora_") for part in path.split(".")):
        sorted_keys.problems.append(f"{key}: not a key that PEFT's LoRA has")
        return
    elif path.rpartition(".")[0] in sorted_keys.lora:
        expected = ".base_layer.".join(path.rpartition(".")[::2])
        sorted_keys.problems.append(
            f"{key}: this module has LoRA, where PEFT reads only {PREFIX}{expected}"
        )
        return
    sorted_keys.full.setdefault(targets, []).append(key)
