"""Some malformed requests in every run of the tests; thousands by name."""

from __future__ import annotations

import pytest

from tests.fuzz import server
from tests.runtime.conftest import bundles_in


@pytest.mark.slow
def test_malformed_requests_are_answered(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[dev]'")
    bundle = bundles_in(tmp_path_factory.mktemp("fuzzed"))("bundle", tasks=("code",))
    statuses = server.fuzz(bundle.path, precision="fp32", seed=1, count=200)
    assert statuses.total() == 200
    assert statuses[400] > 100 and statuses[0] > 0
    assert set(statuses) <= {0, 200, 400, 403, 404, 405, 413, 415, 417, 431}


@pytest.mark.slow
def test_a_wrong_vector_and_a_dead_server_are_told(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[dev]'")
    bundle = bundles_in(tmp_path_factory.mktemp("fuzzed"))("bundle", tasks=("code",))
    monkeypatch.setattr(server, "_LAST_BITS", -1.0)
    with pytest.raises(server.Wrong, match="another vector"):
        server.fuzz(bundle.path, precision="fp32", seed=1, count=1)
    monkeypatch.setattr(server, "check_good", lambda running, *_: running.process.kill())
    with pytest.raises(server.Wrong, match="ended with -9"):
        server.fuzz(bundle.path, precision="fp32", seed=1, count=3)
