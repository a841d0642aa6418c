"""The stack's files, as the tools of those who made the formats see them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from stack_local import COMPOSE, ROOT, load, plan

from stemcache.api.server_process import free_port

DASHBOARD = ROOT / "deploy/grafana/dashboards/stemcache.json"


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def tool(name: str) -> str:
    """A program beside this Python, or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: make test-stack")
    return found


def test_the_compose_file_keeps_to_the_specification() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_the_dockerfile_is_sound() -> None:
    run(tool("hadolint"), ROOT / "Dockerfile")


def test_what_the_image_copies_is_a_whole_package(tmp_path: Path) -> None:
    """The files that .dockerignore lets through, built as the Dockerfile does."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in allowed:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name, **({"symlinks": True} if (ROOT / name).is_dir() else {}))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "made", tmp_path)
    (wheel,) = (tmp_path / "made").iterdir()
    packed = set(zipfile.ZipFile(wheel).namelist())
    for package in ("api", "engine", "kernels", "prefixtree", "ragcache"):
        files = [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        missing = {f"stemcache/{path.relative_to(ROOT)}" for path in files} - packed
        assert missing == set(), package


def test_prometheus_understands_its_configuration_and_the_dashboards_queries(tmp_path: Path) -> None:
    promtool = tool("promtool")
    secrets = tmp_path / "secrets"
    run("sh", ROOT / "deploy/make-secrets.sh", secrets)
    ports = {name: free_port() for name in ("valkey", "stemcache", "prometheus")}
    plan(load({"STEMCACHE_SECRETS": str(secrets)}), ["valkey"], ports, tmp_path)
    run(promtool, "check", "config", tmp_path / "files" / "prometheus.yml")
    queries = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel.get("targets", ())
    ]
    rules = [{"record": f"panel:{i}", "expr": each.replace("$__rate_interval", "5m")} for i, each in enumerate(queries)]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    run(promtool, "check", "rules", tmp_path / "rules.json")  # YAML's readers read JSON


def test_the_script_that_makes_secrets_is_plain_sh() -> None:
    run("sh", "-n", ROOT / "deploy/make-secrets.sh")
    if (dash := shutil.which("dash")) is not None:
        run(dash, "-n", ROOT / "deploy/make-secrets.sh")
