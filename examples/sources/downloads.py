"""Packages fetched with their registries' own clients and unpacked without being installed."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path


def _run(command: list[str], folder: Path, what: str) -> str:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(
            f"{what}: expected `{' '.join(command)}` to succeed, it ended with {run.returncode}: "
            f"{run.stderr.strip()[-300:]}; check that this machine reaches the registry"
        )
    return run.stdout.strip()


def debian_package(name: str, folder: Path) -> Path:
    """Return a folder with the files of a Debian package, downloaded on the first call.

    Args:
        name: Binary package name.
        folder: Where packages are kept; ``<folder>/<name>`` is the result.
    """
    unpacked = folder.resolve() / name
    if not unpacked.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "download", name], folder, name)
        archive = sorted(folder.resolve().glob(f"{name}_*.deb"))[-1]
        _run(["dpkg-deb", "-x", str(archive), str(unpacked)], folder, name)
    return unpacked


def npm_package(spec: str, folder: Path) -> Path:
    """Return a folder with the files of an npm package, downloaded on the first call.

    Args:
        spec: Name and version, e.g. ``"lodash@4.17.21"``.
        folder: Where packages are kept; ``<folder>/<spec>`` is the result.
    """
    unpacked = folder.resolve() / spec.replace("/", "-")
    if not unpacked.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        archive = _run(["npm", "pack", "--silent", spec], folder, spec).splitlines()[-1]
        with tarfile.open(folder / archive) as packed:
            packed.extractall(unpacked, filter="data")
    return unpacked
