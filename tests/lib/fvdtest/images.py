# SPDX-License-Identifier: Apache-2.0
"""Small images for tests of the engine: make, open in-process, and read without the engine."""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from fvdcore import Device
from fvdengine import live
from fvdengine.chain import Layer, read_header
from fvdengine.content import load_content
from fvdengine.create import create_image
from fvdengine.data_file import DataFile
from fvdengine.errors import InvalidTable
from fvdengine.geometry import Wanted, choose_layout
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
    allow_uris: tuple[str, ...] = (),
    cache: str = "writeback",
    **engine: object,
) -> Opened:
    """Open `path` with the engine, with live state when `live_dir` is given."""
    options = OpenOptions(
        read_only=read_only,
        takeover=takeover,
        discard_live_state=discard,
        allow_dirs=allow_dirs,
        allow_uris=allow_uris,
        cache=cache,
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
    """What the files alone say the disk holds: Python's codec, no engine, no locks.

    An engine that has the image open may extend it in the background between two reads of the
    codec, whose tables then seem to map what lies behind the end: it reads such files once more.
    """
    while True:
        length = storage_lengths(path)
        try:
            return _content_now(path)
        except InvalidTable:
            if storage_lengths(path) == length:
                raise


def storage_lengths(path: Path) -> list[int]:
    """The lengths of the files in the folder of an image."""
    return [file.stat().st_size for file in sorted(path.parent.iterdir()) if file.is_file()]


def _content_now(path: Path) -> bytes:
    layers: list[Layer] = []
    name, image_format = path, "fvd"
    with contextlib.ExitStack() as stack:
        while True:
            fd = os.open(name, os.O_RDONLY)
            stack.callback(os.close, fd)
            if image_format == "raw":
                layers.append(Layer(str(name), fd, "raw", None, os.fstat(fd).st_size))
                break
            header = read_header(fd, str(name))
            data = None
            if header.data_file:
                data_path = str(name.parent / header.data_file)
                data_fd = os.open(data_path, os.O_RDONLY)
                stack.callback(os.close, data_fd)
                data = DataFile(data_path, data_fd)
            size = header.virtual_disk_size
            layers.append(Layer(str(name), fd, "fvd", header, size, data))
            if not header.needs_base:
                break
            name, image_format = name.parent / header.base_img, header.base_format
        return load_content(layers).read(0, layers[0].length)


def shape_image(path: Path, base: Path | None, base_format: str, wanted: Wanted,
                data_file: str = "", is_tight: bool = False, **values: object) -> Path:  # fmt: skip
    """Make an image of any layout: what `create` would, and more (tiny journals, odd chunks).

    is_tight: the data area of a compact image begins right behind the table, which cannot grow
    without moving chunks.
    """
    header = create_image(
        path, CreateOptions(size=wanted.size, base=str(base) if base else None,
                            base_format=base_format if base else None)
    ).header  # fmt: skip
    layout = choose_layout(replace(wanted, base_length=header.base_img_size))
    if is_tight and wanted.is_compact and not data_file:
        end = layout.metadata_end
        layout = replace(layout, data_offset=end, file_size=end)
    places = {
        key: getattr(layout, key)
        for key in ("block_size", "chunk_size", "bitmap_offset", "bitmap_size", "journal_offset",
                    "journal_size", "table_offset", "table_size", "data_offset")
    }  # fmt: skip
    header = replace(
        header, **places, data_file=data_file, bytes_per_prefetch=4 * layout.block_size,
        journal_buf_size=min(4096, layout.journal_size), storage_grow_unit=layout.chunk_size,
        data_file_fmt="raw" if data_file else "",
        **values,  # type: ignore[arg-type]
    )  # fmt: skip
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(layout.file_size)
        for at in (0, 8192):
            file.seek(at)
            file.write(header.pack())
        if layout.table_size:
            file.seek(layout.table_offset)
            file.write(b"\xff" * layout.table_size)
    if data_file:
        with (path.parent / data_file).open("wb") as file:
            file.truncate(layout.data_size)
    return path
