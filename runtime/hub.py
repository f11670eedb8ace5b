"""A bundle on the hub: what of it goes there, under which licences, and how it comes back.

Rules:
    * What the manifest lists goes there, with the manifest and the card, each compared with its SHA-256 before. What
      `embedge prepare` made and whatever else lies in the folder does not.
    * A new repository is private unless asked otherwise. One that is public already is not written to unasked.
    * Nothing is sent that a link leads to, out of the bundle.
    * A commit holds all files or none. Files that the hub has already are not sent again, so that a push that was cut
      off goes on.
    * A pull fills the hub's cache, which keeps the files that came before it was cut off. What is damaged there is
      fetched once more. It copies from there, compared again. The bundle appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from embedge.runtime.bundle.contract import CARD, MANIFEST
from embedge.runtime.bundle.files import system_reason
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.licences import is_non_commercial, is_permissive, licence_name
from embedge.runtime.bundle.manifest import FileEntry, Manifest
from embedge.runtime.bundle.model_card import model_card
from embedge.runtime.bundle.subset import Part, chosen_part, copy_part
from embedge.runtime.bundle.writing import check_new
from embedge.runtime.errors import BundleError, EmbedgeError, EmbedgeImportError, EmbedgeValueError
from embedge.runtime.host.install_advice import install_command
from embedge.runtime.hub_answers import asked

__all__ = ["HubFile", "licences_of", "pull_bundle", "push_bundle"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Graphs, lists and the few tensors of tasks that share a graph.
_WITHOUT_WEIGHTS = (".onnx", ".json", ".safetensors")
_AGAIN = "push the bundle again from where it is whole"


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
        public: whether everybody may read it, and what the repository held before.
        accept_licence: needed where the licence of the model or of an adapter allows no commercial use, and with
            ``public`` where it is none of those known to let everybody pass the work on.
        revision: the branch to write to; ``None``: the main one.
        message: of the commit.
        dry_run: send nothing, and ask the hub nothing.

    Returns:
        what was sent, or would be.

    Raises:
        EmbedgeValueError: for an id of another form, a licence that was not accepted, or a public repository without
            ``public``.
        BundleError: if the bundle is damaged, or its card a link that leaves it.
        EmbedgeImportError: without huggingface_hub.
        EmbedgeError: if the hub refuses, with its reason.
    """
    _check_id(repo_id)
    source = Bundle(bundle, verify="full")
    manifest = source.manifest
    _check_licences(manifest, public=public, accepted=accept_licence)
    files = _to_send(source)
    listed = [HubFile(name, _size(content)) for name, content in sorted(files.items())]
    if dry_run:
        return listed
    hub = _client()
    api = hub.HfApi()

    def is_public() -> bool:
        return api.repo_info(repo_id, repo_type="model").private is False

    def send() -> None:
        api.create_repo(repo_id, private=not public, repo_type="model", exist_ok=True)
        if not public and is_public():
            raise EmbedgeValueError(
                f"{repo_id}: expected a private repository, found a public one; pass public=True to publish "
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
        if public and not is_public():
            api.update_repo_settings(repo_id, private=False, repo_type="model")
            if not is_public():
                raise EmbedgeError(
                    f"{repo_id}: all was sent, and the hub still calls the repository private; make it public in its "
                    "settings"
                )

    asked(repo_id, send, {"RevisionNotFoundError": _make_branch(repo_id, revision)})
    return listed


def _make_branch(repo_id: str, revision: str | None) -> str:
    """What makes a branch, which the client's command cannot."""
    names = f"{json.dumps(repo_id)}, branch={json.dumps(revision)}"
    code = f"from huggingface_hub import create_branch as c; c({names})"
    return f"make the branch first: python -c {shlex.quote(code)}"


def _to_send(source: Bundle) -> dict[str, Path | bytes]:
    """Files by their names on the hub, or the content where a name may be a link."""
    content = source.unlisted(MANIFEST)
    if content is None or Manifest.from_dict(json.loads(content)) != source.manifest:
        raise BundleError(f"{source.root}: was replaced while it was opened; open it again")
    card = source.unlisted(CARD)
    return {
        **{name: source.file(name) for name in source.manifest.files},
        MANIFEST: content,
        CARD: model_card(source.manifest).encode() if card is None else card,
    }


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
    if not dry_run:
        check_new(Path(out), Path(os.path.realpath(out)))
    repository = _Repository(repo_id, revision)
    manifest = repository.manifest()
    small = {n: entry for n, entry in manifest.files.items() if n.endswith(_WITHOUT_WEIGHTS)}
    part = _part(repo_id, repository.fetch_listed(small), manifest, precisions, tasks)
    listed = [HubFile(name, entry.size) for name, entry in sorted(part.manifest.files.items())]
    if not dry_run:
        snapshot = repository.fetch_listed(part.manifest.files)
        copy_part(Bundle(snapshot, verify="none"), out, part)
    return listed


class _Repository:
    """A repository at one commit, and the cache's copy of it.

    Args:
        repo_id: its id.
        revision: which commit; ``None``: the newest.

    Raises:
        EmbedgeError: as for all methods, if the hub refuses.
    """

    def __init__(self, repo_id: str, revision: str | None) -> None:
        self._id = repo_id
        self._hub = _client()
        info = asked(
            repo_id,
            lambda: self._hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True),
        )
        self._commit: str = info.sha
        self._sizes: dict[str, int | None] = {f.rfilename: f.size for f in info.siblings or ()}

    def manifest(self) -> Manifest:
        """That of the bundle, which has to fit what is there by name and size.

        Raises:
            BundleError: if there is none, or it does not.
        """
        if MANIFEST not in self._sizes:
            raise BundleError(
                f"{self._id}: no embedge bundle: it has no {MANIFEST}; name one that `embedge push` sent"
            )
        manifest = Bundle(self._fetch([MANIFEST, CARD]), verify="none").manifest
        for name, entry in manifest.files.items():
            if name not in self._sizes:
                raise BundleError(f"{self._id}: {name}: missing, and {MANIFEST} lists it; {_AGAIN}")
            size = self._sizes[name]
            if size not in (None, entry.size):
                raise BundleError(
                    f"{self._id}: {name}: expected {entry.size:,} bytes, found {size:,}; {_AGAIN}"
                )
        return manifest

    def fetch_listed(self, files: Mapping[str, FileEntry]) -> Path:
        """The cache's folder, with these files and the manifest; what is damaged there is fetched once more.

        Raises:
            BundleError: if one is damaged on the hub.
        """
        folder = self._fetch([MANIFEST, CARD, *files])
        damaged = _damaged(folder, files)
        if damaged:
            folder = self._fetch(damaged, force=True)
            for name in _damaged(folder, damaged):
                found = FileEntry.of(folder / name).sha256 if (folder / name).is_file() else "none"
                raise BundleError(
                    f"{self._id}: {name}: expected SHA-256 {files[name].sha256}, found {found}, twice; {_AGAIN}"
                )
        return folder

    def _fetch(self, names: Iterable[str], *, force: bool = False) -> Path:
        return Path(
            asked(
                self._id,
                lambda: self._hub.snapshot_download(
                    self._id,
                    revision=self._commit,
                    allow_patterns=sorted(names),
                    repo_type="model",
                    force_download=force,
                ),
            )
        )


