"""Fitting an adapter's tensors to a checkpoint's.

The outcome is a rule for each changed tensor, a list of everything that is wrong, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from embedge.export.adapters.config import LoraSettings
from embedge.export.adapters.keys import AdapterKeys
from embedge.export.adapters.merge import output_norms
from embedge.export.adapters.merge_advice import merge_advice
from embedge.export.adapters.merge_rules import MergeRule
from embedge.export.errors import AdapterError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.names import base_name
from embedge.export.source.safetensors_file import SafetensorsFile

__all__ = ["Binding", "plan"]

# transformers' families whose layers of these names are Conv1D, with weights [in, out]. PEFT goes
# by the layer's class and corrects fan_in_fan_out where it says otherwise; so the flag in the
# config decides nothing here.
_CONV1D_FAMILIES = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
_TOKEN_TABLES = ("embed_tokens", "tok_embeddings", "word_embeddings")
_OTHER_MODEL = "use it with the model that it was trained on, as PEFT saved it"
_OTHER_CONFIG = (
    "set r and rank_pattern in adapter_config.json as they were in training, or copy both files of "
    "the adapter again"
)
_OTHER_TARGETS = (
    "set target_modules in adapter_config.json as it was in training (null: every module in the file), or "
    "delete the tensors that no training made"
)
_PREFIX = "base_model.model."  # PEFT's own; adapter keys may be given without
# How far an untrained magnitude may be from the norm that it was saved as, by its dtype.
_ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11}


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What becomes of an adapter on a checkpoint.

    Attributes:
        rules: by the checkpoint's key, of the tensors that change.
        problems: everything that does not fit.
        advice: what to do about them.
        left_out: names of the heads that it trains, which no vector depends on.
    """

    rules: dict[str, MergeRule]
    problems: list[str]
    advice: str
    left_out: tuple[str, ...]


def plan(
    file: SafetensorsFile,
    keys: AdapterKeys,
    settings: LoraSettings,
    checkpoint: Checkpoint,
    canonical: Callable[[str], str],
    heads: tuple[str, ...],
) -> Binding:
    """Return a rule per changed checkpoint key, and everything that does not fit.

    Args:
        file: the adapter's tensors.
        keys: its keys, sorted by role.
        settings: its config.
        checkpoint: the base model.
        canonical: maps the keys of both to one form.
        heads: starts of canonical names of modules that cannot reach the vector.
    """
    planner = _Binder(file, settings, checkpoint, canonical, heads)
    planner.problems.extend(keys.problems)
    keys = planner.without_heads(keys)
    planner.check_numbers(key for key in file.keys() if key not in keys.others)
    for targets, sources in keys.full.items():
        planner.replace(targets, sources)
    for path, key in keys.originals.items():
        if planner.target(path) not in planner.rules:
            planner.problems.append(f"{key}: a copy of the base's tensor without the trained one")
    for module, parts in keys.lora.items():
        planner.low_rank(module, parts)
    for module, key in keys.tokens.items():
        planner.trained_rows(module, key)
    planner.check_modules_to_save()
    problems = planner.problems
    if planner.lost and not planner.found:
        problems = [planner.strangeness(), *(p for p in problems if p not in planner.lost)]
    advice = _OTHER_MODEL
    if problems and planner.wrong_ranks == len(problems):
        advice = _OTHER_CONFIG
    if problems and planner.unnamed == len(problems):
        advice = _OTHER_TARGETS
    if planner.resized is not None:
        advice = "a bundle has one tokenizer and one vocabulary for all tasks: " + merge_advice(
            checkpoint.path,
            checkpoint.transformer_path,
            file.path.parent,
            settings.model_class,
            planner.resized,
        )
    left_out = tuple(sorted(planner.left_out))
    return Binding(rules=planner.rules, problems=problems, advice=advice, left_out=left_out)


