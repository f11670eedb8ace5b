"""Sessions with and without embedge's kernels, and with each instruction set that the processor can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from embedge.runtime.kernels import library as library_module
from embedge.runtime.kernels.library import kernel_instructions, kernel_library
from embedge.runtime.kernels.register import INSTRUCTION_SETS, choose, register

Test = TypeVar("Test", bound=Callable[..., Any])

LIBRARY = kernel_library()
NO_KERNEL = "no embedge kernel on this processor or installation"
needs_kernel = pytest.mark.skipif(LIBRARY is None, reason=NO_KERNEL)


def instruction_sets() -> list[str]:
    """Those that the processor can run, the one in use first."""
    if LIBRARY is None:
        return []
    used = kernel_instructions()
    assert used is not None
    found = [used, *(name for name in INSTRUCTION_SETS if name != used and choose(LIBRARY, name))]
    choose(LIBRARY, used)
    return found


SETS = instruction_sets()


def with_each_instruction_set(test: Test) -> Test:
    """A test that runs with each instruction set of the kernels that the processor has.

    It has no parameter for it: sessions that it opens with embedge's kernels use the set.
    """
    parameters = [pytest.param(name, id=name) for name in SETS] or [
        pytest.param("", marks=pytest.mark.skip(reason=NO_KERNEL))
    ]
    run: Test = pytest.mark.usefixtures("instruction_set")(
        pytest.mark.parametrize("instruction_set", parameters, indirect=True)(test)
    )
    return run


@contextmanager
def using(name: str) -> Iterator[None]:
    """Sessions that are opened inside with embedge's kernels use an instruction set."""
    assert LIBRARY is not None
    before = kernel_instructions()
    assert choose(LIBRARY, name) == name
    try:
        yield
    finally:
        choose(LIBRARY, before)


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
