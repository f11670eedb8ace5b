"""Reading the model behind an export, and refusing what no graph could be written for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedge.export.adapters.adapter import Adapter, BoundAdapter
from embedge.export.adapters.folder import check_adapter_files, settings_of_all
from embedge.export.errors import AdapterError, CheckpointError
from embedge.export.families import MERGED, Family, family_of
from embedge.export.families.base import Tower
from embedge.export.families.config_keys import check_config
from embedge.export.graph.pooling import poolings
from embedge.export.late_rules import late_rules
from embedge.export.model import Model
from embedge.export.options import POOLINGS, ExportOptions, check_tasks
from embedge.export.schemes.mixed import unmatched
from embedge.export.schemes.registry import PRECISIONS
from embedge.export.source.base_quantization import BaseQuantization
from embedge.export.source.checkpoint import Checkpoint, ModelFolder
from embedge.export.source.image_processor import image_settings
from embedge.export.source.names import base_name
from embedge.export.source.sentence_transformers import SentenceSettings, read_modules
from embedge.export.source.tokenizer import BundleTokenizer, read_tokenizer
from embedge.export.weights.task import TaskWeights
from embedge.export.weights.tensors import BASE
from embedge.runtime.errors import EmbedgeValueError, EmbedgeWarning


def read_model(options: ExportOptions) -> Model:
    """Open the model, bind all adapters, and check that every tensor reaches a vector.

    Raises:
        CheckpointError: the model cannot be exported.
        AdapterError: an adapter does not fit, or changes what no vector depends on.
    """
    folder = ModelFolder(options.source)
    name = next((n for n in sorted(folder.names) if _is_merged(folder.config, n)), folder.name)
    file = folder.transformer_path / "config.json"
    family_class = family_of(folder.config, name, folder.tensor_names, file)
    check_config(folder.config, family_class.kind(folder.config), file)
    checkpoint = Checkpoint(folder).with_parts(family_class.fused, family_class.aside)
    config = family_class.settings(checkpoint.config)
    settings = family_class.own_settings(config, checkpoint.transformer_path) or read_modules(
        checkpoint.path, config, checkpoint.card
    )
    settings = family_class.completed(settings, config)
    folders = _task_folders(options, checkpoint, family_class, name)
    _check_own_adapter(checkpoint, folders.values())
    loaded = _load(options, checkpoint, family_class, folders)
    settings = settings_of_all(settings, folders, loaded, config)
    pooling = _choose_pooling(options, checkpoint, family_class, settings)
    family = family_class(checkpoint.config, settings.max_length)
    _check_half(options, family)
    _tell_left_out(options, checkpoint.name, family)
    architecture = family.architecture
    checkpoint = _quantized(checkpoint, options.base_quantization, family)
    _check_dense(checkpoint, settings, architecture.vector_size * len(poolings(pooling)))
    tokenizer = _read_tokenizer(checkpoint, config, settings)
    tokenizer, rules = late_rules(options, checkpoint.path, architecture, settings.late, tokenizer)
    tower, image = None, None
    if family_class.tower is not None and options.modality != "text":
        tower = family_class.tower(checkpoint.config, family.hidden_size)
        image = image_settings(checkpoint, tower.image_settings(), tokenizer)
        architecture = architecture.with_images()
    if not settings.include_prompt:
        architecture = architecture.skipping_prompts()
    adapters: dict[str, BoundAdapter | None] = {}
    tasks: dict[str, TaskWeights] = {}
    heads, adjustments = _ignored(family_class, tower), architecture.adjustments()
    for task, adapter in loaded.items():
        bound = None
        if adapter is not None:
            published = not options.adapters
            bound = adapter.bind(
                checkpoint, family_class.canonical, heads=heads, published=published
            )
            check_adapter_files(adapter, checkpoint, settings, tokenizer)
        adapters[task] = bound
        tasks[task] = TaskWeights(checkpoint, family_class.canonical, bound, task, adjustments)
    base = TaskWeights(checkpoint, family_class.canonical, adjustments=adjustments)
    _check_tensors(family, tower, base)
    rows = min(w.shape(f"{architecture.token_table}.weight")[0] for w in (base, *tasks.values()))
    model = Model(
        checkpoint=checkpoint,
        family=family,
        architecture=architecture,
        tower=tower,
        image=image,
        settings=settings,
        pooling=pooling,
        tokenizer=tokenizer.with_table(rows),
        adapters=adapters,
        tasks=tasks,
        base=base,
        late_interaction=rules,
    )
    unused = unmatched(options.keep, model.plain_graphs)  # which ask for every tensor by name
    if unused:
        raise EmbedgeValueError(
            f"keep pattern {', '.join(map(repr, unused))}: expected to match a layer, matched "
            "none; `embedge inspect BUNDLE --layers` lists the names"
        )
    for task, weights in {BASE: base, **tasks}.items():
        if tower is not None:
            _check_tower_shared(tower, task, weights)
        _check_all_read(model, task, weights)
    return model


def _is_merged(config: Mapping[str, Any], name: str) -> bool:
    return any(family.serves(config, name) for family in MERGED)


def _quantized(checkpoint: Checkpoint, how: BaseQuantization | None, family: Family) -> Checkpoint:
    """The base that adapters of QLoRA saw: its Linears quantized, those of a vision tower among them."""
    if how is None:
        return checkpoint
    architecture = family.architecture
    linears = {linear.weight for linear in architecture.linears}
    last = architecture.token_head or architecture.state_projection
    if last is not None and not how.skip:
        linears.remove(
            last.weight
        )  # transformers leaves a model's last module as it is, unless it is told which
    tower = () if family.tower is None else (family.tower.prefix,)

    def is_linear(key: str) -> bool:
        name = family.canonical(key)
        return name in linears or name.startswith(tower)

    return checkpoint.with_base_quantization(how, is_linear)


def _choose_pooling(
    options: ExportOptions, checkpoint: Checkpoint, family: type[Family], settings: SentenceSettings
) -> str | None:
    """How tokens become a vector: as asked for, as the model's files say, or as sentence-transformers guesses.

    With late interaction they become none.
    """
    if settings.late is not None:
        return None
    pooling = options.pooling or settings.pooling
    if pooling is None:
        pooling = _guessed_pooling(checkpoint, family)
    if options.pooling and settings.pooling and options.pooling != settings.pooling:
        warnings.warn(
            f"{checkpoint.name}: pooling {options.pooling!r} was asked for, its files say "
            f"{settings.pooling!r}; the request is followed",
            EmbedgeWarning,
            stacklevel=4,
        )
    return pooling


def _guessed_pooling(checkpoint: Checkpoint, family: type[Family]) -> str:
    """The pooling of a model whose files name none, with a warning; an embedder that lost its files is refused."""
    name, hint = checkpoint.name, f" {family.pooling_hint}".rstrip()
    pooling, signs = family.guessed_pooling(checkpoint.config), _signs_of_an_embedder(checkpoint)
    if pooling is None or signs:
        found = f", though {' and '.join(signs)}" if signs else ""
        raise EmbedgeValueError(
            f"{name}: the model does not say how tokens become a vector (it has no modules.json{found}), and "
            f"pooling is None; expected one of {', '.join(POOLINGS)}: give pooling= (--pooling).{hint}"
        )
    warnings.warn(
        f"{name}: no file says how tokens become a vector, nor names prompts; {pooling} pooling without "
        f"normalization is taken. Give pooling= (--pooling) where the model has another.{hint}",
        EmbedgeWarning,
        stacklevel=5,
    )
    return pooling


def _signs_of_an_embedder(checkpoint: Checkpoint) -> list[str]:
    """What of a model without modules.json says that it was trained to embed, whose rules are lost then."""
    recorded = base_name(str(checkpoint.config.get("_name_or_path") or "")).lower()
    names = sorted(name for name in checkpoint.names | {recorded} if "embed" in name)
    file = checkpoint.path / "config_sentence_transformers.json"
    signs = [f"{file.name} is there"] if os.path.lexists(file) else []
    keys = ("matryoshka_dims", "matryoshka_dimensions", "task_names")
    signs += [f"config.json has {key}" for key in keys if checkpoint.config.get(key)]
    return signs + [f"it is called {name}" for name in names]


def _task_folders(
    options: ExportOptions, checkpoint: Checkpoint, family: type[Family], name: str
) -> dict[str, Path | None]:
    """The adapter's folder of every task: those asked for, else those the model is published with."""
    if options.adapters:
        return dict(options.adapters)
    own = family.own_tasks(checkpoint.config, name) or family.tasks_beside(checkpoint.path)
    if not own:
        raise EmbedgeValueError(
            f"adapters: expected at least one task, found none, and {checkpoint.name} brings none of "
            "its own; give {'name': 'adapter folder'}, or {'name': None} for the bare backbone "
            "(--adapter NAME=FOLDER, --no-adapter NAME)"
        )
    check_tasks(own)
    return {t: None if f is None else checkpoint.path / f for t, f in own.items()}


