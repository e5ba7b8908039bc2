# SPDX-License-Identifier: Apache-2.0
"""Mend an image that nobody has open, never making it worse.

First everything is decided in memory, as a list of actions in words; a dry run ends there. Then the
decided state is written in the order of a checkpoint. A lost first page comes back from the
backup copy at the very end, so that until then a second run finds what the first one found.
What cannot be brought back is said: an entry is unmapped and a short file extended only with the
range of the disk that reads zeros from then on.
"""

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from fvdengine import (
    chain,
    checkpoint,
    editing,
    geometry,
    intent,
    metadata,
    paths,
    records,
    shrink,
    stores,
    two_headers,
)
from fvdengine.chain import refuse_data_below
from fvdengine.check import check_open
from fvdengine.checkpoint import Files, unused_data, used_end
from fvdengine.content import file_extents
from fvdengine.data_file import open_data_file
from fvdengine.editing import ImageFile
from fvdengine.errors import (
    BeyondRepair,
    DataFileTooShort,
    EngineError,
    HeadersDisagree,
    ImageTruncated,
    InvalidJournal,
    UnknownFeature,
)
from fvdengine.findings import REPAIR, CheckResult
from fvdengine.gaps import find_gaps, gap_text
from fvdengine.geometry import SIZE_MAX, UNMAPPED
from fvdengine.header import HEADER_COPY_SIZE, Extension, Header
from fvdengine.locking import lock
from fvdengine.metadata import Metadata
from fvdengine.number_set import NumberSet
from fvdengine.options import OpenOptions
from fvdengine.server_file import ServerFile
from fvdengine.table_faults import Collector, FaultKind, find_faults, is_padding_clear
from fvdengine.units import PAGE, round_up

ACTIONS_MAX = 100_000  # an image with more damage than that is no image any more


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that is mended, as an order: "restore the ..."."""

    code: str
    message: str

    def as_dict(self) -> dict[str, object]:
        return {"code": self.code, "message": self.message}


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What was found, what was done (or would be, in a dry run), and what is found afterwards."""

    path: str
    is_dry_run: bool
    before: CheckResult
    actions: list[Action]
    after: CheckResult

    @property
    def exit_status(self) -> int:
        return self.after.exit_status

    def as_dict(self) -> dict[str, object]:
        return {
            "path": self.path,
            "exit_status": self.exit_status,
            "dry_run": self.is_dry_run,
            "actions": [action.as_dict() for action in self.actions],
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
        }


@dataclass(slots=True)
class _Plan:
    """The state that the image shall have. `header` is not on disk yet where it `is_lost`."""

    header: Header
    is_lost: bool = False
    is_epoch_known: bool = True
    extension: Extension | None = None  # the one to restore
    clear_prefetched: bool = False
    must_settle: bool = False
    image_length: int = 0  # what a short file is extended to; 0: it is not
    data_length: int = 0
    must_finish: bool = False
    must_shrink: bool = False
    must_cut: bool = False
    must_copy: bool = False
    actions: list[Action] = field(default_factory=list)

    def add(self, code: str, message: str) -> None:
        self.actions.append(Action(code, message))
        if len(self.actions) > ACTIONS_MAX:
            raise BeyondRepair(limit=ACTIONS_MAX)


def repair_image(
    path: str | os.PathLike[str], options: OpenOptions | None = None, *, dry_run: bool = False,
    header: str | None = None,
) -> RepairResult:  # fmt: skip
    """Repair the image, or say what would be done; the writer's locks are held throughout.

    `header` says which header counts where both are readable and disagree in what cannot change:
    "front" or "backup"; without it HeadersDisagree is raised. Raises ImageInUse, LiveStateLeft,
    UnknownFeature, and what is beyond repair (nothing is written then): no header is left, metadata
    are cut off, the data file is missing.
    """
    name = os.fspath(path)
    options = replace(options or OpenOptions(), read_only=True)
    with editing.open_for_change(name, wait_seconds=options.lock_wait_seconds) as image:
        if options.discard_live_state:
            paths.forget_cached(image.fd)
        plan = _plan_header(image, options, header)
        before = _first_look(image, options)
        with _open_files(image, plan.header, options) as files:
            if isinstance(files.data, ImageFile) and files.data is not image:
                refuse_data_below(image.fd, name, plan.header, files.data.fd, options)
            _plan_lengths(files, plan)
            loaded = _plan_metadata(files, plan)
            _plan_leaks(files, plan, loaded)
            _plan_backup(plan, before)
            if dry_run or not plan.actions:
                return RepairResult(name, dry_run, before, plan.actions, before)
            _write(files, plan, loaded)
        after = check_open(image.fd, name, options)
    return RepairResult(name, dry_run, before, plan.actions, after)


