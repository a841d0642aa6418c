"""What was measured so far, in a file: a run that was broken off can go on where it stopped.

Invariant: a server's rounds of a workload are in order and without gaps, so rounds of the same number are compared; the
file is as complete as memory whenever a round of one server has ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from harness import RESULTS, record, write_results

from peers.report import Round


class SavedRunError(Exception):
    """There is no saved run, or it is of other settings; the message says which."""


@dataclass(slots=True)
class Measured:
    """One run. setup: what has to be equal for a run to go on (shape, dtype, sizes, memory). versions: by server.

    ready_seconds: from the first start of each. peak_mb: most memory that each held. rounds, failures: by workload and
    server; a server that failed at a workload has no further rounds of it. machine: see harness.record.
    """

    setup: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    ready_seconds: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, dict[str, list[Round]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=record)

    @classmethod
    def load(cls, shape: str, dtype: str) -> Self:
        """The last run of that shape and dtype. Raises SavedRunError."""
        path = RESULTS / f"{_name(shape, dtype)}.json"
        if not path.exists():
            raise SavedRunError(f"there is no {path}: start a run without --resume")
        return cls(**json.loads(path.read_text()))

    def require_setup(self, setup: Mapping[str, Any]) -> None:
        """Raise SavedRunError unless this run is of that setup."""
        mine, asked = json.loads(json.dumps(self.setup)), json.loads(json.dumps(setup))
        if mine != asked:
            changed = [name for name in asked if mine.get(name) != asked[name]]
            raise SavedRunError(f"the saved run has another {', '.join(changed)}: start a run without --resume")

    def save(self) -> None:
        """Write it to results/peers-<shape>-<dtype>.json."""
        write_results(_name(self.setup["shape"], self.setup["dtype"]), asdict(self))

    def lacks(self, workload: str, server: str, round_: int) -> bool:
        """Whether this round is the next that the server has to do."""
        done = len(self.rounds.get(workload, {}).get(server, ()))
        return done == round_ and server not in self.failures.get(workload, {})

    def add(self, workload: str, server: str, figures: Round) -> None:
        """The server's next round."""
        self.rounds.setdefault(workload, {}).setdefault(server, []).append(figures)

    def fail(self, workload: str, server: str, reason: str) -> None:
        """The server cannot do the workload."""
        self.failures.setdefault(workload, {})[server] = reason


def _name(shape: str, dtype: str) -> str:
    return f"peers-{shape}-{dtype}"
