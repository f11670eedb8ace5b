"""A bundle on the hub: what of it goes there, under which licences, and how it comes back.

Rules:
    * What the manifest lists goes there, with the manifest and the card, each compared with its SHA-256 before. What
      `embedge prepare` made and whatever else lies in the folder does not.
    * A new repository is private unless asked otherwise. One that is public already is not written to unasked.
    * A commit holds all files or none. Files that the hub has already are not sent again, so that a push that was cut
      off goes on.
    * A pull fills the hub's cache, which goes on where it was cut off, and copies from there, compared again. The
      bundle appears under its name when it is whole.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from embedge.runtime.bundle.contract import CARD, MANIFEST
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.licences import is_non_commercial, licence_name
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.model_card import model_card
from embedge.runtime.bundle.subset import chosen_part, copy_part
from embedge.runtime.errors import EmbedgeError, EmbedgeImportError, EmbedgeValueError
from embedge.runtime.host.install_advice import install_command

__all__ = ["HubFile", "licences_of", "pull_bundle", "push_bundle"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Graphs, lists and the few tensors of tasks that share a graph.
_WITHOUT_WEIGHTS = (".onnx", ".json", ".safetensors")
_LOG_IN = "check the name, or log in with `hf auth login`"
# By the client's own errors.
_ADVICE = {
    "GatedRepoError": "accept its terms on its page, and log in with `hf auth login`",
    "RepositoryNotFoundError": f"the hub has no model of that id, or a private one: {_LOG_IN}",
    "RevisionNotFoundError": "name a branch, a tag or a commit that it has with --revision",
    "LocalTokenNotFoundError": "log in with `hf auth login`",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    """A file of a bundle on the hub: its path there, and its bytes."""

    name: str
    size: int


def licences_of(manifest: Manifest) -> dict[str, str | None]:
    """The licence of the model, and that of each task's adapter, by what it is of."""
    adapters = {
        f"adapter {name}": task.adapter.license
        for name, task in manifest.tasks.items()
        if task.adapter is not None
    }
    return {manifest.source.name: manifest.source.license, **adapters}


