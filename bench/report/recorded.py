"""Reads reports back: a file that the bench wrote, or what ``--record`` left in a bundle.

BUNDLE/report.json   the last recorded report, beside the files that the manifest lists
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from embedge.bench.errors import BenchError
from embedge.bench.report.report import Report
from embedge.runtime.bundle.contract import MANIFEST
from embedge.runtime.bundle.files import system_reason
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.manifest import Manifest

__all__ = ["RECORDED", "files_digest", "read_reports"]

RECORDED = "report.json"


def files_digest(manifest: Manifest) -> str:
    """Return the SHA-256 of the names and hashes of a bundle's files; the figures recorded in it leave it alone."""
    listed = sorted((name, entry.sha256) for name, entry in manifest.files.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


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
        return _reports(path / RECORDED)
    bundle = Bundle(path, verify="none")
    if not (path / RECORDED).exists():
        raise BenchError(
            f"{path}: no report was recorded in this bundle; run `embedge bench {path} --reference MODEL --record`, "
            "or name a report.json"
        )
    reports = _reports(path / RECORDED)
    if reports[0].settings.get("files_sha256") != files_digest(bundle.manifest):
        raise BenchError(
            f"{path / RECORDED}: is of other files than the bundle has now; run `embedge bench {path} "
            "--reference MODEL --record` again"
        )
    return reports


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
