# SPDX-License-Identifier: Apache-2.0
"""Change the size of a disk that nobody has open.

Growing is the engine's: the image is opened privately and grown as if it were in use. Shrinking
is only done offline, see shrink. What was begun and cut short is finished first.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fvdengine import chain, content, editing, geometry, intent, metadata, paths, remote, uris
from fvdengine.chain import Layer
from fvdengine.checkpoint import Files
from fvdengine.content import ELSEWHERE
from fvdengine.data_file import open_data_file
from fvdengine.editing import ImageFile
from fvdengine.errors import EngineError, InvalidOption, InvalidSize, TailInUse
from fvdengine.geometry import METADATA_SIZE_MAX, SIZE_MAX
from fvdengine.header import Header
from fvdengine.metadata import Metadata, Run, Source
from fvdengine.opening import OpenOptions, grow_device, open_plan
from fvdengine.server_file import ServerFile
from fvdengine.shrink import finish, shrink
from fvdengine.units import MIB, PAGE, SECTOR, parse_size, round_up


@dataclass(frozen=True, slots=True)
class ResizeOptions:
    """shrink: the disk may become smaller, if its tail is empty. force: even if it is not.

    allow_dirs, allow_uris and accept_changed_base are those of an opening.
    """

    shrink: bool = False
    force: bool = False
    allow_dirs: tuple[str, ...] = ()
    allow_uris: tuple[str, ...] = ()
    accept_changed_base: bool = False


@dataclass(frozen=True, slots=True)
class ResizeResult:
    """Sizes in bytes."""

    path: str
    old_size: int
    new_size: int
    warnings: list[str] = field(default_factory=list)


def wanted_size(text: str, current: int) -> int:
    """Return the size in bytes that `text` ([+]SIZE) means for a disk of `current` bytes."""
    size = parse_size(text.removeprefix("+"))
    if text.startswith("+"):
        size += current
    if size % SECTOR:
        raise InvalidSize(
            text=f"{size} bytes", reason="it is not a multiple of 512",
            hint=f"The next larger size that fits is {round_up(size, SECTOR)} bytes.",
        )  # fmt: skip
    if not size:
        raise InvalidSize(text="0 bytes", reason="an image must have at least 512 bytes")
    return size


def check_size(header: Header, size: int, device_length: int | None = None) -> None:
    """Raise InvalidSize if the image cannot have a disk of `size` bytes.

    `device_length` is that of the device with its data, None where these lie in a file.
    """
    text = f"{size} bytes"
    if size > min(geometry.DISK_SIZE_MAX, SIZE_MAX - header.data_offset):
        raise InvalidSize(text=text, reason="it is larger than a disk can be")
    if header.is_compact:
        table = round_up(geometry.table_bytes(size, header.chunk_size), PAGE)
        if table + header.bitmap_size > METADATA_SIZE_MAX:
            raise InvalidSize(
                text=text, reason="its chunk table and bitmap would be above the limit of 1 GiB",
                hint="Make a new image with larger chunks (--chunk-size).",
            )  # fmt: skip
    elif device_length is not None and header.data_offset + size > device_length:
        raise InvalidSize(
            text=text,
            reason=f"the image would need {header.data_offset + size} bytes and its device has "
            f"{device_length}",
            hint="Enlarge the device first, then the image.",
        )


def resize_image(
    path: str | os.PathLike[str], text: str, options: ResizeOptions | None = None
) -> ResizeResult:
    """Give the disk the size that `text` ([+]SIZE) means; on any refusal nothing has changed.

    Raises InvalidSize, InvalidOption, TailInUse, ImageInUse, LiveStateLeft, and what opening and
    writing may end with.
    """
    name = os.fspath(path)
    options = options or ResizeOptions()
    fd = paths.open_file(name)
    try:
        # Without a lock another's change is seen halfway: whoever goes on looks again.
        header = chain.read_header(fd, name)
    finally:
        os.close(fd)
    old = intent.shrunk(header).virtual_disk_size
    size = wanted_size(text, old)
    if options.force and not options.shrink:
        raise InvalidOption(
            option="--force", reason="has no meaning without --shrink",
            hint="Add --shrink, or leave --force out.",
        )  # fmt: skip
    if size > old:
        return _grow(name, old, size, options)
    if size < old and not options.shrink:
        raise InvalidOption(
            option=f"the new size, {size} bytes,",
            reason=f"is smaller than the present one, {old} bytes",
            hint="Add --shrink if the disk shall become smaller; nothing was changed.",
        )
    with _settled(name, old, options) as (files, header, loaded):
        if size < old:
            if files.data.fd == ELSEWHERE:
                raise InvalidOption(
                    option=name, reason="has its data on an NBD server and cannot shrink",
                    hint="Leave it as it is, or copy its content to a new image.",
                )  # fmt: skip
            if not options.force:
                check_tail(files, intent.shrunk(header), loaded, size, options)
        editing.finish_update(files.image)
        if size < header.virtual_disk_size:
            shrink(files, header, loaded, size)
        elif intent.is_shrinking(header):
            finish(files, header, loaded)
    return ResizeResult(name, old, size)


def _grow(name: str, old: int, size: int, options: ResizeOptions) -> ResizeResult:
    opening = OpenOptions(
        allow_dirs=options.allow_dirs, allow_uris=options.allow_uris,
        accept_changed_base=options.accept_changed_base,
    )  # fmt: skip
    with open_plan(name, opening) as plan:
        _check_unchanged(plan.header, name, old)
        fd, _ = plan.layers[0].storage
        data = ImageFile(fd, name) if fd >= 0 else None
        if data is None and not plan.header.is_compact:
            _check_server(plan.header, name, size)
        check_size(plan.header, size, data.length() if data and data.is_device else None)
        if data is not None and not plan.header.is_compact:
            _try_length(data, plan.header.data_offset + size)
        grow_device(plan, size)
        image = ImageFile(plan.layers[0].fd, name)
        editing.write_backup(image, plan.header)
        return ResizeResult(name, old, size, plan.warnings)


def _try_length(data: ImageFile, length: int) -> None:
    """Raise if the file cannot be so long, before anything else has changed."""
    before = data.length()
    if not data.is_device and length > before:
        data.truncate(length)
        data.truncate(before)


def _check_server(header: Header, name: str, size: int) -> None:
    """Raise InvalidOption if the server that has the data has no room for so many."""
    uri = uris.parse_uri(header.data_file)
    room = remote.data_server_length(uri)
    if room < size:
        raise InvalidOption(
            option=name, reason=f"needs {size} bytes of its data server, {uri.shown} has {room}",
            hint="Make the export larger first; nothing was changed.",
        )  # fmt: skip


def _check_unchanged(header: Header, name: str, size: int) -> None:
    if header.virtual_disk_size != size:
        raise InvalidOption(
            option=name, reason="was resized by somebody else just now", hint="Try again."
        )


# Shrinking ---------------------------------------------------------------------------------


@contextmanager
def _settled(
    name: str, size: int, options: ResizeOptions
) -> Iterator[tuple[Files, Header, Metadata]]:
    """Give the locked files of the image, its header and its state after replay."""
    with editing.open_for_change(name) as image:
        header = editing.read_free_header(image)
        _check_unchanged(intent.shrunk(header), name, size)
        opening = OpenOptions(allow_dirs=options.allow_dirs, allow_uris=options.allow_uris)
        data_file = open_data_file(header, image.fd, name, opening)
        try:
            if data_file is None:
                files = Files(image, image)
            elif data_file.fd < 0:
                files = Files(image, ServerFile(data_file.path))
            else:
                files = Files(image, ImageFile(data_file.fd, data_file.path))
            if files.data.fd not in (image.fd, ELSEWHERE):
                chain.refuse_data_below(image.fd, name, header, files.data.fd, opening)
            length = None if files.data.fd == ELSEWHERE else files.data.length()
            loaded = metadata.load_metadata(image.fd, header, name, length)
            yield files, header, loaded
        finally:
            if data_file is not None:
                data_file.close()


def check_tail(
    files: Files, header: Header, loaded: Metadata, size: int, options: ResizeOptions
) -> None:
    """Raise TailInUse unless the disk behind `size` reads as zeros, of its own or of its base.

    A base that is not at hand, or on a server, holds what nobody can know: it is taken for data.
    """
    data = files.data
    in_base: list[Run] = []
    for run in metadata.runs(loaded, header, size, header.virtual_disk_size):
        if run.source is Source.BASE:
            in_base.append(run)
        if run.source is Source.DATA:
            at = _first_data(data.fd, data.path, run.offset, run.offset + run.length)
            if at is not None:
                at += run.start - run.offset
                raise TailInUse(path=files.image.path, size=size, at=at, what="data")
    if in_base:
        at = _first_in_base(files.image, header, in_base, options)
        if at is not None:
            raise TailInUse(
                path=files.image.path, size=size, at=at, what="content of the base"
            )


def _first_in_base(
    image: ImageFile, header: Header, parts: list[Run], options: ResizeOptions
) -> int | None:
    """Return the first byte of the disk in `parts` that the base does not say is zero."""
    top = Layer(image.path, image.fd, "fvd", header, header.virtual_disk_size)
    opening = OpenOptions(
        read_only=True, allow_dirs=options.allow_dirs,
        accept_changed_base=options.accept_changed_base,
    )  # fmt: skip
    start = parts[0].start
    try:
        layers = chain.open_chain(top, opening, [])
    except EngineError:
        return start
    bases = layers[1:]
    try:
        if any(base.remote is not None or base.storage[0] == ELSEWHERE for base in bases):
            return start
        found = content.load_content(bases)
        for piece in (piece for part in parts for piece in found.pieces(part.start, part.end)):
            if piece.offset is not None:
                fd, path = bases[piece.depth].storage
                at = _first_data(fd, path, piece.offset, piece.offset + piece.length)
                if at is not None:
                    return piece.start + at - piece.offset
        return None
    except EngineError:
        return start
    finally:
        for base in bases:
            base.close()


def _first_data(fd: int, path: str, start: int, end: int) -> int | None:
    """Return where the first byte in [start, end) lies that is not zero; none does behind the
    end of the file."""
    end = min(end, paths.file_length(fd))
    for offset, length, is_data in content.file_extents(fd, start, end):
        for at in range(offset, offset + length if is_data else offset, MIB):
            part = metadata.read_area(fd, at, min(MIB, offset + length - at), path)
            stripped = part.lstrip(b"\0")
            if stripped:
                return at + len(part) - len(stripped)
    return None
