"""Sessions with and without embedge's kernel for 8-bit matmuls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from embedge.runtime.kernels import library as library_module
from embedge.runtime.kernels.library import kernel_library
from embedge.runtime.kernels.register import register

LIBRARY = kernel_library()
needs_kernel = pytest.mark.skipif(
    LIBRARY is None, reason="no embedge kernel on this processor or installation"
)


@contextmanager
def asked_anew() -> Iterator[pytest.MonkeyPatch]:
    """What is patched inside decides whether there is a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        library_module._find.cache_clear()
        try:
            yield patch
        finally:
            library_module._find.cache_clear()


@contextmanager
def without_kernel() -> Iterator[None]:
    """Sessions that are opened inside multiply with ONNX Runtime's kernel."""
    with asked_anew() as patch:
        patch.setenv("EMBEDGE_KERNELS", "onnxruntime")
        yield


@contextmanager
def layouts_seen() -> Iterator[list[bool]]:
    """For each session opened inside with the kernel, whether its weights lie in panels."""
    kernel_library()  # its check opens sessions too
    seen: list[bool] = []

    def note(options: object, library: str, *, panels: bool) -> None:
        seen.append(panels)
        register(options, library, panels=panels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedge.runtime.kernels.library.register", note)
        yield seen