def _first_look(image: ImageFile, options: OpenOptions) -> CheckResult:
    """What a check says; a feature that nobody knows is damage where the copy was chosen."""
    try:
        return check_open(image.fd, image.path, options)
    except UnknownFeature as error:
        found = CheckResult(image.path)
        found.add_error(error, where="header", is_corrupt=True, remedy=REPAIR)
        return found


@contextmanager
def _open_files(image: ImageFile, header: Header, options: OpenOptions) -> Iterator[Files]:
    """Give the image and its data file, locked for writing though it may be too short."""
    opening = replace(options, read_only=False)
    try:
        data = open_data_file(header, image.fd, image.path, opening)
    except DataFileTooShort:
        fd, real = paths.open_data_file(
            header.data_file, image.path, options.allow_dirs, writable=True
        )
        try:
            lock(fd, real, exclusive=True, wait_seconds=options.lock_wait_seconds)
            yield Files(image, ImageFile(fd, real))
        finally:
            os.close(fd)
        return
    try:
        if data is None:
            yield Files(image, image)
        elif data.fd < 0:
            yield Files(image, ServerFile(data.path))
        else:
            yield Files(image, ImageFile(data.fd, data.path))
    finally:
        if data is not None:
            data.close()


# Header ------------------------------------------------------------------------------------


def _plan_header(image: ImageFile, options: OpenOptions, choice: str | None) -> _Plan:
    """Find the header that counts: the one at the front, or the backup copy."""
    raw = image.read(0, min(HEADER_COPY_SIZE, image.length()))
    fields: list[str] = []
    try:
        header = Header.unpack(raw, image.path)
        two_headers.validate(image.fd, image.path, header, SIZE_MAX)
        fields = two_headers.disagreement(image.fd, image.path, header)
        if fields and (choice != "front" or not intent.has_room(header)):
            raise two_headers.refusal(image.path, header, fields)
        plan = _Plan(intent.settled(header, image.fd, image.path))
        if intent.is_renaming(header):
            plan.header = intent.plain(plan.header)
            plan.must_finish = True
            how = "finish" if intent.is_staged(header) else "take back"
            plan.add("finish_update", f"{how} an update that was cut short")
        _plan_shrink(plan)
        if not options.discard_live_state:
            chain.check_not_left_live(header, image.path)
        _plan_extension(image, plan)
        return plan
    except EngineError as error:
        backup = intent.good_backup(image.fd, image.path)
        is_header = error.is_corruption or error.code in ("not_an_image", "old_layout")
        if isinstance(error, UnknownFeature):
            chain.point_to_backup(error, image.fd, image.path)
        if isinstance(error, (UnknownFeature, HeadersDisagree)) and choice != "backup":
            raise
        if not is_header and not isinstance(error, UnknownFeature):
            raise
        if backup is None:
            if error.is_corruption:
                error.hint = "Restore the image from a copy: its backup header is damaged as well."
            raise
    header, is_epoch_known = two_headers.restored(
        raw, backup, is_epoch_damaged="stable_journal_epoch" in fields
    )
    plan = _Plan(header, is_lost=True, is_epoch_known=is_epoch_known, must_settle=True)
    _plan_shrink(plan)
    if not options.discard_live_state:
        chain.check_not_left_live(header, image.path)
    plan.add(
        "restore_header",
        "restore the first page from the backup copy; a size or setting that was changed "
        "since the copy was made is lost",
    )
    if not is_epoch_known:
        plan.add(
            "recover_epoch",
            "replay the last two epochs of the journal: no other can still be needed",
        )
    return plan


