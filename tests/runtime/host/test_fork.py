"""What a forked child can do with an Embedder of its parent's, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from embedge.runtime.host.fork import no_fork

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")

INTEGER = {"activation_constants": {"a": {"dtype": "uint8", "full": 128, "reduced": 64}}}

SCRIPT = """
import os, signal, sys
import numpy as np
from embedge.runtime import Embedder

folder, precision, before = sys.argv[1:]
texts = {"one": ["w1 w2"], "batch": [f"w{i} " * (i % 9) + "w1" for i in range(40)]}
model = Embedder(folder, precision=precision, threads=3)
model.encode(texts[before], batch_size=4)
for after in texts:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        vectors = model.encode(texts[after], batch_size=4)
        fresh = Embedder(folder, precision=precision, threads=1)
        expected = fresh.encode(texts[after], batch_size=4)
        np.testing.assert_allclose(vectors, expected, atol=1e-6, rtol=0)
        sys.stdout.write(f"embedded {after}\\n")
        sys.stdout.flush()
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child that embeds {after} ended with status {status}"
model.encode(texts[before], batch_size=4)  # the parent's own graphs are as they were
"""
EMBEDDED = "embedded one\nembedded batch\n"


def run(*arguments: str, **variables: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables},
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("before", ["one", "batch"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_child_embeds_and_ends_whatever_its_parent_did(
    make_bundle: Any, precision: str, before: str
) -> None:
    bundle = make_bundle(precisions={"fp32": {}, "int8": INTEGER})
    assert run(str(bundle.path), precision, before) == EMBEDDED


@pytest.mark.slow
def test_a_child_embeds_though_tokenizers_was_told_to_use_threads(bundle: Any) -> None:
    arguments = (str(bundle.path), "fp32", "batch")
    assert run(*arguments, TOKENIZERS_PARALLELISM="true") == EMBEDDED


def forked(work: Any) -> int:
    """The exit status of a child that does some work."""
    child = os.fork()
    if child == 0:
        os._exit(work() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_no_child_is_forked_while_another_thread_opens_a_session() -> None:
    opening, opened = threading.Event(), threading.Event()

    def open_slowly() -> None:
        with no_fork(), no_fork():
            opening.set()
            time.sleep(0.2)
            opened.set()

    thread = threading.Thread(target=open_slowly)
    thread.start()
    assert opening.wait(10)
    assert forked(lambda: not opened.is_set()) == 0
    thread.join()


@pytest.mark.slow
def test_a_thread_may_fork_while_it_opens_and_both_go_on() -> None:
    def again() -> None:
        with no_fork():
            pass

    with no_fork():
        assert forked(again) == 0
    others = [threading.Thread(target=again) for _ in range(3)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert forked(lambda: forked(again)) == 0
