"""ONNX Runtime: found and checked once per process; :func:`open_session` is the one call of ``InferenceSession``.

Rules:
    * It is imported when it is first needed, so that `embedge --version` and ``import embedge.runtime``
      do without it.
    * What counts is the package that Python imports, whatever distribution it came with
      (``onnxruntime``, ``onnxruntime-gpu``, ``onnxruntime-openvino``, one built from source).
    * Versions below ``ONNXRUNTIME`` (:mod:`embedge.runtime.bundle.contract`) are refused: 1.23 refuses
      operator set 24, 1.24 gives wrong vectors, 1.25 to 1.29 end the process where exact integer matmuls
      are asked for. Later ones than were tested warn.
    * No child is forked while a session opens, see :mod:`embedge.runtime.host.fork`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedge.runtime.bundle.contract import ONNXRUNTIME
from embedge.runtime.errors import EmbedgeError, EmbedgeImportError, warn
from embedge.runtime.host.fork import no_fork

__all__ = ["command_for_cuda", "load_onnxruntime", "open_session"]

_LOWEST, _UNTESTED = (
    tuple(map(int, version.split("."))) for version in re.findall(r"[\d.]+", ONNXRUNTIME)
)
_NAME, _GPU = "onnxruntime", "onnxruntime-gpu"
_DISTRIBUTION = re.compile(r"(onnxruntime(?:_\w+)?)-[^-]+\.(?:dist|egg)-info", re.IGNORECASE)


def load_onnxruntime() -> Any:
    """The module ``onnxruntime``, of a version that is known to be right.

    Raises:
        EmbedgeImportError: if it is missing, damaged or too old, with the command that mends it.
    """
    with no_fork():
        return _load()


def open_session(model: str | bytes, options: Any, providers: Sequence[Any]) -> Any:
    """An ``InferenceSession``.

    Args:
        model: the file's path, or the model itself.
        options: ``SessionOptions``.
        providers: as ONNX Runtime takes them.

    Raises:
        EmbedgeError: for a path that is no UTF-8.
        Exception: ONNX Runtime's own errors, which have no common base.
    """
    if isinstance(model, str) and not _is_utf8(model):
        raise EmbedgeError(
            f"{model!r}: ONNX Runtime opens paths in UTF-8 alone; rename the folder, or copy the bundle"
        )
    with no_fork():
        return _load().InferenceSession(model, options, providers=list(providers))


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # of bytes that are not
        return False
    return True


def command_for_cuda() -> str:
    """The command, or commands, after which ONNX Runtime with CUDA is installed in place of what there is."""
    return _replace(_distributions(Path(load_onnxruntime().__file__).parent) or [_NAME], _GPU)


@functools.cache
def _load() -> Any:
    spec = importlib.util.find_spec(_NAME)
    if spec is None or spec.origin is None:
        raise EmbedgeImportError(_missing())
    found = _distributions(Path(spec.origin).parent)
    try:
        module: Any = importlib.import_module(_NAME)
        version = str(module.__version__)
    except Exception as error:  # of the system's loader, or of another package that it imports
        names = found or [_NAME]
        raise EmbedgeImportError(
            f"ONNX Runtime ({', '.join(names)}, in {Path(spec.origin).parent}) cannot be imported: "
            f"{' '.join(str(error).split())}; run {_replace(names)}"
        ) from error
    _check_version(version, found, Path(spec.origin).parent)
    if len(found) > 1:
        warn(_installed_twice(found, version))
    return module


def _check_version(version: str, distributions: list[str], folder: Path) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return
    here = tuple(map(int, numbers.groups()))
    if here < _LOWEST:
        names = distributions or [_NAME]
        raise EmbedgeImportError(
            f"ONNX Runtime {version} ({', '.join(names)}, in {folder}): embedge needs {ONNXRUNTIME}, earlier "
            f"ones give wrong vectors or end the process; run {_replace(names)}"
        )
    if here >= _UNTESTED:
        warn(
            f"ONNX Runtime {version} is later than embedge was tested with ({ONNXRUNTIME}); if something is "
            f"wrong, run {_replace(distributions or [_NAME])}"
        )


def _distributions(package: Path) -> list[str]:
    """Names of the distributions that were installed where the package lies, for itself.

    Others of that prefix, as ``onnxruntime-extensions``, bring packages of their own.
    """
    names = set()
    for entry in package.parent.glob("*-info"):
        match = _DISTRIBUTION.fullmatch(entry.name)
        if match is not None and (match[1].lower() == _NAME or _brings_package(entry)):
            names.add(match[1].lower().replace("_", "-"))
    return sorted(names)


def _brings_package(entry: Path) -> bool:
    """Whether a distribution lists the package's files."""
    try:
        return _lists_package((entry / "RECORD").read_text("utf-8", "replace"))
    except OSError:
        return False


def _lists_package(record: str) -> bool:
    """By the text of RECORD: ``Distribution.files`` leaves out what is gone, from Python 3.12 on."""
    return any(line.startswith(f"{_NAME}/__init__.py,") for line in record.splitlines())


def _missing() -> str:
    import importlib.metadata  # of use for messages alone, and slow to load

    left = sorted(
        str(one.metadata["Name"]).lower()
        for one in importlib.metadata.distributions()
        if _lists_package(one.read_text("RECORD") or "")
    )
    if left:
        command = _install(left[-1], "--force-reinstall --no-deps ")
        return (
            f"ONNX Runtime's files are missing though {' and '.join(left)} is installed, as they are when "
            f"another distribution of it was uninstalled; run {command}"
        )
    return f"ONNX Runtime is not installed; run {_install(_NAME)}, or {_install(_GPU)} for CUDA"


def _installed_twice(names: list[str], version: str) -> str:
    """Whose files are in place, and how to keep one: what requires the other by name runs with it too."""
    try:
        own = str(importlib.import_module(f"{_NAME}.capi.build_and_package_info").package_name)
    except (ImportError, AttributeError):
        own = "one of them"
    wanted = own if own in names and own != _NAME else next(n for n in names if n != _NAME)
    keep = f"{_replace(names, _GPU)} for CUDA, or " if wanted == _GPU else ""
    return (
        f"{' and '.join(names)} are both installed and overwrite each other's files; those of {own} "
        f"{version} are in place and are used; to keep one, run {keep}{_replace(names, _NAME)} for the "
        "processor: what requires another of them runs with it too"
    )


def _replace(names: list[str], by: str | None = None) -> str:
    """The command, or commands, after which one distribution of a right version is installed."""
    if by is None:
        by = _GPU if _GPU in names else _NAME
    if names == [by]:
        return _install(by)
    return f"`pip uninstall -y {' '.join(names)}` and then {_install(by)}"


def _install(name: str, options: str = "") -> str:
    return f'`pip install {options}"{name}{ONNXRUNTIME}"`'
