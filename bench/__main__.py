"""``python -m embedge.bench`` is ``embedge bench``."""

from __future__ import annotations

import sys

from embedge.runtime.cli.main import main

sys.exit(main(["bench", *sys.argv[1:]]))
