# SPDX-License-Identifier: Apache-2.0
"""What a worker gives up once its files are open: capabilities, new privileges, system calls.

All that needs privileges is behind it then: the image, its chain and its live state are open, its
memory is locked. What serves the disk parses requests of clients and bytes of images; whoever
takes it over from there shall find no more than these descriptors.

It is done just before the engine starts its threads, which inherit it. A worker that keeps
something needs it later: servers of remote bases are started again when they end, and a program
makes a full volume longer. What cannot be given up here is told in the log, and the disk is
served all the same.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Final

from fvdd.log import fields
from fvdd.worker.seccomp import Needs, SeccompUnavailable, install
from fvdengine.opening import OpenPlan

CAP_DAC_READ_SEARCH: Final = 2
ALL_CAPABILITIES: Final = (1 << 64) - 1
THREADS_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.001
# Threads of fvdengine.children: one for each server of a remote base.
CHILD_THREAD: Final = "fvd-child"

_log = logging.getLogger(__name__)


def confine(needs: Needs) -> None:
    """Give up what is not needed, in all threads of this process and for good."""
    capabilities = _limit_capabilities(_kept(needs))
    try:
        install(needs)
        filtered = "yes"
    except SeccompUnavailable as error:
        filtered = "no"
        _log.warning("system calls are not filtered", extra=fields(reason=error))
    _log.info(
        "confined",
        extra=fields(
            capabilities=capabilities, filter=filtered, programs=needs.programs,
            volumes=needs.volumes, network=needs.network,
        ),
    )  # fmt: skip


def confine_for(plan: OpenPlan, can_grow: bool) -> None:
    """Keep what serving this image needs, and nothing else."""
    confine(needs_of(plan, can_grow))


def needs_of(plan: OpenPlan, can_grow: bool) -> Needs:
    """What serving this image will need; `can_grow`: a program makes its storage longer."""
    serves_bases = any(thread.name == CHILD_THREAD for thread in threading.enumerate())
    network = any(layer.remote is not None or layer.storage[0] < 0 for layer in plan.layers)
    return Needs(programs=serves_bases or can_grow, volumes=can_grow, network=network)


def _kept(needs: Needs) -> int:
    """Capabilities that stay permitted, though not effective: for programs alone."""
    if needs.volumes:
        return ALL_CAPABILITIES
    # qemu-nbd opens its file anew, which may be somebody's who lets nobody else read it.
    return 1 << CAP_DAC_READ_SEARCH if needs.programs else 0


def _limit_capabilities(kept: int) -> str:
    """Limit every thread; "none", "programs' alone", or why some stay."""
    from fvdcore.privileges import limit_this_thread, limit_thread

    try:
        limit_this_thread(kept)
        deadline = time.monotonic() + THREADS_SECONDS
        while others := _privileged_threads(kept):
            for thread in others:
                try:
                    limit_thread(thread)
                except ProcessLookupError:
                    continue
            if time.monotonic() > deadline:
                _log.warning("threads kept their capabilities", extra=fields(threads=others))
                return "of some threads"
            time.sleep(_POLL_SECONDS)
    except OSError as error:
        _log.warning("capabilities were not given up", extra=fields(reason=error))
        return "all"
    return "for programs" if kept else "none"


def _privileged_threads(kept: int) -> list[int]:
    """The threads of this process that are not limited yet."""
    found = []
    for name in os.listdir("/proc/self/task"):
        try:
            status = Path(f"/proc/self/task/{name}/status").read_text()
        except OSError:
            continue  # it has ended
        values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        permitted = int(values["CapPrm"], 16)
        limited = not int(values["CapEff"], 16) and not permitted & ~kept
        if not limited or int(values["NoNewPrivs"]) != 1:
            found.append(int(name))
    return found