def push_bundle(
    bundle: str | os.PathLike[str],
    repo_id: str,
    *,
    public: bool = False,
    accept_licence: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> list[HubFile]:
    """Send a bundle to the hub, as one commit.

    Args:
        bundle: the bundle's folder.
        repo_id: ``organization/name``; made where there is none.
        public: whether everybody may read it.
        accept_licence: needed where the licence of the model or of an adapter allows no commercial use.
        revision: the branch to write to; ``None``: the main one.
        message: of the commit.
        dry_run: send nothing, and ask the hub nothing.

    Returns:
        what was sent, or would be.

    Raises:
        EmbedgeValueError: for an id of another form, a licence that was not accepted, or a public repository without
            ``public``.
        BundleError: if the bundle is damaged.
        EmbedgeImportError: without huggingface_hub.
        EmbedgeError: if the hub refuses, with its reason.
    """
    _check_id(repo_id)
    source = Bundle(bundle, verify="full")
    manifest = source.manifest
    _check_licences(manifest, accepted=accept_licence)
    files: dict[str, Path | bytes] = {name: source.file(name) for name in manifest.files}
    files[MANIFEST] = source.root / MANIFEST
    card = source.root / CARD
    files[CARD] = card if card.is_file() else model_card(manifest).encode()
    listed = [HubFile(name, _size(content)) for name, content in sorted(files.items())]
    if dry_run:
        return listed
    hub = _client()
    api = hub.HfApi()

    def send() -> None:
        api.create_repo(repo_id, private=not public, repo_type="model", exist_ok=True)
        if not public and api.repo_info(repo_id, repo_type="model").private is False:
            raise EmbedgeValueError(
                f"{repo_id}: expected a private repository, found a public one; pass public=True (--public) to publish "
                "there, or name another",
                arguments=["public=True"],
            )
        operations = [
            hub.CommitOperationAdd(
                path_in_repo=name,
                path_or_fileobj=content if isinstance(content, bytes) else str(content),
            )
            for name, content in sorted(files.items())
        ]
        api.create_commit(
            repo_id,
            operations=operations,
            commit_message=message or f"{manifest.source.name}, by embedge",
            repo_type="model",
            revision=revision,
        )

    _asked(repo_id, send)
    return listed


def pull_bundle(
    repo_id: str,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    precisions: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    dry_run: bool = False,
) -> list[HubFile]:
    """Fetch a bundle from the hub, or a part of it.

    Args:
        repo_id: ``organization/name``.
        out: the new bundle's folder, which must not exist or be empty.
        revision: a branch, a tag or a commit; ``None``: the main branch.
        precisions: which to fetch; ``None``: all.
        tasks: likewise.
        dry_run: fetch the manifest and the graphs without their weights, and write nothing to ``out``.

    Returns:
        what was fetched, or would be.

    Raises:
        EmbedgeValueError: for an id of another form, a precision or task that it does not have, or an ``out`` that is
            taken.
        BundleError: if what the hub has is no bundle, or damaged.
        EmbedgeImportError: without huggingface_hub.
        EmbedgeError: if the hub refuses, with its reason.
    """
    _check_id(repo_id)
    hub = _client()

    def fetched(names: Sequence[str]) -> Path:
        return Path(
            _asked(
                repo_id,
                lambda: hub.snapshot_download(
                    repo_id, revision=commit, allow_patterns=sorted(names), repo_type="model"
                ),
            )
        )

    commit = _asked(
        repo_id, lambda: hub.HfApi().model_info(repo_id, revision=revision).sha
    )  # one state of it throughout
    manifest = Bundle(fetched([MANIFEST, CARD]), verify="none").manifest
    small = [name for name in manifest.files if name.endswith(_WITHOUT_WEIGHTS)]
    snapshot = fetched([MANIFEST, CARD, *small])
    with TemporaryDirectory(prefix="embedge-pull-") as folder:
        part = chosen_part(_outlined(Path(folder), snapshot, manifest), precisions, tasks)
    listed = [HubFile(name, entry.size) for name, entry in sorted(part.manifest.files.items())]
    if not dry_run:
        fetched([MANIFEST, CARD, *part.manifest.files])
        copy_part(Bundle(snapshot, verify="none"), out, part)
    return listed


def _outlined(folder: Path, snapshot: Path, manifest: Manifest) -> Bundle:
    """A bundle of what was fetched, with empty files of the right length for all else.

    Which weights a graph uses stands in the graph, and is looked up by a bundle whose files are there.
    """
    shutil.copyfile(snapshot / MANIFEST, folder / MANIFEST)
    for name, entry in manifest.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(_WITHOUT_WEIGHTS):
            shutil.copyfile(snapshot / name, folder / name)
        else:
            with open(folder / name, "wb") as file:
                file.truncate(entry.size)
    return Bundle(folder)


def _check_id(repo_id: str) -> None:
    if not isinstance(repo_id, str) or not _HUB_ID.fullmatch(repo_id):
        raise EmbedgeValueError(
            f"repo_id is {repo_id!r}; expected organization/name, such as me/small-bundle",
            arguments=["repo_id"],
        )


def _check_licences(manifest: Manifest, *, accepted: bool) -> None:
    """Refuses to redistribute what allows no commercial use, unless that was accepted."""
    bound = [
        f"{of}: {licence_name(licence)}"
        for of, licence in licences_of(manifest).items()
        if is_non_commercial(licence)
    ]
    if bound and not accepted:
        raise EmbedgeValueError(
            f"{'; '.join(bound)}: expected that you may pass it on under these terms; if you have read them, pass "
            "accept_licence=True (--accept-licence), and leave the licence in the card",
            arguments=["accept_licence=True"],
        )


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise EmbedgeImportError(
            f"the hub needs huggingface_hub, which cannot be imported; run: {install_command('hub')}"
        ) from error
    return huggingface_hub


def _asked(repo_id: str, ask: Callable[[], Result]) -> Result:
    """What the hub answers.

    Raises:
        EmbedgeError: with its reason and what to do.
    """
    try:
        return ask()
    except EmbedgeError:
        raise
    except (
        Exception
    ) as error:  # the client raises its own, those of its HTTP library, and the system's
        kind = type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        advice = _ADVICE.get(kind)
        if advice is None:
            advice = _LOG_IN if status in (401, 403) else "check the network, and run it again"
        raise EmbedgeError(f"{repo_id}: {lines[0] if lines else kind}; {advice}") from error
