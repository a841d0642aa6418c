"""What loads a model leaves no thread behind that computes: the engine's own are the only ones of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stemcache.engine.apart import apart

TEAMS = """
import os, sys, threading, time
import torch
from stemcache import Engine, SamplingParams
from stemcache.engine.apart import apart
from stemcache.engine.demo import MODEL_PATH

def native():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def settled(expected):  # a thread that ends is gone a little later
    for _ in range(100):
        if native() <= expected:
            break
        time.sleep(0.02)
    return native()

def parallel():
    torch.ones(1 << 20).add_(1)

before = native()
(apart if sys.argv[1] == "apart" else lambda function: function())(parallel)
print(settled(before) - before)
with Engine.load(MODEL_PATH, pool_bytes=1 << 24) as engine:
    print(settled(before) - before)
    list(engine.generate([list(range(4, 900))], SamplingParams(max_tokens=2)))
    print(native() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="native threads are counted in /proc, which only Linux has")
@pytest.mark.parametrize(("how", "left"), [("apart", 0), ("here", 1)])
def test_teams_of_threads(how: str, left: int) -> None:
    """`here`: that the count would notice a team that is left."""
    environment = {"OMP_NUM_THREADS": "2", "PATH": "", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(
        [sys.executable, "-c", TEAMS, how], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert [int(each) for each in run.stdout.split()] == [left, left, left + 1]


def test_what_is_raised_comes_out() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)
    assert apart(lambda: 7) == 7