def _damaged(folder: Path, files: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Those that are not there as the manifest says."""
    return {
        name: entry
        for name, entry in files.items()
        if not (folder / name).is_file() or FileEntry.of(folder / name) != entry
    }


def _part(
    repo_id: str,
    snapshot: Path,
    manifest: Manifest,
    precisions: Sequence[str] | None,
    tasks: Sequence[str] | None,
) -> Part:
    """What to fetch of a bundle of which the graphs are there."""
    with TemporaryDirectory(prefix="embedge-pull-") as folder:
        try:
            outline = _outlined(Path(folder), snapshot, manifest)
        except OSError as error:
            raise EmbedgeError(
                f"{repo_id}: its graphs cannot be looked at in {folder}: {system_reason(error)}; set TMPDIR to a "
                "folder with more space"
            ) from error
        return chosen_part(outline, precisions, tasks)


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


def _check_licences(manifest: Manifest, *, public: bool, accepted: bool) -> None:
    """Refuses to redistribute, unless that was accepted, what allows no commercial use.

    To everybody likewise what is not known to allow that.
    """
    bound = [
        f"{of}: {licence_name(licence)}"
        for of, licence in licences_of(manifest).items()
        if is_non_commercial(licence) or (public and not is_permissive(licence))
    ]
    if bound and not accepted:
        raise EmbedgeValueError(
            f"licence of {'; of '.join(bound)}: expected that you may pass it on; if you have read the terms and may, "
            "pass accept_licence=True, and leave the licence in the card",
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
