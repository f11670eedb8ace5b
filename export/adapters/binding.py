"""Fitting an adapter's tensors to a checkpoint's: a rule for each tensor that changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from embedge.export.adapters.base_tensors import BaseTensors
from embedge.export.adapters.config import LoraSettings
from embedge.export.adapters.heads import without_heads
from embedge.export.adapters.keys import AdapterKeys
from embedge.export.adapters.merge import MergeRule, block_rows, output_norms
from embedge.export.adapters.problems import OTHER_CONFIG, OTHER_TARGETS, Problems
from embedge.export.errors import AdapterError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.safetensors_file import TensorSource

__all__ = ["Binding", "bind"]

_TOKEN_TABLES = ("embed_tokens", "tok_embeddings", "word_embeddings")
# How far an untrained magnitude may be from the norm that it was saved as, by its dtype.
_ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11}


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What becomes of an adapter on a checkpoint.

    Attributes:
        rules: by the checkpoint's key, of the tensors that change.
        left_out: names of the heads that it trains, which no vector depends on.
    """

    rules: dict[str, MergeRule]
    left_out: tuple[str, ...]


def bind(
    name: str,
    file: TensorSource,
    keys: AdapterKeys,
    settings: LoraSettings,
    checkpoint: Checkpoint,
    canonical: Callable[[str], str],
    heads: tuple[str, ...],
) -> Binding:
    """Return a rule per changed checkpoint key.

    Args:
        name: the adapter's.
        file: the adapter's tensors.
        keys: its keys, sorted by role.
        settings: its config.
        checkpoint: the base model.
        canonical: maps the keys of both to one form.
        heads: starts of canonical names of modules that cannot reach the vector.

    Raises:
        AdapterError: counting everything that does not fit, and listing the first.
    """
    binder = _Binder(file, settings, checkpoint, canonical)
    problems, expected = binder.problems, settings.base_sha256
    if expected is not None and expected != checkpoint.sha256():
        problems.add(
            f"it was trained on base weights with the sha256 {expected}, these have {checkpoint.sha256()}"
        )
    for problem in keys.problems:
        problems.add(problem)
    keys, left_out = without_heads(keys, heads, binder.base.canonical_path, binder.trained)
    for key in file.keys():
        if key not in keys.others:
            binder.check_numbers(key)
    for targets, sources in keys.full.items():
        binder.replace(targets, sources)
    for path, key in keys.originals.items():
        if binder.base.only(path) not in binder.rules:
            problems.add(f"{key}: a copy of the base's tensor without the trained one")
    for module, parts in keys.lora.items():
        binder.low_rank(module, parts)
    for module, key in keys.tokens.items():
        binder.trained_rows(module, key)
    binder.check_all_there(heads)
    if problems:
        raise problems.error(name, file, settings, checkpoint)
    return Binding(rules=binder.rules, left_out=left_out)


