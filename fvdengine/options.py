# SPDX-License-Identifier: Apache-2.0
"""What a caller may ask for when an image is opened or created, with the reason of each default."""

from dataclasses import dataclass

from fvdengine import geometry
from fvdengine.errors import InvalidOption, InvalidSize
from fvdengine.geometry import SIZE_MAX
from fvdengine.header import Header
from fvdengine.units import PAGE, SECTOR, TIB, round_up
from fvdengine.uris import is_uri, parse_uri
from fvdengine.validation import BASE_FORMATS, DATA_FORMATS

CHUNK_SIZE_MAX = 1 << 30
GROW_UNIT_MAX = TIB


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How an image is opened.

    read_only: nothing is ever written; readers share the image with other readers.
    allow_dirs: directories, besides the image's own tree, in which its bases may lie.
    allow_uris: patterns of the URIs that may be followed to bases and data (fvdengine.uris).
    base_timeout: seconds that a request may wait for a remote base before it fails.
    accept_changed_base: open although a base no longer is what the image was made from.
    discard_live_state: give up what a dead process had acknowledged but not flushed.
    takeover: this opener continues from the live state of a dead process.
    owner_held: the caller's caller holds the owner range (lock_owner), take only the writer range.
    lock_wait_seconds: how long to wait for the locks; a takeover waits at least 30 s, since the
        kernel may still be finishing the I/O of the dead process.
    cache: "writeback"; "writethrough": what is answered is durable; "none": data go past the
        page cache.
    """

    read_only: bool = False
    allow_dirs: tuple[str, ...] = ()
    allow_uris: tuple[str, ...] = ()
    base_timeout: float = 60.0
    accept_changed_base: bool = False
    discard_live_state: bool = False
    takeover: bool = False
    owner_held: bool = False
    lock_wait_seconds: float = 0
    cache: str = "writeback"


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """What a new image shall be; None means "choose".

    Sizes are bytes, rates KB/s (1024 bytes), times as the name says. The defaults are those
    of the format description; copy-on-read and prefetch are off because both write, which
    nobody has asked for yet. `like` is the header of an image that the new one is to be run as:
    its fields that `update` can change, but names, hold instead of those here.
    """

    size: int | None = None
    base: str | None = None
    base_format: str | None = None
    allow_dirs: tuple[str, ...] = ()
    allow_uris: tuple[str, ...] = ()
    accept_changed_base: bool = False
    force: bool = False
    compact: bool = False
    chunk_size: int | None = None
    storage_grow_unit: int | None = None
    add_storage_cmd: str = ""
    data_file: str | None = None
    data_file_format: str | None = None
    detect_holes: int | None = None
    block_size: int | None = None
    journal_size: int | None = None
    journal_buffer: int | None = None
    journal_period_ms: int = 5000
    copy_on_read: bool = False
    max_outstanding_copy_on_read: int = 2_000_000
    prefetch_delay_seconds: int = -1
    prefetch_slots: int = 2
    bytes_per_prefetch: int | None = None
    prefetch_read_measure_ms: int = 100
    prefetch_write_measure_ms: int = 100
    prefetch_min_read_kb: int = 5120
    prefetch_min_write_kb: int = 5120
    prefetch_max_read_kb: int = 1_000_000_000
    prefetch_max_write_kb: int = 1_000_000_000
    prefetch_throttle_ms: int = 30_000
    like: Header | None = None

    @property
    def data_format(self) -> str:
        """The format of the data file; raw where none was named."""
        return self.data_file_format or "raw"


def _need(holds: bool, option: str, reason: str, hint: str | None = None) -> None:
    if not holds:
        raise InvalidOption(option=option, reason=reason, hint=hint)


def _need_beside(holds: bool, option: str, other: str) -> None:
    """Refuse an option that means nothing without another one."""
    _need(holds, option, f"needs {other}", f"Add {other}, or leave {option} out.")


def check_create_options(options: CreateOptions) -> None:
    """Raise InvalidOption or InvalidSize for what needs no look at any file."""
    if options.size is not None:
        _check_size(options.size)
    elif options.base is None:
        raise InvalidOption(
            option="the size", reason="is missing, and there is no base that it could come from",
            hint="Give it behind the name, such as 20G, or name a --base.",
        )  # fmt: skip
    block = options.block_size
    if block is not None:
        _need(
            geometry.BLOCK_SIZE_MIN <= block <= geometry.BLOCK_SIZE_MAX and block.bit_count() == 1,
            "--block-size", "must be a power of two from 4k to 2M",
        )  # fmt: skip
    journal = options.journal_size
    if journal:
        _need(
            geometry.JOURNAL_SIZE_MIN <= journal <= geometry.METADATA_SIZE_MAX,
            "--journal-size", "must be 0 or from 64k to 1G",
        )  # fmt: skip
        _need(
            options.base is not None or options.compact, "--journal-size",
            "has no use in an image without a base that is not compact",
            "Add --base or --compact, or leave --journal-size out.",
        )  # fmt: skip
    _check_base_options(options)
    _check_useless(options)
    _check_compact_options(options)
    _check_data_options(options)
    for option, number in _unsigned(options).items():
        _need(0 <= number <= SIZE_MAX, option, "must not be negative")


def _check_base_options(options: CreateOptions) -> None:
    _need(
        options.base_format in (None, *BASE_FORMATS), "--base-format",
        f"must be one of {', '.join(BASE_FORMATS)}",
    )  # fmt: skip
    for option, value in (
        ("--base-format", options.base_format),
        ("--detect-holes", options.detect_holes),
    ):
        _need_beside(options.base is not None or value is None, option, "--base")
    if options.detect_holes is not None:
        _need(
            0 < options.detect_holes <= SIZE_MAX, "--detect-holes",
            "must be the length of the shortest hole to look for, at least 1",
        )  # fmt: skip


def _check_useless(options: CreateOptions) -> None:
    """Refuse what would have no effect: whoever gave it expects one."""
    if options.base is None:
        for name, option in _BASE_ONLY.items():
            is_given = getattr(options, name) != getattr(_DEFAULT, name)
            _need(
                not is_given, option, "has no use without --base, from which nothing can be copied",
                f"Add --base, or leave {option} out.",
            )  # fmt: skip
    if options.base is None and not options.compact:
        for name, option in _JOURNAL_ONLY.items():
            is_given = getattr(options, name) != getattr(_DEFAULT, name)
            _need(
                not is_given, option,
                "has no use in an image without a base that is not compact: it has no journal",
                f"Add --base or --compact, or leave {option} out.",
            )  # fmt: skip


_DEFAULT = CreateOptions()
# By their fields; only values beside the default are known to be wanted.
_BASE_ONLY = {
    "copy_on_read": "--copy-on-read",
    "max_outstanding_copy_on_read": "--max-outstanding-copy-on-read",
    "prefetch_delay_seconds": "--prefetch-delay",
    "prefetch_slots": "--prefetch-slots",
    "bytes_per_prefetch": "--bytes-per-prefetch",
    "prefetch_read_measure_ms": "--prefetch-read-measure-time",
    "prefetch_write_measure_ms": "--prefetch-write-measure-time",
    "prefetch_min_read_kb": "--prefetch-min-read",
    "prefetch_min_write_kb": "--prefetch-min-write",
    "prefetch_max_read_kb": "--prefetch-max-read",
    "prefetch_max_write_kb": "--prefetch-max-write",
    "prefetch_throttle_ms": "--prefetch-throttle-time",
}
_JOURNAL_ONLY = {
    "journal_buffer": "--journal-buffer",
    "journal_period_ms": "--journal-period",
}


def _check_compact_options(options: CreateOptions) -> None:
    chunk, unit = options.chunk_size, options.storage_grow_unit
    for option, value in (("--chunk-size", chunk), ("--storage-grow-unit", unit)):
        _need_beside(options.compact or value is None, option, "--compact")
    if chunk is not None:
        _need(
            PAGE <= chunk <= CHUNK_SIZE_MAX and chunk % PAGE == 0,
            "--chunk-size", "must be a multiple of 4k from 4k to 1G",
        )  # fmt: skip
    if unit is not None:
        _need(
            0 < unit <= GROW_UNIT_MAX and unit % SECTOR == 0, "--storage-grow-unit",
            "must be a multiple of 512 from 512 to 1T",
        )  # fmt: skip


def _check_data_options(options: CreateOptions) -> None:
    _need(
        options.data_file_format in (None, *DATA_FORMATS), "--data-file-format",
        f"must be one of {', '.join(DATA_FORMATS)}",
        "Any other format is used through a server: give nbd, and the server's URI to --data-file.",
    )  # fmt: skip
    name = options.data_file
    if name is None:
        _need_beside(options.data_file_format is None, "--data-file-format", "--data-file")
        return
    _need(bool(name), "--data-file", "is empty")
    if options.data_format == "nbd":
        _need(
            is_uri(name) and parse_uri(name).is_nbd, "--data-file",
            f"must be the URI of an NBD server, such as nbd://host/export, not {name}",
        )  # fmt: skip
        _need(
            options.detect_holes is None or options.compact, "--detect-holes",
            "needs storage that reads zeros, which an NBD server does not promise: "
            "it needs --compact as well", "Add --compact, or leave --detect-holes out.",
        )  # fmt: skip
    else:
        _need(
            not is_uri(name), "--data-file", "is a URI, which needs --data-file-format nbd",
            "Add --data-file-format nbd, or name a file.",
        )  # fmt: skip


def _check_size(size: int) -> None:
    text = f"{size} bytes"
    if size <= 0:
        raise InvalidSize(text=text, reason="an image must have at least 512 bytes")
    if size % SECTOR:
        raise InvalidSize(
            text=text, reason="it is not a multiple of 512",
            hint=f"The next larger size that fits is {round_up(size, SECTOR)} bytes.",
        )  # fmt: skip
    if size > SIZE_MAX - 4 * geometry.METADATA_SIZE_MAX:  # the metadata come on top
        raise InvalidSize(text=text, reason="it is larger than a file can be")


def _unsigned(options: CreateOptions) -> dict[str, int]:
    """The plain numbers by option; what is too large for its field is left to validation."""
    return {
        "--journal-size": options.journal_size or 0,
        "--journal-buffer": options.journal_buffer or 0,
        "--journal-period": options.journal_period_ms,
        "--max-outstanding-copy-on-read": options.max_outstanding_copy_on_read,
        "--prefetch-slots": options.prefetch_slots,
        "--bytes-per-prefetch": options.bytes_per_prefetch or 0,
        "--prefetch-read-measure-time": options.prefetch_read_measure_ms,
        "--prefetch-write-measure-time": options.prefetch_write_measure_ms,
        "--prefetch-min-read": options.prefetch_min_read_kb,
        "--prefetch-min-write": options.prefetch_min_write_kb,
        "--prefetch-max-read": options.prefetch_max_read_kb,
        "--prefetch-max-write": options.prefetch_max_write_kb,
        "--prefetch-throttle-time": options.prefetch_throttle_ms,
    }
