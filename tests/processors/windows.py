"""Runs a bundle's graphs with the kernels on Windows: ``python -m tests.processors.windows BUNDLE``.

mingw-w64 compiles the kernels, and Wine runs them in ONNX Runtime's own build for Windows. The vectors have to be those
of this machine with its kernels, to the bit, and no memory may be freed in a wrong way. ``EMBEDGE_KERNELS=avx2`` takes
the kernels of this instruction set on both. Debian:
``apt-get install gcc-mingw-w64-x86-64 wine wine64``. ONNX Runtime and Microsoft's C++ library come from PyPI.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.kernels.library import describe_kernels, kernel_library
from embedge.runtime.kernels.register import register
from tests.processors.vectors import difference, some_texts

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "runtime/kernels/native"
COMPILER, DISASSEMBLER, WINE = "x86_64-w64-mingw32-gcc", "x86_64-w64-mingw32-objdump", "wine"
FLAGS = ["-std=gnu11", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
PACKAGES = [f"onnxruntime=={onnxruntime.__version__}", "msvc-runtime"]
OUTPUT = "embedding"

Ints = NDArray[np.int64]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.processors.windows", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/windows")
    parser.add_argument("--texts", type=int, default=8)
    options = parser.parse_args(arguments)
    for program in (COMPILER, DISASSEMBLER, WINE):
        if shutil.which(program) is None:
            parser.error(f"{program}: not found; apt-get install gcc-mingw-w64-x86-64 wine wine64")
    if kernel_library() is None:
        parser.error(f"there is nothing to compare with: {describe_kernels()}")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "onnxruntime.dll").is_file():
        fetch_libraries(folder)
    compile_all(folder)
    check_system(folder)
    return int(not all(compare(Bundle(options.bundle), options.texts, folder)))


def fetch_libraries(folder: Path) -> None:
    """Takes the libraries out of wheels for Windows."""
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--platform", "win_amd64", "--only-binary", ":all:", "--dest", str(wheels)]
    subprocess.run([*command, *PACKAGES], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".dll"):
                    (folder / Path(name).name.lower()).write_bytes(archive.read(name))
    shutil.rmtree(wheels)


def compile_all(folder: Path) -> None:
    """The kernels as they are installed, and the two programs."""
    programs = ROOT / "tests/processors"
    kernels = sorted(str(file) for file in NATIVE.glob("*.c"))
    _compile(folder / "_native.dll", ["-O3", "-shared", *kernels])
    _compile(folder / "run_graph.exe", ["-O1", str(programs / "run_graph.c")])
    check = [str(programs / "system_check.c"), str(NATIVE / "system.c")]
    _compile(folder / "system_check.exe", ["-O1", *check])
    # GCC does not align the stack for vectors there (GCC's bug 54412): no instruction may rely on it.
    shown = _output([DISASSEMBLER, "-d", str(folder / "_native.dll")])
    aligned = [line for line in shown.splitlines() if _needs_aligned_stack(line)]
    if aligned:
        sys.exit("\n".join(["moves that need an aligned stack:", *aligned]))


def _compile(file: Path, arguments: Sequence[str]) -> None:
    subprocess.run([COMPILER, *FLAGS, *arguments, "-o", str(file)], check=True)


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _needs_aligned_stack(line: str) -> bool:
    moves = ("vmovaps", "vmovapd", "vmovdqa", "vmovntps", "vmovntdq")
    wide = "%ymm" in line or "%zmm" in line
    return wide and any(move in line for move in moves) and ("(%rsp" in line or "(%rbp" in line)


def run_in_wine(folder: Path, *arguments: str) -> bytes:
    """What a program writes; ends this one where it fails, or frees what Windows would not."""
    libraries = "msvcp140,msvcp140_1,vcruntime140,vcruntime140_1=n"  # Wine's own are too old
    done = subprocess.run(
        [WINE, *arguments],
        check=False,
        cwd=folder,
        capture_output=True,
        env={
            **os.environ,
            "WINEPREFIX": str(folder / "wine"),
            "WINEDEBUG": "-all,warn+heap",
            "WINEDLLOVERRIDES": libraries,
        },
    )
    said = done.stderr.decode("utf-8", "replace").splitlines()
    wrong = [line for line in said if "invalid block" in line or "invalid pointer" in line]
    if done.returncode or wrong:
        sys.exit("\n".join([" ".join(arguments), *(wrong[:3] if wrong else said[-5:])]))
    return done.stdout


def check_system(folder: Path) -> None:
    """The program that checks memory."""
    (folder / "file").write_bytes(bytes(range(256)) * 8192)
    run_in_wine(folder, "system_check.exe", "file", "emulated")


def compare(bundle: Bundle, texts: int, folder: Path) -> list[bool]:
    """Prints how far vectors are apart for each graph that the CPU runs; returns whether each is the same."""
    inputs = inputs_of(bundle, texts)
    found = []
    for precision, settings in bundle.manifest.precisions.items():
        for task in settings.graphs if "cpu" in settings.devices and not settings.unpack else ():
            graph = bundle.graph(precision, task).resolve()
            here = run_here(graph, inputs)
            there = run_there(graph, inputs, folder).reshape(here.shape)
            print(f"{precision} {task}: {difference(here, there)}", flush=True)
            found.append(np.array_equal(here, there))
    return found


def inputs_of(bundle: Bundle, count: int) -> Mapping[str, Ints]:
    """Inputs int64 ``[texts, tokens]`` of a graph."""
    tokenizer = Tokenizer.from_file(str(bundle.file(bundle.manifest.tokenizer.file)))
    tokenizer.enable_padding(pad_id=bundle.manifest.tokenizer.pad_token_id)
    encoded = tokenizer.encode_batch(some_texts(count))
    every = {
        "input_ids": [text.ids for text in encoded],
        "attention_mask": [text.attention_mask for text in encoded],
        "token_type_ids": [text.type_ids for text in encoded],
    }
    return {name: np.array(every[name], np.int64) for name in bundle.manifest.model.inputs}


def run_here(graph: Path, inputs: Mapping[str, Ints]) -> NDArray[np.float32]:
    """Vectors float32 ``[texts, dim]`` with the kernels of this machine."""
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    library = kernel_library()
    assert library is not None
    register(options, library, panels=False)
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    vectors: NDArray[np.float32] = session.run([OUTPUT], dict(inputs))[0]
    return vectors


def run_there(graph: Path, inputs: Mapping[str, Ints], folder: Path) -> NDArray[np.float32]:
    """Vectors float32, flat, with those of Windows."""
    files = []
    for name, values in inputs.items():
        values.tofile(folder / f"{name}.bin")
        files.append(f"{name}={name}.bin")
    sizes = [str(size) for size in inputs["input_ids"].shape]
    command = ["run_graph.exe", "onnxruntime.dll", "_native.dll", str(graph), *sizes, OUTPUT]
    return np.frombuffer(run_in_wine(folder, *command, *files), np.float32)


if __name__ == "__main__":
    sys.exit(main())
