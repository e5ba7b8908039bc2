# SPDX-License-Identifier: Apache-2.0
"""The chain of an image: its header and data file, then base after base, opened and identified.

Everything is opened read-only with shared locks, so that no base can be opened for writing while
a clone uses it. A base that is not what the image was made from is refused: through a changed
base every clone reads silent nonsense.
"""

import contextlib
import datetime
import os
import shlex
import stat
import struct
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from fvdengine import (
    foreign,
    intent,
    late,
    locking,
    paths,
    patience,
    remote,
    stores,
    two_headers,
    uris,
)
from fvdengine import header as codec
from fvdengine.data_file import DataFile, open_data_file
from fvdengine.errors import (
    BaseChanged,
    BaseTooShort,
    ChainLoop,
    ChainTooDeep,
    EngineError,
    InvalidHeader,
    InvalidSections,
    IoFailed,
    LiveStateLeft,
    NotAnImage,
    OldLayout,
    StorageHangs,
    UnknownFeature,
    from_os_error,
)
from fvdengine.header import Header
from fvdengine.options import OpenOptions
from fvdengine.remote import Remembered, Remote
from fvdengine.units import SECTOR, round_up

CHAIN_LENGTH_MAX = 64


@dataclass(frozen=True, slots=True)
class Layer:
    """One image or raw file of a chain, with its data file if it has one.

    `length` is what it shows: a virtual disk, or a raw file's bytes. Of a `remote` base `path` is
    the URI, and `fd` keeps what serves it.
    """

    path: str
    fd: int
    format: str
    header: Header | None
    length: int
    data: DataFile | None = None
    remote: Remote | None = None

    def close(self) -> None:
        """Close the descriptors; not idempotent."""
        os.close(self.fd)
        if self.data is not None:
            self.data.close()

    @property
    def storage(self) -> tuple[int, str]:
        """The descriptor and the path of the file with the data; -1 where it is a URI."""
        return (self.fd, self.path) if self.data is None else (self.data.fd, self.data.path)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a base is recognised by: the fields base_kind, base_id and base_length."""

    kind: int
    id: bytes
    length: int


def boot_id() -> bytes:
    """Return the identifier of this boot of the host."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return uuid.UUID(file.read().strip()).bytes


def read_header(fd: int, path: str) -> Header:
    """Read, parse and validate the header of the image open as `fd`, a staged update included."""
    try:
        length = paths.file_length(fd)
        data = os.pread(fd, codec.HEADER_COPY_SIZE, 0)
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    try:
        codec.check_prelude(data, path, length)
        header = Header.unpack(data, path)
        two_headers.validate(fd, path, header, length)
    except EngineError as error:
        point_to_backup(error, fd, path)
        raise
    return intent.settled(header, fd, path)


def read_sound_header(fd: int, path: str, *, is_taken_over: bool = False) -> Header:
    """Like read_header for whoever relies on it: raise HeadersDisagree, ExtensionDamaged or
    PrefetchedFalsely where it must be repaired first."""
    header = read_header(fd, path)
    two_headers.refuse_damage(fd, path, header, is_taken_over=is_taken_over)
    return header


def point_to_backup(error: EngineError, fd: int, path: str) -> None:
    """Let the hint of an error about the header name the way back, where there is a sound copy."""
    is_damage = isinstance(error, InvalidHeader | InvalidSections | NotAnImage | OldLayout)
    if not (is_damage or isinstance(error, UnknownFeature)):
        return
    if intent.good_backup(fd, path) is None:
        return
    name = shlex.quote(path)
    if is_damage:
        error.hint = (
            "It has a sound backup copy of the header, so the header is damaged: copy the file, "
            f"then `fvdctl check --repair {name}`; `--dry-run` says what that would do."
        )
    else:
        error.hint += (
            f" If that is damage, `fvdctl check --repair --header backup {name}` takes the sound "
            "backup copy of the header."
        )


def check_not_left_live(header: Header, path: str) -> None:
    """Raise if a process of this boot died with the image open and left live state."""
    extension = header.trusted_extension
    if header.is_clean or extension is None or not any(extension.boot_id):
        return
    if extension.boot_id == boot_id():
        raise LiveStateLeft(path=path)


