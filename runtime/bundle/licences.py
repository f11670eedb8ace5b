"""What is said of licences: that of a model, and those of its adapters.

A licence is told by its identifier on the hub, such as "apache-2.0". Creative Commons' are written as they are called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["described_licences", "is_non_commercial", "is_permissive", "licence_name"]

_CREATIVE_COMMONS = re.compile(r"cc-(by(?:-\w+)*)-(\d\.\d)")
_NOT_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial", re.IGNORECASE)
# The hub's identifiers of those that let everybody pass the work on for a notice at most.
# Source: https://huggingface.co/docs/hub/repositories-licenses
_PERMISSIVE = frozenset(
    {
        "afl-3.0",
        "apache-2.0",
        "artistic-2.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "bsl-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc0-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "ecl-2.0",
        "isc",
        "mit",
        "ms-pl",
        "ncsa",
        "odc-by",
        "pddl",
        "postgresql",
        "unlicense",
        "wtfpl",
        "zlib",
    }
)


def licence_name(licence: str | None) -> str:
    """A licence for people: "CC BY-NC 4.0 (no commercial use)", "apache-2.0", "not stated"."""
    if licence is None:
        return "not stated"
    found = _CREATIVE_COMMONS.fullmatch(licence)
    name = f"CC {found[1].upper()} {found[2]}" if found else licence
    return f"{name} (no commercial use)" if is_non_commercial(licence) else name


def is_non_commercial(licence: str | None) -> bool:
    """Whether a licence's name says that it allows no commercial use."""
    return licence is not None and _NOT_COMMERCIAL.search(licence) is not None


def is_permissive(licence: str | None) -> bool:
    """Whether every licence of those named, with commas between, is known to let everybody pass the work on."""
    names = [name.strip().lower() for name in (licence or "").split(",")]
    return all(name in _PERMISSIVE for name in names)


def described_licences(model: str | None, adapters: Mapping[str, str | None]) -> str:
    """Licences in a line: "apache-2.0; adapter code: mit; adapters chat, web: not stated".

    Args:
        model: that of the model.
        adapters: those of the adapters to tell of, by task.
    """
    tasks: dict[str, list[str]] = {}
    for task, licence in adapters.items():
        tasks.setdefault(licence_name(licence), []).append(task)
    own = (
        f"adapter{'s' if len(of_name) > 1 else ''} {', '.join(of_name)}: {name}"
        for name, of_name in tasks.items()
    )
    return "; ".join([licence_name(model), *own])
