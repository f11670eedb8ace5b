"""The bundle that is at an export's place: what is in the way, and whether it can be added to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from embedge.export.writing.files import relative_files
from embedge.runtime.bundle.contract import CARD, MANIFEST, PREPARED, REPORT, VISION
from embedge.runtime.bundle.files import sha256_of
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import read_json_object
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.errors import BundleError, EmbedgeValueError

LOCK = ".export.lock"  # inside a bundle whose parent cannot be written
# Of embedge, in no manifest: what `prepare` made, and what a killed process was about to rename.
_OWN = (f"{PREPARED}/", LOCK, f".{MANIFEST}.", f".{CARD}.", f".{REPORT}.")


def is_bundle(out: Path) -> bool:
    """Whether a bundle, or something with a manifest like one, is at ``out``."""
    return (out / MANIFEST).is_file()


def read_existing(out: Path, overwrite: bool) -> Manifest | None:
    """The manifest of the bundle at ``out``; ``None`` where there is nothing, or it is replaced.

    Raises:
        EmbedgeValueError: something else is at ``out``.
    """
    if not out.exists() and not out.is_symlink():
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not is_bundle(out):
        raise EmbedgeValueError(
            f"{out}: expected no such path, an empty folder or a bundle, found something else; "
            "it is left alone, also with --overwrite: choose another --out"
        )
    content = _manifest_content(out)
    if not overwrite:
        return Manifest.from_dict(content, str(out / MANIFEST))
    listed = {*content["files"], MANIFEST, CARD}
    strangers = [n for n in relative_files(out) - listed if not _is_own(out, n)]
    if strangers:
        raise EmbedgeValueError(
            f"{out}: expected a bundle's files alone, found {', '.join(sorted(strangers)[:5])} "
            "beside them, which --overwrite would delete; move them away or choose another --out"
        )
    return None


def check_kept(out: Path, precisions: Iterable[str]) -> None:
    """Check the files of a bundle that an addition keeps, and the content of those that it builds on.

    Args:
        out: the bundle.
        precisions: those that get further tasks.

    Raises:
        BundleError: a file is missing or damaged, or a graph reads past what is listed.
    """
    bundle = Bundle(out, verify="size")
    listed = bundle.manifest.files
    grows = {p: s for p, s in bundle.manifest.precisions.items() if p in set(precisions)}
    folders = {path.rpartition("/")[0] for s in grows.values() for path in s.graphs.values()}
    for name in listed:
        if name.rpartition("/")[0] not in folders:
            continue
        found = sha256_of(out / name)[0]
        if found != listed[name].sha256:
            raise BundleError(
                f"{out / name}: expected SHA-256 {listed[name].sha256}, found {found}: the file is damaged, "
                "and new tasks would share it; copy the bundle again, or export it anew with --overwrite"
            )
    for precision, settings in grows.items():
        for name in (*settings.graphs, *([VISION] if settings.vision else [])):
            bundle.graph_bytes(precision, name)


def _is_own(out: Path, name: str) -> bool:
    """Whether embedge wrote a file of a bundle that its manifest does not list."""
    if name != REPORT:
        return name.startswith(_OWN)
    try:
        return "report_version" in read_json_object(out / name)
    except BundleError:
        return False


def _manifest_content(out: Path) -> dict[str, Any]:
    """The JSON of a bundle's manifest.

    Raises:
        EmbedgeValueError: it is damaged, or of something else than a bundle.
    """
    content: dict[str, Any] = {}
    found = "JSON without them"
    try:
        content = read_json_object(out / MANIFEST)
    except BundleError as error:
        found = str(error)
    if not isinstance(content.get("files"), dict):
        raise EmbedgeValueError(
            f"{out / MANIFEST}: expected a bundle's manifest with format_version and files, found "
            f"{found}; it is left alone, also with --overwrite: choose another --out"
        )
    return content