def identity_of(layer: Layer) -> Identity:
    """Return how a clone recognises `layer` as its base."""
    if layer.header is not None:
        extension = layer.header.trusted_extension
        if extension is None:
            return Identity(codec.BASE_UNKNOWN, bytes(32), layer.length)
        return Identity(
            codec.BASE_FVD, extension.image_uuid + extension.open_session, layer.length
        )
    if layer.remote is not None and layer.remote.file_id:
        return Identity(codec.BASE_FILE, layer.remote.file_id, layer.length)
    if layer.remote is not None:
        return Identity(codec.BASE_URI, layer.remote.identity, layer.length)
    status = os.fstat(layer.fd)
    if stat.S_ISBLK(status.st_mode):
        packed = struct.pack("<Q", layer.length)
        return Identity(codec.BASE_DEVICE, packed.ljust(32, b"\0"), layer.length)
    return Identity(codec.BASE_FILE, file_id(layer.fd), layer.length)


def file_id(fd: int) -> bytes:
    """Return what an open file is recognised by."""
    packed = struct.pack("<qQ", os.fstat(fd).st_mtime_ns, paths.file_length(fd))
    return packed.ljust(32, b"\0")


def identity_problem(header: Header, base: Layer) -> str:
    """Return why `base` is not the one that `header` was made from, "" if it is or none knows."""
    extension = header.trusted_extension
    if extension is None or extension.base_kind == codec.BASE_UNKNOWN:
        return ""
    if base.remote is not None and not (base.remote.is_reached or base.remote.file_id):
        return ""
    wanted = Identity(extension.base_kind, extension.base_id, extension.base_length)
    return difference(wanted, identity_of(base))


def difference(wanted: Identity, found: Identity) -> str:
    """Return why a base is not the one that was wanted, "" if it is."""
    if found.kind != wanted.kind:
        return "it is another kind of file"
    if found.length != wanted.length:
        return f"it had {wanted.length} bytes and has {found.length} now"
    if found.id != wanted.id:
        if found.kind == codec.BASE_URI:
            return "the server has another version of it"
        if found.kind != codec.BASE_FVD:
            then, now = (_time_text(item) for item in (wanted.id, found.id))
            return f"it was modified: its time is {now}, it was {then} then"
        if found.id[:16] != wanted.id[:16]:
            return "it is another image"
        return "it was opened for writing"
    return ""


def _time_text(base_id: bytes) -> str:
    """The modification time in an identity of a file; "unknown" where none can be told."""
    (nanoseconds,) = struct.unpack_from("<q", base_id)
    try:
        time = datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return "unknown"
    return f"{time:%Y-%m-%d %H:%M:%S.%f} UTC"


def check_base(
    image: Layer, base: Layer, *, accept_changed: bool, warnings: list[str]
) -> None:
    """Check that `base` is long enough and is the base that `image` was made from."""
    header = image.header
    assert header is not None
    if round_up(base.length, SECTOR) < header.base_img_size:
        raise BaseTooShort(
            path=image.path, base=base.path, actual=base.length, needed=header.base_img_size
        )
    problem = identity_problem(header, base)
    if problem and not accept_changed:
        raise BaseChanged(path=image.path, base=base.path, reason=problem)
    if problem:
        warnings.append(f"the base {base.path} of {image.path} has changed: {problem}")
    extension = header.trusted_extension
    if extension is None or extension.base_kind == codec.BASE_UNKNOWN:
        warnings.append(
            f"{image.path} does not know the identity of its base {base.path}, "
            "which may have changed unnoticed"
        )


def open_layer(
    fd: int,
    path: str,
    image_format: str,
    options: OpenOptions | None = None,
    seen: Collection[tuple[int, int, int]] = (),
) -> Layer:
    """Return the layer for an open file of a format that is known, never guessed.

    The data file of an image is opened, too, as `options` say; `seen` are files in other use.
    """
    if image_format == "fvd":
        options = options or OpenOptions(read_only=True)
        header = read_sound_header(fd, path, is_taken_over=options.takeover)
        data = open_data_file(header, fd, path, options, seen)
        return Layer(path, fd, "fvd", header, header.virtual_disk_size, data)
    return Layer(path, fd, "raw", None, paths.file_length(fd))


