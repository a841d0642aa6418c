"""A Redis server that speaks TLS only, with a certificate that was made for it: for tests.

Invariant: nobody trusts its authority but who is handed the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trustme
from redis_process import RedisProcess


@contextmanager
def tls_server(folder: Path) -> Iterator[tuple[RedisProcess, Path]]:
    """The server, and the file with the certificate of its authority."""
    authority = trustme.CA()
    own, ca = authority.issue_cert("127.0.0.1"), folder / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    own.private_key_pem.write_to_path(folder / "key.pem")
    own.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    files = f"tls-cert-file {folder / 'cert.pem'}", f"tls-key-file {folder / 'key.pem'}", f"tls-ca-cert-file {ca}"
    with RedisProcess(*files, "tls-auth-clients no", tls=True) as process:
        yield process, ca