def _check_half(options: ExportOptions, family: Family) -> None:
    """Refuse precisions whose matmuls take float16 for a model whose values do not fit it."""
    halves = [name for name in options.precisions if PRECISIONS[name].half]
    if halves and not family.fits_half:
        raise EmbedgeValueError(
            f"precisions {', '.join(halves)}: a {family.config['model_type']} model has values above float16's "
            "largest, which these multiply in; expected int8, int4 or fp32",
            arguments=["precisions"],
        )


def _tell_left_out(options: ExportOptions, name: str, family: Family) -> None:
    what = family.left_out()
    if what and options.modality != "text":
        warnings.warn(
            f"{name}: it embeds {what} too, which is not exported yet; the bundle takes texts alone. Give "
            "modality='text' (--modality text) where that is what you want",
            EmbedgeWarning,
            stacklevel=4,
        )


def _load(
    options: ExportOptions,
    checkpoint: Checkpoint,
    family: type[Family],
    folders: Mapping[str, Path | None],
) -> dict[str, Adapter | None]:
    """The adapter of every task: from its folder, or of those that the checkpoint itself holds."""
    here = [t for t, f in folders.items() if f and f.is_dir() and f.samefile(checkpoint.path)]
    inside = family.own_adapters(checkpoint) if here or not options.adapters else {}
    chosen = inside if not options.adapters else {t: inside[t] for t in here if t in inside}
    loaded = {
        t: None if f is None or t in chosen else Adapter.load(f, t) for t, f in folders.items()
    }
    return {task: chosen.get(task, adapter) for task, adapter in loaded.items()}


