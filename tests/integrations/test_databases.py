"""Each section of the guide to vector databases refuses an index of another task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embedge.runtime import Embedder, FingerprintError
from tests.helpers.documents import blocks
from tests.helpers.postgres import postgres
from tests.runtime.conftest import bundles_in
from tests.test_document_code import PACKAGES

GUIDE = "docs/guides/vector-databases.md"


@pytest.mark.slow
def test_every_section_refuses_vectors_of_another_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES[GUIDE]:
        pytest.importorskip(package, reason="make test-integrations has the databases")
    bundles_in(tmp_path)("bundle", tasks=("retrieval", "code"), precisions={"int8": {}})
    monkeypatch.chdir(tmp_path)
    first, *sections = (block for block in blocks(GUIDE) if block.language == "python")
    names: dict[str, Any] = {}
    exec(first.body, names)
    code = Embedder("bundle", precision="int8", task="code")
    names["stored"] = {"parts": code.fingerprint_parts(role="document")}
    with postgres():
        for section in sections:
            place = "\n" * (section.line - 1)
            with pytest.raises(FingerprintError, match="graph: ") as raised:
                exec(compile(place + section.body, GUIDE, "exec"), names)
            assert raised.value.differing == ("graph",)
    assert len(sections) == 7
