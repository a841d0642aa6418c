"""API keys: what a file of them may hold, and whom a key stands for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from stemcache.api.keys import KeyFileError, Keyring, Tenant
from stemcache.api.settings import Settings

SECRET = b"s" * 32
ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789ab"


def write(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_are_found_by_their_whole_and_nothing_else(tmp_path: Path) -> None:
    ring = Keyring.load(write(tmp_path, f"# our clients\n\nalice {ALICE}\n  bob\t{BOB}  \n"), SECRET)
    assert ring.find(ALICE) == Tenant.of("alice", SECRET)
    assert ring.find(BOB) == Tenant.of("bob", SECRET)
    for wrong in ("", "alice", ALICE[:-1], ALICE + "x", ALICE.upper(), "\udcff", f"{ALICE} {BOB}"):
        assert ring.find(wrong) is None


def test_a_key_can_be_replaced_by_one_of_the_same_name(tmp_path: Path) -> None:
    ring = Keyring.load(write(tmp_path, f"alice {ALICE}\nalice {BOB}\n"), SECRET)
    assert ring.find(ALICE) == ring.find(BOB)


def test_a_tenants_id_depends_on_name_and_secret() -> None:
    ids = {Tenant.of(name, secret).id for name in ("", "a", "b") for secret in (b"1", b"2")}
    assert len(ids) == 6
    assert {len(each) for each in ids} == {32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# alice key", "holds no key"),
        (f"alice {ALICE}\nbob", "line 2: write a name and a key"),
        (f"alice {ALICE} shared", "line 1: write a name and a key"),
        (f"a/b {ALICE}", "line 1: a name has"),
        ("alice short", "line 1: the key of 'alice' needs"),
        ("alice key-of-sixteen-letters-\u00e4", "line 1: the key of 'alice' needs"),
        (f"alice {ALICE}\nbob {ALICE}", "line 2: the key of 'bob' is another"),
    ],
)
def test_what_is_no_file_of_keys_is_refused_without_quoting_keys(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(KeyFileError, match=message) as refused:
        Keyring.load(write(tmp_path, text), SECRET)
    assert ALICE not in str(refused.value)
    assert "short" not in str(refused.value)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        Keyring.load(write(tmp_path, f"alice {ALICE}", mode), SECRET)
    assert ("can be read by other users" in caplog.text) == warned


def test_a_mounted_secret_is_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stemcache.api.keys._MOUNTED", tmp_path)
    with caplog.at_level(logging.WARNING):
        Keyring.load(write(tmp_path, f"alice {ALICE}", 0o444), SECRET)
    assert caplog.text == ""


def test_no_object_holds_a_key(tmp_path: Path) -> None:
    ring = Keyring.load(write(tmp_path, f"alice {ALICE}"), SECRET)
    assert ALICE not in repr(vars(ring))


def test_the_environments_part(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-file\n")
    assert Settings.read({"STEMCACHE_SECRET_FILE": str(tmp_path / "secret")}).secret == b"from-file"
    given = Settings.read({"STEMCACHE_SECRET": "direct", "STEMCACHE_API_KEY": ALICE, "STEMCACHE_API_KEYS_FILE": "k"})
    assert given == Settings(Path("k"), ALICE, b"direct", None, None, has_secret=True)
    assert Settings.read({}).secret != Settings.read({}).secret
    (tmp_path / "password").write_text("of valkey\n")
    assert Settings.read({"STEMCACHE_COLD_PASSWORD_FILE": str(tmp_path / "password")}).cold_password == "of valkey"
    both = {"STEMCACHE_COLD_PASSWORD": "direct", "STEMCACHE_COLD_PASSWORD_FILE": "nowhere"}
    assert Settings.read(both).cold_password == "direct"
    assert Settings.read({}).cold_password is None
    with pytest.raises(OSError, match="nowhere"):
        Settings.read({"STEMCACHE_SECRET_FILE": str(tmp_path / "nowhere")})
