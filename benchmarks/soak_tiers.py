"""A soak of the tiers: questions without end, while the Redis server behind them is killed, hung, slowed and corrupted.

    python benchmarks/soak_tiers.py [--minutes 10] [--seed 1]

Every answer is compared with the one that the same engine gave without tiers; the engine is closed and opened anew now
and then. Ends with 1 if a token is wrong, a request fails, a lease or a slot is lost, or memory grows by more than a
tenth.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
import redis
import torch
from fault_proxy import FaultProxy
from redis_process import RedisProcess
from rich.console import Console
from rich.progress import Progress

from stemcache import Engine, SamplingParams
from stemcache.engine.checkpoint import Checkpoint, load_checkpoint
from stemcache.engine.cold import ColdOptions
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, random_corpus
from stemcache.engine.prompts import Prompts
from stemcache.engine.restoration import LoadBudget
from stemcache.engine.spill import ColdPolicy

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
POOL_BYTES = 4 << 20  # a few prompts
HOST_BYTES = 4 << 20
AT_A_TIME = 4
ENGINE_SECONDS = 45.0
GROWTH = 1.1


@dataclass
class Soaked:
    """What happened."""

    answers: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    restored: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    resident: list[int] = field(default_factory=list)
    longest_wait: float = 0.0
    longest_overrun: float = 0.0
    longest_step: float = 0.0


def questions(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts over a few corpora, so that beginnings are shared."""
    from transformers import AutoTokenizer

    prompts = Prompts(AutoTokenizer.from_pretrained(MODEL_PATH))
    corpora = [random_corpus(rng, 7, facts=4, fillers=3) for _ in range(8)]
    asked = []
    for _ in range(count):
        corpus = rng.choice(corpora)
        documents = [document.as_template_document() for document in corpus[: rng.randrange(3, 8)]]
        question = rng.choice(rng.choice(corpus).facts).question
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
        asked.append(prompts.encode_chat(messages, documents=documents))
    return asked


def tokens_of(engine: Engine, prompt: list[int]) -> list[int]:
    return [token for delta in engine.submit(prompt, GREEDY) for token in delta.token_ids]


