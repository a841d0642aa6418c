"""Run the stack of docker-compose.yml without a container engine: `make stack-local`, or python scripts/stack_local.py.

Commands, environment, mounts and secrets are read out of the compose file, so that the two cannot drift apart. What is
a path or a host name inside of a container becomes one of this machine: in commands, in the environment, and in the
configuration files that are mounted. Grafana is left out, as it is in no package of Debian's; Prometheus runs where it
is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker-compose.yml"
SECRETS = "/run/secrets"

# What a service's image starts, and what of it may be installed here, the first that is there.
PROGRAMS = {
    "stemcache": ([sys.executable, "-m", "stemcache.api.cli"],),
    "valkey": (["valkey-server"], ["redis-server"]),
    "prometheus": (["prometheus"],),
}
PORTS = {"stemcache": 8000, "valkey": 6379, "prometheus": 9090}
HOSTS = {"stemcache": "endpoint"}  # by which name others know a service, if not by its own


class StackError(Exception):
    """The stack cannot be started; the message says what to do."""


@dataclass(frozen=True)
class Process:
    """What is to be run for a service. `port`: where it will listen, on 127.0.0.1."""

    name: str
    command: list[str]
    environment: dict[str, str]
    port: int


def load(environ: Mapping[str, str]) -> dict[str, Any]:
    """The compose file, with its variables filled in as Compose does: `${NAME:-default}`."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: environ.get(found[1]) or found[2], COMPOSE.read_text())
    return dict(yaml.safe_load(text))


class Translation:
    """From paths and addresses inside of the containers to those of this machine.

    folder: takes copies of configuration files, and what containers keep in volumes.
    """

    def __init__(self, compose: Mapping[str, Any], ports: Mapping[str, int], folder: Path) -> None:
        self._folder = folder
        self._places = {f"{HOSTS.get(name, name)}:{PORTS[name]}": f"127.0.0.1:{port}" for name, port in ports.items()}
        for name, secret in compose["secrets"].items():
            self._places[f"{SECRETS}/{name}"] = str(ROOT / secret["file"])
        for name in ports:
            for mount in compose["services"][name].get("volumes", ()):
                source, target = mount.split(":")[:2]
                self._places[target] = self._place_of(source)

    def __call__(self, text: str) -> str:
        """The longest first, so that no place is taken for another's beginning; all at once, so that nothing is
        translated twice."""
        inside = sorted(self._places, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, inside)), lambda found: self._places[found[0]], text)

    def copy_files(self) -> None:
        """Translate the configuration files, whose copies `__call__` names."""
        for place in {Path(place) for place in self._places.values()}:
            if place.parent == self._folder / "files":
                place.write_text(self((ROOT / "deploy" / place.name).read_text()))

    def _place_of(self, source: str) -> str:
        path = ROOT / source
        if not source.startswith((".", "/")):  # a volume's name
            (self._folder / source).mkdir(exist_ok=True)
            return str(self._folder / source)
        if path.is_dir():
            return str(path.resolve())
        (self._folder / "files").mkdir(exist_ok=True)
        return str(self._folder / "files" / path.name)


def plan(compose: Mapping[str, Any], names: Sequence[str], ports: Mapping[str, int], folder: Path) -> list[Process]:
    """The processes of some services, in the order of `names`. Raises StackError if a program is not installed."""
    translate = Translation(compose, ports, folder)
    translate.copy_files()
    processes = []
    for name in names:
        service, port = compose["services"][name], ports[name]
        command = [translate(part) for part in service["command"]]
        if name == "stemcache":
            command = [part.replace("--host=0.0.0.0", "--host=127.0.0.1") for part in command]
            command = [part.replace(f"--port={PORTS[name]}", f"--port={port}") for part in command]
        elif name == "valkey":
            command = [*command[1:], "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        else:
            command.append(f"--web.listen-address=127.0.0.1:{port}")
        environment = {key: translate(value) for key, value in service.get("environment", {}).items()}
        processes.append(Process(name, [*program(name), *command], environment, port))
    return processes


def program(name: str) -> list[str]:
    """How a service's program is started here. Raises StackError."""
    for command in PROGRAMS[name]:
        if shutil.which(command[0]):
            return command
    wanted = " or ".join(command[0] for command in PROGRAMS[name])
    raise StackError(f"the stack needs {wanted}: install it first")


@contextlib.contextmanager
def running(processes: Sequence[Process], *, seconds: float = 180) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start processes one after another, each when the one before listens; at the end all are ended, the last first.

    Raises StackError if one ends, or does not listen in time.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        for process in processes:
            child = subprocess.Popen(process.command, env=os.environ | process.environment, start_new_session=True)
            started.append(child)
            _wait(process, child, seconds)
        yield started
    finally:
        for child in reversed(started):
            child.terminate()
            try:
                child.wait(45)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait(process: Process, child: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise StackError(f"{process.name} ended with status {child.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", process.port), timeout=1):
            return
        time.sleep(0.1)
    raise StackError(f"{process.name} does not listen on port {process.port} after {seconds:g} s")


def main() -> int:
    """Run the stack until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint-port", type=int, default=8000)
    parser.add_argument("--valkey-port", type=int, default=6379)
    parser.add_argument("--prometheus-port", type=int, default=9090)
    options = parser.parse_args()
    ports = {"valkey": options.valkey_port, "stemcache": options.endpoint_port, "prometheus": options.prometheus_port}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = [name for name in ports if name != "prometheus" or shutil.which("prometheus")]
    secrets = os.environ.get("STEMCACHE_SECRETS") or str(ROOT / "deploy" / "secrets")
    subprocess.run(["sh", str(ROOT / "deploy" / "make-secrets.sh"), secrets], check=True)
    with tempfile.TemporaryDirectory(prefix="stemcache-stack-") as folder:
        try:
            processes = plan(load(os.environ), names, ports, Path(folder))
            with running(processes) as children:
                for process in processes:
                    print(f"{process.name} listens on http://127.0.0.1:{process.port}", flush=True)
                while all(child.poll() is None for child in children):
                    time.sleep(0.5)
                raise StackError("a part of the stack has ended; its last lines above say why")
        except KeyboardInterrupt:
            return 0
        except (StackError, OSError) as error:
            print(f"stack-local: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
