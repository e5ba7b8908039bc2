# SPDX-License-Identifier: Apache-2.0
"""The states of a device and the transitions between them.

    opening ──> ready ──> attached <──> recovering
       │          │        │  │  ▲          │
       │          │        │  │  └─ failed <┘
       ▼          ▼        ▼  ▼       │
     closed <── draining <────┴───────┘        orphaned ──> recovering

opening     the worker opens the image
ready       the image is open, the kernel does not have it yet
attached    the kernel has the device and a worker serves it
recovering  the worker died; the kernel holds requests back until a successor serves
draining    the kernel lets go; the image is being closed
closed      nothing is left of it
failed      nobody serves it and no further try is made; the live state is kept
orphaned    an earlier fvdd left it, and nothing is touched until its adoption is asked for

Every change goes through `Life.move`, which refuses what the table does not have, logs, and counts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Final

from fvdapi.models import DeviceState
from fvdd.log import fields

log = logging.getLogger("fvdd.devices")

S = DeviceState

TRANSITIONS: Final[dict[DeviceState, frozenset[DeviceState]]] = {
    S.OPENING: frozenset({S.READY, S.CLOSED, S.FAILED}),
    S.READY: frozenset({S.ATTACHED, S.DRAINING}),
    S.ATTACHED: frozenset({S.RECOVERING, S.DRAINING, S.FAILED}),
    S.RECOVERING: frozenset({S.ATTACHED, S.DRAINING, S.FAILED}),
    S.DRAINING: frozenset({S.CLOSED, S.FAILED}),
    S.FAILED: frozenset({S.RECOVERING, S.DRAINING}),
    S.CLOSED: frozenset(),
    S.ORPHANED: frozenset({S.RECOVERING}),
}

# Nobody serves the device, and its requests wait.
STALLED: Final = frozenset({S.RECOVERING, S.FAILED, S.ORPHANED})

LEVELS: Final = {S.FAILED: logging.ERROR, S.RECOVERING: logging.WARNING}

# How often each transition was made, for the metrics: (from, to) -> count. A counter that appears
# with its first event hides it from every rate, so all are there from the start.
COUNTS: Final[Counter[tuple[str, str]]] = Counter(
    {(before.value, after.value): 0 for before, afters in TRANSITIONS.items() for after in afters}
)


class WrongTransition(Exception):
    """A defect of fvdd: a state change that the table does not have."""


class Life:
    """The state of one device, and the reason for it where it needs one."""

    def __init__(
        self, name: str, state: DeviceState = S.OPENING, reason: str | None = None
    ) -> None:
        self._name = name
        self.state = state
        self.reason = reason
        self._stalled_before = 0.0
        self._stalled_since = time.monotonic() if state in STALLED else None

    @property
    def stalled_seconds(self) -> float:
        """How long nobody has served the device so far, this moment included."""
        since = self._stalled_since
        return self._stalled_before + (time.monotonic() - since if since is not None else 0.0)

    def move(self, to: DeviceState, reason: str | None = None) -> None:
        """Change the state; `reason` is kept until the next change."""
        if to not in TRANSITIONS[self.state]:
            raise WrongTransition(f"{self._name}: {self.state.value} -> {to.value}")
        COUNTS[(self.state.value, to.value)] += 1
        level = LEVELS.get(to, logging.INFO)
        extra = fields(name=self._name, previous=self.state.value, state=to.value)
        if reason is not None:
            extra = fields(
                name=self._name, previous=self.state.value, state=to.value, reason=reason
            )
        log.log(level, "device state", extra=extra)
        self._stalled_before = self.stalled_seconds
        self._stalled_since = time.monotonic() if to in STALLED else None
        self.state = to
        self.reason = reason
