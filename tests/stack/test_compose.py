"""The compose stack as it is written: what it runs exists, nothing is open that need not be, nothing drifts apart.

Whether it runs: tests/stack/running (`make test-stack`).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from stack_local import COMPOSE, ROOT, load

from stemcache.api.cli import _parser
from stemcache.api.keys import Keyring
from stemcache.api.metrics import Metrics
from stemcache.api.settings import Settings
from stemcache.engine.cold import ColdOptions
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.engine import Engine
from stemcache.prefixtree.tiers.address import RedisAddress

DASHBOARD = ROOT / "deploy/grafana/dashboards/stemcache.json"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load({})


def test_variables_are_filled_in_as_compose_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(re.findall(r"\$\{?\w+(.?.?)", COMPOSE.read_text())) == {":-"}, "load() knows this form only"
    set_, empty = load({"STEMCACHE_PORT": "1234"}), load({"STEMCACHE_PORT": ""})
    assert set_["services"]["stemcache"]["ports"] == ["127.0.0.1:1234:8000"]
    assert empty["services"]["stemcache"]["ports"] == ["127.0.0.1:8000:8000"]


def test_every_service_is_contained(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"stemcache", "stemcache-gpu", "valkey", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"]), f"{name} must not be root"
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.search(r":v?\d+\.\d+\.\d+(-|$)", service["image"]), f"{name}: pin a version"
        assert "healthcheck" in service or "build" in service, name
        assert not any(
            "password" in str(value).lower()
            for key, value in service.get("environment", {}).items()
            if (not key.endswith("_FILE"))
        ), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        assert set(service.get("secrets", ())) <= set(compose["secrets"]), name
    assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()
    assert compose["networks"]["cold"]["internal"] is True
    assert "ports" not in compose["services"]["valkey"]
    assert list(compose["services"]["valkey"]["networks"]) == ["cold"]
    used = {secret for service in compose["services"].values() for secret in service.get("secrets", ())}
    assert used == set(compose["secrets"])


def test_what_is_mounted_and_built_exists(compose: dict[str, Any]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for service in compose["services"].values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"], mount
        if "build" in service:
            assert service["build"]["target"] in targets
    profiles = {name: service.get("profiles") for name, service in compose["services"].items()}
    assert {name for name, given in profiles.items() if given} == {"stemcache", "stemcache-gpu"}
    images = re.findall(r"^FROM (\S+:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert len(set(images)) == 1


def test_the_build_has_what_the_package_is_made_of_and_no_secrets() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    assert allowed == {
        *("api", "engine", "kernels", "prefixtree", "ragcache", "stemcache"),
        *("LICENSE", "README.md", "pyproject.toml"),
    }
    assert all((ROOT / name).exists() for name in allowed)
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("name", ["stemcache", "stemcache-gpu"])
def test_the_endpoints_command_and_environment_are_understood(
    compose: dict[str, Any], name: str, tmp_path: Path
) -> None:
    service = compose["services"][name]
    options = _parser().parse_args(service["command"])
    assert (options.command, options.host, options.port) == ("serve", "0.0.0.0", 8000)
    assert service["ports"][0].endswith(f":{options.port}")
    address = RedisAddress.parse(options.cold, "secret")
    assert (address.username, address.hosts, address.prefix) == ("stemcache", (("valkey", 6379),), "stemcache")
    secrets = make_secrets(tmp_path)
    environment = {key: value.replace("/run/secrets", str(secrets)) for key, value in service["environment"].items()}
    settings = Settings.read(environment)
    assert settings.has_secret
    assert settings.cold_password == (secrets / "valkey-password").read_text()
    assert settings.api_keys_file is not None
    keyring = Keyring.load(settings.api_keys_file, settings.secret)
    tenant = keyring.find((secrets / "metrics-key").read_text())
    assert tenant is not None
    assert tenant.name == "prometheus"
    for variable, value in service["environment"].items():
        assert value.removeprefix("/run/secrets/") in service["secrets"], variable


def make_secrets(folder: Path) -> Path:
    subprocess.run(["sh", ROOT / "deploy/make-secrets.sh", folder / "secrets"], check=True, capture_output=True)
    return folder / "secrets"


def test_secrets_are_made_once(compose: dict[str, Any], tmp_path: Path) -> None:
    first = {file.name: file.read_text() for file in make_secrets(tmp_path).iterdir()}
    assert set(first) == set(compose["secrets"])
    (tmp_path / "secrets" / "grafana-password").unlink()
    second = {file.name: file.read_text() for file in make_secrets(tmp_path).iterdir()}
    assert {name for name in first if first[name] != second[name]} == {"grafana-password"}
    assert all(len(text) >= 48 for text in second.values())
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert first["valkey-password"] not in first["valkey-users"]


def test_prometheus_asks_the_endpoint_with_its_key(compose: dict[str, Any]) -> None:
    (job,) = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["endpoint:8000"]}]
    for name in ("stemcache", "stemcache-gpu"):
        assert "endpoint" in compose["services"][name]["networks"]["default"]["aliases"]
    assert (
        job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
        in compose["services"]["prometheus"]["secrets"]
    )


# -- the dashboard ---------------------------------------------------------------------------------------------------


def queries() -> Iterator[tuple[str, str]]:
    """(panel, PromQL) of the dashboard."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of every sample that a server with tiers exposes before its first request, by name."""
    place = tmp_path_factory.mktemp("cold")
    tiers = ColdOptions(cold=f"disk://{place}", host_bytes=1 << 20, cold_bytes=64 << 20)
    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=4 << 20, cold=tiers) as engine:
        text = generate_latest(Metrics(engine).registry).decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        names = [family.name, f"{family.name}_total"] if not family.samples else []
        for name, labels in [(name, set()) for name in names] + [(s.name, set(s.labels)) for s in family.samples]:
            found.setdefault(name, set()).update(labels)
    return found


def test_the_dashboard_asks_for_metrics_that_exist(exposed: dict[str, set[str]]) -> None:
    asked = list(queries())
    assert len(asked) > 20
    for panel, query in asked:
        names = set(re.findall(r"stemcache_\w+", query))
        assert names, panel
        assert names <= set(exposed), panel
        labels = set(re.findall(r"(\w+)=", query)) | {
            label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")
        }
        known = {label for name in names for label in exposed[name]}
        # What has no samples before something happened does not tell its labels yet.
        assert labels <= known or any(not exposed[name] for name in names), (panel, labels - known)


def test_grafana_finds_the_dashboard_and_its_data(compose: dict[str, Any]) -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/stemcache.yml").read_text())["providers"]
    grafana = compose["services"]["grafana"]
    mounts = dict(mount.split(":")[1::-1] for mount in grafana["volumes"])
    assert (ROOT / mounts[provider["options"]["path"]]).resolve() == DASHBOARD.parent
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert {target["datasource"]["uid"] for panel in panels for target in panel.get("targets", ())} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & covered, panel["title"]
        assert at["x"] + at["w"] <= 24
        covered |= cells
