"""What to type where a package is missing.

The packages themselves are named, with the versions that embedge's own metadata asks for: that installs
from anywhere, whether embedge came from a folder, a wheel or an index.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable

__all__ = ["install_command"]

_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[([^\]]*)\])?\s*([^;]*?)\s*(?:;(.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")


def install_command(extra: str, missing: Iterable[str] = ()) -> str:
    """The command that brings the packages of an extra.

    Args:
        extra: of embedge.
        missing: packages to bring; none: those that are not installed, or all if all are.
    """
    bounds = _bounds(extra)
    names = list(missing) or [name for name in bounds if not _is_installed(name)] or list(bounds)
    if not names:  # embedge runs from a folder that was never installed
        return f'pip install -e ".[{extra}]" (in the folder of embedge\'s sources)'
    return "pip install " + " ".join(_quoted(name + bounds.get(name, "")) for name in names)


def _bounds(extra: str) -> dict[str, str]:
    """Versions by package, what other extras bring to this one included."""
    try:
        requirements = importlib.metadata.requires("embedge") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, str] = {}
    for requirement in requirements:
        parts = _REQUIREMENT.fullmatch(requirement)
        if parts is None or extra not in _EXTRA.findall(parts[4] or ""):
            continue
        if parts[1] == "embedge":
            for other in (parts[2] or "").split(","):
                found |= _bounds(other.strip())
        else:
            versions = sorted(re.sub(r"\s", "", parts[3]).split(","), reverse=True)  # >= before <
            found[parts[1]] = ",".join(versions)
    return found


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # or another distribution of the same module
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    return True


def _quoted(requirement: str) -> str:
    return f'"{requirement}"' if re.search(r"[<>\[]", requirement) else requirement
