# SPDX-License-Identifier: Apache-2.0
"""The verbs that look at or make image files: create, info, map.

They work on the file itself, without the daemon and without the compiled engine; map asks the
daemon where a device has the image.
"""

import datetime
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from fvdctl import output
from fvdctl.output import DELAY, SIZE, size_text
from fvdctl.svg import write_svg
from fvdengine.create import create_image
from fvdengine.errors import ImageInUse
from fvdengine.info import ImageInfo, image_info
from fvdengine.mapping import Extent, map_image
from fvdengine.options import CreateOptions, OpenOptions

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _options(*decorators: Decorator) -> Decorator:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_common = _options(
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option("-q", "--quiet", is_flag=True, help="Print no notes and warnings."),
)
_allow_dir = _options(
    click.option(
        "--allow-dir", "allow_dirs", multiple=True, metavar="DIR",
        help="Allow bases and data files in DIR, besides the image's own directory. May be given "
        "several times.",
    ),
    click.option(
        "--allow-uri", "allow_uris", multiple=True, metavar="PATTERN",
        help="Allow URIs in images to lead to SCHEME://HOST[:PORT][/PATH]; HOST may be *.DOMAIN "
        "or *. May be given several times.",
    ),
)  # fmt: skip
_reading = _options(
    _allow_dir,
    click.option(
        "--accept-changed-base", is_flag=True,
        help="Go on although a base is not what the image was made from.",
    ),
    click.option(
        "--discard-live-state", is_flag=True,
        help="Look at the disk's state, though a dead process left newer live state.",
    ),
)  # fmt: skip


def _number(name: str, field: str, default: int, text: str) -> Decorator:
    return click.option(
        name, field, type=int, default=default, show_default=True, metavar="N", help=text
    )


_prefetch_options = _options(
    click.option(
        "--prefetch-delay", "prefetch_delay_seconds", type=DELAY, default="off",
        show_default=True, help="Begin to copy the base that long after the image is opened.",
    ),
    _number("--prefetch-slots", "prefetch_slots", 2, "Buffers of the prefetch pipeline, 1 to 64."),
    click.option(
        "--bytes-per-prefetch", type=SIZE,
        help="Bytes of one prefetch request.  [default: 1M or one block]",
    ),
    _number("--prefetch-read-measure-time", "prefetch_read_measure_ms", 100,
            "Milliseconds over which read throughput is measured."),
    _number("--prefetch-write-measure-time", "prefetch_write_measure_ms", 100,
            "Milliseconds over which write throughput is measured."),
    _number("--prefetch-min-read", "prefetch_min_read_kb", 5120,
            "KB/s of reading below which prefetch pauses; 0 never."),
    _number("--prefetch-min-write", "prefetch_min_write_kb", 5120,
            "KB/s of writing below which prefetch pauses; 0 never."),
    _number("--prefetch-max-read", "prefetch_max_read_kb", 1_000_000_000,
            "KB/s that prefetch reads at most."),
    _number("--prefetch-max-write", "prefetch_max_write_kb", 1_000_000_000,
            "KB/s that prefetch writes at most."),
    _number("--prefetch-throttle-time", "prefetch_throttle_ms", 30_000,
            "Longest pause of prefetch, in milliseconds."),
)  # fmt: skip

_create_options = _options(
    click.option(
        "--base", metavar="FILE|URI", help="The golden image to clone; it is never written."
    ),
    click.option(
        "--base-format", metavar="raw|fvd|qcow2|vmdk|vhdx|vdi",
        help="Format of the base.  [default: raw]",
    ),
    click.option(
        "--block-size", type=SIZE,
        help="Unit of copying, a power of two from 4k to 2M.  [default: by the base's size]",
    ),
    click.option(
        "--detect-holes", type=SIZE, metavar="SIZE",
        help="Make runs of zeros of at least SIZE in the base local holes: they are never copied.",
    ),
    click.option(
        "--compact", is_flag=True,
        help="Store chunks as they are written, one behind the other: for storage without holes.",
    ),
    click.option(
        "--chunk-size", type=SIZE,
        help="Unit of storage of a compact image, a multiple of 4k.  [default: 1M or one block]",
    ),
    click.option(
        "--storage-grow-unit", type=SIZE,
        help="A compact image's storage grows by this much at once.  [default: 100M]",
    ),
    click.option(
        "--add-storage-cmd", default="", metavar="TEXT",
        help="Kept in the header for other programs; never run.",
    ),
    click.option(
        "--data-file", metavar="FILE|URI",
        help="Keep the data in FILE, or on an NBD server, and only metadata in IMAGE.",
    ),
    click.option(
        "--data-file-format", metavar="raw|nbd",
        help="Format of the data file; nbd: the URI of an NBD server.  [default: raw]",
    ),
    click.option(
        "--journal-size", type=SIZE, help="Size of the journal; 0: none, slow.  [default: 16M]"
    ),
    click.option(
        "--journal-buffer", type=SIZE,
        help="Collect this much metadata before a commit; 0: none.  "
        "[default: half of the journal, at most 4M]",
    ),
    _number("--journal-period", "journal_period_ms", 5000,
            "Commit metadata after this many milliseconds; 0: no timer."),
    click.option("--copy-on-read", is_flag=True, help="Keep what is read from the base."),
    click.option(
        "--max-outstanding-copy-on-read", type=SIZE, default=2_000_000, show_default=True,
        help="Bytes that copy-on-read may hold back at once; at least two blocks.",
    ),
    _prefetch_options,
    _allow_dir,
    click.option("--force", is_flag=True, help="Overwrite an existing file."),
)  # fmt: skip