def _plan_shrink(plan: _Plan) -> None:
    """Let a shrink that was cut short be finished: all else is decided for the smaller disk."""
    if intent.is_shrinking(plan.header):
        plan.header = intent.shrunk(plan.header)
        plan.must_shrink = plan.must_settle = plan.must_cut = True
        plan.add(
            "finish_shrink",
            f"finish a shrink to {plan.header.virtual_disk_size} bytes that was cut short",
        )


def _plan_extension(image: ImageFile, plan: _Plan) -> None:
    """Restore a damaged extension; without one the journal's sums cannot be checked."""
    header = plan.header
    if not two_headers.is_extension_damaged(header):
        return
    plan.must_settle = True
    backup = two_headers.backup_of_damaged(image.fd, image.path, header)
    if backup is None or backup.extension is None:
        plan.add(
            "renew_extension",
            "make a new extension: the identity of the base is unknown from now on, and journal "
            "sectors that belong to the old one are given up",
        )
        return
    extension = replace(backup.extension, boot_id=bytes(16), open_session=os.urandom(16))
    plan.extension = extension
    plan.header = replace(header, extension=extension)
    plan.add("restore_extension", "restore the extension area from the backup copy")


def _plan_backup(plan: _Plan, before: CheckResult) -> None:
    """Refresh a copy that is not as it should be; every other repair does so, too."""
    plan.must_copy = any(finding.code == "backup_header" for finding in before.findings)
    if plan.must_copy:
        plan.add("refresh_backup", "make the backup copy of the header anew")


# Content -----------------------------------------------------------------------------------


def _plan_lengths(files: Files, plan: _Plan) -> None:
    """Extend what is too short for raw data; metadata that are cut off are beyond repair."""
    header = plan.header
    length = files.image.length()
    sections = [s for s in geometry.sections(header) if s.name != "data area"]
    metadata_end = max(section.end for section in sections)
    if length < metadata_end:
        raise ImageTruncated(path=files.image.path, actual=length, needed=metadata_end)
    if header.is_compact:
        return
    needed = header.data_offset + header.virtual_disk_size
    have = files.data.length()
    if have >= needed:
        return
    if files.data.is_device:
        raise ImageTruncated(
            path=files.data.path, actual=have, needed=needed,
            hint="The device became smaller: enlarge it to its former size.",
        )  # fmt: skip
    if header.data_file:
        plan.data_length = needed
    else:
        plan.image_length = needed
    plan.must_settle = True
    start = max(0, have - header.data_offset)
    plan.add(
        "extend_file",
        f"extend {files.data.path} from {have} to {needed} bytes: "
        + _reads_zeros(header, start, header.virtual_disk_size),
    )


def _reads_zeros(header: Header, start: int, end: int) -> str:
    text = f"bytes {start} to {end - 1} of the disk read zeros from now on"
    return text + (" where they are local" if header.needs_base else "")


def _plan_metadata(files: Files, plan: _Plan) -> Metadata:
    """Return the state after replay with everything mended in memory."""
    header, image = plan.header, files.image
    stored = image.read(header.bitmap_offset, geometry.used_bitmap(header))
    # Of entries that nobody can mend each would be an action.
    judge = Collector(header, image.path) if header.is_compact else None
    table = metadata.load_table(image.fd, header, image.path, judge)
    journal = _read_journal(image, plan)
    if not plan.is_epoch_known:
        # A checkpoint ends before the next begins, and an open that replays makes one: records of
        # older epochs are all in the table, and may name places that others have by now.
        journal.live.drop_before(journal.highest_epoch - 1)
    bitmap = bytearray(stored)
    for gap in find_gaps(journal.live, header.journal_size):
        plan.must_settle = True
        plan.add("drop_sector", f"go on without what the journal lost: {gap_text(gap)}")
    changes = records.replay(journal, header, bitmap, table)
    loaded = Metadata(bitmap, table, journal, changes, stored)
    if not header.is_clean or changes.blocks or changes.chunks:
        plan.must_settle = True
        plan.add(
            "replay",
            f"replay the journal ({len(journal.live)} sectors, {changes.blocks} blocks, "
            f"{changes.chunks} chunks) and mark the image clean",
        )
    if records.numbers_used_up(journal, header):
        plan.must_settle = True
        plan.add("renumber", "empty the journal, whose epochs or sequences are used up")
    if table is not None:
        _mend_table(files, plan, loaded)
        _plan_table_padding(image, plan)
    checkpoint.clear_padding(header, loaded)
    blocks = metadata.block_count(header) if header.has_base else 0
    if checkpoint.padding_bits(image.fd, header, image.path, stored):
        plan.must_settle = True
        plan.add("clear_padding", "clear the bits behind the last block")
    missing = blocks - metadata.count_set(bitmap, blocks)
    if header.has_base and header.base_img_fully_prefetched and missing:
        plan.clear_prefetched = plan.must_settle = True
        plan.add(
            "need_base",
            f"take back the claim that no base is needed: {missing} blocks come from it again",
        )
    return loaded


