"""Checkpoint folders: what is in them, and the model and tokenizer that they hold.

Invariant: whatever is wrong with a folder comes out as one ModelLoadError that names the folder, the cause and the
remedy.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stemcache.engine import attention
from stemcache.engine.errors import ModelLoadError
from stemcache.engine.families import require_served
from stemcache.engine.freed_memory import keep_freed_memory
from stemcache.kernels.attention import triton_backend

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model. `fingerprint` is a SHA-256 over configuration and weights: equal digests, equal caches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    fingerprint: bytes


def device_named(name: str) -> torch.device:
    """The device "auto", "cpu" or "cuda". Raises ModelLoadError where there is none, or what it needs is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ModelLoadError(f"device must be auto, cpu or cuda; got {name!r}")
    if name != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelLoadError(
            f"device 'cuda' was asked for, but torch {torch.__version__} finds no GPU here: use device='cpu', or "
            "install the driver and a CUDA build of torch"
        )
    try:
        triton_backend()
    except ValueError as error:
        raise ModelLoadError(str(error)) from error
    log.warning("models on a GPU: tested with Triton's interpreter only, and not yet on a GPU (docs/kernels.md)")
    return torch.device("cuda", torch.cuda.current_device())


def load_checkpoint(path_or_name: str | os.PathLike[str], *, device: torch.device, dtype: str) -> Checkpoint:
    """Load a folder in Hugging Face's form, or a hub name through the hub's local cache.

    dtype: "auto" takes the checkpoint's own where the device computes it natively, else float32.
    Raises ModelLoadError.
    """
    keep_freed_memory()  # before the threads that read files begin
    folder = _folder(path_or_name)
    with _explained(folder):
        config = AutoConfig.from_pretrained(folder)
        require_served(config)
        with ThreadPoolExecutor(1) as reader:  # hashing releases the GIL, so it costs nothing beside the loading
            fingerprint = reader.submit(_fingerprint, folder)
            model = _load_model(folder, device, _choose_dtype(dtype, config, device))
            tokenizer = _load_tokenizer(folder)
            return Checkpoint(model, tokenizer, fingerprint.result())


def _folder(path_or_name: str | os.PathLike[str]) -> Path:
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    looks_like_path = (
        os.path.isabs(folder) or str(path_or_name).startswith((".", "~")) or str(path_or_name).count("/") != 1
    )
    if folder.exists() or looks_like_path:
        raise ModelLoadError(
            f"no model folder at {str(path_or_name)!r}: give a folder with config.json and safetensors files"
        )
    from huggingface_hub import snapshot_download

    with _explained(path_or_name):
        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        return Path(snapshot_download(str(path_or_name), allow_patterns=wanted))


@contextmanager
def _explained(where: object) -> Iterator[None]:
    """Turn whatever a library raises about a checkpoint into one ModelLoadError."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelLoadError(
            f"the model {str(where)!r} cannot be loaded: {reason} "
            "(is the folder complete: config.json, *.safetensors, tokenizer.json?)"
        ) from error


def _load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    if not any(folder.glob("*.safetensors")):
        raise ModelLoadError(
            f"no *.safetensors file in {str(folder)!r}: pickled weights are not read, convert them first"
        )
    attention.register()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention.NAME, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(report["missing_keys"]) + [str(entry[0]) for entry in sorted(report["mismatched_keys"])]
    if missing:
        raise ModelLoadError(
            f"the weights in {str(folder)!r} do not fit its config.json: {len(missing)} are missing or of another "
            f"shape, such as {missing[0]}"
        )
    return model.to(device).eval()


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer; None where it has none, and then only token ids can be served."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ModelLoadError(f"the tokenizer in {str(folder)!r} has no tokenizer.json; convert it to the fast form")
    return tokenizer


def _choose_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelLoadError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
        return DTYPES[dtype]
    stored = getattr(config, "dtype", None) or torch.float32
    if device.type != "cpu":
        return stored
    # Without bf16 instructions a CPU converts at every product, which is slower than float32; float16 always is.
    native = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if stored == torch.bfloat16 and native else torch.float32


def _fingerprint(folder: Path) -> bytes:
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(len(file.name).to_bytes(8, "little") + file.name.encode() + content)
    return digest.digest()