class _Binder:
    """Collects rules and problems.

    Attributes:
        lost: the problems of keys that find no tensor, with the path that was looked for.
        found: whether any key finds a tensor.
        wrong_ranks: how many problems are ranks unlike the config's.
        unnamed: how many are modules that the config does not name.
        resized: rows of the adapter's token table, where it has another number than the model's.
        left_out: names of heads that it trains.
    """

    def __init__(
        self,
        file: SafetensorsFile,
        settings: LoraSettings,
        checkpoint: Checkpoint,
        canonical: Callable[[str], str],
        heads: tuple[str, ...],
    ) -> None:
        self.file = file
        self.heads = heads
        self.left_out: set[str] = set()
        self.resized: int | None = None
        self.settings = settings
        self.checkpoint = checkpoint
        self.canonical = canonical
        self.rules: dict[str, MergeRule] = {}
        self.problems: list[str] = []
        self.lost: dict[str, str] = {}
        self.found = False
        self.wrong_ranks = 0
        self.unnamed = 0
        self._zero: set[str] = set()
        self._lora_targets: dict[str, str] = {}
        self._targets: dict[str, list[str]] = {}
        for key in checkpoint.keys():
            self._targets.setdefault(canonical(key), []).append(key)
        self._conv1d_family = checkpoint.config.get("model_type") in _CONV1D_FAMILIES

    def _is_head(self, path: str) -> bool:
        name = self.canonical(f"{_PREFIX}{path}").removeprefix(_PREFIX)
        return name.startswith(self.heads)

    def without_heads(self, keys: AdapterKeys) -> AdapterKeys:
        """Leave out what cannot reach the vector, and remember the heads that are not as they began."""
        dropped: set[str] = set(keys.others)

        def leave_out(path: str, sources: Iterable[str]) -> None:
            sources = list(sources)
            dropped.update(sources)
            factors = [key for key in sources if ".lora_A" in key or ".lora_B" in key]
            if not factors or all(self._trained(key) for key in factors):
                name = self.canonical(f"{_PREFIX}{path}").removeprefix(_PREFIX)
                self.left_out.add(name.partition(".")[0])

        for targets, sources in keys.full.items():
            if self._is_head(targets[0]):
                leave_out(targets[0], sources)
        for path, key in keys.originals.items():
            if self._is_head(path):
                dropped.add(key)
        for module, parts in keys.lora.items():
            if self._is_head(f"{module}.weight"):
                leave_out(f"{module}.weight", parts.values())
        for module, key in keys.tokens.items():
            if self._is_head(f"{module}.weight"):
                dropped.add(key)  # tied to the input's table
        return replace(
            keys,
            others=frozenset(dropped),
            lora={m: p for m, p in keys.lora.items() if not dropped.issuperset(p.values())},
            full={t: s for t, s in keys.full.items() if not dropped.issuperset(s)},
            originals={p: k for p, k in keys.originals.items() if k not in dropped},
            tokens={m: k for m, k in keys.tokens.items() if k not in dropped},
        )

    def _trained(self, key: str) -> bool:
        try:
            return bool(self.file.read(key).any())
        except AdapterError:  # NaN
            return True

    def check_numbers(self, keys: Iterable[str]) -> None:
        """Read every tensor once: name those with NaN or infinity, remember those of zeros."""
        for key in keys:
            try:
                if not self.file.read(key).any():
                    self._zero.add(key)
            except AdapterError as problem:
                self.problems.append(str(problem))

    def _find(self, path: str) -> list[str]:
        return self._targets.get(self.canonical(f"{_PREFIX}{path}"), [])

    def target(self, path: str) -> str | None:
        """Return the one checkpoint key for a parameter path, ``None`` for none or several."""
        found = self._find(path)
        return found[0] if len(found) == 1 else None

    def _target_or_problem(self, path: str, key: str) -> str | None:
        found = self._find(path)
        self.found |= bool(found)
        if len(found) == 1:
            return found[0]
        if found:
            self.problems.append(f"{key}: finds several tensors of the model: {', '.join(found)}")
        else:
            problem = f"{key}: finds no tensor of the model"
            self.problems.append(problem)
            self.lost[problem] = path
        return None

    def strangeness(self) -> str:
        """Say in one text that the adapter is that of another model altogether."""
        base, kind = self.settings.base_model, self.checkpoint.config.get("model_type", "model")
        origin = "it" if base is None else f"it was trained on {base_name(base)!r} and"
        theirs = next(iter(self.lost.values()))
        matrices = (k for k, of in self._targets.items() if len(self.checkpoint.shape(of[0])) == 2)
        ours = next((k for k in matrices if ".0." in k), "no numbered layers")
        return (
            f"none of its {len(self.lost)} modules is in this {kind}: {origin} has {theirs}, the "
            f"model has {ours}"
        )

    def replace(self, targets: tuple[str, ...], sources: list[str]) -> None:
        """Binding that ``sources`` (several if stored twice) take the place of the base's tensor."""
        path = next((path for path in targets if self._find(path)), targets[0])
        target = self._target_or_problem(path, sources[0])
        if target is None:
            return
        known = self.rules.get(target)
        candidates = [*([known.replacement] if known and known.replacement else []), *sources]
        source, *others = candidates
        for other in others:
            if not self._same(source, other):
                self.problems.append(f"{other}: another value for {target} than {source}")
        shape, expected = self.file.shape(source), self.checkpoint.shape(target)
        is_table = target.rpartition(".")[0].endswith(_TOKEN_TABLES)
        if is_table and shape != expected and shape[1:] == expected[1:]:
            self.resized = shape[0]
            self.problems.append(
                f"{source}: {shape[0]} tokens, the model has {expected[0]}: the vocabulary was resized "
                "in training"
            )
            return
        if shape != expected:
            self.problems.append(
                f"{source}: shape {list(self.file.shape(source))} does not fit {target} of shape "
                f"{list(self.checkpoint.shape(target))}"
            )
            return
        try:
            changes = not np.array_equal(self.file.read(source), self.checkpoint.read(target))
        except AdapterError:  # listed by check_numbers
            changes = True
        self.rules[target] = MergeRule(
            shape=self.file.shape(source), replacement=source, changes=changes
        )

    def _same(self, first: str, second: str) -> bool:
        if self.file.shape(first) != self.file.shape(second):
            return False
        return self.file.dtype(first) == self.file.dtype(second) and all(
            a == b for a, b in zip(self.file.chunks(first), self.file.chunks(second), strict=True)
        )

    def low_rank(self, module: str, parts: Mapping[str, str]) -> None:
        """Binding the LoRA of one module, and the bias of its B."""
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
                self.problems.append(f"{key}: not used, {reason}")
        if missing := sorted(allowed - set(parts)):
            self.problems.append(
                f"{module}: has {', '.join(sorted(parts))} but no {', '.join(missing)}"
            )
            return
        a, b = parts[name_a], parts[name_b]
        target = self._target_or_problem(f"{module}.weight", a)
        if target is None or not self._fits(module, target, parts, a, b, embedding):
            return
        if not self.settings.targets.names(module):
            self.unnamed += 1
            self.problems.append(
                f"{a}: PEFT leaves it out, as target_modules, exclude_modules and layers_to_transform in "
                f"adapter_config.json do not ask for {module}"
            )
            return
        if target in self._lora_targets:
            self.problems.append(
                f"{a}: a second LoRA for {target} beside {self._lora_targets[target]}"
            )
            return
        self._lora_targets[target] = a
        before = self.rules.get(target) or MergeRule(
            shape=self.checkpoint.shape(target), changes=False
        )
        zero_delta = a in self._zero or b in self._zero
        magnitude = parts["lora_magnitude_vector"] if self.settings.use_dora else None
        transposed = embedding or self._is_conv1d(module)
        changes = not zero_delta or (
            magnitude is not None and not self._is_length(magnitude, target, transposed)
        )
        self.rules[target] = replace(
            before,
            a=a,
            b=b,
            magnitude=magnitude,
            scaling=self.settings.scaling(module),
            transposed=transposed,
            zero_delta=zero_delta,
            changes=before.changes or changes,
        )
        if "lora_B.bias" in parts:
            self._shift(target, module, parts["lora_B.bias"])

    def trained_rows(self, module: str, key: str) -> None:
        """Binding the rows of a table that were trained alone."""
        ends = sorted(self.settings.trainable_tokens, key=len, reverse=True)
        named = next((end for end in ends if module.endswith(end)), None)
        if named is None:
            self.problems.append(
                f"{key}: adapter_config.json names no tokens for it in trainable_token_indices"
            )
            return
        target = self._target_or_problem(f"{module}.weight", key)
        if target is None:
            return
        rows, shape = self.settings.trainable_tokens[named], self.checkpoint.shape(target)
        if target in self.rules:
            self.problems.append(
                f"{key}: trained rows of {target}, which is trained otherwise as well"
            )
        elif max(rows) >= shape[0]:
            self.resized = max(rows) + 1
            self.problems.append(
                f"{key}: token {max(rows)}, the model has {shape[0]}: the vocabulary was resized in "
                "training"
            )
        elif self.file.shape(key) != (len(rows), *shape[1:]):
            self.problems.append(
                f"{key}: shape {list(self.file.shape(key))}, expected {[len(rows), *shape[1:]]} by "
                "trainable_token_indices in adapter_config.json"
            )
        else:
            self.rules[target] = MergeRule(shape=shape, rows=key, row_numbers=rows)

    def _is_length(self, magnitude: str, target: str, transposed: bool) -> bool:
        """Whether DoRA's magnitude is what the base's weights have already, up to rounding."""
        norms = output_norms(self.checkpoint.read(target), transposed=transposed)
        rounding = _ROUNDING.get(self.file.dtype(magnitude), 1e-5)
        try:
            close = np.isclose(self.file.read(magnitude), norms, rtol=rounding, atol=0)
        except AdapterError:  # listed by check_numbers
            return False
        return bool(norms.all() and close.all())

    def _fits(
        self, module: str, target: str, parts: Mapping[str, str], a: str, b: str, embedding: bool
    ) -> bool:
        """Check ranks and shapes of one LoRA against the config and the base's tensor."""
        before = len(self.problems)
        shape_a, shape_b, shape = (
            self.file.shape(a),
            self.file.shape(b),
            self.checkpoint.shape(target),
        )
        if len(shape_a) != 2 or len(shape_b) != 2:
            self.problems.append(
                f"{a}: shape {list(shape_a)}, expected [rank, in]; LoRA "
                "on convolutions is not supported"
            )
            return False
        rank = self.settings.rank(module)
        if shape_a[0] != shape_b[1]:
            self.problems.append(f"{module}: rank {shape_a[0]} in {a} and {shape_b[1]} in {b}")
        elif shape_a[0] != rank:
            self.problems.append(
                f"{module}: rank {shape_a[0]} in the weights, {rank} by adapter_config.json"
            )
            self.wrong_ranks += 1
        product = (shape_b[0], shape_a[1])
        if embedding or self._is_conv1d(module):
            product = product[::-1]
        if product != shape:
            self.problems.append(
                f"{a}, {b}: their product of shape {list(product)} does "
                f"not fit {target} of shape {list(shape)}"
            )
        for part in ("lora_magnitude_vector", "lora_B.bias"):
            if part in parts and self.file.shape(parts[part]) != shape_b[:1]:
                self.problems.append(
                    f"{parts[part]}: shape {list(self.file.shape(parts[part]))}, "
                    f"expected {list(shape_b[:1])}"
                )
        return len(self.problems) == before

    def _is_conv1d(self, module: str) -> bool:
        return self._conv1d_family and module.rpartition(".")[2] in _CONV1D_LAYERS

    def _shift(self, weight_target: str, module: str, key: str) -> None:
        """Binding the bias of lora_B: added to the base's bias, or new where the base has none."""
        target = self.target(f"{module}.bias") or f"{weight_target.removesuffix('weight')}bias"
        before = self.rules.get(target) or MergeRule(shape=self.file.shape(key), changes=False)
        is_new = not self.checkpoint.has(target)
        self.rules[target] = replace(
            before,
            shift=key,
            scaling=self.settings.scaling(module),
            changes=before.changes or is_new or key not in self._zero,
        )

    def check_modules_to_save(self) -> None:
        """Name the tensors of ``modules_to_save`` and ``trainable_token_indices`` that the file lacks."""
        has_rows = any(rule.rows for rule in self.rules.values())
        if self.settings.trainable_tokens and not has_rows and not self.problems:
            self.problems.append(
                "trainable_token_indices in adapter_config.json: the adapter has no rows for them"
            )
        for name in self.settings.modules_to_save:
            for key in self.checkpoint.keys():
                inside = f".{name}." in f".{key}" and self.checkpoint.is_float(key)
                if inside and self.canonical(key).startswith(self.heads):
                    continue
                if inside and (key not in self.rules or self.rules[key].replacement is None):
                    self.problems.append(
                        f"{key}: belongs to modules_to_save {name!r}, but "
                        "the adapter has no tensor for it"
                    )
