"""What a step has freed is used again, by all threads: page faults and memory of processes that take and free as much
as prefills do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from stemcache.engine import freed_memory as ours
from stemcache.engine.packed import can_pack

FAULTS = """
import resource, sys
import numpy as np
from stemcache.engine.freed_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for round in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    some = [np.ones(5 << 20, np.float32) for _ in range(3)]
    del some
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

ARENAS = """
import sys, threading
import numpy as np
import psutil
from stemcache.engine import freed_memory

freed_memory.ARENAS = int(sys.argv[1])
freed_memory.keep_freed_memory()
turn, done, leave = threading.Lock(), threading.Barrier(9), threading.Event()

def work():
    with turn:  # no two of them hold memory at a time
        some = [np.ones(1 << 20, np.float32) for _ in range(8)]
        del some
    done.wait()
    leave.wait()

before = psutil.Process().memory_info().rss
for _ in range(8):
    threading.Thread(target=work).start()
done.wait()
print(psutil.Process().memory_info().rss - before >> 20)
leave.set()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings: other systems have other allocators")


def said_by(program: str, argument: str) -> int:
    """The number that a program prints, with glibc's own settings."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", program, argument]
    return int(subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_kept() -> None:
    """Of the last round, which takes 60 MB. A page has 4 KiB."""
    assert said_by(FAULTS, "kept") < 1_000 < said_by(FAULTS, "as delivered")


def test_freed_memory_is_kept_once_for_all_threads() -> None:
    """In MiB, after eight threads have had 32 each, one after the other."""
    assert said_by(ARENAS, str(ours.ARENAS)) < 100 < 200 < said_by(ARENAS, "8")


STEPS = """
import sys
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
from stemcache import Engine, SamplingParams
from stemcache.engine import runner
from stemcache.kernels import products

products.is_preferred = lambda: False  # whose kernel is one for all numbers of rows
runner.NEW_ROW_COUNTS = int(sys.argv[1])
config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
with Engine.from_model(model, pool_bytes=1 << 24) as engine:
    def resident(lengths):
        for n in lengths:
            list(engine.generate([[n % 64] * n], SamplingParams(max_tokens=1, temperature=0)))
            engine.clear_cache()
        return psutil.Process().memory_info().rss / 2**20
    before = resident(range(1, 10))
    print(resident(range(100, 420)) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that gives freed memory back, which is Linux's")
@pytest.mark.skipif(
    not can_pack(torch.bfloat16), reason="without packed bfloat16 products oneDNN makes no kernels for this model"
)
def test_prompts_of_many_lengths_leave_little_behind() -> None:
    """A kernel for each number of rows: what making it took is given back now and then, or never."""
    grown = []
    for new_row_counts in ("32", "1000000"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", STEPS, new_row_counts]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        grown.append(float(run.stdout))
    assert grown[0] < 0.8 * grown[1], grown  # 445 and 707 MiB; what is left are kernels that are kept
