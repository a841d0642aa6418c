"""The turns: in a round of a workload every server does the same work, while the others stand still.

Invariant: no two servers run at the same time once all have started; what one has done is saved before the next begins.
"""

from __future__ import annotations

import random
import time
from asyncio import sleep, timeout
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx

from peers.checkpoint import text_of
from peers.commands import Peer, Settings
from peers.drive import AnswerError, Client
from peers.measured import Measured
from peers.report import Round
from peers.server import Server
from peers.workloads import Sizes, Workload
from stemcache.api.server_process import ServerStartError

TURN_SECONDS = 240.0
"""What a server may take for one round of a workload, beyond which it has failed at it."""
SETTLE_SECONDS = 0.5
"""Without growth of its memory, after which a server that has been started counts as settled."""


@dataclass(slots=True)
class Contestant:
    """A peer and its running server."""

    peer: Peer
    server: Server
    model: str

    @property
    def name(self) -> str:
        return self.peer.name

    async def warm_up(self) -> None:
        """One short request: what a server prepares on its first one is not what a cold prompt costs.

        Then wait until it takes no more memory: ours fills its pool meanwhile, which a sharer would be charged with.
        """
        async with self._client() as client, timeout(TURN_SECONDS):
            await client.ask(text_of(random.Random(self.name), 64), 4)
            held = 0
            while held < (held := self.server.memory_bytes()):
                await sleep(SETTLE_SECONDS)

    async def turn(self, workload: Workload, round_: int, sizes: Sizes) -> Round:
        """One round of a workload, with the machine to itself. Raises what a server that fails raises."""
        rng = random.Random(f"{workload.name} {round_}")
        self.server.resume()
        try:
            async with self._client() as client, timeout(TURN_SECONDS):
                return await workload.run(client, self.server, rng, sizes)
        finally:
            self.server.pause()

    def _client(self) -> Client:
        return Client(self.server.url, self.model, honours_n=self.peer.honours_n)


FAILURES = (AnswerError, ServerStartError, httpx.HTTPError, TimeoutError, OSError)


async def start(stack: ExitStack, peers: Sequence[Peer], settings: Settings, measured: Measured) -> list[Contestant]:
    """Start those that are installed, one after the other, and leave each paused."""
    started = []
    for peer in peers:
        name = peer.name
        if not peer.is_installed:
            say(f"{name} is left out, as it is not installed: `make peers-install`")
            continue
        contestant = Contestant(peer, stack.enter_context(peer.server(settings)), peer.model(settings))
        try:
            measured.ready_seconds[name] = contestant.server.start()
            await contestant.warm_up()
        except FAILURES as error:
            say(f"{name} is left out: {reason_of(error)}")
            contestant.server.stop()
            continue
        measured.versions[name] = peer.version()
        say(f"{name} {measured.versions[name]} was ready after {measured.ready_seconds[name]:.1f} s")
        contestant.server.pause()
        started.append(contestant)
    return started


@dataclass(slots=True)
class Contest:
    """rounds: of each workload. minutes: after which no further round begins but each workload's first.
    save: called after every turn."""

    contestants: list[Contestant]
    measured: Measured
    sizes: Sizes
    rounds: int
    minutes: float
    save: Callable[[], None]
    began: float = field(default_factory=time.monotonic)

    async def run(self, workloads: Sequence[Workload]) -> None:
        """All rounds that `measured` lacks. First one of everything, so that what is broken off is a whole table, but
        for what every server does alone: that comes last."""
        lasted: dict[str, float] = {}
        for round_ in range(self.rounds):
            for workload in workloads:
                if workload.alone:
                    continue
                before = time.monotonic()
                if round_ and (before - self.began + lasted.get(workload.name, 0)) / 60 > self.minutes:
                    say(f"round {round_ + 1}, {workload.name}: no time is left for it")
                    continue
                await self._round(workload, round_)
                lasted[workload.name] = time.monotonic() - before
        for workload in workloads:
            if workload.alone:
                await self._alone(workload)

    async def _round(self, workload: Workload, round_: int) -> None:
        """Every server's turn; each round another one begins."""
        first = round_ % max(1, len(self.contestants))
        for each in [*self.contestants[first:], *self.contestants[:first]]:
            if self._is_due(workload, each, round_) and not await self._turn(workload, each, round_):
                await self._restart(each)

    async def _alone(self, workload: Workload) -> None:
        """The one round of a workload for which no other server may be in memory. It ends them all."""
        for each in self.contestants:
            each.server.stop()
        for each in self.contestants:
            if self._is_due(workload, each, 0):
                await self._turn(workload, each, 0)
                each.server.stop()

    def _is_due(self, workload: Workload, contestant: Contestant, round_: int) -> bool:
        name = contestant.name
        return name not in workload.without and self.measured.lacks(workload.name, name, round_)

    async def _turn(self, workload: Workload, each: Contestant, round_: int) -> bool:
        """A server's turn; whether it managed it."""
        began = time.monotonic()
        try:
            self.measured.add(workload.name, each.name, await each.turn(workload, round_, self.sizes))
            failure = None
        except FAILURES as error:
            failure = reason_of(error)
            self.measured.fail(workload.name, each.name, failure)
        if failure is None:
            say(f"round {round_ + 1}, {workload.name}: {each.name}, {time.monotonic() - began:.1f} s")
        else:
            say(f"{each.name} fails at {workload.name}: {failure}")
        peak = each.server.peak_bytes() / 1e6
        self.measured.peak_mb[each.name] = max(self.measured.peak_mb.get(each.name, 0), peak)
        self.save()
        return failure is None

    async def _restart(self, contestant: Contestant) -> None:
        """After a failure it may still be busy with what it failed at."""
        contestant.server.stop()
        try:
            contestant.server.start()
            await contestant.warm_up()
        except FAILURES as error:
            say(f"{contestant.name} is left out from here on: {reason_of(error)}")
            contestant.server.stop()
            self.contestants.remove(contestant)
        else:
            contestant.server.pause()


def reason_of(error: BaseException) -> str:
    """In one line, with the end of what a server printed; a time limit says nothing of itself."""
    if isinstance(error, TimeoutError):
        return f"it took more than {TURN_SECONDS:.0f} s"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 500 else f"{text[:100]} [...] {text[-390:]}"


def say(text: str) -> None:
    """Progress, also where nobody sees it at once."""
    print(text, flush=True)
