"""What the package lists is what it has."""

from __future__ import annotations

import subprocess
import sys

import pytest

import embedge.bench


def test_every_listed_name_exists() -> None:
    for name in embedge.bench.__all__:
        assert getattr(embedge.bench, name) is not None
    assert dir(embedge.bench) == sorted(embedge.bench.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = embedge.bench.nothing


@pytest.mark.slow
def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, embedge.runtime.cli.bench; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_missing_package_is_named_with_the_command_that_brings_it() -> None:
    code = (
        "import importlib.metadata as m, importlib.util as u; real, version = u.find_spec, m.version\n"
        "u.find_spec = lambda name, *rest: None if name == 'peft' else real(name, *rest)\n"
        "m.version = lambda name: version('no-peft' if name == 'peft' else name)\n"
        "import embedge.bench"
    )

    found = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )

    assert found.stderr.splitlines()[-1].endswith(
        'embedge.bench needs peft, which is not installed; run: pip install "peft>=0.17,<0.22"'
    )