def _check_dense(checkpoint: Checkpoint, settings: SentenceSettings, width: int) -> None:
    for number, layer in enumerate(settings.dense, 1):
        if layer.in_features != width:
            raise CheckpointError(
                f"{checkpoint.path}: Dense layer {number} has in_features {layer.in_features}, expected "
                f"{width}, the length of the vector before it; are its folder and modules.json of the same "
                "model?"
            )
        width = layer.out_features


def _read_tokenizer(
    checkpoint: Checkpoint, config: Mapping[str, Any], settings: SentenceSettings
) -> BundleTokenizer:
    """The model's tokenizer; a longest text that special tokens alone pass is refused."""
    tokenizer = read_tokenizer(
        checkpoint.transformer_path,
        config,
        overrides=settings.tokenizer_settings,
        lowercase=settings.lowercase,
    )
    shortest = settings.max_length if settings.late is None else settings.late.shortest
    needed = len(tokenizer.encode([""], shortest)[0])
    if needed > shortest:
        raise CheckpointError(
            f"{checkpoint.path}: texts are cut at {shortest} tokens, and the special tokens of each pass that; "
            f"expected a length of at least {needed}: correct max_seq_length or the length of queries or documents"
        )
    return tokenizer


def _check_own_adapter(checkpoint: Checkpoint, folders: Iterable[Path | None]) -> None:
    """Refuse an adapter beside the model, which transformers would load with it, unless it is asked for."""
    folder = checkpoint.transformer_path
    if not os.path.lexists(folder / "adapter_config.json"):
        return
    if not any(given and given.is_dir() and os.path.samefile(given, folder) for given in folders):
        raise CheckpointError(
            f"{folder}: holds a PEFT adapter (adapter_config.json) beside the model, which transformers "
            f"loads with it, and it was not asked for: name it, --adapter NAME={folder}, or move "
            "adapter_config.json away where the model's weights stand alone"
        )


def _ignored(family: type[Family], tower: Tower | None) -> tuple[str, ...]:
    """Prefixes of tensors that reach no vector; those of a tower that is not exported are among them."""
    return tuple(p for p in family.ignored if tower is None or p != tower.prefix)


def _check_tensors(family: Family, tower: Tower | None, base: TaskWeights) -> None:
    family.check_tensors(base.names())
    shapes = {name: base.shape(name) for name in base.names()}
    family.check_shapes({n: s for n, s in shapes.items() if not n.startswith(family.ignored)})
    if tower is not None:
        tower.check_tensors(base.names())
        tower.check_shapes({n: s for n, s in shapes.items() if n.startswith(tower.prefix)})


def _check_tower_shared(tower: Tower, task: str, weights: TaskWeights) -> None:
    touched = sorted(n for n in weights.changed() if n.startswith(tower.prefix))
    if touched:
        raise AdapterError(
            f"adapter of task {task}: expected to leave the vision tower alone, which all tasks of a "
            f"bundle share, but it changes {', '.join(touched[:5])}"
            f"{f' and {len(touched) - 5} more' if len(touched) > 5 else ''}; merge it into the model's "
            "own weights and export those, or export with modality='text' (--modality text)"
        )


def _is_of(module: str, keys: Sequence[str]) -> bool:
    return any(f".{module}." in f".{key}" for key in keys)


def _check_all_read(model: Model, task: str, weights: TaskWeights) -> None:
    changed, others = weights.unread(model.base.asked)
    bound = model.adapters.get(task)
    if changed and bound is not None:
        saved = [m for m in bound.adapter.settings.modules_to_save if _is_of(m, changed)]
        config = f", and {', '.join(saved)} from modules_to_save in adapter_config.json"
        raise AdapterError(
            f"adapter of task {task}: expected every adapted tensor to reach the vector, but these "
            f"do not: {', '.join(changed)}; no vector changes without them: delete the tensors "
            f"{', '.join(bound.sources(changed))} from {bound.adapter.file.path}"
            f"{config if saved else ''}, or train without them"
        )
    late = model.settings.late
    ignored = (*_ignored(type(model.family), model.tower), *(late.tensors if late else ()))
    left = [n for n in others if not n.startswith(ignored) and not n.endswith(".inv_freq")]
    if left and task == BASE:
        shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
        raise CheckpointError(
            f"{model.checkpoint.path}: expected only tensors of a {model.family.config['model_type']} "
            f"backbone, found {shown}; the architecture differs from what its config.json says"
        )
