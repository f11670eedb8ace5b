"""The npm package agrees with the Python package, and its lock file names no registry."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

from embedge.runtime.bundle.contract import FORMAT_VERSION, ONNXRUNTIME
from embedge.runtime.host.saturation import probe_model

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "runtime" / "javascript"


def read(name: str) -> str:
    return (PACKAGE / name).read_text("utf-8")


def test_versions_are_pythons() -> None:
    package: dict[str, Any] = json.loads(read("package.json"))
    [version] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert package["version"] == json.loads(read("package-lock.json"))["version"] == version
    least, beyond = re.findall(r"1\.\d+", ONNXRUNTIME)
    expected = {f">={least}.0 <{beyond}.0"}
    assert set(package["peerDependencies"].values()) == expected
    sessions = read("src/sessions.js")
    assert f"const LEAST = {least.removeprefix('1.')};" in sessions
    assert f"const BEYOND = {beyond.removeprefix('1.')};" in sessions
    assert f'FORMAT_VERSION = "{FORMAT_VERSION}";' in read("src/manifest.js")


def test_the_probe_is_pythons() -> None:
    [first, second] = re.findall(r'^  "([A-Za-z0-9+/=]{20,})"', read("src/saturation.js"), re.M)
    assert zlib.decompress(base64.b64decode(first + second)) == probe_model()


def test_the_lock_file_names_no_registry() -> None:
    packages: dict[str, Any] = json.loads(read("package-lock.json"))["packages"]
    assert len(packages) > 10
    assert not [name for name, entry in packages.items() if "resolved" in entry]
    assert all("integrity" in entry for name, entry in packages.items() if name)


def test_the_licence_is_the_repositorys() -> None:
    assert (PACKAGE / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
