"""What lies beside an adapter's two files and says how texts become vectors.

sentence-transformers saves a model with an adapter as the adapter and all of its own files: modules, prompts,
limits, the tokenizer; and so do trainers. What they say is the task's: prompts are written per task, the rest
(pooling, Dense layers, limits) a bundle has once, so that all tasks of an export have to agree on it. A
tokenizer or a config.json that differs from the model's is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from embedge.export.adapters.adapter import Adapter
from embedge.export.errors import AdapterError, CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.config import words
from embedge.export.source.fingerprint import dense_sha256
from embedge.export.source.json_files import read_bytes, read_json_object
from embedge.export.source.modules import MODULES, transformer_folder
from embedge.export.source.sentence_transformers import SentenceSettings, read_modules
from embedge.export.source.tokenizer import BundleTokenizer, read_tokenizer

__all__ = ["check_adapter_files", "settings_of_all"]

_PER_TASK = ("prompts", "default_prompt_name", "task_prompts", "task_defaults")
_WITHOUT_MODULES = (
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
# Files that a tokenizer without tokenizer.json is made of.
_VOCABULARIES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
# Keys of config.json that no vector depends on, by a part of their name.
_BOOKKEEPING = words(
    "_name architectures auto_map dropout dtype finetuning gradient id2label initializer label2id num_labels "
    "output_ problem_type return_dict task_specific tie_word token_id transformers_version use_cache vocab_size"
)


def settings_of_all(
    base: SentenceSettings,
    given: Mapping[str, Path | None],
    adapters: Mapping[str, Adapter | None],
    config: Mapping[str, Any],
) -> SentenceSettings:
    """Return the settings of a bundle: the model's, or those that the folders of all its adapters give.

    Args:
        base: the model's own.
        given: the folder that was given for every task, ``None`` for the bare model.
        adapters: the adapter of every task, which may lie in a folder below that.
        config: the model's config.json.

    Raises:
        AdapterError: if the tasks do not agree on what a bundle has once, naming what differs.
        CheckpointError: if a file is damaged, or says what is not supported.
    """
    folders = {
        task: None if a is None or not a.beside else _settings_folder(a.folder, given[task])
        for task, a in adapters.items()
    }
    own = {task: _read_settings(folder, config) for task, folder in folders.items()}
    by_task = {task: settings or base for task, settings in own.items()}
    first_task, first = next(iter(by_task.items()))
    for task, settings in by_task.items():
        if differences := _differences(first, settings):
            folder = folders[task] or folders[first_task]
            alone = task if folders[task] else first_task
            raise AdapterError(
                f"adapter {alone!r} ({folder}): the sentence-transformers files in its folder say how its "
                f"texts become vectors, and a bundle has one of each: {', '.join(differences)} (tasks "
                f"{first_task} and {task}); export it into a bundle of its own: "
                f"--adapter {alone}={folder} --out OTHER_BUNDLE"
            )
    prompts = {task: settings.prompts for task, settings in own.items() if settings}
    defaults = {task: settings.default_prompt_name for task, settings in own.items() if settings}
    return replace(
        first,
        prompts=base.prompts,
        default_prompt_name=base.default_prompt_name,
        task_prompts={**base.task_prompts, **prompts},
        task_defaults={**base.task_defaults, **defaults},
    )


def _settings_folder(folder: Path, given: Path | None) -> Path:
    """Where sentence-transformers' files of an adapter lie: of one with a name, in the folder above."""
    return given if given and not os.path.lexists(folder / MODULES) else folder


def _read_settings(folder: Path | None, config: Mapping[str, Any]) -> SentenceSettings | None:
    """The settings that an adapter's folder gives, ``None`` where it gives none."""
    if folder is None:
        return None
    if os.path.lexists(folder / MODULES):
        return read_modules(folder, config)
    if found := [name for name in _WITHOUT_MODULES if os.path.lexists(folder / name)]:
        raise AdapterError(
            f"{folder}: holds {', '.join(found)}, which say how texts become vectors, but no modules.json "
            "that they belong to; add it, or move them away where the model's own settings count"
        )
    return None