def _read_journal(image: ImageFile, plan: _Plan) -> records.Journal:
    """Return the journal without the sectors that must not be replayed."""

    def drop(error: InvalidJournal) -> None:
        plan.must_settle = True
        plan.add(
            "drop_sector",
            f"give up journal sector {error.details['sector']}, which {error.details['reason']}: "
            "a change that stands there alone is lost",
        )

    return metadata.load_journal(image.fd, plan.header, image.path, drop)


def _mend_table(files: Files, plan: _Plan, loaded: Metadata) -> None:
    """Unmap entries that cannot be right; extend the storage for those that can."""
    header, table = plan.header, loaded.table
    assert table is not None
    length = files.data.length()
    limit = length
    if not files.data.is_device:
        # A copy that was cut short has mappings behind its end; a hostile one has them anywhere.
        spare = 2 * len(table) + geometry.first_place(header) + 1
        grown = geometry.place_offset(header, spare) + header.storage_grow_unit
        limit = max(length, min(grown, SIZE_MAX))
    preferred = NumberSet()
    if plan.is_epoch_known:  # what was recorded last is newer than what stands in the table
        for record in records.table_records(loaded.journal, header):
            for index in range(record.first_index, record.first_index + len(record.entries)):
                preferred.take(index)
    for fault in find_faults(table, header, limit, preferred):
        table[fault.index] = UNMAPPED
        plan.must_settle = True
        start = fault.index * header.chunk_size
        end = min(start + header.chunk_size, header.virtual_disk_size)
        which = "which another chunk keeps" if fault.kind is FaultKind.DOUBLE else (
            f"which {fault.kind.value}"
        )  # fmt: skip
        plan.add(
            "unmap_chunk",
            f"unmap chunk {fault.index} from place {fault.place}, {which}: "
            + _reads_zeros(header, start, end),
        )
    _plan_extended_storage(files, plan, loaded, length)


def _plan_extended_storage(files: Files, plan: _Plan, loaded: Metadata, length: int) -> None:
    header, table = plan.header, loaded.table
    assert table is not None
    needed = geometry.place_offset(header, loaded.highest_place() + 1)
    if needed <= length:
        return
    if header.data_file:
        plan.data_length = needed
    else:
        plan.image_length = needed
    plan.must_settle = True
    first = geometry.end_place(header, length)
    plan.add("extend_file", f"extend {files.data.path} from {length} to {needed} bytes")
    for start, end in _merged(_cut_ranges(header, table, first, length)):
        plan.add("extend_file", f"give up what was cut off: {_reads_zeros(header, start, end)}")


def _cut_ranges(
    header: Header, table: "array[int]", first: int, length: int
) -> Iterator[tuple[int, int]]:
    """Yield the parts of the disk whose place, `first` or later, ends behind `length`."""
    for index, place in enumerate(table):
        if first <= place < UNMAPPED:
            have = max(0, length - geometry.place_offset(header, place))
            start = index * header.chunk_size + have
            end = min((index + 1) * header.chunk_size, header.virtual_disk_size)
            if start < end:
                yield start, end


