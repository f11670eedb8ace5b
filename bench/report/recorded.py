"""Reads reports back: a file that the bench wrote, or what ``--record`` left in a bundle.

BUNDLE/report.json   the last recorded report, beside the files that the manifest lists
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedge.bench.errors import BenchError
from embedge.bench.report.report import Report
from embedge.runtime.bundle.contract import MANIFEST, REPORT
from embedge.runtime.bundle.files import system_reason
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.errors import BundleError

__all__ = ["measured_bundle", "read_reports"]


def read_reports(path: Path) -> list[Report]:
    """Return the reports of a file, one of each bundle that was measured, or the one recorded in a bundle.

    Args:
        path: ``report.json``, a folder that the bench wrote, or a bundle's.

    Raises:
        BenchError: there is none, it is no report, or the bundle has other files than were measured.
        BundleError: the bundle cannot be read.
    """
    if not path.exists():
        raise BenchError(
            f"{path}: does not exist; expected a report.json of `embedge bench`, or a bundle's folder"
        )
    if not path.is_dir():
        return _reports(path)
    if not (path / MANIFEST).exists():
        return _reports(path / REPORT)
    bundle = Bundle(path, verify="none")
    if not (path / REPORT).exists():
        raise BenchError(
            f"{path}: no report was recorded in this bundle; run `embedge bench {path} --reference MODEL --record`, "
            "or name a report.json"
        )
    reports = _reports(path / REPORT)
    if reports[0].settings.get("files_sha256") != bundle.manifest.files_sha256:
        raise BenchError(
            f"{path / REPORT}: is of other files than the bundle has now; run `embedge bench {path} "
            "--reference MODEL --record` again"
        )
    return reports


def measured_bundle(path: Path, report: Report) -> Path | None:
    """Return the folder that a report is of, ``None`` if it lies elsewhere: a report has no paths, as others read it.

    Looked for are the folder that was named, and one of the bundle's name here and beside the report; the hashes of its
    files have to be those of the report.

    Args:
        path: where the report was read, a file or a folder.
        report: read there.
    """
    beside = [folder / report.bundle for folder in (Path(), *path.parents[:2])]
    for folder in (path, *beside):
        if (folder / MANIFEST).is_file() and _has_files(
            folder, report.settings.get("files_sha256")
        ):
            return folder
    return None


def _has_files(folder: Path, digest: str | None) -> bool:
    try:
        return Bundle(folder, verify="none").manifest.files_sha256 == digest
    except BundleError:
        return False


def _reports(file: Path) -> list[Report]:
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(
            f"{file}: cannot be read: {system_reason(error)}; expected the report.json that `embedge bench` writes"
        ) from error
    except ValueError as error:
        raise BenchError(
            f"{file}: expected the report.json that `embedge bench` writes, found no JSON: {error}"
        ) from error
    if isinstance(values, dict) and "report_version" in values:
        parts = values.get("reports", [values])
        if isinstance(parts, list) and parts:
            return [Report.from_dict(part) for part in parts]
    raise BenchError(
        f"{file}: expected the report.json that `embedge bench` writes, found JSON without report_version or reports"
    )
