# SPDX-License-Identifier: Apache-2.0
"""What an image says about itself, without needing its base and without waiting for its user.

Reading the header takes no lock that must succeed: each of its updates is one sector, and info
is what one looks at when something is in the way. Problems with the base or a user of the image
are part of the answer.
"""

import os
import uuid
from dataclasses import dataclass, field, fields, replace

from fvdengine import chain, geometry, locking, paths
from fvdengine.data_file import DataFile, open_data_file
from fvdengine.errors import EngineError, ImageInUse, LiveStateLeft
from fvdengine.header import Header
from fvdengine.locking import BOTH, Holder
from fvdengine.metadata import Metadata, load_metadata
from fvdengine.options import OpenOptions
from fvdengine.units import SECTOR

_BASE_KINDS = {0: "unknown", 1: "fvd", 2: "uri", 3: "file", 4: "device"}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A base of the chain or the data file, as far as it could be reached."""

    name: str
    format: str
    path: str | None = None
    length: int | None = None
    problem: str | None = None

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name, "format": self.format, "path": self.path, "length": self.length,
            "problem": self.problem,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class JournalInfo:
    """What the journal holds for the next open to replay."""

    used_bytes: int
    records: int
    blocks: int
    chunks: int
    torn_sectors: int

    def as_dict(self) -> dict[str, object]:
        return {
            "used_bytes": self.used_bytes, "records_to_replay": self.records,
            "blocks_to_replay": self.blocks, "chunks_to_replay": self.chunks,
            "torn_sectors": self.torn_sectors,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The answer. What is counted is None while another process may be changing it."""

    path: str
    header: Header
    file_length: int
    allocated_bytes: int
    state: str
    bases: list[FileInfo]
    used_by: list[Holder] = field(default_factory=list)
    local_bytes: int | None = None
    mapped_chunks: int | None = None
    journal: JournalInfo | None = None
    data: FileInfo | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def layout(self) -> str:
        return "compact" if self.header.is_compact else "raw"

    @property
    def chunks(self) -> int:
        """How many chunks the disk has; 0 in raw layout."""
        header = self.header
        if not header.is_compact:
            return 0
        return geometry.chunk_count(header.virtual_disk_size, header.chunk_size)

    @property
    def metadata_memory(self) -> int:
        """Bytes of bitmap and table that an open image keeps in memory."""
        header = self.header
        return (geometry.used_bitmap(header) if header.needs_base else 0) + header.table_size

    @property
    def extension_trust(self) -> str:
        """Whether what the extension area says counts."""
        if self.header.trusted_extension is not None:
            return "trusted"
        if self.header.extension is None:
            return "missing or damaged: its sum is wrong"
        return "not trusted: an older version opened the image last"

    @property
    def compatible_features(self) -> list[str]:
        """The names of the features that an older reader may ignore; bits without a name too."""
        extension = self.header.trusted_extension
        bits = extension.compatible_features if extension is not None else 0
        names = {0: "journal_trailers", 1: "update_staged"}
        return [names.get(bit, f"bit {bit}") for bit in range(64) if bits >> bit & 1]

    def as_dict(self) -> dict[str, object]:
        """Return the answer for a program; field names are those of the format."""
        header = self.header
        values: dict[str, object] = {
            item.name: getattr(header, item.name)
            for item in fields(header)
            if item.name not in ("magic", "incompatible_features", "extension")
        }
        extension = header.extension
        return {
            "path": self.path,
            "format": "fvd",
            "layout": self.layout,
            "size_bytes": header.virtual_disk_size,
            "local_bytes": self.local_bytes,
            "file_length": self.file_length,
            "allocated_bytes": self.allocated_bytes,
            "state": self.state,
            "used_by": [{"pid": item.pid, "command": item.command} for item in self.used_by],
            "bases": [base.as_dict() for base in self.bases],
            "data_file": None if self.data is None else self.data.as_dict(),
            "chunks": self.chunks,
            "mapped_chunks": self.mapped_chunks,
            "metadata_memory": self.metadata_memory,
            "journal": None if self.journal is None else self.journal.as_dict(),
            "compatible_features": self.compatible_features,
            "extension_trust": self.extension_trust,
            "header": values,
            "extension": None if extension is None else {
                "trusted": header.trusted_extension is not None,
                "image_uuid": str(uuid.UUID(bytes=extension.image_uuid)),
                "open_session": extension.open_session.hex(),
                "boot_id": extension.boot_id.hex(),
                "create_time": extension.create_time,
                "compatible_features": extension.compatible_features,
                "base_length": extension.base_length,
                "base_kind": _BASE_KINDS.get(extension.base_kind, str(extension.base_kind)),
                "base_id": extension.base_id.hex(),
            },
            "warnings": self.warnings,
        }  # fmt: skip


