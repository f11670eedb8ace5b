"""How large an installation of the runtime is, and how soon it gives a vector.

    python -m embedge.bench.studies.installed demo-bundle --precision int8 --task retrieval

A wheel is built from this checkout and installed with the extra ``cpu`` into an empty virtual environment, from the
package index. Shown are the sizes of the wheels and of what they became, compiled Python included, and the time from
the start of Python to the first vector, in seconds and in CPU seconds. The first start is not counted: it compiles
Python's files and reads the bundle's from the disk.

The last line is the same as one JSON document; exit status 1: a target was missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["bytes_of", "first_vectors", "main"]

_ROOT = Path(__file__).resolve().parents[2]
_MOST_BYTES = 120_000_000
_MOST_SECONDS = 1.0
_OWN = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils")
_CODE = """
import json, sys
from embedge import Embedder
vector = Embedder(sys.argv[1], **json.loads(sys.argv[2])).encode("the first text")
assert vector.ndim == 1
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="embedge.bench.studies.installed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", help="may be left out where the bundle has exactly one")
    parser.add_argument("--task", help="may be left out where the bundle has exactly one")
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {options.rounds}")
    choice = {n: getattr(options, n) for n in ("task", "precision") if getattr(options, n)}
    with tempfile.TemporaryDirectory() as folder:
        wheels, python, packages = _install(Path(folder))
        sizes = bytes_of(packages)
        rounds = first_vectors(python, options.bundle.absolute(), choice, options.rounds)
    total = sum(sizes.values())
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:8]:
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{wheels / 1e6:8.1f} MB  the wheels, as they are downloaded")
    print(f"{total / 1e6:8.1f} MB  all of it (target {_MOST_BYTES / 1e6:.0f})")
    seconds = statistics.median(wall for wall, _ in rounds)
    cpu = statistics.median(cpu for _, cpu in rounds)
    print(
        f"{seconds:8.2f} s   to the first vector, {cpu:.2f} CPU seconds, median of {len(rounds)} (target "
        f"{_MOST_SECONDS:g})"
    )
    print(json.dumps({"bytes": total, "wheels": wheels, "by_package": sizes, "rounds": rounds}))
    return 1 if total > _MOST_BYTES or seconds > _MOST_SECONDS else 0


def bytes_of(packages: Path) -> dict[str, int]:
    """The sizes of what lies in a folder of packages, by name, without what an empty environment has.

    Args:
        packages: a ``site-packages``.
    """
    return {
        path.name: sum(file.lstat().st_size for file in [path, *path.rglob("*")] if file.is_file())
        for path in packages.iterdir()
        if path.name.partition("-")[0] not in _OWN
    }


def first_vectors(
    python: Path, bundle: Path, choice: dict[str, str], rounds: int
) -> list[tuple[float, float]]:
    """Seconds and CPU seconds of programs that end with a vector, after one that is not counted.

    Args:
        python: that has embedge.
        bundle: its folder.
        choice: arguments of ``Embedder``.
        rounds: programs.
    """
    found = []
    for _ in range(rounds + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begin = time.perf_counter()
        subprocess.run([python, "-I", "-c", _CODE, bundle, json.dumps(choice)], check=True, cwd="/")
        seconds = time.perf_counter() - begin
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append((round(seconds, 3), round(used, 3)))
    return found[1:]


def _install(folder: Path) -> tuple[int, Path, Path]:
    """Bytes of the wheels, Python of a new environment that has them, and where its packages lie."""
    pip = [sys.executable, "-I", "-m", "pip"]
    built, wheels, environment = folder / "built", folder / "wheels", folder / "venv"
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", built, _ROOT], check=True)
    [wheel] = built.glob("embedge-*.whl")
    subprocess.run(
        [*pip, "download", "--quiet", "--only-binary=:all:", "--dest", wheels, f"{wheel}[cpu]"],
        check=True,
    )
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    offline = ["--no-index", "--find-links", str(wheels), f"{wheel}[cpu]"]
    subprocess.run([python, "-I", "-m", "pip", "install", "--quiet", *offline], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    return sum(file.stat().st_size for file in wheels.iterdir()), python, packages


if __name__ == "__main__":
    sys.exit(main())
