"""Results as torch's tensors, for programs that have torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from embedge.runtime.arguments import check_flag
from embedge.runtime.encode.vectors import Results
from embedge.runtime.errors import EmbedgeImportError, EmbedgeValueError

__all__ = ["converter"]


def converter(*, to_tensor: bool, to_numpy: bool) -> Callable[[Results], Any]:
    """What makes of a call's results what it asks for; a call that cannot be answered fails before it runs.

    Raises:
        EmbedgeValueError: for neither.
        EmbedgeImportError: for tensors without torch.
    """
    check_flag("convert_to_numpy", to_numpy)
    if not check_flag("convert_to_tensor", to_tensor):
        if not to_numpy:
            raise EmbedgeValueError(
                "convert_to_numpy is False; expected True, or convert_to_tensor=True for tensors: list(vectors) gives "
                "a list",
                arguments=["convert_to_numpy", "convert_to_tensor=True"],
            )
        return lambda results: results
    try:
        torch = import_module("torch")
    except ImportError as error:
        raise EmbedgeImportError(
            "convert_to_tensor=True: expected torch, which embedge itself does without, found none; leave it out for "
            "NumPy's arrays, or run: pip install torch"
        ) from error

    def tensors(results: Results) -> Any:
        return (
            list(map(tensors, results)) if isinstance(results, list) else torch.from_numpy(results)
        )

    return tensors
