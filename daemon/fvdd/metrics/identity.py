# SPDX-License-Identifier: Apache-2.0
"""What a device is: no number of the engine's.

Paths and URLs stand in fvd_device_info alone, so that no other series ends when one changes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import NamedTuple

from fvdd.metrics.exposition import Exposition
from fvdengine.uris import is_uri


class Identity(NamedTuple):
    """The labels of fvd_device_info, in their order."""

    device: str
    devpath: str
    name: str
    image: str
    attach: str
    base: str
    base_format: str
    cookie: str


def strip_secrets(base: str) -> str:
    """A base's name without credentials and query, as it may stand in a label."""
    if not is_uri(base):
        return base
    scheme, _, rest = base.partition("://")
    place, _, query = rest.partition("#")[0].partition("?")
    host, slash, path = place.partition("/")
    shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    if scheme.endswith("+unix"):  # the socket is where it is
        sockets = [part for part in query.split("&") if part.startswith("socket=")]
        shown += "".join(f"?{part}" for part in sockets[:1])
    return shown


def write_build(out: Exposition, version: str) -> None:
    """Versions of fvd, of Python and of the kernel."""
    versions = (
        ("version", version),
        ("python", platform.python_version()),
        ("kernel", os.uname().release),
    )
    out.family("fvd_build_info", "gauge", "Versions, as labels.")
    out.sample("fvd_build_info", versions, 1)


def write_identities(out: Exposition, identities: Sequence[Identity]) -> None:
    out.family("fvd_device_info", "gauge", "What a device is, as labels.")
    for identity in identities:
        shown = identity._replace(base=strip_secrets(identity.base))
        out.sample("fvd_device_info", tuple(zip(Identity._fields, shown, strict=True)), 1)
