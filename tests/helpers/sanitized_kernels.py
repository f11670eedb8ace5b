"""Kernels that were compiled with sanitizers, in the place of the installed ones: a plugin of pytest's.

``make sanitize`` loads it. Run as a program it says whose kernels the tests will run, and fails where there
are none to look at.
"""

from __future__ import annotations

import os
import sys

import embedge.runtime.kernels
from embedge.runtime.kernels.library import describe_kernels, kernel_library

FOLDER = os.environ["EMBEDGE_SANITIZED"]
embedge.runtime.kernels.__path__.insert(0, FOLDER)

if __name__ == "__main__":
    found = kernel_library()
    if found is None or not found.startswith(FOLDER):
        sys.exit(
            f"make sanitize: there are no kernels to test on this processor: {describe_kernels()}"
        )
    print(f"sanitized: {found}")
