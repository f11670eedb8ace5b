"""What is advised to install is packages by name, with the versions that embedge's metadata asks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from embedge.runtime.host import install_advice
from embedge.runtime.host.install_advice import install_command

ROOT = Path(__file__).resolve().parents[3]
METADATA = [
    "numpy<3,>=1.26",
    'onnxruntime<1.34,>=1.30; extra == "cpu"',
    'pillow<14,>=10.3; extra == "images"',
    "scipy>=1.11 ; python_version >= '3.11' and extra == 'export'",
    'embedge[cpu,export]; extra == "bench"',
    'torch; extra == "bench"',
]


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: METADATA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_the_packages_of_an_extra_with_their_versions() -> None:
    assert install_command("images") == 'pip install "pillow>=10.3,<14"'


def test_an_extra_that_holds_others() -> None:
    expected = 'pip install "onnxruntime>=1.30,<1.34" "scipy>=1.11" torch'
    assert install_command("bench") == expected


def test_only_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "scipy" else None
    )
    assert install_command("bench") == 'pip install "onnxruntime>=1.30,<1.34" torch'
    assert install_command("export") == 'pip install "scipy>=1.11"'  # there, but of no use
    assert install_command("bench", ["scipy", "other"]) == 'pip install "scipy>=1.11" other'


def test_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert install_command("images").startswith('pip install -e ".[images]"')
    assert install_command("images", ["pillow"]) == "pip install pillow"


@pytest.mark.parametrize("extra", ["cpu", "images", "export", "bench", "mteb", "peers"])
def test_each_extra_of_the_real_metadata(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    bounds = install_advice._bounds(extra)
    assert bounds
    monkeypatch.setattr(install_advice, "_is_installed", lambda name: False)
    words = install_command(extra).removeprefix("pip install ").split()
    for word in words:
        Requirement(word.strip('"'))


def test_no_message_advises_to_install_embedge_from_an_index() -> None:
    sources = [
        f for part in ("bench", "export", "quant", "runtime") for f in (ROOT / part).rglob("*.py")
    ]
    assert len(sources) > 100
    for file in sources:
        assert not re.search(r"pip install \\?[\"']?embedge", file.read_text("utf-8")), file
