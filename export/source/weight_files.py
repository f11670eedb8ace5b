"""Which safetensors file holds each tensor of a model folder; pickled weights are never read."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from embedge.export.errors import CheckpointError
from embedge.export.source.json_files import read_json_object
from embedge.export.source.modules import inside_folder
from embedge.export.source.safetensors_file import SafetensorsFile

__all__ = ["partly", "weight_files"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(folder: Path, hub_id: str | None = None) -> dict[str, SafetensorsFile]:
    """Return the file of each tensor: ``model.safetensors``, or the parts that its index lists.

    Args:
        folder: holds them.
        hub_id: the model's, for messages; ``None`` where it was not fetched.

    Raises:
        CheckpointError: if a file is missing, truncated or not what it should be, or there are only
            pickled weights.
    """
    if os.path.lexists(folder / _WEIGHTS):
        file = SafetensorsFile(folder / _WEIGHTS, CheckpointError)
        return dict.fromkeys(file.keys(), file)
    if os.path.lexists(folder / _INDEX):
        return _shards(folder)
    if any((folder / name).exists() for name in _PICKLES):
        raise CheckpointError(_pickled(folder))
    raise CheckpointError(
        f"{folder}: has no weights; expected {_WEIGHTS}, or {_INDEX} and the files it lists{partly(hub_id)}"
    )


def partly(hub_id: str | None) -> str:
    """What to say of a file that is missing from the hub's cache; "" for other folders."""
    if hub_id is None:
        return ""
    return (
        f"; the hub's cache holds no more of {hub_id}: fetch the rest without HF_HUB_OFFLINE. Pickled weights are "
        "never fetched: where it has no others, download it by hand, convert them, and name the folder"
    )


def _pickled(folder: Path) -> str:
    """What to say of a folder that has only pickled weights: a command that converts them in place."""
    code = (
        "import glob, sys, torch; from safetensors.torch import save_file; p = sys.argv[1]; t = {}; "
        "[t.update(torch.load(f, 'cpu', weights_only=True)) for f in "
        "sorted(glob.glob(glob.escape(p) + '/pytorch_model*.bin'))]; "
        "save_file({k: v.clone().contiguous() for k, v in t.items()}, p + '/model.safetensors', "
        "metadata={'format': 'pt'})"
    )
    return (
        f"{folder}: has only pickled weights (pytorch_model.bin), which can run code when loaded and are "
        "not read; expected model.safetensors. This command, which needs torch and safetensors, writes it "
        f"beside them; run it where you trust them: python -c {shlex.quote(code)} {shlex.quote(str(folder))}"
    )


def _shards(folder: Path) -> dict[str, SafetensorsFile]:
    index = folder / _INDEX
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    if missing := [n for n in names if not (folder / inside_folder(n, index)).is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(names)} weight files are missing: "
            f"{', '.join(missing)}; fetch the model again"
        )
    shards = {name: SafetensorsFile(folder / name, CheckpointError) for name in names}
    # Like transformers, tensors that the index forgets are taken from the shards that it does list.
    files = {key: shard for shard in shards.values() for key in shard.keys()}
    held = {name: set(shard.keys()) for name, shard in shards.items()}
    if absent := sorted(key for key, name in weight_map.items() if key not in held[name]):
        raise CheckpointError(
            f"{index}: {len(absent)} tensors are not in the files that it names: "
            f"{', '.join(f'{key} in {weight_map[key]}' for key in absent)}; fetch the model again"
        )
    return files | {key: shards[name] for key, name in weight_map.items()}