def _differences(one: SentenceSettings, other: SentenceSettings) -> list[str]:
    """What two tasks of a bundle cannot differ in, in words."""
    found = []
    for field in fields(SentenceSettings):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name in _PER_TASK:
            continue
        if field.name == "dense":
            same = dense_sha256(a) == dense_sha256(b)
            a, b = ([layer.out_features for layer in layers] for layers in (a, b))
            if not same:
                found.append(
                    f"Dense layers of {a} and {b} outputs" if a != b else "other Dense layers"
                )
        elif a != b:
            found.append(f"{field.name} {a!r} and {b!r}")
    return found


def check_adapter_files(
    adapter: Adapter,
    checkpoint: Checkpoint,
    settings: SentenceSettings,
    tokenizer: BundleTokenizer,
) -> None:
    """Refuse a tokenizer or a config.json beside an adapter that is not the model's.

    Args:
        adapter: the adapter.
        checkpoint: the model.
        settings: how texts become vectors, which includes what is asked of the tokenizer.
        tokenizer: the model's.

    Raises:
        AdapterError: naming what differs.
    """

    def read(folder: Path) -> BundleTokenizer:
        return read_tokenizer(
            folder,
            checkpoint.config,
            overrides=settings.tokenizer_settings,
            lowercase=settings.lowercase,
        )

    if not adapter.beside:
        return
    for folder in dict.fromkeys((adapter.folder, transformer_folder(adapter.folder))):
        _check_tokenizer(adapter.name, folder, checkpoint.transformer_path, tokenizer, read)
        _check_config(adapter.name, folder / "config.json", checkpoint.config)


def _check_tokenizer(
    task: str,
    folder: Path,
    base: Path,
    tokenizer: BundleTokenizer,
    read: Callable[[Path], BundleTokenizer],
) -> None:
    file = folder / "tokenizer.json"
    if not os.path.lexists(file):
        for name in _VOCABULARIES:
            if os.path.lexists(folder / name) and _content(folder / name) != _content(base / name):
                raise _other_tokenizer(task, folder / name, f"it is another {name}")
        return
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    )
    if all(_content(folder / name) == _content(base / name) for name in names):
        return
    try:
        own = read(folder)
    except CheckpointError as problem:
        raise _other_tokenizer(
            task, file, f"and it cannot be compared with it ({problem})"
        ) from problem
    if own.truncation_side != tokenizer.truncation_side:
        raise _other_tokenizer(task, file, f"it cuts long texts on the {own.truncation_side}")
    if own.text != tokenizer.text:
        theirs, ours = json.loads(own.text), json.loads(tokenizer.text)
        parts = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        what = f"they differ in {', '.join(parts)}"
        if parts == ["added_tokens"]:
            known = {token["content"] for token in ours["added_tokens"]}
            new = [t["content"] for t in theirs["added_tokens"] if t["content"] not in known]
            what += f" ({', '.join(map(repr, new[:5]))})" if new else ""
        raise _other_tokenizer(task, file, what)


def _other_tokenizer(task: str, file: Path, what: str) -> AdapterError:
    return AdapterError(
        f"adapter {task!r}: {file} is another tokenizer than the model's: {what}; a bundle has one for all "
        "tasks: where the adapter was trained with the model's, move the tokenizer's files out of its "
        "folder; else export it alone, from a copy of the model's folder with these files in it"
    )


def _check_config(task: str, file: Path, config: Mapping[str, Any]) -> None:
    if not os.path.lexists(file):
        return
    own = read_json_object(file, AdapterError)
    differing = [
        f"{key} {value!r} (the model has {config.get(key)!r})"
        for key, value in own.items()
        if value not in (None, False, config.get(key))
        and not any(part in key for part in _BOOKKEEPING)
    ]
    if differing:
        raise AdapterError(
            f"adapter {task!r}: {file} says another model than the one it is merged into: "
            f"{'; '.join(differing[:4])}; PEFT does not read this file: move it away where the adapter was "
            "trained on the model as it is, else put it into a copy of the model's folder"
        )


def _content(file: Path) -> bytes | None:
    return read_bytes(file, AdapterError) if os.path.lexists(file) else None
