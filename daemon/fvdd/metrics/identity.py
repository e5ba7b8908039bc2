# SPDX-License-Identifier: Apache-2.0
"""What a device is, and how much room its image has: no number of the engine's.

Paths and URLs stand in fvd_device_info alone, so that no other series ends when one changes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from fvdd.metrics.exposition import Exposition

SECTOR = 512


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
    if "://" not in base:
        return base
    parts = urlsplit(base)
    host = parts.hostname or ""
    return urlunsplit(
        (parts.scheme, host + (f":{parts.port}" if parts.port else ""), parts.path, "", "")
    )


def write_identities(out: Exposition, identities: Sequence[Identity]) -> None:
    out.family("fvd_device_info", "gauge", "What a device is, as labels.")
    for identity in identities:
        values = map(strip_secrets, identity)
        out.sample("fvd_device_info", tuple(zip(Identity._fields, values, strict=True)), 1)


def write_stores(out: Exposition, images: Sequence[tuple[str, str]]) -> None:
    """Free space below each image, and what the image takes; `images` are (device, path)."""
    name = "fvd_backing_store_avail_bytes"
    out.family(name, "gauge", "Free space of the file system that holds the image.")
    for device, path in images:
        try:
            store = os.statvfs(path)
        except OSError:
            continue
        out.sample(name, (("device", device),), store.f_bavail * store.f_frsize)
    name = "fvd_image_allocated_bytes"
    out.family(name, "gauge", "Bytes that the image takes of its file system.")
    for device, path in images:
        try:
            blocks = os.stat(path).st_blocks
        except OSError:
            continue
        out.sample(name, (("device", device),), blocks * SECTOR)
