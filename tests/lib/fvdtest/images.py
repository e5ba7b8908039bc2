# SPDX-License-Identifier: Apache-2.0
"""Small images for tests of the engine: make, open in-process, and read without the engine."""

import os
from dataclasses import dataclass
from pathlib import Path

from fvdcore import Device
from fvdengine import live
from fvdengine.create import create_image
from fvdengine.header import Header
from fvdengine.metadata import load_metadata
from fvdengine.opening import OpenOptions, open_device, open_plan
from fvdengine.options import CreateOptions


@dataclass
class Opened:
    """A device with the live state it was opened with, if any."""

    device: Device
    state: live.LiveState | None = None

    def abandon(self) -> None:
        """Let go as a dying process would: nothing flushed, state files left where they are."""
        self.device.abandon()
        if self.state is not None:
            self.state.close()

    def close(self) -> None:
        self.device.close()
        if self.state is not None:
            self.state.close()
            self.state.remove()


def make_image(path: Path | str, **options: object) -> Path:
    """Create an image of these options at `path`."""
    create_image(path, CreateOptions(**options))  # type: ignore[arg-type]
    return Path(path)


def open_image(
    path: Path | str,
    *,
    live_dir: Path | None = None,
    takeover: bool = False,
    read_only: bool = False,
    discard: bool = False,
    start: bool = True,
    allow_dirs: tuple[str, ...] = (),
    **engine: object,
) -> Opened:
    """Open `path` with the engine, with live state when `live_dir` is given."""
    options = OpenOptions(
        read_only=read_only,
        takeover=takeover,
        discard_live_state=discard,
        allow_dirs=allow_dirs,
    )
    with open_plan(path, options) as plan:
        if live_dir is None:
            opened = Opened(open_device(plan, **engine))  # type: ignore[arg-type]
        else:
            state = (
                live.adopt_live(live_dir, plan)
                if takeover
                else live.create_live(live_dir, plan, os.urandom(16))
            )
            device = open_device(
                plan,
                live_fd=state.live_fd,
                stats_fd=state.stats_fd,
                open_session=state.header.open_session,
                **engine,  # type: ignore[arg-type]
            )
            opened = Opened(device, state)
    if start:
        opened.device.start()
    return opened


def content_on_disk(path: Path) -> bytes:
    """What the image file alone says the disk holds: Python's codec, no engine, raw base."""
    header = Header.unpack(path.read_bytes()[:8192])
    with path.open("rb") as file:
        # The bitmap first: a bit that is set promises its data, also while prefetch goes on.
        bitmap = load_metadata(file.fileno(), header, str(path)).bitmap
        file.seek(header.data_offset)
        content = bytearray(file.read(header.virtual_disk_size))
    if not header.needs_base:
        return bytes(content)
    base = (path.parent / header.base_img).read_bytes()
    base = base[: header.base_img_size].ljust(header.base_img_size, b"\0")
    block = header.block_size
    for number in range(-(-header.base_img_size // block)):
        if not bitmap[number // 8] >> number % 8 & 1:
            begin, end = number * block, min((number + 1) * block, header.base_img_size)
            content[begin:end] = base[begin:end]
    return bytes(content)