def open_base_layer(
    name: str,
    base_format: str,
    image_path: str,
    options: OpenOptions,
    warnings: list[str],
    seen: Collection[tuple[int, int, int]] = (),
    known: Remembered | None = None,
    directory: str | None = None,
) -> Layer:
    """Open one base by the path policy, with shared locks; the caller closes `Layer.fd`.

    `seen` are the identities of the images above: one of them again would be a loop. `known`
    is what the image knows of a remote base, without which it must be reachable; `directory` the
    one that the image was opened in, without which its name says it. Raises StorageHangs where its
    storage does not answer.
    """
    if uris.is_uri(name):
        return _open_remote(name, base_format, image_path, options, warnings, known)
    place = paths.place_of(name, image_path, directory)
    if not patience.answers(place):
        raise StorageHangs(base=place)
    fd, real = paths.open_base(name, image_path, options.allow_dirs, directory)
    if base_format == "fvd" and not patience.reads(fd, codec.HEADER_COPY_SIZE):
        # Not closed: that might wait as well.
        raise StorageHangs(base=real)
    try:
        if paths.file_identity(fd) in seen:  # before the lock, which we hold ourselves
            raise ChainLoop(path=image_path, base=real)
        try:
            locking.lock(
                fd, real, exclusive=False, wait_seconds=options.lock_wait_seconds
            )
        except IoFailed as error:  # a base may lie where there are no locks
            warnings.append(error.message)
        verdict, store = stores.judge_store(fd)
        if verdict is stores.Verdict.REFUSED:
            warnings.append(f"the base {real} lies on {store}, which may change or go away")
        if base_format in foreign.FORMATS:
            return _open_foreign(fd, real, base_format, options, warnings, known)
        layer = open_layer(fd, real, base_format, replace(options, read_only=True), seen)
    except BaseException:
        os.close(fd)
        raise
    try:
        if layer.header is not None:
            check_not_left_live(layer.header, real)
    except BaseException:
        layer.close()
        raise
    return layer


def _open_remote(
    name: str,
    base_format: str,
    image_path: str,
    options: OpenOptions,
    warnings: list[str],
    known: Remembered | None,
) -> Layer:
    uri = remote.parse_allowed(name, options.allow_uris, image_path)
    # A successor has to serve at once; its predecessor has looked.
    patience = remote.CHILD_OPEN_SECONDS if uri.scheme in ("ssh", "s3") else remote.OPEN_SECONDS
    seconds = 0.0 if options.takeover else patience
    found, warning = remote.open_remote(
        uri, base_format, image_path, known,
        remote.CREATE_SECONDS if known is None else seconds,
    )  # fmt: skip
    if warning:
        warnings.append(warning)
    return Layer(uri.shown, found.keeper, base_format, None, found.length, remote=found)


def _open_foreign(
    fd: int,
    path: str,
    base_format: str,
    options: OpenOptions,
    warnings: list[str],
    known: Remembered | None,
) -> Layer:
    """Serve an open, locked file in another format; the descriptor goes over to its server."""
    seconds = remote.CREATE_SECONDS if known is None else remote.CHILD_OPEN_SECONDS
    found, warning = remote.open_foreign(
        fd, path, base_format, known, 0.0 if options.takeover else seconds
    )
    found = replace(found, file_id=file_id(fd))
    os.close(fd)
    if warning:
        warnings.append(warning)
    return Layer(path, found.keeper, base_format, None, found.length, remote=found)


def remembered(header: Header) -> Remembered:
    """Return what the image knows of a remote base that cannot be asked."""
    extension = header.trusted_extension
    if extension is not None and extension.base_kind != codec.BASE_UNKNOWN:
        return Remembered(extension.base_length, True)
    return Remembered(header.base_img_size, False)


def _open_base_of(
    image: Layer,
    header: Header,
    options: OpenOptions,
    warnings: list[str],
    seen: Collection[tuple[int, int, int]],
) -> Layer:
    """Open the base of an image of the chain; where its storage hangs, somebody else waits for it
    and what is local is served meanwhile."""
    name, image_format = header.base_img, header.base_format
    known, place = remembered(header), paths.directory_of(image.fd)
    extension = header.trusted_extension
    if (
        extension is not None
        and extension.base_kind == codec.BASE_URI
        and not options.accept_changed_base
    ):
        known = replace(known, identity=extension.base_id)
    try:
        return open_base_layer(
            name, image_format, image.path, options, warnings, seen, known, place
        )
    except StorageHangs:
        if not late.can_serve(image_format):
            raise
    base = late.LateBase(
        name, image_format, image.path, place, options.allow_dirs, options.allow_uris,
        extension.base_kind if extension is not None else codec.BASE_UNKNOWN,
        extension.base_id.hex() if extension is not None else "",
        known.length, options.accept_changed_base, options.base_timeout,
    )  # fmt: skip
    found, warning = late.open_late(base, known)
    warnings.append(warning)
    return Layer(base.path, found.keeper, image_format, None, found.length, remote=found)


