"""A step on the device: its metadata and the workspace for partial results, used by every layer.

Invariant: one host-to-device copy a step, from pinned memory, and nothing waits for the device. A `StepBuffers` has
fixed
addresses: a captured graph that reads them sees whatever step was loaded last, as long as it fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stemcache.kernels.plan import AttentionPlan
from stemcache.kernels.triton_metadata import Geometry, StepMetadata


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a launch needs to know.

    words: int32 on the device, see triton_metadata. part_out: float32[parts, q_heads, head_dim]; part_lse:
    float32[parts, q_heads]. n_rows, n_pieces: for how many to launch; at least the step's. large, small: whether
    pieces of that tile may exist. merges: whether any row has several pieces.
    """

    words: Tensor
    part_out: Tensor
    part_lse: Tensor
    n_rows: int
    n_pieces: int
    large: bool
    small: bool
    merges: bool


@dataclass(frozen=True, slots=True)
class StepKey:
    """Under which a plan keeps its step: layers of equal shape share it."""

    device: torch.device
    geometry: Geometry
    head_dim: int

    @property
    def q_heads(self) -> int:
        return self.geometry.kv_heads * self.geometry.group


def step_of(plan: AttentionPlan, key: StepKey) -> Step:
    """The plan's step: the one that a `StepBuffers` loaded, or else one of its own, made on first use."""
    return plan.derived(("triton step", key), lambda: _own_step(plan, key))


def slots_of(plan: AttentionPlan, device: torch.device) -> Tensor:
    """Words whose header and `slots` are the plan's: any step's where there is one already, or else those alone."""
    return plan.derived(("triton slots", device), lambda: _upload(StepMetadata.slots_only(plan).words, device))


class StepBuffers:
    """Fixed buffers for the steps of one shape: metadata, staging memory and workspace, allocated once.

    n_rows, n_words, n_parts: what a step may need at most. `programs` of the geometry bounds the launches, whatever the
    step. Two pinned staging buffers alternate, so that the next step can be packed while the copy of the last one runs.
    """

    def __init__(self, key: StepKey, *, n_rows: int, n_words: int, n_parts: int) -> None:
        on_gpu = key.device.type == "cuda"
        self.key = key
        self.n_rows, self.n_words, self.n_parts = n_rows, n_words, n_parts
        self._staging = [torch.zeros(n_words, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # type: ignore[no-untyped-call]
        self._turn = 0
        self.step = Step(
            words=torch.zeros(n_words, dtype=torch.int32, device=key.device),
            part_out=torch.zeros(n_parts, key.q_heads, key.head_dim, device=key.device),
            part_lse=torch.zeros(n_parts, key.q_heads, device=key.device),
            n_rows=n_rows,
            n_pieces=key.geometry.programs,
            large=True,
            small=key.geometry.small > 0,
            merges=True,
        )

    def fits(self, metadata: StepMetadata) -> bool:
        return (
            metadata.n_rows <= self.n_rows and len(metadata.words) <= self.n_words and metadata.n_parts <= self.n_parts
        )

    def pack(self, plan: AttentionPlan) -> StepMetadata:
        """Host work only: may run for the next step while the device computes this one. Raises ValueError if the step
        does not fit, naming what it needs."""
        metadata = StepMetadata.build(plan, self.key.geometry)
        if not self.fits(metadata):
            raise ValueError(
                f"a step of {metadata.n_rows} rows, {len(metadata.words)} words and {metadata.n_parts} partials "
                f"does not fit buffers of {self.n_rows}, {self.n_words} and {self.n_parts}: "
                "run it without them, or allocate larger ones"
            )
        return metadata

    def load(self, plan: AttentionPlan, metadata: StepMetadata | None = None) -> None:
        """Copy the plan's metadata to the device, in the current stream, and make the plan's layers use it.

        Only the words in use are copied. The one wait is for the copy of two steps ago to have left its staging buffer.
        """
        metadata = metadata or self.pack(plan)
        staging = self._staging[self._turn]
        if self._copied:
            self._copied[self._turn].synchronize()
        n = len(metadata.words)
        staging.numpy()[:n] = metadata.words
        self.step.words[:n].copy_(staging[:n], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
        self._turn = 1 - self._turn
        self.attach(plan)

    def attach(self, plan: AttentionPlan) -> None:
        """Make the layers that are given this plan read these buffers: what a graph is captured with.

        Raises ValueError if the plan has been computed with before.
        """
        if plan.derived(("triton step", self.key), lambda: self.step) is not self.step:
            raise ValueError("this plan's layers have a step of their own already: load it before its first attention")
        plan.derived(("triton slots", self.key.device), lambda: self.step.words)


def _own_step(plan: AttentionPlan, key: StepKey) -> Step:
    metadata = StepMetadata.build(plan, key.geometry)
    shape = (max(1, metadata.n_parts), key.q_heads)
    return Step(
        words=_upload(metadata.words, key.device),
        part_out=torch.empty(*shape, key.head_dim, device=key.device),
        part_lse=torch.empty(shape, device=key.device),
        n_rows=metadata.n_rows,
        n_pieces=metadata.n_large + metadata.n_small,
        large=metadata.n_large > 0,
        small=metadata.n_small > 0,
        merges=metadata.n_parts > 0,
    )


def _upload(words: np.ndarray[tuple[int], np.dtype[np.int32]], device: torch.device) -> Tensor:
    """Through pinned memory, which torch keeps until the copy has been made."""
    host = torch.from_numpy(words)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
