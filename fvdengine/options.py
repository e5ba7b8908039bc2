# SPDX-License-Identifier: Apache-2.0
"""What a caller may ask for when an image is opened or created, with the reason of each default."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How an image is opened.

    read_only: nothing is ever written; readers share the image with other readers.
    allow_dirs: directories, besides the image's own tree, in which its bases may lie.
    accept_changed_base: open although a base no longer is what the image was made from.
    discard_live_state: give up what a dead process had acknowledged but not flushed.
    takeover: this opener continues from the live state of a dead process.
    owner_held: the caller's caller holds the owner range (lock_owner), take only the writer range.
    lock_wait_seconds: how long to wait for the locks; a takeover waits at least 30 s, since the
        kernel may still be finishing the I/O of the dead process.
    """

    read_only: bool = False
    allow_dirs: tuple[str, ...] = ()
    accept_changed_base: bool = False
    discard_live_state: bool = False
    takeover: bool = False
    owner_held: bool = False
    lock_wait_seconds: float = 0


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """What a new image shall be; None means "choose".

    Sizes are bytes, rates KB/s (1024 bytes), times as the name says. The defaults are those
    of the format description; copy-on-read and prefetch are off because both write, which
    nobody has asked for yet.
    """

    size: int | None = None
    base: str | None = None
    base_format: str | None = None
    allow_dirs: tuple[str, ...] = ()
    force: bool = False
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
