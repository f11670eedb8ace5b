"""The load on a server: every part runs, each answer is compared, and another server is asked beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedge.bench.studies import serve_load
from tests.helpers.server_process import serving
from tests.runtime.conftest import bundles_in

pytestmark = pytest.mark.slow


def test_all_parts_run_and_no_answer_is_wrong_or_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"max_length": 512}
    bundle = str(bundles_in(tmp_path)("bundle", tasks=("search",), model=long).path)
    options = ["--clients", "4", "--texts", "300", "--rounds", "1", "--minutes", "0.005"]
    with serving(tmp_path / "log", bundle) as other:
        beside = ["--beside", f"{other.url}/v1/embeddings", "bundle:search"]
        assert serve_load.main([bundle, *options, *beside]) == 0
    *said, document = capsys.readouterr().out.splitlines()
    load = json.loads(document)
    assert load["wrong"] == load["lost"] == 0
    assert load["server_rate"] > 0 and load["beside_rate"] > 0 and load["mixed_requests"] > 0
    assert load["refused"] + load["kept"] == 60
    assert said[0].startswith("bundle:search: ")


@pytest.mark.parametrize("url", ["https://127.0.0.1/x", "http://other/x", "http://127.0.0.1:1/x"])
def test_another_server_has_to_be_there(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(bundles_in(tmp_path)("bundle", tasks=("search",)).path)
    options = ["--texts", "300", "--rounds", "1", "--beside", url, "model"]
    assert serve_load.main([bundle, *options]) == 1
    assert url in capsys.readouterr().err
