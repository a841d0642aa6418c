"""The GPU kernels on blocks A to I (see kernel_workloads.py), against the bound and against other kernels.

    python benchmarks/kernels.py            everything, at most nine minutes; needs a GPU
    python benchmarks/kernels.py --plans    only what needs none: what each step's plan shares, and what planning costs

Each kernel is captured in a CUDA graph. Cold: the second-level cache is overwritten before each replay; warm: eight
calls a graph. Medians. The bound is the longer of the bytes that must move at the measured copy rate and the
operations at the measured rate of a large matrix product. Errors are against float64, relative to the largest
output, over some of the sequences. Planning is host time a step, apart. Writes results/kernels-<gpu>.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import harness
import torch
from kernel_peers import Inputs, Run, UnsupportedError, peers
from kernel_workloads import CHUNK, Workload, blocks, dynamics
from torch import Tensor

from stemcache.kernels.attention import attend, triton_backend
from stemcache.kernels.plan import AttentionPlan, Sharing
from stemcache.kernels.triton_metadata import Geometry, StepMetadata, gpu_sharing

REPEATS, WARM_CALLS = 200, 8
ERROR_SEQUENCES = 4


@dataclass(frozen=True)
class Ceilings:
    """What this GPU was measured to do: bytes a second of a copy, operations a second of a matrix product in
    bfloat16."""

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls) -> Ceilings:
        source = torch.zeros(1 << 29, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(source)
        copy = _graph_seconds(lambda: target.copy_(source), None, repeats=20)
        left, right = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
        product = _graph_seconds(lambda: left @ right, None, repeats=20)
        return cls(2 * source.nbytes / copy, 2 * 8192**3 / product)

    def bound(self, workload: Workload) -> float:
        """Seconds that a layer of the workload takes at least."""
        return max(workload.bytes_needed() / self.bandwidth, workload.operations() / self.rate)


def plan_of(workload: Workload, sharing: Sharing | None = None) -> AttentionPlan:
    sharing = sharing or gpu_sharing(group=workload.q_heads // workload.kv_heads)
    return AttentionPlan.build(workload.sequences, chunk_tokens=CHUNK, sharing=sharing)


def unshared() -> Sharing:
    """A rule that never shares: plain split-KV decode by the same kernel."""
    return Sharing(fixed_tokens=1 << 62)


def inputs_of(workload: Workload, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, workload.dtype)
    shape = (2, workload.kv_heads, workload.chunks, CHUNK, workload.head_dim)
    pool = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
    query = torch.empty(workload.rows, workload.q_heads, workload.head_dim, dtype=dtype, device=device)
    return Inputs(workload, query.normal_(generator=generator), pool)


def ours(inputs: Inputs, plan: AttentionPlan, *, one_launch: bool = True) -> Run:
    """Our kernel over a plan."""
    backend: Any = triton_backend()
    shipped = backend.tiles_for(inputs.query.shape[2], inputs.query.element_size(), 16, _arch(inputs.query.device))
    chosen = replace(shipped, one_launch=one_launch)
    return lambda: backend.attend(inputs.query, inputs.pool, plan, scale=inputs.scale, tiles=chosen)


def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def error_of(output: Tensor, inputs: Inputs) -> float:
    """Greatest difference from float64 attention over a few sequences, relative to the largest output."""
    sequences = inputs.workload.sequences
    step = max(1, len(sequences) // ERROR_SEQUENCES)
    chosen, rows, row = [], [], 0
    for i, s in enumerate(sequences):
        if i % step == 0:
            chosen.append(s)
            rows += range(row, row + s.stop - s.start)
        row += s.stop - s.start
    index = torch.tensor(rows, device=output.device)
    plan = AttentionPlan.build(chosen, chunk_tokens=CHUNK)
    exact = _reference(inputs, index, plan)
    return float((output[index].float() - exact).abs().max() / exact.abs().max())


def _reference(inputs: Inputs, index: Tensor, plan: AttentionPlan) -> Tensor:
    """Float64 attention without the last rounding: over a copy, in float32, of the few chunks it reads."""
    ids = torch.unique(torch.cat([torch.from_numpy(s.chunks).long() for s in plan.sequences]))
    place = torch.zeros(int(ids.max()) + 1, dtype=torch.int32)
    place[ids] = torch.arange(len(ids), dtype=torch.int32)
    moved = [type(s)(place[torch.from_numpy(s.chunks).long()].numpy(), s.start, s.stop) for s in plan.sequences]
    pool = inputs.pool.index_select(2, ids.to(inputs.pool.device)).float()
    return attend(
        inputs.query[index].float(),
        pool,
        AttentionPlan.build(moved, chunk_tokens=CHUNK),
        scale=inputs.scale,
        backend="reference",
    )


def _graph_seconds(run: Callable[[], object], flush: Tensor | None, *, repeats: int = REPEATS, calls: int = 1) -> float:
    """Median seconds of a call, captured in a graph of `calls` calls; `flush` is overwritten before each replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        if flush is not None:
            flush.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1000 / calls