class _Binder:
    """Collects ``rules``, by the checkpoint's key, and ``problems``."""

    def __init__(
        self,
        file: TensorSource,
        settings: LoraSettings,
        checkpoint: Checkpoint,
        canonical: Callable[[str], str],
    ) -> None:
        self.file = file
        self.settings = settings
        self.checkpoint = checkpoint
        self.base = BaseTensors(checkpoint, canonical)
        self.rules: dict[str, MergeRule] = {}
        self.problems = Problems()
        self._zero: set[str] = set()
        self._lora_targets: dict[str, str] = {}

    def trained(self, key: str) -> bool:
        """Whether a tensor of the adapter is anything but zero."""
        try:
            return bool(self.file.read(key).any())
        except AdapterError:  # NaN
            return True

    def check_numbers(self, key: str) -> None:
        """Read a tensor: a problem if it has NaN or infinity; remember whether it is zero."""
        try:
            if not self.file.read(key).any():
                self._zero.add(key)
        except AdapterError as problem:
            self.problems.add(str(problem))

    def replace(self, targets: tuple[str, ...], sources: list[str]) -> None:
        """``sources`` (several if stored twice) take the place of the base's tensor."""
        whole = next((t for t in targets if self.base.has(t)), targets[0])
        for path, block in self.base.blocks(whole):
            self._replace(path, sources, block)

    def _replace(self, path: str, sources: list[str], block: tuple[int, int]) -> None:
        target = self._target_or_problem(path, sources[0])
        if target is None:
            return
        known = self.rules.get(target)
        source, *others = [*([known.replacement] if known and known.replacement else []), *sources]
        for other in others:
            if not self._same(source, other):
                self.problems.add(f"{other}: another value for {target} than {source}")
        shape, expected = (
            _block_shape(self.file.shape(source), block),
            self.checkpoint.shape(target),
        )
        is_table = target.rpartition(".")[0].endswith(_TOKEN_TABLES)
        if is_table and shape != expected and shape[1:] == expected[1:]:
            self.problems.resized = shape[0]
            self.problems.add(
                f"{source}: {shape[0]} tokens, the model has {expected[0]}: the vocabulary was resized "
                "in training"
            )
            return
        if shape != expected:
            self.problems.add(
                f"{source}: shape {list(shape)} does not fit {target} of shape {list(expected)}"
            )
            return
        try:
            own = self.file.read(source, block_rows(block, self.file.shape(source)[0]))
            changes = not np.array_equal(own, self.checkpoint.read(target))
        except AdapterError:  # listed by check_numbers
            changes = True
        self.rules[target] = MergeRule(
            shape=shape, replacement=source, block=block, changes=changes
        )

    def low_rank(self, module: str, parts: Mapping[str, str]) -> None:
        """The LoRA of one module, and the bias of its B."""
        embedding = any(part.startswith("lora_embedding") for part in parts)
        name_a, name_b = (
            ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        )
        allowed = {name_a, name_b}
        allowed |= {"lora_magnitude_vector"} if self.settings.use_dora else set()
        allowed |= {"lora_B.bias"} if self.settings.lora_bias and not embedding else set()
        for part, key in parts.items():
            if part not in allowed:
                flag = {"lora_magnitude_vector": "use_dora", "lora_B.bias": "lora_bias"}.get(part)
                reason = (
                    f"adapter_config.json does not set {flag}"
                    if flag
                    else "it is mixed with an embedding's"
                )
                self.problems.add(f"{key}: not used, {reason}")
        if missing := sorted(allowed - set(parts)):
            self.problems.add(
                f"{module}: has {', '.join(sorted(parts))} but no {', '.join(missing)}"
            )
            return
        pair = parts[name_a], parts[name_b]
        transposed = embedding or self.base.is_conv1d(module)
        for path, block in self.base.blocks(f"{module}.weight"):
            self._low_rank(module, parts, pair, path, block, transposed)

    def _low_rank(
        self,
        module: str,
        parts: Mapping[str, str],
        pair: tuple[str, str],
        path: str,
        block: tuple[int, int],
        transposed: bool,
    ) -> None:
        """The LoRA ``pair`` of one tensor, by a block of the rows of B."""
        a, b = pair
        target = self._target_or_problem(path, a)
        if target is None or not self._fits(module, target, parts, pair, block, transposed):
            return
        if not self.settings.targets.names(module):
            self.problems.add(
                f"{a}: PEFT leaves it out, as target_modules, exclude_modules and layers_to_transform in "
                f"adapter_config.json do not ask for {module}",
                OTHER_TARGETS,
            )
            return
        if target in self._lora_targets:
            self.problems.add(
                f"{a}: a second LoRA for {target} beside {self._lora_targets[target]}"
            )
            return
        self._lora_targets[target] = a
        before = self.rules.get(target) or MergeRule(
            shape=self.checkpoint.shape(target), changes=False
        )
        zero_delta = a in self._zero or b in self._zero
        magnitude = parts["lora_magnitude_vector"] if self.settings.use_dora else None
        changes = not zero_delta or (
            magnitude is not None and not self._is_length(magnitude, target, block, transposed)
        )
        self.rules[target] = replace(
            before,
            a=a,
            b=b,
            magnitude=magnitude,
            scaling=self.settings.scaling(module),
            transposed=transposed,
            block=block,
            zero_delta=zero_delta,
            changes=before.changes or changes,
        )
        if "lora_B.bias" in parts:
            self._shift(target, module, parts["lora_B.bias"], path, block)

    def trained_rows(self, module: str, key: str) -> None:
        """The rows of a table that were trained alone."""
        ends = sorted(self.settings.trainable_tokens, key=len, reverse=True)
        named = next((end for end in ends if module.endswith(end)), None)
        if named is None:
            self.problems.add(
                f"{key}: adapter_config.json names no tokens for it in trainable_token_indices"
            )
            return
        target = self._target_or_problem(f"{module}.weight", key)
        if target is None:
            return
        rows, shape = self.settings.trainable_tokens[named], self.checkpoint.shape(target)
        if target in self.rules:
            self.problems.add(
                f"{key}: trained rows of {target}, which is trained otherwise as well"
            )
        elif max(rows) >= shape[0]:
            self.problems.resized = max(rows) + 1
            self.problems.add(
                f"{key}: token {max(rows)}, the model has {shape[0]}: the vocabulary was resized in "
                "training"
            )
        elif self.file.shape(key) != (len(rows), *shape[1:]):
            self.problems.add(
                f"{key}: shape {list(self.file.shape(key))}, expected {[len(rows), *shape[1:]]} by "
                "trainable_token_indices in adapter_config.json"
            )
        else:
            self.rules[target] = MergeRule(shape=shape, rows=key, row_numbers=rows)

    def check_all_there(self, heads: tuple[str, ...]) -> None:
        """Name the tensors of ``modules_to_save`` and ``trainable_token_indices`` that the file lacks."""
        has_rows = any(rule.rows for rule in self.rules.values())
        if self.settings.trainable_tokens and not has_rows and not self.problems:
            self.problems.add(
                "trainable_token_indices in adapter_config.json: the adapter has no rows for them"
            )
        for name in self.settings.modules_to_save:
            for key in self.base.of_module(name):
                if not self.checkpoint.is_float(key):
                    continue
                saved = key in self.rules and self.rules[key].replacement is not None
                if not saved and not self.base.canonical(key).startswith(heads):
                    self.problems.add(
                        f"{key}: belongs to modules_to_save {name!r}, but "
                        "the adapter has no tensor for it"
                    )

    def _target_or_problem(self, path: str, key: str) -> str | None:
        found = self.base.find(path)
        self.problems.found |= bool(found)
        if len(found) == 1:
            return found[0]
        if found:
            self.problems.add(f"{key}: finds several tensors of the model: {', '.join(found)}")
        else:
            self.problems.add_lost(key, path)
        return None

    def _same(self, first: str, second: str) -> bool:
        if self.file.shape(first) != self.file.shape(second):
            return False
        return self.file.dtype(first) == self.file.dtype(second) and all(
            a == b for a, b in zip(self.file.chunks(first), self.file.chunks(second), strict=True)
        )

    def _is_length(
        self, magnitude: str, target: str, block: tuple[int, int], transposed: bool
    ) -> bool:
        """Whether DoRA's magnitude is what the base's weights have already, up to rounding."""
        norms = output_norms(self.checkpoint.read(target), transposed=transposed)
        rounding = _ROUNDING.get(self.file.dtype(magnitude), 1e-5)
        try:
            rows = block_rows(block, self.file.shape(magnitude)[0])
            close = np.isclose(self.file.read(magnitude, rows), norms, rtol=rounding, atol=0)
        except AdapterError:  # listed by check_numbers
            return False
        return bool(norms.all() and close.all())

    def _fits(
        self,
        module: str,
        target: str,
        parts: Mapping[str, str],
        pair: tuple[str, str],
        block: tuple[int, int],
        transposed: bool,
    ) -> bool:
        """Check ranks and shapes of one LoRA against the config and the base's tensor."""
        before, (a, b) = len(self.problems), pair
        shape_a, shape_b = self.file.shape(a), self.file.shape(b)
        shape = self.checkpoint.shape(target)
        if len(shape_a) != 2 or len(shape_b) != 2:
            self.problems.add(
                f"{a}: shape {list(shape_a)}, expected [rank, in]; LoRA "
                "on convolutions is not supported"
            )
            return False
        rank = self.settings.rank(module)
        if shape_a[0] != shape_b[1]:
            self.problems.add(f"{module}: rank {shape_a[0]} in {a} and {shape_b[1]} in {b}")
        elif shape_a[0] != rank:
            self.problems.add(
                f"{module}: rank {shape_a[0]} in the weights, {rank} by adapter_config.json",
                OTHER_CONFIG,
            )
        rows = _block_shape(shape_b, block)[0]
        product = (shape_a[1], rows) if transposed else (rows, shape_a[1])
        if product != shape:
            self.problems.add(
                f"{a}, {b}: their product of shape {list(product)} does "
                f"not fit {target} of shape {list(shape)}"
            )
        for part in ("lora_magnitude_vector", "lora_B.bias"):
            if part in parts and self.file.shape(parts[part]) != shape_b[:1]:
                self.problems.add(
                    f"{parts[part]}: shape {list(self.file.shape(parts[part]))}, "
                    f"expected {list(shape_b[:1])}"
                )
        return len(self.problems) == before

    def _shift(
        self, weight_target: str, module: str, key: str, path: str, block: tuple[int, int]
    ) -> None:
        """The bias of lora_B: added to the base's bias, or new where the base has none."""
        own = self.base.only(f"{path.removesuffix('weight')}bias")
        target = own or f"{weight_target.removesuffix('weight')}bias"
        shape = _block_shape(self.file.shape(key), block)
        before = self.rules.get(target) or MergeRule(shape=shape, changes=False)
        is_new = not self.checkpoint.has(target)
        self.rules[target] = replace(
            before,
            shift=key,
            block=block,
            scaling=self.settings.scaling(module),
            changes=before.changes or is_new or key not in self._zero,
        )


def _block_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of one of several blocks of rows; that of the whole where they are uneven, which fits nothing."""
    if not shape or shape[0] % block[1]:
        return shape
    return (shape[0] // block[1], *shape[1:])