def image_info(path: str | os.PathLike[str], options: OpenOptions | None = None) -> ImageInfo:
    """Return what the image says; only its own header must be valid."""
    options = options or OpenOptions()
    name = os.fspath(path)
    fd = paths.open_file(name)
    try:
        is_free = locking.try_lock(fd, BOTH, exclusive=False)
        # The descriptor looking has a lock only if it is free, so any holder is another.
        used_by = [] if is_free else locking.find_holders(fd)
        header = chain.read_header(fd, name)
        warnings: list[str] = []
        data, data_info = _data_file(header, fd, name, options, is_free)
        allocated = os.fstat(fd).st_blocks * 512
        if data is not None and data.fd >= 0:
            allocated += os.fstat(data.fd).st_blocks * 512
        loaded = None
        if is_free:
            loaded = _load(chain.Layer(name, fd, "fvd", header, 0, data), data_info, warnings)
        if data is not None:
            data.close()
        top = chain.Layer(name, fd, "fvd", header, header.virtual_disk_size)
        return ImageInfo(
            path=name,
            header=header,
            file_length=paths.file_length(fd),
            allocated_bytes=allocated,
            state=_state(header, name, is_free),
            bases=_bases(top, options, warnings),
            used_by=used_by,
            local_bytes=None if loaded is None else loaded.count_local(header),
            mapped_chunks=loaded.count_mapped() if loaded and header.is_compact else None,
            journal=None if loaded is None else _journal(loaded),
            data=data_info,
            warnings=list(dict.fromkeys(warnings)),
        )
    finally:
        os.close(fd)


def _data_file(
    header: Header, fd: int, path: str, options: OpenOptions, is_free: bool
) -> tuple[DataFile | None, FileInfo | None]:
    """Open the data file and say what it is; a user of it is no problem of a used image."""
    if not header.data_file:
        return None, None
    name, data_format = header.data_file, header.data_format
    try:
        data = open_data_file(header, fd, path, replace(options, read_only=True))
    except EngineError as error:
        is_expected = isinstance(error, ImageInUse) and not is_free
        problem = None if is_expected else error.message
        return None, FileInfo(name, data_format, problem=problem)
    assert data is not None
    length = None if data.fd < 0 else paths.file_length(data.fd)
    return data, FileInfo(name, data_format, data.path, length)


def _load(
    layer: chain.Layer, data: FileInfo | None, warnings: list[str]
) -> Metadata | None:
    assert layer.header is not None
    length = paths.file_length(layer.fd) if data is None else data.length
    try:
        return load_metadata(layer.fd, layer.header, layer.path, length)
    except EngineError as error:
        warnings.append(error.message)
        return None


def _journal(loaded: Metadata) -> JournalInfo:
    journal = loaded.journal
    return JournalInfo(
        len(journal.live) * SECTOR, journal.record_count,
        loaded.changes.blocks, loaded.changes.chunks, len(journal.torn),
    )  # fmt: skip


def _state(header: Header, path: str, is_free: bool) -> str:
    if not is_free:
        return "in use"
    if header.is_clean:
        return "clean"
    try:
        chain.check_not_left_live(header, path)
    except LiveStateLeft:
        return "left by a dead process"
    return "not closed cleanly"


def _bases(top: chain.Layer, options: OpenOptions, warnings: list[str]) -> list[FileInfo]:
    """Follow the chain as far as it goes; the first problem ends it."""
    found: list[FileInfo] = []
    opened: list[chain.Layer] = []
    image = top
    seen = set(chain.identities(top))
    try:
        while image.header is not None and image.header.has_base:
            header = image.header
            if len(found) >= chain.CHAIN_LENGTH_MAX:
                break
            try:
                base = chain.open_base_layer(
                    header.base_img, header.base_format, image.path, options, warnings,
                    seen, chain.remembered(header),
                )  # fmt: skip
                opened.append(base)
                seen.update(chain.identities(base))
                problem = None
                try:
                    chain.check_base(image, base, accept_changed=False, warnings=warnings)
                except EngineError as error:
                    problem = error.message
            except EngineError as error:
                found.append(
                    FileInfo(header.base_img, header.base_format, problem=error.message)
                )
                break
            found.append(
                FileInfo(header.base_img, base.format, base.path, base.length, problem)
            )
            image = base
    finally:
        for layer in opened:
            layer.close()
    return found