# Completed as a path; whether it can be read is said by our own errors.
_IMAGE = click.Path(readable=False)


@click.command()
@click.argument("image", type=_IMAGE)
@click.argument("size", type=SIZE, required=False)
@_create_options
@_common
def create(image: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Make IMAGE, of SIZE bytes or as large as its base.

    SIZE takes k, M, G or T (powers of 1024). With --base the image is a thin clone: what it has
    not stored itself is read from the base.
    """
    result = create_image(image, CreateOptions(**values))
    output.warn(result.warnings, quiet=quiet)
    header = result.header
    if as_json:
        output.emit_json(
            {
                "path": result.path,
                "size_bytes": header.virtual_disk_size,
                "base": result.base_path,
                "base_format": header.base_img_fmt or None,
                "block_size": header.block_size,
                "journal_size": header.journal_size,
                "compact": header.is_compact,
                "chunk_size": header.chunk_size if header.is_compact else None,
                "data_file": result.data_path,
                "hole_bytes": result.hole_bytes,
                "warnings": result.warnings,
            }
        )
    elif not quiet:
        origin = f", a clone of {result.base_path}" if result.base_path else ""
        if result.data_path:
            origin += f", data in {result.data_path}"
        if result.hole_bytes:
            origin += f", {size_text(result.hole_bytes)} of it holes"
        click.echo(
            f"{output.printable(image)}: {size_text(header.virtual_disk_size)}"
            + output.printable(origin)
        )


def _reading_options(
    allow_dirs: Sequence[str], allow_uris: Sequence[str], accept_changed_base: bool = False,
    discard_live_state: bool = False,
) -> OpenOptions:  # fmt: skip
    return OpenOptions(
        read_only=True,
        allow_dirs=tuple(allow_dirs),
        allow_uris=tuple(allow_uris),
        accept_changed_base=accept_changed_base,
        discard_live_state=discard_live_state,
    )


@click.command()
@click.argument("image", type=_IMAGE)
@_allow_dir
@click.option("--header", "with_header", is_flag=True, help="Show every field of the header.")
@_common
def info(
    image: str, allow_dirs: Sequence[str], allow_uris: Sequence[str], with_header: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Show what IMAGE says about itself, its chain of bases, and who uses it."""
    found = image_info(image, _reading_options(allow_dirs, allow_uris))
    if as_json:
        output.emit_json(found.as_dict())
        return
    output.pairs(_info_rows(found))
    if with_header:
        click.echo()
        values = found.as_dict()["header"]
        assert isinstance(values, dict)
        output.pairs((name, value) for name, value in values.items())
    output.warn(found.warnings, quiet=quiet)


def _info_rows(found: ImageInfo) -> list[tuple[str, object]]:
    header = found.header
    size = header.virtual_disk_size
    unit = f", chunks of {size_text(header.chunk_size)}" if header.is_compact else ""
    rows: list[tuple[str, object]] = [
        ("image", found.path),
        ("format", f"fvd, {found.layout} layout, blocks of {size_text(header.block_size)}{unit}"),
        ("size", f"{size_text(size)} ({size} bytes)"),
        ("on disk", size_text(found.allocated_bytes)),
    ]
    if found.local_bytes is not None and header.has_base:
        rows.append(
            ("local", f"{size_text(found.local_bytes)} ({100 * found.local_bytes // size}%)")
        )
    if found.mapped_chunks is not None:
        rows.append(("chunks", f"{found.mapped_chunks} of {found.chunks} have storage"))
    rows.append(("state", found.state))
    rows += [("used by", holder) for holder in found.used_by]
    rows += _file_rows(found)
    if header.has_base and not header.needs_base:
        rows.append(("", "the base is not needed any more"))
    delay = header.prefetch_start_delay
    rows.append(("copy-on-read", "on" if header.copy_on_read else "off"))
    rows.append(("prefetch", "off" if delay < 0 else f"after {delay} s"))
    rows += _format_rows(found)
    return rows


def _file_rows(found: ImageInfo) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    if found.data is not None:
        length = f", {size_text(found.data.length)}" if found.data.length is not None else ""
        rows.append(
            ("data file", f"{found.data.path or found.data.name} ({found.data.format}{length})")
        )
        if found.data.problem:
            rows.append(("", found.data.problem))
    for base in found.bases:
        length = f", {size_text(base.length)}" if base.length is not None else ""
        rows.append(("base", f"{base.path or base.name} ({base.format}{length})"))
        if base.problem:
            rows.append(("", base.problem))
    return rows


def _format_rows(found: ImageInfo) -> list[tuple[str, object]]:
    """What the format keeps for itself: memory, journal, extension, the command never run."""
    header = found.header
    rows: list[tuple[str, object]] = []
    if found.metadata_memory:
        rows.append(("memory", f"{size_text(found.metadata_memory)} for bitmap and table"))
    if found.journal is not None and header.journal_size:
        used = f"{size_text(found.journal.used_bytes)} of {size_text(header.journal_size)}"
        rows.append(("journal", f"{used}, {found.journal.records} records to replay"))
    elif header.bitmap_size or header.is_compact:
        rows.append(("journal", size_text(header.journal_size) if header.journal_size else "none"))
    if header.add_storage_cmd:
        rows.append(("storage command", f"{header.add_storage_cmd} (never run)"))
    if header.need_zero_init:
        rows.append(("storage", "must read zeros where nothing was written"))
    if found.extension_trust != "trusted":
        rows.append(("extension", found.extension_trust))
    if header.extension is not None:
        created = datetime.datetime.fromtimestamp(
            min(header.extension.create_time, 1 << 37), datetime.UTC
        )
        rows.append(("created", f"{created:%Y-%m-%d %H:%M:%S} UTC"))
    return rows


def _extents(image: str, options: OpenOptions, socket: str | None) -> Iterator[Extent]:
    """The map of a file that nobody uses, or of an attached device by its name or image."""
    # The node of a device is a file, too, but reading it shows no image.
    is_file = os.path.lexists(image) and not re.fullmatch(r"/dev/nbd[0-9]+", image)
    try:
        if is_file:
            yield from map_image(image, options)
            return
    except ImageInUse:
        found = running_extents(image, socket)
        if found is None:
            raise
    else:
        found = running_extents(image, socket) or map_image(image, options)
    yield from found


def running_extents(word: str, socket: str | None) -> Iterator[Extent] | None:
    """Ask fvdd; its client is loaded only then."""
    from fvdctl.commands.running import extents

    return extents(word, socket)


@click.command(name="map")
@click.argument("image", type=_IMAGE, metavar="IMAGE|NAME|DEVICE")
@click.option(
    "--svg", type=click.Path(dir_okay=False, readable=False), help="Draw the map as a picture."
)
@click.option(
    "--socket", metavar="PATH",
    help="The daemon's socket, for an image that is attached (default: FVDD_SOCKET, or "
    "/run/fvd/fvdd.sock).",
)
@_reading
@_common
def map_(
    image: str, allow_dirs: Sequence[str], allow_uris: Sequence[str], accept_changed_base: bool,
    discard_live_state: bool, as_json: bool, quiet: bool, svg: str | None, socket: str | None,
) -> None:  # fmt: skip
    """Show which parts of IMAGE are its own data, zeros, or come from a base.

    Of a device that is attached its worker tells that: without places in files.
    """
    options = _reading_options(allow_dirs, allow_uris, accept_changed_base, discard_live_state)
    extents = _extents(image, options, socket)
    if svg is not None:
        write_svg(svg, image, extents)
        return
    if as_json:
        output.emit_json_list(extent.as_dict() for extent in extents)
        return
    # The first extent before the heading: what cannot be opened prints nothing.
    first = list(itertools.islice(extents, 1))
    if not quiet:
        click.echo(f"{'start':>16}  {'length':>16}  {'kind':<9}  file")
    for extent in itertools.chain(first, extents):
        place = f"{extent.path} at {extent.offset}" if extent.offset is not None else ""
        line = f"{extent.start:>16}  {extent.length:>16}  {extent.kind.value:<9}  {place}"
        click.echo(output.printable(line).rstrip())
