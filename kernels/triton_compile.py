"""Cross-compilation of the GPU kernels: what the compiler makes of every shipped configuration, without a GPU.

Invariant: what is compiled here is what `triton_backend` launches: same constants, same tiles, same stages.

    python -m stemcache.kernels.triton_compile [--arch 80 90 100] [--some]

prints a table of matrix instructions, shared memory, registers and stack (spilled registers lie on the stack) and fails
where one is off. Shared memory limits a block may use: CUDA C++ Programming Guide, compute capabilities.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from stemcache.kernels.triton_attend import attend_kernel
from stemcache.kernels.triton_backend import Tiles, attend_constants, tiles_for
from stemcache.kernels.triton_metadata import Geometry

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory a block may have, by compute capability."""
HEAD_DIMS = (64, 96, 128, 256)
MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
_POINTEE = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Configuration:
    """One compilation of the attention kernel. features: softcap, window and sinks all at once, or none of them."""

    arch: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    bits: int = 16
    group: int = 4
    chunk_tokens: int = 64
    features: bool = False
    large: bool = True
    small: bool = True

    def __str__(self) -> str:
        tiles = "+".join(name for name, used in (("large", self.large), ("small", self.small)) if used)
        words = [
            f"sm_{self.arch}",
            f"d{self.head_dim}",
            str(self.dtype).removeprefix("torch."),
            f"G{self.group}",
            tiles,
        ]
        words += [f"q{self.bits}"] * (self.bits < 16) + ["features"] * self.features
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Resources:
    """matrix: names of the matrix instructions. shared, stack: bytes. registers: of a thread."""

    matrix: tuple[str, ...]
    shared: int
    registers: int
    stack: int

    def faults(self, configuration: Configuration) -> list[str]:
        """Why this must not ship; empty if it may."""
        found = []
        if not self.matrix and configuration.dtype != torch.float32:
            found.append("no matrix instructions")
        if self.shared > SHARED_LIMIT[configuration.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[configuration.arch]} may be had")
        if self.stack:
            found.append(f"{self.stack} bytes spilled")
        return found


def shipped(archs: Iterable[int], *, every: bool = True) -> Iterator[Configuration]:
    """All configurations, or the few that need most: the two tiles in one launch, the widest heads, all features."""
    for arch in archs:
        if not every:
            yield Configuration(arch, 128)
            yield Configuration(arch, 128, bits=4, features=True)
            yield Configuration(arch, 256, features=True)
            continue
        for head_dim in HEAD_DIMS:
            for features in (False, True):
                for bits in (16, 8, 4):
                    yield Configuration(arch, head_dim, bits=bits, features=features)
            yield Configuration(arch, head_dim, large=False)
            yield Configuration(arch, head_dim, small=False)
            for group in (1, 8):
                yield Configuration(arch, head_dim, group=group, features=True)
            yield Configuration(arch, head_dim, dtype=torch.float16)
            yield Configuration(arch, head_dim, dtype=torch.float32)


def compile_attention(configuration: Configuration, tiles: Tiles | None = None) -> Resources:
    """Compile for the configuration's chip and read the resources off the PTX and the binary; the larger of the two
    kernels' where the tiles go in two launches. tiles: others than the shipped, to try them."""
    c = configuration
    tiles = tiles or tiles_for(c.head_dim, c.dtype.itemsize, c.bits, c.arch)
    if c.large and c.small and not tiles.one_launch:
        first = compile_attention(replace(c, small=False), tiles)
        second = compile_attention(replace(c, large=False), tiles)
        return Resources(
            tuple(sorted({*first.matrix, *second.matrix})),
            max(first.shared, second.shared),
            max(first.registers, second.registers),
            max(first.stack, second.stack),
        )
    constants = attend_constants(
        Geometry(8, c.group, tiles.large, tiles.small),
        c.head_dim,
        c.chunk_tokens,
        tiles,
        large=c.large,
        small=c.small,
        bits=c.bits,
        softcap=c.features,
        window=c.features,
        sinks=c.features,
    )
    value = "*" + _POINTEE[c.dtype]
    types = {"query": value, "pool": {16: value, 8: "*i8", 4: "*u8"}[c.bits], "scales": "*fp32", "out": value}
    types |= {"part_out": "*fp32", "part_lse": "*fp32", "step": "*i32", "sinks": value}
    types |= dict.fromkeys(("n_chunks", "row_stride", "head_stride", "window"), "i32")
    types |= {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(constants, "constexpr")
    names = attend_kernel.arg_names
    signature = {name: types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name.endswith("_stride")]
    source = ASTSource(
        attend_kernel,
        signature,
        constexprs={(names.index(name),): constant for name, constant in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    kernel = compile(source, target=GPUTarget("cuda", c.arch, 32), options=options)
    registers, stack = _usage(kernel.asm["cubin"])
    matrix = tuple(sorted(set(MATRIX.findall(kernel.asm["ptx"]))))
    return Resources(matrix, int(kernel.metadata.shared), registers, stack)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Function attend_kernel:\s*REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of attend_kernel: {text!r}")
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=list(SHARED_LIMIT))
    parser.add_argument("--some", action="store_true", help="only the configurations that need most")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    arguments = parser.parse_args()
    faulty = 0
    for configuration in shipped(arguments.arch, every=not arguments.some):
        resources = compile_attention(configuration)
        faults = resources.faults(configuration)
        faulty += bool(faults)
        if arguments.json:
            print(json.dumps({"configuration": str(configuration), **asdict(resources), "faults": faults}), flush=True)
        else:
            matrix = ",".join(resources.matrix) or "-"
            line = (
                f"{matrix:28} shared {resources.shared:6} registers {resources.registers:3} stack {resources.stack:4}"
            )
            print(f"{configuration!s:40} {line}  {'; '.join(faults)}", flush=True)
    sys.exit(1 if faulty else 0)


if __name__ == "__main__":
    main()
