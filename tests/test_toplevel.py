"""``embedge`` itself: its names, what importing it loads, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import embedge.export
import embedge.runtime

PATH = [path for path in sys.path if path]


def python(
    package_path: Path, *arguments: str, path: list[str] = PATH
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package_path), *path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def printed(package_path: Path, code: str) -> str:
    done = python(package_path, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_public_name_of_the_parts_is_there_and_the_same(package_path: Path) -> None:
    code = """
import embedge, embedge.export, embedge.runtime, json
for part in (embedge.runtime, embedge.export):
    for name in part.__all__:
        assert getattr(embedge, name) == getattr(part, name), name
assert dir(embedge) == sorted(embedge.__all__)
print(json.dumps(sorted(embedge.__all__)))
"""
    names = {*embedge.runtime.__all__, *embedge.export.__all__}
    assert json.loads(printed(package_path, code)) == sorted(names)


@pytest.mark.slow
def test_importing_it_loads_nothing_and_an_embedder_no_exporter(package_path: Path) -> None:
    code = """
import sys
before = {*sys.modules}
import embedge
embedge.__version__
assert not {m for m in {*sys.modules} - before if m.startswith("embedge.")}
assert "numpy" not in {*sys.modules} - before
from embedge import Embedder, EmbedgeError
assert "embedge.export" not in sys.modules
assert embedge.export.export_bundle is embedge.export_bundle
"""
    printed(package_path, code)


def test_an_unknown_name_is_an_attribute_error(package_path: Path) -> None:
    code = """
import embedge
assert not hasattr(embedge, "Embeder")
try:
    from embedge import Embeder
except ImportError as error:
    print(error)
"""
    assert "cannot import name 'Embeder' from 'embedge'" in printed(package_path, code)


@pytest.mark.slow
def test_export_bundle_without_its_packages_says_what_to_install(package_path: Path) -> None:
    code = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "scipy" else real(name, *rest)
from embedge import Embedder, EmbedgeImportError
try:
    from embedge import export_bundle
except EmbedgeImportError as error:
    print(error)
"""
    assert "embedge.export needs scipy" in printed(package_path, code)


WITHOUT_NUMPY = """
import sys
class Missing:
    def find_spec(self, name, *rest):
        if name == "numpy":
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")
sys.meta_path.insert(0, Missing())
sys.argv = ["embedge", *sys.argv[1:]]
from embedge.__main__ import main
sys.exit(main())
"""


@pytest.mark.slow
def test_without_numpy_the_command_knows_its_version_and_says_what_is_missing(
    package_path: Path,
) -> None:
    done = python(package_path, "-c", WITHOUT_NUMPY, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"embedge {embedge.runtime.__version__}\n"
    done = python(package_path, "-c", WITHOUT_NUMPY, "inspect", "bundle")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line == (
        "embedge: error: No module named 'numpy'; install embedge again, with what it depends on"
    )


@pytest.mark.slow
def test_it_is_a_program(package_path: Path) -> None:
    assert python(package_path, "-m", "embedge", "--help").stdout.startswith("usage: embedge [-h]")
    done = python(package_path, "-m", "embedge", "--version")
    assert done.stdout == f"embedge {embedge.runtime.__version__}\n"


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="no signals")
def test_an_interrupt_of_the_imports_is_a_message(package_path: Path) -> None:
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Interrupt:
    def find_spec(self, name, *rest):
        if name == "embedge.runtime":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from embedge.__main__ import main
sys.exit(main())
"""
    done = python(package_path, "-c", code)
    assert done.returncode == 130
    assert done.stderr == "embedge: error: interrupted\n"


NAMES = """
import embedge
from embedge import Embedder, EmbedgeError, export_bundle

reveal_type(embedge.__version__)
reveal_type(Embedder("bundle").dim)
export_bundle("model", outt="bundle")
embedge.nothing
"""
OPTIONS = """
from embedge import Embedder
model = Embedder("bundle", task="code", truncate_dim=4)
model.encode_query("a", truncat_dim=2)
model.encode_document("a", truncate_dim="2")
model.encode("a", truncat_dim=2)
reveal_type(model.encode("a"))
reveal_type(model.encode_query(["a"], truncate_dim=2))
reveal_type(model.encode_document(["a"], task="code"))
reveal_type(model.encode_image(["a.png"]))
reveal_type(model.count_tokens("a"))
reveal_type(model.count_tokens(["a"]))
"""


@pytest.fixture(scope="module")
def said(package_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What mypy says of each script, line numbers first."""
    pytest.importorskip("mypy")
    place = tmp_path_factory.mktemp("scripts")
    scripts = {"names": NAMES, "options": OPTIONS}
    for name, script in scripts.items():
        (place / f"{name}.py").write_text(script)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent"),
            *("--cache-dir", str(place / "cache"), "--ignore-missing-imports"),
            *(f"{name}.py" for name in scripts),
        ],
        cwd=place,
        env={**os.environ, "MYPYPATH": str(package_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.partition(".py:") for line in done.stdout.splitlines()]
    return {name: [rest for of, _, rest in lines if of == name] for name in scripts}


@pytest.mark.slow
def test_type_checkers_know_the_names(said: dict[str, list[str]]) -> None:
    text = "\n".join(said["names"])
    assert '5: note: Revealed type is "str"' in text
    assert '6: note: Revealed type is "int"' in text
    assert 'Unexpected keyword argument "outt" for "export_bundle"' in text
    assert 'Module has no attribute "nothing"' in text


@pytest.mark.slow
def test_type_checkers_find_misspelt_options(said: dict[str, list[str]]) -> None:
    errors = [line for line in said["options"] if "error:" in line]
    assert {line.split(":")[0] for line in errors} == {"4", "5", "6"}, said["options"]
    notes = [line.rpartition("type is ")[2] for line in said["options"] if "Revealed" in line]
    assert notes.pop(4) == '"int"'
    assert len(notes) == 5
    assert all("ndarray" in note and "list" not in note for note in notes)