class Chaos(threading.Thread):
    """Does something bad every few moments, and puts an end to it."""

    def __init__(self, server: RedisProcess, proxy: FaultProxy, result: Soaked, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self._server, self._proxy, self._result, self._rng = server, proxy, result, rng
        self._over = threading.Event()

    def run(self) -> None:
        faults = [self._kill, self._pause, self._tamper, self._corrupt, self._corrupt, self._flush]
        while not self._over.wait(self._rng.uniform(0.2, 3.0)):
            fault = self._rng.choice(faults)
            self._result.faults[fault.__name__.strip("_")] += 1
            with suppress(redis.RedisError):
                fault()

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _kill(self) -> None:
        self._server.kill()
        self._over.wait(self._rng.uniform(0, 2))
        self._server.start()

    def _pause(self) -> None:
        self._server.pause()
        self._over.wait(self._rng.uniform(0, 2))
        self._server.go_on()

    def _tamper(self) -> None:
        self._proxy.mode = self._rng.choice(["slow", "trickle", "cut"])
        self._over.wait(self._rng.uniform(0, 3))
        self._proxy.mode = "pass"

    def _flush(self) -> None:
        self._server.client().flushall()

    def _corrupt(self) -> None:
        """Flip a bit, cut short, or swap some values."""
        with self._server.client() as client:
            names = list(client.scan_iter("stemcache:*"))
            for name in self._rng.sample(names, min(len(names), 5)):
                value = client.get(name)
                if not value:
                    continue
                at = self._rng.randrange(len(value))
                match self._rng.choice(["flip", "cut", "swap"]):
                    case "flip":
                        flipped = bytes([value[at] ^ 1 << self._rng.randrange(8)])
                        client.set(name, value[:at] + flipped + value[at + 1 :])
                    case "cut":
                        client.set(name, value[:at])
                    case _:
                        client.set(self._rng.choice(names), value)


def soak(minutes: float, seed: int) -> Soaked:
    torch.set_num_threads(1)
    rng, result, process = random.Random(seed), Soaked(), psutil.Process()
    checkpoint = load_checkpoint(MODEL_PATH, device=torch.device("cpu"), dtype="float32")
    asked = questions(rng, 60)
    with Engine(checkpoint, "demo", pool_bytes=64 << 20) as plain:
        expected = [tokens_of(plain, prompt) for prompt in asked]
    end = time.monotonic() + 60 * minutes
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("soak", total=60 * minutes)
    with (
        RedisProcess("maxmemory 32mb", "maxmemory-policy allkeys-lru") as server,
        FaultProxy(server.port) as proxy,
        bar,
    ):
        chaos = Chaos(server, proxy, result, random.Random(seed + 1))
        chaos.start()
        while time.monotonic() < end:
            policy = rng.choice(list(ColdPolicy))
            for _ in one_engine(checkpoint, proxy.url, policy, asked, expected, result, end):
                result.resident.append(process.memory_info().rss)
                bar.update(task, completed=60 * minutes - (end - time.monotonic()))
        chaos.stop()
    return result


def one_engine(
    checkpoint: Checkpoint,
    url: str,
    policy: ColdPolicy,
    asked: list[list[int]],
    expected: list[list[int]],
    result: Soaked,
    end: float,
) -> Iterator[None]:
    """Ask one engine for a while; yields now and then. At its end nothing may be held."""
    cold = ColdOptions(url, HOST_BYTES, policy=policy, budget=LoadBudget(0.2, 0.5))
    end = min(end, time.monotonic() + ENGINE_SECONDS)
    with Engine(checkpoint, "demo", pool_bytes=POOL_BYTES, cold=cold) as engine:
        # The demo model computes as fast as it loads: without this little would be loaded.
        engine._loop.cold.cost.advises = lambda *asked: True  # type: ignore[method-assign]
        observe = engine.cost.observe

        def observed(work: list[tuple[int, int]], seconds: float) -> None:
            result.longest_step = max(result.longest_step, seconds)
            observe(work, seconds)

        engine.cost.observe = observed  # type: ignore[method-assign]
        arguments = [(engine, asked, expected, result, end, i) for i in range(AT_A_TIME)]
        threads = [threading.Thread(target=ask, args=each) for each in arguments]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            yield
        stats = engine.cold_stats()
        result.restored.update(stats.restored.tokens)
        result.longest_wait = max(result.longest_wait, stats.restored.longest_wait)
        result.longest_overrun = max(result.longest_overrun, stats.restored.overrun)
        for tier in stats.tiers:
            result.misses.update(tier.misses)
        engine.check()
        held = engine.stats().store
        result.answers["leaked"] += held.leases + held.claims + held.private_chunks


def ask(
    engine: Engine, asked: list[list[int]], expected: list[list[int]], result: Soaked, end: float, seed: int
) -> None:
    rng = random.Random(seed + time.monotonic_ns())
    while time.monotonic() < end:
        which = rng.randrange(len(asked))
        stream = engine.submit(asked[which], GREEDY)
        if rng.random() < 0.1:
            stream.cancel()
            result.answers["cancelled"] += 1
            continue
        try:
            tokens = [token for delta in stream for token in delta.token_ids]
        except Exception as error:
            result.answers[f"failed: {error}"] += 1
        else:
            result.answers["right" if tokens == expected[which] else "wrong"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    result = soak(options.minutes, options.seed)
    third = max(1, len(result.resident) // 3)
    parts = (result.resident[third : 2 * third], result.resident[-third:])
    early, late = (statistics.median(part) / 2**20 for part in parts)
    print(f"answers   {dict(result.answers)}")
    print(f"faults    {dict(result.faults)}")
    print(f"restored  {dict(result.restored)} tokens; misses {dict(result.misses)}")
    print(
        f"waits     {result.longest_wait:.2f} s at most for chunks, {result.longest_overrun:.2f} s over the budget; "
        f"the longest step, which is not interrupted, took {result.longest_step:.2f} s"
    )
    print(f"memory    {early:.0f} MiB in the second third, {late:.0f} MiB in the last")
    sound = result.answers.keys() <= {"right", "cancelled", "leaked"} and not result.answers["leaked"]
    return 0 if sound and result.answers["right"] and late < GROWTH * early else 1


if __name__ == "__main__":
    sys.exit(main())
