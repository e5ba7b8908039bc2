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
orphaned    an earlier fvdd left it, and it is not adopted: nothing is touched

Every change goes through `Life.move`, which refuses what the table does not have, logs, and counts.
"""

from __future__ import annotations

import logging
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

    def move(self, to: DeviceState, reason: str | None = None) -> None:
        """Change the state; `reason` is kept until the next change."""
        if to not in TRANSITIONS[self.state]:
            raise WrongTransition(f"{self._name}: {self.state.value} -> {to.value}")
        COUNTS[(self.state.value, to.value)] += 1
        level = logging.ERROR if to is S.FAILED else logging.INFO
        extra = fields(name=self._name, previous=self.state.value, state=to.value)
        if reason is not None:
            extra = fields(
                name=self._name, previous=self.state.value, state=to.value, reason=reason
            )
        log.log(level, "device state", extra=extra)
        self.state = to
        self.reason = reason
