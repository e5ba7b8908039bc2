# SPDX-License-Identifier: Apache-2.0
"""The verbs that look at or make image files: create, info, map.

They work on the file itself, without the daemon and without the compiled engine.
"""

import datetime
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import click

from fvdctl import output
from fvdctl.output import DELAY, SIZE, size_text
from fvdengine.create import create_image
from fvdengine.errors import InvalidOption
from fvdengine.info import ImageInfo, image_info
from fvdengine.mapping import map_image
from fvdengine.options import CreateOptions, OpenOptions

# What an image cannot have yet: the option, and what is not there.
_NOT_YET = {
    "compact": ("--compact", "needs chunk tables, which this version does not have yet"),
    "chunk_size": ("--chunk-size", "needs chunk tables, which this version does not have yet"),
    "storage_grow_unit": (
        "--storage-grow-unit", "needs compact images, which this version does not have yet",
    ),
    "data_file": ("--data-file", "needs separate data files, which this version does not have yet"),
    "detect_holes": ("--detect-holes", "needs the search for holes, which is not there yet"),
}  # fmt: skip

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
_allow_dir = click.option(
    "--allow-dir", "allow_dirs", multiple=True, metavar="DIR",
    help="Allow bases in DIR, besides the image's own directory. May be given several times.",
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
    click.option("--base", metavar="FILE", help="The golden image to clone; it is never written."),
    click.option(
        "--base-format", metavar="raw|fvd", help="Format of the base.  [default: raw]"
    ),
    click.option(
        "--block-size", type=SIZE,
        help="Unit of copying, a power of two from 4k to 2M.  [default: by the base's size]",
    ),
    click.option("--journal-size", type=SIZE, help="Size of the journal.  [default: 16M]"),
    click.option(
        "--journal-buffer", type=SIZE,
        help="Collect this much metadata before a commit; 0: none.  [default: 64k]",
    ),
    _number("--journal-period", "journal_period_ms", 5000,
            "Commit metadata after this many milliseconds; 0: no timer."),
    click.option("--copy-on-read", is_flag=True, help="Keep what is read from the base."),
    click.option(
        "--max-outstanding-copy-on-read", type=SIZE, default=2_000_000, show_default=True,
        help="Bytes that copy-on-read may hold back at once.",
    ),
    _prefetch_options,
    _allow_dir,
    click.option("--force", is_flag=True, help="Overwrite an existing file."),
    click.option("--compact", is_flag=True, hidden=True),
    *(click.option(option, hidden=True) for option, _ in _NOT_YET.values()
      if option != "--compact"),
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
    for name, (option, reason) in _NOT_YET.items():
        if values.pop(name):
            raise InvalidOption(option=option, reason=reason, hint="Leave the option out.")
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
                "warnings": result.warnings,
            }
        )
    elif not quiet:
        origin = f", a clone of {result.base_path}" if result.base_path else ""
        click.echo(
            f"{output.printable(image)}: {size_text(header.virtual_disk_size)}"
            + output.printable(origin)
        )


@click.command()
@click.argument("image", type=_IMAGE)
@_allow_dir
@click.option("--header", "with_header", is_flag=True, help="Show every field of the header.")
@_common
def info(
    image: str, allow_dirs: Sequence[str], with_header: bool, as_json: bool, quiet: bool
) -> None:
    """Show what IMAGE says about itself, its chain of bases, and who uses it."""
    found = image_info(image, OpenOptions(read_only=True, allow_dirs=tuple(allow_dirs)))
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
    rows: list[tuple[str, object]] = [
        ("image", found.path),
        ("format", f"fvd, raw layout, blocks of {size_text(header.block_size)}"),
        ("size", f"{size_text(size)} ({size} bytes)"),
        ("on disk", size_text(found.allocated_bytes)),
    ]
    if found.local_bytes is not None and header.has_base:
        rows.append(
            ("local", f"{size_text(found.local_bytes)} ({100 * found.local_bytes // size}%)")
        )
    rows.append(("state", found.state))
    rows += [("used by", holder) for holder in found.used_by]
    for base in found.bases:
        length = f", {size_text(base.length)}" if base.length is not None else ""
        rows.append(("base", f"{base.path or base.name} ({base.format}{length})"))
        if base.problem:
            rows.append(("", base.problem))
    if header.has_base and not header.needs_base:
        rows.append(("", "the base is not needed any more"))
    delay = header.prefetch_start_delay
    rows.append(("copy-on-read", "on" if header.copy_on_read else "off"))
    rows.append(("prefetch", "off" if delay < 0 else f"after {delay} s"))
    if header.extension is not None:
        created = datetime.datetime.fromtimestamp(
            min(header.extension.create_time, 1 << 37), datetime.UTC
        )
        rows.append(("created", f"{created:%Y-%m-%d %H:%M:%S} UTC"))
    return rows


@click.command(name="map")
@click.argument("image", type=_IMAGE)
@_reading
@_common
def map_(
    image: str, allow_dirs: Sequence[str], accept_changed_base: bool, discard_live_state: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Show which parts of IMAGE are its own data, zeros, or come from a base."""
    extents = map_image(
        image,
        OpenOptions(
            read_only=True,
            allow_dirs=tuple(allow_dirs),
            accept_changed_base=accept_changed_base,
            discard_live_state=discard_live_state,
        ),
    )
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
