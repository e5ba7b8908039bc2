# SPDX-License-Identifier: Apache-2.0
"""The jobs that no client command makes, by name. quick: with fewer and smaller runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fvdtest.bench import engine, kills, links, postmark, special
from fvdtest.bench.figures import Row
from fvdtest.bench.stand import Stand


@dataclass(frozen=True)
class Probe:
    """in_quick: a part of --quick, which has no time for more and needs no root."""

    what: str
    rows: Callable[[Stand, bool], list[Row]]
    in_quick: bool = False


PROBES = {
    "engine": Probe("the engine without a socket, beside preadv2 and pwritev2", engine.engine,
                    in_quick=True),
    "open-1T": Probe("creating, opening and a first read", special.open_1t),
    "open-16T": Probe("the same, with its memory", special.open_16t, in_quick=True),
    "create-1T": Probe("creating a clone", special.create_1t, in_quick=True),
    "prefetch-idle": Probe("a full copy over a link of 64 MiB/s", special.prefetch_idle),
    "prefetch-fg": Probe("random reads beside prefetch over a shaped link (root)",
                         links.prefetch_fg),
    "prefetch-fsync": Probe("writes with a flush each beside prefetch (root)",
                            links.prefetch_fsync),
    "kill-9": Probe("the pause when the worker is killed under writes", kills.kill_9),
    "postmark": Probe("mails on a file system of a kernel's device (User Mode Linux)",
                      postmark.postmark),
}  # fmt: skip