def _merged(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join neighbours."""
    current: tuple[int, int] | None = None
    for start, end in ranges:
        if current is not None and current[1] == start:
            current = current[0], end
            continue
        if current is not None:
            yield current
        current = start, end
    if current is not None:
        yield current


def _plan_table_padding(image: ImageFile, plan: _Plan) -> None:
    if not is_padding_clear(image.fd, plan.header, image.path):
        plan.must_settle = True
        plan.add("clear_padding", "unmap the entries behind the last chunk")


def _plan_leaks(files: Files, plan: _Plan, loaded: Metadata) -> None:
    """Give back what nothing uses.

    Where the size of a raw disk is that of the copy and there are data behind it, the disk has
    grown since the copy was made: these stay.
    """
    header = plan.header
    if files.data.is_device:
        return
    if loaded.table is None:
        end = header.data_offset + header.virtual_disk_size
        end = end if header.data_file else geometry.required_length(header)
        wasted = 0
    else:
        end = used_end(header, loaded)
        wasted = sum(size for _, size in unused_data(files.data.fd, header, loaded, end))
    length = files.data.length()
    if plan.is_lost and loaded.table is None and _has_data(files.data, end, length):
        return
    surplus = max(0, length - round_up(end, PAGE))
    if files.image is not files.data and not stores.is_device(files.image.fd):
        surplus += max(
            0, files.image.length() - round_up(geometry.required_length(header), PAGE)
        )
    if surplus > 0:
        plan.add("cut_file", f"cut {surplus} bytes that nothing uses off the end")
    if wasted:
        plan.add("free_places", f"free {wasted} bytes in places that no chunk has")
    plan.must_cut |= surplus > 0 or wasted > 0


def _has_data(file: ImageFile, start: int, end: int) -> bool:
    return any(is_data for _, _, is_data in file_extents(file.fd, start, end))


# Writing -----------------------------------------------------------------------------------


def _write(files: Files, plan: _Plan, loaded: Metadata) -> None:
    """Write the decided state; every prefix leaves an image that can be repaired again."""
    image, header = files.image, plan.header
    checkpoint.extend_files(files, plan.image_length, plan.data_length)
    if plan.must_settle:
        checkpoint.reserve_metadata(image, header)
    if plan.must_finish:
        editing.finish_update(image)
    if plan.is_lost:
        header = _write_lost(files, plan, loaded)
    elif plan.must_settle:
        raw = Header.unpack(image.read(0, HEADER_COPY_SIZE), image.path)
        raw = editing.write_header(image, raw, replace(raw, clean_shutdown=0))
        if plan.extension is not None:
            raw = editing.write_header(image, raw, replace(raw, extension=plan.extension))
        if plan.must_shrink:
            raw = shrink.write_sizes(files, raw)
        header = checkpoint.settle(files, raw, loaded)
        header = editing.begin_change(image, header)
        if plan.clear_prefetched:
            header = editing.write_header(
                image, header, replace(header, base_img_fully_prefetched=0)
            )
    if plan.must_cut:
        checkpoint.cut_files(files, header, loaded)
        checkpoint.free_unused(files.data, header, loaded)
    if plan.must_settle and not plan.is_lost:
        editing.end_change(image, header)
    else:
        editing.write_backup(image, header)


def _write_lost(files: Files, plan: _Plan, loaded: Metadata) -> Header:
    """Bring the first page back last: until then the damage is found again as it was."""
    image = files.image
    files.flush()
    checkpoint.write_metadata(image, plan.header, loaded)
    checkpoint.clear_journal(image, plan.header)
    epoch = records.next_epoch(loaded.journal, plan.header)
    if records.numbers_used_up(loaded.journal, plan.header):
        epoch = 1                      # the journal is empty
    extension = plan.header.extension
    assert extension is not None
    header = replace(
        plan.header, clean_shutdown=1, stable_journal_epoch=epoch,
        base_img_fully_prefetched=plan.header.base_img_fully_prefetched
        and not plan.clear_prefetched,
        extension=replace(
            extension, open_session=os.urandom(16), boot_id=bytes(16), shrink_size=0
        ),
    )  # fmt: skip
    image.write(0, header.pack())
    image.flush()
    return header
