"""The extras that commands need, and what to say where a package of one is missing."""

from __future__ import annotations

from embedge.runtime.errors import EmbedgeImportError

__all__ = ["EXTRAS", "missing_package"]

EXTRAS = {
    "export": "export",
    "families": "export",
    "fit-maps": "export",
    "pretrained": "export",
    "pull": "hub",
    "push": "hub",
    "bench": "bench",
    "choose": "bench",
    "serve": "serve",
}


def missing_package(command: str, error: ImportError) -> EmbedgeImportError:
    """What a command says that cannot import something, with the fix."""
    if command not in EXTRAS:
        return EmbedgeImportError(f"{error}; install embedge again, with what it depends on")
    name = (error.name or "").partition(".")[0]
    from embedge.runtime.host.install_advice import install_command

    advice = install_command(EXTRAS[command], [name] if name else [])
    return EmbedgeImportError(
        f"`embedge {command}` needs {error.name or error}, which cannot be imported; run `{advice}`"
    )
