"""pyarrow, loaded when it is first used, and the words for what it cannot read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from embedge.runtime.errors import EmbedgeError, EmbedgeImportError
from embedge.runtime.host.install_advice import install_command

__all__ = ["load_pyarrow", "named_errors"]


def load_pyarrow() -> ModuleType:
    """The package pyarrow, with ``pyarrow.parquet`` in it.

    Raises:
        EmbedgeImportError: it cannot be imported; the message says how to install it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EmbedgeImportError(
            f"Parquet needs pyarrow, which cannot be imported ({error}); run "
            f"`{install_command('parquet', ['pyarrow'])}`"
        ) from error
    package: ModuleType = pyarrow
    return package


@contextmanager
def named_errors(name: str, advice: str) -> Iterator[None]:
    """Errors of pyarrow inside the block become one that names the file.

    Args:
        name: of the file, as the caller gave it.
        advice: the next step.

    Raises:
        EmbedgeError: for an error of pyarrow or of the system.
    """
    arrow = load_pyarrow()
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise EmbedgeError(f"{name}: {reason.rstrip('.')}; {advice}") from error
