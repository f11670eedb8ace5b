"""What all tests share."""

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face package is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "runtime"))  # the helpers beside the tests: _images


@pytest.fixture(scope="session")
def package_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH where ``embedge`` is found without the editable install's import hook."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "embedge").mkdir()
    for name in ("bench", "export", "quant", "runtime"):
        (folder / "embedge" / name).symlink_to(ROOT / name)
    for file in (ROOT / "runtime" / "toplevel").glob("[!.]*"):
        if file.is_file():
            (folder / "embedge" / file.name).symlink_to(file)
    return folder
