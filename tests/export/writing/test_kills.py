"""A process killed at any moment leaves a bundle or none, and nothing that the next run does not clear up.

``python -m tests.fuzz.kills`` kills at more moments.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_kills_leave_a_bundle_or_none_and_nothing_stray(source: Path) -> None:
    """Three moments of each job: an export, two ways of overwriting, an addition, ``prepare``."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.kills", "--quick", "--source", str(source)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "15 kills, 0 faults\n"
