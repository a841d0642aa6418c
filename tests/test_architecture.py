"""The packages may only import downwards: api -> ragcache -> engine -> {prefixtree, kernels}."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "kernels": {"kernels"},
    "prefixtree": {"prefixtree"},
    "engine": {"engine", "prefixtree", "kernels"},
    "ragcache": {"ragcache", "engine", "prefixtree", "kernels"},
    "api": {"api", "ragcache", "engine", "prefixtree", "kernels"},
}
TORCH_FREE = (
    "tree.py",
    "slots.py",
    "store.py",
    "lease.py",
    "namespace.py",
    "eviction.py",
    "layout.py",
    "frame.py",
    "frame_header.py",
    "pgdsf.py",
    "frequency.py",
)


def imported_modules(source: str) -> set[str]:
    """Absolute names of everything that a module imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(package: str, source: str) -> list[str]:
    """Imports of `source`, a module of `package`, that point upwards or pass by the stemcache namespace."""
    found = []
    for name in sorted(imported_modules(source)):
        parts = name.split(".")
        if parts[0] in ALLOWED:
            found.append(f"{name}: import it as stemcache.{name}")
        if parts[0] == "stemcache" and len(parts) > 1 and parts[1] in ALLOWED and parts[1] not in ALLOWED[package]:
            found.append(f"{package} must not import {name}")
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package: str) -> None:
    modules = list((ROOT / package).rglob("*.py"))
    assert modules, f"{package}/ holds no module"
    for path in modules:
        assert violations(package, path.read_text()) == [], path.relative_to(ROOT)


def test_the_rule_can_be_broken() -> None:
    assert violations("kernels", "from stemcache.engine.engine import Engine")
    assert violations("engine", "def late():\n    import stemcache.api.cli")
    assert violations("engine", "from kernels.plan import AttentionPlan")
    assert not violations("api", "from stemcache.engine.engine import Engine")


def test_plugins_are_imported_by_nobody() -> None:
    """They need frameworks that others do not; and each stands without the others' frameworks."""
    plugins = "stemcache.ragcache.plugins"
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            used = {name for name in imported_modules(path.read_text()) if name.startswith(plugins)}
            if (ROOT / "ragcache" / "plugins") not in path.parents:
                assert not used, path.relative_to(ROOT)
            else:
                frameworks = {name.split(".")[3] for name in used} & {"langchain", "llamaindex", "haystack"}
                assert frameworks <= {path.parent.name}, path.relative_to(ROOT)


@pytest.mark.parametrize("name", TORCH_FREE)
def test_the_trees_bookkeeping_is_free_of_torch(name: str) -> None:
    imports = imported_modules((ROOT / "prefixtree" / name).read_text())
    assert not any(module.split(".")[0] == "torch" for module in imports)


def test_kernels_is_no_package_of_its_own() -> None:
    """With an `__init__.py` it would be taken for Hugging Face's library of that name, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_http_enters_the_engine_by_admission_only() -> None:
    """Which is where a request gets its tenant; `generate` and the demo have no tenants."""
    submitting = {
        path.name
        for path in (ROOT / "api").rglob("*.py")
        if re.search(r"engine\.(submit|generate)\(", path.read_text()) is not None
    }
    assert submitting == {"admission.py", "generate.py"}


def test_only_settings_read_the_environment() -> None:
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            source = path.read_text()
            reads = "os.environ" in source or "getenv" in source
            assert not reads or path.name == "settings.py", path.relative_to(ROOT)
