"""Which ONNX Runtime is taken, refused or warned of: each in a Python with packages of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from embedge.runtime.bundle.contract import ONNXRUNTIME

REAL = Path(onnxruntime.__file__).parent
# Of a version that must not be used: whatever touches it ends the process.
FAKE = """
import os
__version__ = {version!r}
class SessionOptions:
    def __init__(self): os._exit(99)
InferenceSession = OrtValue = SessionOptions
"""
EMBED = """
import sys, warnings
import embedge.runtime as e
assert "onnxruntime" not in sys.modules
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        for _ in range(2):
            vector = e.Embedder(sys.argv[1]).encode("w1")
        print("embedded", vector.shape)
    except e.EmbedgeImportError as error:
        print("refused", error)
print(*(f"warned {w.category.__name__} {w.message}" for w in said), sep="\\n")
"""

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Puts distributions and one package, real, fake or missing, into a folder of the import path."""

    def install(*distributions: str, version: str | None = None, files: bool = True) -> Path:
        site = tmp_path / "site"
        site.mkdir()
        if files and version is None:
            (site / "onnxruntime").symlink_to(REAL)
        elif files:
            (site / "onnxruntime").mkdir()
            (site / "onnxruntime" / "__init__.py").write_text(FAKE.format(version=version))
        for name in distributions:
            info = site / f"{name.replace('-', '_')}-{version or onnxruntime.__version__}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            package = "onnxruntime_extensions" if "extensions" in name else "onnxruntime"
            (info / "RECORD").write_text(f"{package}/__init__.py,,\n")
        return site

    return install


def python(site: Path, *arguments: str, real: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs Python with the folder before this one's import path, which may do without the real one."""
    paths = [str(site), *(path for path in sys.path if path)]
    code = (
        ""
        if real
        else f"import sys; sys.path = [p for p in sys.path if p != {str(REAL.parent)!r}]\n"
    )
    if not real:  # what else is needed lies beside it
        for package in ("numpy", "tokenizers", "tqdm", "embedge"):
            found = Path(__import__(package).__file__ or "").parent
            if found.parent == REAL.parent and not (site / package).exists():
                (site / package).symlink_to(found)
        libraries = REAL.parent / "numpy.libs"
        if libraries.is_dir() and not (site / libraries.name).exists():
            (site / libraries.name).symlink_to(libraries)
    return subprocess.run(
        [sys.executable, "-c", code + arguments[0], *arguments[1:]],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def embed(site: Path, bundle: Any, **how: Any) -> list[str]:
    done = python(site, EMBED, str(bundle.path), **how)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.23.2", "1.24.4", "1.25.0", "1.29.1+cu12", "0.9.0.dev1"])
def test_an_early_version_is_refused_before_it_is_used(
    install: Install, bundle: Any, version: str
) -> None:
    (line,) = embed(install("onnxruntime", version=version), bundle)
    assert line.startswith(f"refused ONNX Runtime {version} (onnxruntime, in ")
    assert f"embedge needs {ONNXRUNTIME}" in line
    assert line.endswith(f'run `pip install "onnxruntime{ONNXRUNTIME}"`')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("installed", "command"),
    [
        (("onnxruntime-gpu",), f'`pip install "onnxruntime-gpu{ONNXRUNTIME}"`'),
        (
            ("onnxruntime-openvino",),
            f'`pip uninstall -y onnxruntime-openvino` and then `pip install "onnxruntime{ONNXRUNTIME}"`',
        ),
        (
            ("onnxruntime", "onnxruntime-gpu"),
            "`pip uninstall -y onnxruntime onnxruntime-gpu` and then "
            f'`pip install "onnxruntime-gpu{ONNXRUNTIME}"`',
        ),
        ((), f'`pip install "onnxruntime{ONNXRUNTIME}"`'),
    ],
    ids=str,
)
def test_the_command_is_for_what_is_installed(
    install: Install, bundle: Any, installed: tuple[str, ...], command: str
) -> None:
    (line,) = embed(install(*installed, version="1.24.4"), bundle)
    assert line.endswith(f"run {command}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "installed",
    [
        ("onnxruntime",),
        ("onnxruntime-gpu",),
        ("onnxruntime-openvino",),
        ("onnxruntime-directml",),
        (),  # built from source
        ("onnxruntime", "onnxruntime-extensions"),
    ],
    ids=str,
)
def test_any_distribution_of_it_will_do(
    install: Install, bundle: Any, installed: tuple[str, ...]
) -> None:
    assert embed(install(*installed), bundle) == ["embedded (8,)"]


@pytest.mark.slow
def test_two_distributions_warn_once_and_say_whose_files_are_there(
    install: Install, bundle: Any
) -> None:
    embedded, warned = embed(install("onnxruntime", "onnxruntime-gpu"), bundle)
    assert embedded == "embedded (8,)"
    assert warned.startswith(
        "warned EmbedgeWarning onnxruntime and onnxruntime-gpu are both installed"
    )
    assert f"those of onnxruntime {onnxruntime.__version__} are in place" in warned
    uninstall = "`pip uninstall -y onnxruntime onnxruntime-gpu` and then "
    for name in ("onnxruntime-gpu", "onnxruntime"):
        assert f'{uninstall}`pip install "{name}{ONNXRUNTIME}"`' in warned


@pytest.mark.slow
def test_a_later_version_than_was_tested_warns(install: Install, bundle: Any) -> None:
    site = install("onnxruntime", files=False)
    (site / "onnxruntime").mkdir()
    (site / "onnxruntime" / "__init__.py").write_text(
        f"__path__ = [{str(REAL)!r}]\n"
        f"exec({(REAL / '__init__.py').read_text('utf-8')!r})\n"
        "__version__ = '1.34.0'\n"
    )
    embedded, warned = embed(site, bundle)
    assert embedded == "embedded (8,)"
    assert "ONNX Runtime 1.34.0 is later than embedge was tested with" in warned
    assert f'`pip install "onnxruntime{ONNXRUNTIME}"`' in warned


@pytest.mark.slow
def test_without_it_the_version_is_printed_and_a_bundle_says_what_to_install(
    install: Install, bundle: Any
) -> None:
    site = install(files=False)
    done = python(
        site, "from embedge.runtime.cli.main import main; main(['--version'])", real=False
    )
    assert re.fullmatch(r"embedge \S+\n", done.stdout), done.stderr
    script = "from embedge.runtime.cli.main import main; sys.exit(main(['inspect', sys.argv[1]]))"
    done = python(site, script, str(bundle.path), real=False)
    assert done.returncode == 1
    assert done.stderr == (
        f'embedge: error: ONNX Runtime is not installed; run `pip install "onnxruntime{ONNXRUNTIME}"`, '
        f'or `pip install "onnxruntime-gpu{ONNXRUNTIME}"` for CUDA\n'
    )


@pytest.mark.slow
def test_files_that_another_distribution_took_along_are_installed_again(
    install: Install, bundle: Any
) -> None:
    (line,) = embed(install("onnxruntime-gpu", files=False), bundle, real=False)
    assert "files are missing though onnxruntime-gpu is installed" in line
    assert f'`pip install --force-reinstall --no-deps "onnxruntime-gpu{ONNXRUNTIME}"`' in line


def test_the_required_versions_are_those_that_are_installed_with_embedge() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    asked = re.findall(r'"onnxruntime(?:-gpu)?([<>=][^"]*)"', text)
    assert asked
    assert set(asked) == {ONNXRUNTIME}
