"""``python -m embedge.runtime`` is the ``embedge`` command."""

from __future__ import annotations

import sys

from embedge.runtime._cli import main

sys.exit(main())
