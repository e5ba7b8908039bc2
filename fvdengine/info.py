# SPDX-License-Identifier: Apache-2.0
"""What an image says about itself, without needing its base and without waiting for its user.

Reading the header takes no lock that must succeed: each of its updates is one sector, and info
is what one looks at when something is in the way. Problems with the base or a user of the image
are part of the answer.
"""

import os
import uuid
from dataclasses import dataclass, field, fields

from fvdengine import chain, locking, paths
from fvdengine.errors import EngineError, LiveStateLeft
from fvdengine.header import Header
from fvdengine.locking import BOTH, Holder
from fvdengine.metadata import load_metadata
from fvdengine.options import OpenOptions

_BASE_KINDS = {0: "unknown", 1: "fvd", 2: "uri", 3: "file", 4: "device"}


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """One base of the chain, as far as it could be reached."""

    name: str
    format: str
    path: str | None = None
    length: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The answer. `local_bytes` is None while another process may be changing it."""

    path: str
    header: Header
    file_length: int
    allocated_bytes: int
    state: str
    bases: list[BaseInfo]
    used_by: list[Holder] = field(default_factory=list)
    local_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)

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
            "layout": "raw",
            "size_bytes": header.virtual_disk_size,
            "local_bytes": self.local_bytes,
            "file_length": self.file_length,
            "allocated_bytes": self.allocated_bytes,
            "state": self.state,
            "used_by": [{"pid": item.pid, "command": item.command} for item in self.used_by],
            "bases": [
                {"name": base.name, "format": base.format, "path": base.path,
                 "length": base.length, "problem": base.problem}
                for base in self.bases
            ],
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
        local_bytes = None
        if is_free:
            try:
                local_bytes = load_metadata(fd, header, name).count_local(header)
            except EngineError as error:
                warnings.append(error.message)
        top = chain.Layer(name, fd, "fvd", header, header.virtual_disk_size)
        return ImageInfo(
            path=name,
            header=header,
            file_length=paths.file_length(fd),
            allocated_bytes=os.fstat(fd).st_blocks * 512,
            state=_state(header, name, is_free),
            bases=_bases(top, options, warnings),
            used_by=used_by,
            local_bytes=local_bytes,
            warnings=list(dict.fromkeys(warnings)),
        )
    finally:
        os.close(fd)


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


def _bases(top: chain.Layer, options: OpenOptions, warnings: list[str]) -> list[BaseInfo]:
    """Follow the chain as far as it goes; the first problem ends it."""
    found: list[BaseInfo] = []
    opened: list[chain.Layer] = []
    image = top
    try:
        while image.header is not None and image.header.has_base:
            header = image.header
            if len(found) >= chain.CHAIN_LENGTH_MAX:
                break
            try:
                base = chain.open_base_layer(
                    header.base_img, header.base_format, image.path, options, warnings
                )
                opened.append(base)
                problem = None
                try:
                    chain.check_base(image, base, accept_changed=False, warnings=warnings)
                except EngineError as error:
                    problem = error.message
            except EngineError as error:
                found.append(
                    BaseInfo(header.base_img, header.base_format, problem=error.message)
                )
                break
            found.append(
                BaseInfo(header.base_img, base.format, base.path, base.length, problem)
            )
            image = base
    finally:
        for layer in opened:
            layer.close()
    return found