def measure(workload: Workload, ceilings: Ceilings, flush: Tensor) -> dict[str, Any]:
    inputs = inputs_of(workload, "cuda")
    plan = plan_of(workload)
    kernels: dict[str, Callable[[], Run]] = {
        "stemcache": lambda: ours(inputs, plan),
        "two launches": lambda: ours(inputs, plan, one_launch=False),
        "unshared": lambda: ours(inputs, plan_of(workload, unshared())),
        **{name: (lambda make=make: make(inputs)) for name, make in peers().items()},
    }
    bound = ceilings.bound(workload)
    columns: dict[str, Any] = {}
    for name, make in kernels.items():
        try:
            run = make()
            columns[name] = {"error": error_of(run(), inputs)}
            columns[name]["cold"] = cold = _graph_seconds(run, flush)
            columns[name]["warm"] = _graph_seconds(run, None, repeats=REPEATS // WARM_CALLS, calls=WARM_CALLS)
            columns[name]["share_of_bound"] = bound / cold
            columns[name]["bytes_per_second"] = workload.bytes_needed() / cold
        except UnsupportedError as reason:
            columns[name] = {"left_out": str(reason)}
        except Exception as error:  # a peer that breaks must not take the others with it; its text is in the results
            columns[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            torch.cuda.synchronize()
    return {"workload": workload.label, "bound": bound, "kernels": columns, **planning(workload)}


def planning(workload: Workload) -> dict[str, Any]:
    """Host seconds of a step's plan and metadata, and what the plan shares."""
    group = workload.q_heads // workload.kv_heads
    cut = Geometry(workload.kv_heads, group, small=16 if group <= 16 else 0)
    timing = harness.interleave(
        {"plan": lambda: plan_of(workload), "metadata": lambda: StepMetadata.build(plan_of(workload), cut)},
        repeats=5,
        clock=time.process_time,  # one thread, and others' work is not its own
    )
    plan = plan_of(workload)
    metadata = StepMetadata.build(plan, cut)
    return {
        "plan_seconds": timing["plan"].median,
        "plan_and_metadata_seconds": timing["metadata"].median,
        "shared_items": sum(item.shared for item in plan.items),
        "pieces": metadata.n_large + metadata.n_small,
        "partials": metadata.n_parts,
        "metadata_bytes": metadata.words.nbytes,
    }


def measure_dynamics(steps: int = 512) -> dict[str, Any]:
    """Block I: how long planning takes from step to step, and how large buffers must be to serve all of them."""
    rule, cut = gpu_sharing(group=4), Geometry(8, 4)
    seconds, words, parts = [], [], []
    for sequences in dynamics(steps=steps):
        begin = time.process_time()
        metadata = StepMetadata.build(AttentionPlan.build(sequences, chunk_tokens=CHUNK, sharing=rule), cut)
        seconds.append(time.process_time() - begin)
        words.append(len(metadata.words))
        parts.append(metadata.n_parts)
    return {
        "steps": steps,
        "median_seconds": statistics.median(seconds),
        "worst_seconds": max(seconds),
        "most_words": max(words),
        "most_partials": max(parts),
    }


def cell(column: dict[str, Any]) -> str:
    if "cold" in column:
        return f"{column['cold'] * 1e6:.1f} ({column['warm'] * 1e6:.1f})"
    return "failed" if "failed" in column else "-"


def gpu_main(minutes: float) -> None:
    deadline = time.monotonic() + 60 * minutes
    ceilings = Ceilings.measure()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    results, left_out = [], []
    for workload in blocks():
        if time.monotonic() > deadline:
            left_out.append(workload.label)
            continue
        results.append(measure(workload, ceilings, flush))
        torch.cuda.empty_cache()
    names = list(results[0]["kernels"])
    rows = [
        [r["workload"], f"{r['bound'] * 1e6:.1f}", *(cell(r["kernels"][name]) for name in names),
         f"{r['plan_and_metadata_seconds'] * 1e6:.0f}"]
        for r in results
    ]  # fmt: skip
    print(harness.table(["us cold (warm)", "bound", *names, "plan"], rows))
    device: Any = torch.cuda.get_device_properties(0)
    payload = {
        "gpu": device.name,
        "bandwidth": ceilings.bandwidth,
        "operations_per_second": ceilings.rate,
        "results": results,
        "left_out": left_out,
        "dynamics": measure_dynamics(),
    }
    print(harness.write_results(f"kernels-{device.name.lower().replace(' ', '-')}", payload))


def plans_main(limit: int | None) -> None:
    rows = []
    for workload in blocks()[:limit]:
        found = planning(workload)
        mib = workload.bytes_needed() / 2**20
        times = [f"{found[name] * 1e6:.0f}" for name in ("plan_seconds", "plan_and_metadata_seconds")]
        counts = [found[name] for name in ("shared_items", "pieces", "partials", "metadata_bytes")]
        rows.append([workload.label, f"{mib:.0f}", *counts, *times])
    header = ["workload", "MiB", "shared items", "pieces", "partials", "metadata bytes", "plan us", "with metadata us"]
    print(harness.table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", action="store_true", help="only planning, without a GPU")
    parser.add_argument("--limit", type=int, help="with --plans: only so many workloads")
    parser.add_argument("--minutes", type=float, default=8.0, help="no workload is begun after this")
    arguments = parser.parse_args()
    if arguments.plans:
        plans_main(arguments.limit)
    elif torch.cuda.is_available():
        gpu_main(arguments.minutes)
    else:
        parser.error("there is no GPU here: try --plans")


if __name__ == "__main__":
    main()