def open_chain(
    top: Layer, options: OpenOptions, warnings: list[str],
    above: Collection[tuple[int, int, int]] = (), spare: int = 0,
) -> list[Layer]:  # fmt: skip
    """Return `top` and all bases under it; the caller closes their descriptors.

    `above` are the identities of files that `top` is, or shall become, a base of; `spare` are
    layers that shall come on top, beside those of the limit.

    On an error the bases opened so far are closed again, `top` is not.
    """
    layers = [top]
    seen = {*above, *identities(top)}
    try:
        while (header := layers[-1].header) is not None and header.needs_base:
            image = layers[-1]
            if len(layers) >= CHAIN_LENGTH_MAX - spare:
                raise ChainTooDeep(path=top.path, limit=CHAIN_LENGTH_MAX - spare)
            base = _open_base_of(image, header, options, warnings, seen)
            layers.append(base)
            seen.update(identities(base))
            check_base(
                image, base, accept_changed=options.accept_changed_base, warnings=warnings
            )
    except BaseException:
        for layer in layers[1:]:
            layer.close()
        raise
    return layers


def check_local_bases(path: str, options: OpenOptions) -> None:
    """Raise what opening the image would, as far as its file and local bases go: EngineError. The
    image may be in use; whoever has it and its bases open goes on where nobody could begin."""
    with contextlib.ExitStack() as stack:
        fd = paths.open_file(path, writable=not options.read_only)
        stack.callback(os.close, fd)
        header = read_header(fd, path)
        layer = Layer(path, fd, "fvd", header, header.virtual_disk_size)
        seen = set(identities(layer))
        while (above := layer.header) is not None and above.needs_base:
            if uris.is_uri(above.base_img):
                return
            place = paths.directory_of(layer.fd)
            if above.base_format in foreign.FORMATS:
                os.close(paths.open_base(above.base_img, layer.path, options.allow_dirs, place)[0])
                return
            try:
                base = open_base_layer(
                    above.base_img, above.base_format, layer.path, options, [], seen,
                    directory=place,
                )  # fmt: skip
            except StorageHangs:
                return
            stack.callback(base.close)
            seen.update(identities(base))
            check_base(layer, base, accept_changed=options.accept_changed_base, warnings=[])
            layer = base


def images_below(path: str) -> list[str]:
    """The images of our format that are bases of the image `path`, the nearest first, as far as
    they can be followed; they may be in use."""
    found: list[str] = []
    while len(found) < CHAIN_LENGTH_MAX and patience.answers(path):
        try:
            fd = paths.open_file(path)
            try:
                header = read_header(fd, path)
                place = paths.directory_of(fd)
            finally:
                os.close(fd)
        except EngineError:
            break
        name = header.base_img
        if not header.has_base or header.base_format != "fvd" or uris.is_uri(name):
            break
        path = os.path.realpath(paths.place_of(name, path, place))
        if path in found:
            break
        found.append(path)
    return found


def refuse_data_below(
    fd: int, path: str, header: Header, data_fd: int, options: OpenOptions
) -> None:
    """Raise ChainLoop if the data file of the image, open at `data_fd`, lies under it as well:
    who writes it would write a base. What else may be wrong with bases is not judged here."""
    if not header.needs_base or uris.is_uri(header.base_img):
        return
    top = Layer(path, fd, "fvd", header, header.virtual_disk_size)
    above = {paths.file_identity(data_fd)}
    try:
        layers = open_chain(top, replace(options, read_only=True), [], above)
    except ChainLoop as error:
        found = str(error.details["base"])
        if os.path.exists(found) and os.path.samestat(os.stat(found), os.fstat(data_fd)):
            raise
    except EngineError:
        return
    else:
        for layer in layers[1:]:
            layer.close()


def identities(layer: Layer) -> Iterator[tuple[int, int, int]]:
    """The files of a layer, to tell when a chain meets one of them again."""
    yield paths.file_identity(layer.fd)
    if layer.data is not None and layer.data.fd >= 0:
        yield paths.file_identity(layer.data.fd)
