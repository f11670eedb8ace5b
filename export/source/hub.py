"""Where a model comes from: a folder on this machine, or a hub id that is turned into one."""

from __future__ import annotations

import re
from pathlib import Path

from embedge.export.errors import CheckpointError
from embedge.export.source.late_interaction import METADATA
from embedge.runtime.host.install_advice import install_command

__all__ = ["is_hub_id", "local_folder"]

# Weights, settings, tokenizer files and the model card; never pickles, never code.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md", METADATA]
_UNWANTED = ["onnx/*", "openvino/*", "*checkpoint-*/*", "*.py", "*.bin"]
_BARE = re.compile(r"[A-Za-z0-9][\w.-]*")
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co/|hf\.co/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:/(?:tree|blob)/.*|/)?"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# By the hub client's own errors.
_ADVICE = {
    "GatedRepoError": (
        "the hub gives it to those alone who accepted its terms: accept them on its page there, log in with "
        "`hf auth login`, and export again"
    ),
    "RepositoryNotFoundError": (
        "the hub has no model of that id, or a private one: check the name, or log in with `hf auth login`"
    ),
}


def is_hub_id(source: str) -> bool:
    """Return whether ``source`` has the form ``organization/name``."""
    return _HUB_ID.fullmatch(source) is not None


def local_folder(source: str | Path) -> Path:
    """Return the folder that ``source`` names, fetched from the hub if it is an id and no folder.

    Nothing is fetched where ``HF_HUB_OFFLINE`` is set; what the hub's cache holds is used.

    Raises:
        CheckpointError: if there is no such folder and it is no hub id or cannot be fetched.
    """
    if not str(source).strip():
        raise CheckpointError(
            "the source is empty; name a local model folder, or a hub id such as organization/name"
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{source}: expected a model folder, found a file; name the folder that holds it"
        )
    if isinstance(source, Path) or not is_hub_id(source):
        raise CheckpointError(
            f"{source}: no such folder; name a local model folder, "
            f"or a hub id such as organization/name{_meant(str(source))}"
        )
    return _fetch(source)


def _meant(source: str) -> str:
    """What a name that is no hub id may have been meant as, "" where nothing is near."""
    if address := _ADDRESS.fullmatch(source):
        return f": {address[1]}, without what is around it"
    name, _, revision = source.partition("@")
    if revision and is_hub_id(name):
        return f"; a revision is fetched by `hf download {name} --revision {revision}`, which prints its folder"
    if _BARE.fullmatch(source):
        return f"; sentence-transformers' own models are sentence-transformers/{source}"
    return ""


def _fetch(hub_id: str) -> Path:
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as problem:
        raise CheckpointError(
            f"{hub_id}: no such folder, and huggingface_hub, which could "
            "fetch it as a hub id, is not installed; "
            f"run: {install_command('export', ['huggingface_hub'])}"
        ) from problem
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as problem:  # the hub client raises its own, requests' and the system's errors
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{hub_id}: no such folder here, and the hub's cache does not hold it; nothing is "
                "fetched, because HF_HUB_OFFLINE is set: unset it, or download the model elsewhere "
                "and name its folder"
            ) from problem
        why = _ADVICE.get(type(problem).__name__)
        if why is not None:
            raise CheckpointError(f"{hub_id}: no such folder here, and {why}") from problem
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        raise CheckpointError(
            f"{hub_id}: no such folder here, and it could not be fetched from the hub as an id "
            f"({type(problem).__name__}: {lines[0] if lines else 'no details'}); check the name "
            "and the network, or download the model elsewhere and name its folder"
        ) from problem
