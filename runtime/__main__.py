"""``python -m embedge.runtime`` is the ``embedge`` command."""

from __future__ import annotations

import sys

from embedge.runtime.cli.main import main

sys.exit(main())
