"""``python -m embedge.export`` is ``embedge export``."""

from __future__ import annotations

import sys

from embedge.runtime.cli.main import main

sys.exit(main(["export", *sys.argv[1:]]))
