"""What transformers 4.57 and 5.24 write into config.json means the same, and both export.

``saved_configs/VERSION.json`` holds what each version wrote for ``make_model`` of every name.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from embedge.export import export_bundle
from embedge.runtime import Embedder
from tests.helpers.models import (
    CONFIGS,
    Reference,
    cosines,
    linears,
    make_model,
    model_type,
    random_texts,
    save,
    save_adapter,
    write_json,
)

FOLDER = Path(__file__).parent / "saved_configs"
SAVED: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text("utf-8")) for file in sorted(FOLDER.glob("*.json"))
}
NAMES = [name for name in CONFIGS if model_type(name) in transformers.CONFIG_MAPPING]
TEXTS = random_texts(5, longest=40)


class Model:
    """A model that the running version saved, and its vectors with an adapter of PEFT."""

    def __init__(self, name: str, folder: Path) -> None:
        self.source = save(make_model(name), folder / "model")
        self.adapter = save_adapter(self.source, folder / "adapter", target=linears(name))
        self.expected = Reference(self.source, self.adapter).encode(TEXTS)

    def assert_same(self, out: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            export_bundle(self.source, adapters={"t": self.adapter}, precisions=["fp32"], out=out)
        found = Embedder(out, precision="fp32", threads=1).encode(TEXTS, on_truncate="ignore")
        assert cosines(found, self.expected).min() >= 0.999999


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_either_version_saves_gives_the_vectors_of_the_running_one(
    name: str, tmp_path: Path
) -> None:
    model = Model(name, tmp_path)

    file = model.source / "config.json"
    own = json.loads(file.read_text("utf-8"))
    # transformers 4.57 halves Gemma's window whenever it makes a config, so that each save halves it again
    window = {key: own[key] for key in ("sliding_window",) if name == "gemma3_text"}

    model.assert_same(tmp_path / "own")
    for version, saved in SAVED.items():
        if name in saved:
            write_json(file, {**saved[name], **window})
            model.assert_same(tmp_path / version)


@pytest.mark.parametrize("name", NAMES)
def test_the_running_version_writes_what_is_kept_of_it(name: str, tmp_path: Path) -> None:
    version = next((v for v in SAVED if transformers.__version__.startswith(v)), None)
    if version is None:
        pytest.skip(f"transformers {transformers.__version__}: kept are {', '.join(SAVED)}")
    make_model(name).config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    kept = {**SAVED[version][name]}
    for key in ("architectures", "dtype", "transformers_version"):  # a model's own, not a config's
        kept.pop(key, None)
        written.pop(key, None)

    assert written == kept


def test_every_name_is_kept_of_a_version() -> None:
    assert set(CONFIGS) - set().union(*SAVED.values()) == set()
