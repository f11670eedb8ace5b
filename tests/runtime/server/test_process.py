"""The real process: its address, its signals, bundles that are replaced, clients of other kinds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedge.runtime import Embedder
from embedge.runtime.cli.main import main
from tests.helpers.command import Capture, error_line
from tests.helpers.server_process import BODY, Server, serving
from tests.helpers.serving import array_of, error_of, httpx, vectors_in
from tests.runtime.conftest import MakeBundle, TinyBundle


def tokens_taken(server: Server) -> float:
    """Tokens of all requests that the server has taken: run, running and waiting."""
    metrics = httpx.get(f"{server.url}/metrics").text
    counts = re.findall(
        r"^embedge_(?:tokens_total\{.*\}|queued_tokens) (\S+)$", metrics, re.MULTILINE
    )
    return sum(float(count) for count in counts)


@pytest.mark.slow
class TestProcess:
    def test_curl_as_the_help_shows_it(self, tasks_bundle: TinyBundle, tmp_path: Path) -> None:
        curl = shutil.which("curl") or pytest.skip("curl is not installed")
        key = tmp_path / "keys"
        key.write_text("first\n\nsecond\n")
        arguments = (str(tasks_bundle.path), "--api-key-file", str(key))
        with serving(tmp_path / "log", *arguments) as server:
            command = [curl, "-sS", f"{server.url}/v1/embeddings", "-d", json.dumps(BODY)]
            command += ["-H", "Content-Type: application/json"]
            refused = subprocess.run(command, capture_output=True, check=True)
            assert json.loads(refused.stdout)["error"]["code"] == "invalid_api_key"
            command += ["-H", "Authorization: Bearer second"]
            answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            assert server.end() == 0
        expected = Embedder(tasks_bundle.path, task="code").encode("w1 w2")
        np.testing.assert_array_equal(array_of(answer["data"][0]["embedding"]), expected)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_what_is_under_way_is_answered_before_the_end(
        self, tasks_bundle: TinyBundle, tmp_path: Path, number: int
    ) -> None:
        texts = [f"w{i % 60} w{i % 7}" for i in range(1000)]
        expected = Embedder(tasks_bundle.path, task="code").encode(texts)
        with serving(tmp_path / "log", str(tasks_bundle.path)) as server:
            with ThreadPoolExecutor(3) as pool:
                tokens = server.embed(input=texts).json()["usage"]["total_tokens"]
                asked = [pool.submit(server.embed, input=texts) for _ in range(3)]
                while tokens_taken(server) < 4 * tokens:  # the last of the three has come in
                    time.sleep(0.001)
                assert server.end(number) == 0
                answers = [one.result() for one in asked]
            for answer in answers:
                np.testing.assert_allclose(vectors_in(answer), expected, atol=1e-6)
            with pytest.raises(httpx.ConnectError):
                server.embed()

    def test_a_bundle_is_replaced_and_a_damaged_one_is_not_taken(
        self, copied: Path, make_bundle: MakeBundle, tmp_path: Path
    ) -> None:
        other = make_bundle("other", tasks=("code",)).path
        before = Embedder(copied, task="code").encode("w1 w2")
        after = Embedder(other).encode("w1 w2")
        assert not np.allclose(before, after)
        with serving(tmp_path / "log", str(copied)) as server:
            copied.rename(tmp_path / "old")
            (copied / "code").mkdir(parents=True)
            (copied / "manifest.json").write_text('{"format_version": "1.5", "cut')
            server.process.send_signal(signal.SIGHUP)
            server.said("bundle stays as it was: ")
            np.testing.assert_array_equal(vectors_in(server.embed())[0], before)
            shutil.rmtree(copied)
            other.rename(copied)
            server.process.send_signal(signal.SIGHUP)
            server.said("bundle: opened anew")
            np.testing.assert_array_equal(vectors_in(server.embed())[0], after)
            error_of(server.embed(model="bundle:retrieval"), 404)
            server.process.send_signal(signal.SIGHUP)
            server.said("bundle: unchanged")
            assert server.end() == 0

    def test_no_request_fails_while_bundles_are_replaced(
        self, tasks_bundle: TinyBundle, copied: Path, tmp_path: Path
    ) -> None:
        expected = Embedder(tasks_bundle.path, task="code").encode("w1 w2")
        with serving(tmp_path / "log", str(copied)) as server, httpx.Client() as http:
            url, replaced = f"{server.url}/v1/embeddings", 0
            for number in range(30):
                if number % 10 == 5:
                    document = json.loads((copied / "manifest.json").read_text())
                    document["producer"]["version"] = f"0.1.{number}"
                    (copied / "new").write_text(json.dumps(document))
                    (copied / "new").rename(copied / "manifest.json")
                    server.process.send_signal(signal.SIGHUP)
                    replaced += 1
                [vector] = vectors_in(http.post(url, json=BODY, timeout=60))
                np.testing.assert_array_equal(vector, expected)
            server.said("bundle: opened anew")
            assert replaced == 3

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
    @pytest.mark.parametrize("buffered", [False, True])
    def test_a_full_disk_ends_no_server(self, copied: Path, buffered: bool) -> None:
        expected = Embedder(copied, task="code").encode("w1 w2")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "embedge", "serve", str(copied), "--port", str(port)]
        path = os.pathsep.join(path for path in sys.path if path)
        variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "" if buffered else "1"}
        url = f"http://127.0.0.1:{port}"
        with (
            open("/dev/full", "w") as full,
            subprocess.Popen(
                command, stdout=full, stderr=full, env={**os.environ, **variables}
            ) as process,
        ):
            try:
                for _ in range(600):
                    with contextlib.suppress(httpx.ConnectError):
                        httpx.get(f"{url}/health")
                        break
                    assert process.poll() is None
                    time.sleep(0.05)
                (copied / "manifest.json").write_text("{")
                process.send_signal(signal.SIGHUP)  # a line of the log for it
                for _ in range(20):
                    response = httpx.post(f"{url}/v1/embeddings", json=BODY, timeout=60)
                    np.testing.assert_array_equal(vectors_in(response)[0], expected)
                process.terminate()
                assert process.wait(60) == 0
            finally:
                process.kill()

    def test_a_killed_server_starts_again_at_its_port(
        self, tasks_bundle: TinyBundle, tmp_path: Path
    ) -> None:
        with serving(tmp_path / "log", str(tasks_bundle.path)) as server:
            with httpx.Client() as http:  # a connection that is open when the server dies
                assert http.get(f"{server.url}/health").status_code == 200
                assert server.end(signal.SIGKILL) == -signal.SIGKILL
            port = server.url.rpartition(":")[2]
        with serving(tmp_path / "log", str(tasks_bundle.path), "--port", port) as server:
            assert server.url.endswith(port)
            assert server.embed().status_code == 200

    def test_a_connection_that_sends_half_a_request_holds_nobody_up(
        self, tasks_bundle: TinyBundle, tmp_path: Path
    ) -> None:
        with serving(tmp_path / "log", str(tasks_bundle.path), "--stop-timeout", "1") as server:
            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as half:
                half.sendall(
                    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
                )
                half.sendall(b"Content-Type: application/json\r\n\r\n{")
                assert server.embed().status_code == 200
                for _ in range(3):
                    with socket.create_connection((host, int(port))) as other:
                        other.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
                        assert other.recv(1000).startswith(b"HTTP/1.1 400")
                assert (
                    "Invalid HTTP request" not in server.log.read_text()
                )  # it would fill the disk
                assert server.end() == 0

    def test_a_second_signal_does_not_wait(self, tasks_bundle: TinyBundle, tmp_path: Path) -> None:
        arguments = (str(tasks_bundle.path), "--stop-timeout", "60")
        with serving(tmp_path / "log", *arguments) as server:
            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as half:
                half.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n")
                half.sendall(b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
                assert server.embed().status_code == 200
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
                assert server.process.poll() is None
                start = time.monotonic()
                assert server.end() == 0
                assert time.monotonic() - start < 30

    def test_several_bundles_and_precisions(
        self, make_bundle: MakeBundle, tasks_bundle: TinyBundle, tmp_path: Path
    ) -> None:
        two = make_bundle("two", precisions={"fp32": {}, "int4": {}}).path
        arguments = (f"org/two={two}", "--precision", "int4", "fp32")
        with serving(tmp_path / "log", *arguments) as server:
            listed = httpx.get(f"{server.url}/v1/models").json()["data"]
            assert [model["id"] for model in listed][::2] == ["org/two", "org/two@fp32"]
            assert [model["embedge"]["precision"] for model in listed] == ["int4"] * 2 + [
                "fp32"
            ] * 2
            for model in ("org/two", "org/two@int4:retrieval", "org/two@fp32"):
                assert server.embed(model=model).status_code == 200


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (
                ["--max-requests", "0"],
                2,
                "--max-requests is 0; expected a whole number of at least",
            ),
            (
                ["--stop-timeout", "0"],
                2,
                "--stop-timeout is 0; expected a whole number of at least",
            ),
            (["--precision", "auto", "--port", "0"], 2, "--precision is 'auto'; expected names"),
            (["--max-body", "much"], 2, "--max-body 'much': expected a number of bytes"),
            (["--host", "no.such.host.invalid"], 1, "no.such.host.invalid:8000 cannot be listened"),
            (["--port", "70000"], 2, "--port is 70000; expected 0 for any that is free"),
            (["--api-key-file", "nothing"], 1, "nothing: cannot be read: No such file"),
            (["--precision", "int9", "--port", "0"], 2, "the bundle has no precision 'int9'"),
        ],
    )
    def test_wrong_calls(
        self, bundle: TinyBundle, capsys: Capture, arguments: list[str], code: int, said: str
    ) -> None:
        assert main(["serve", str(bundle.path), *arguments]) == code
        assert said in error_line(capsys)

    def test_names(self, bundle: TinyBundle, capsys: Capture) -> None:
        folder = str(bundle.path)
        for named in (f"a:b={folder}", f"a@b={folder}", f"={folder}", f"a b={folder}"):
            assert main(["serve", named]) == 2
            assert "expected a name of letters, digits" in error_line(capsys)
        assert main(["serve", folder, f"bundle={folder}", "--port", "0"]) == 2
        assert "two bundles are called 'bundle'" in error_line(capsys)

    @pytest.mark.parametrize("content", ["", "\n\n", "a b\n", "é\n", "a\x00\n"])
    def test_keys_that_no_header_carries(
        self, bundle: TinyBundle, tmp_path: Path, capsys: Capture, content: str
    ) -> None:
        (tmp_path / "keys").write_text(content)
        keys = ["--api-key-file", str(tmp_path / "keys")]
        assert main(["serve", str(bundle.path), *keys]) == 2
        assert "expected " in error_line(capsys)

    def test_keys_from_two_places(
        self, bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        monkeypatch.setenv("EMBEDGE_API_KEY", "a")
        assert main(["serve", str(bundle.path), "--api-key-file", "keys"]) == 2
        assert "--api-key-file and EMBEDGE_API_KEY both give keys" in error_line(capsys)

    def test_a_port_that_is_taken(self, bundle: TinyBundle, capsys: Capture) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert main(["serve", str(bundle.path), "--port", port]) == 1
        assert "choose another --host or --port" in error_line(capsys)

    @pytest.mark.filterwarnings("default")
    def test_an_address_that_others_reach_wants_a_key(
        self, bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        from embedge.runtime.server import process

        called: list[Callable[..., object]] = []
        monkeypatch.setattr(process, "run", lambda *_, **options: called.append(options["started"]))
        everywhere = ["serve", str(bundle.path), "--host", "0.0.0.0", "--port", "0"]
        assert main(everywhere) == 0
        assert "any machine that reaches it may use it" in error_line(capsys)
        monkeypatch.setenv("EMBEDGE_API_KEY", "a")
        assert main(everywhere) == 0
        assert capsys.readouterr().err == ""
        assert len(called) == 2
