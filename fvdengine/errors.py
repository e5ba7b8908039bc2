# SPDX-License-Identifier: Apache-2.0
"""Every error that work on an image can end with.

One class an error: a fixed `code` for programs, a one-sentence message made from named
details, a hint that names the remedy, and the exit status of a command that ends with it.
Nothing here looks at an image; `from_os_error` is the only place where an errno becomes one
of these classes.
"""

import errno
import os
import shlex
from typing import ClassVar


class EngineError(Exception):
    """Base of all errors of the engine; `details` holds what the message was made from."""

    code: ClassVar[str] = "engine_error"
    template: ClassVar[str] = "{reason}"
    hint_template: ClassVar[str] = ""
    exit_status: ClassVar[int] = 1
    # True where the error says that the bytes of an image are wrong, not that it cannot be reached.
    is_corruption: ClassVar[bool] = False

    def __init__(self, *, hint: str | None = None, **details: object) -> None:
        self.details: dict[str, object] = details
        self.message = self.template.format_map(details)
        words = {"quoted_path": shlex.quote(str(details.get("path", ""))), **details}
        self.hint = self.hint_template.format_map(words) if hint is None else hint
        super().__init__(self.message)


# Files ------------------------------------------------------------------------------------


class ImageNotFound(EngineError):
    code = "image_not_found"
    template = "{path} does not exist"
    hint_template = "Check the name, or make the image with `fvdctl create`."


class NotAFile(EngineError):
    code = "not_a_file"
    template = "{path} is {kind}, not a regular file or a block device"
    hint_template = "Name a regular file or a block device."


class NoPermission(EngineError):
    code = "no_permission"
    template = "no permission to {action} {path}"
    hint_template = (
        "Change the permissions of the file or its folder, or run the command as its owner or root."
    )


class ReadOnlyStore(EngineError):
    code = "read_only_store"
    template = "{path} lies on a read-only file system"
    hint_template = "Open it with -r, or remount the file system for writing."


class UnsupportedStore(EngineError):
    code = "unsupported_store"
    template = "{path} lies on {store}, where a writable image is not safe"
    hint_template = "Move the image to ext4, xfs, btrfs or tmpfs, or open it with -r."


class NoDirectIo(EngineError):
    code = "no_direct_io"
    template = "the data of {path} cannot go past the page cache: {reason}"
    hint_template = "Use another cache mode than none, or move the image to ext4, xfs or btrfs."


class NoSpace(EngineError):
    code = "no_space"
    template = "no space left for {path}"
    hint_template = "Free some space, or choose another file system."


class FileTooLarge(EngineError):
    code = "file_too_large"
    template = "the file system of {path} does not take files as large as this"
    hint_template = "Choose a smaller size, or a file system such as xfs."


class IoFailed(EngineError):
    code = "io_failed"
    template = "{path}: {reason}"
    hint_template = "Look for errors of the disk or the network in the kernel log."


class ImageInUse(EngineError):
    code = "image_in_use"
    template = "{path} is in use by {holder}"
    hint_template = "Detach the image (fvdctl detach), or end its server, then try again."


class ImageExists(EngineError):
    code = "image_exists"
    template = "{path} exists"
    hint_template = "Choose another name, or overwrite it with --force."


# Contents ---------------------------------------------------------------------------------


class NotAnImage(EngineError):
    code = "not_an_image"
    template = "{path} is not an FVD image: {reason}"
    hint_template = "Check the name; `fvdctl create NEW --base FILE` makes a clone of a raw file."


class OldLayout(EngineError):
    code = "old_layout"
    template = "{path} has the older wiki layout of FVD, which is not supported"
    hint_template = "Convert it with the program that made it to a raw file, and clone that."


class EarlyCodeLayout(EngineError):
    code = "early_code_layout"
    template = "{path} has the layout of the FVD code of January 2011, which is not supported"
    hint_template = "Convert it with the program that made it to a raw file, and clone that."


class ImageTruncated(EngineError):
    code = "image_truncated"
    template = "{path} is cut short: {actual} bytes of the {needed} that its header calls for"
    hint_template = (
        "Restore the image from a copy, or see what `fvdctl check --repair --dry-run` says of it."
    )
    is_corruption = True


class UnknownFeature(EngineError):
    code = "unknown_feature"
    template = "{path} needs a newer version of fvd: incompatible feature bit {bits} is set"
    hint_template = "Open it with the version that made it, or install a newer one."


class InvalidHeader(EngineError):
    code = "invalid_header"
    template = "the header of {path} is invalid: {field} {reason}"
    hint_template = "Look at it with `fvdctl check {quoted_path}`, or restore it from a copy."
    is_corruption = True


class InvalidSections(EngineError):
    code = "invalid_sections"
    template = "the header of {path} is invalid: the {section} {reason}"
    hint_template = "Look at it with `fvdctl check {quoted_path}`, or restore it from a copy."
    is_corruption = True


class InvalidJournal(EngineError):
    code = "invalid_journal"
    template = "the journal of {path} is damaged: sector {sector} {reason}"
    hint_template = "Look at it with `fvdctl check {quoted_path}`, or restore it from a copy."
    is_corruption = True


class InvalidTable(EngineError):
    code = "invalid_table"
    template = "the chunk table of {path} is damaged: entry {entry} {reason}"
    hint_template = "Look at it with `fvdctl check {quoted_path}`, or restore it from a copy."
    is_corruption = True


class TableHopeless(EngineError):
    code = "table_hopeless"
    template = "more than {limit} entries of the chunk table of {path} are wrong"
    hint_template = "Restore the image from a copy."
    is_corruption = True


class BeyondRepair(EngineError):
    code = "beyond_repair"
    template = "the image has more than {limit} damaged parts, so nothing was repaired"
    hint_template = "Restore the image from a copy."


class HeadersDisagree(EngineError):
    code = "headers_disagree"
    template = (
        "the header of {path} and its backup copy disagree in {fields}, and nothing says which "
        "of them is damaged, so nothing was changed"
    )
    hint_template = (
        "Copy the image first. Then `fvdctl check --repair --header front` keeps the header and "
        "`--header backup` takes the copy; see what `--dry-run` says of each."
    )
    is_corruption = True


class PrefetchedFalsely(EngineError):
    code = "prefetched_without_bits"
    template = (
        "{path} claims to need no base any more, but {missing} of its blocks are not marked as "
        "local, so one of the two is damaged"
    )
    hint_template = (
        "Copy the image first. Then `fvdctl check --repair` lets them come from the base again; "
        "`--dry-run` says what that would do."
    )
    is_corruption = True


class ExtensionDamaged(EngineError):
    code = "extension_damaged"
    template = (
        "the extension area in the header of {path} is damaged (its sum is wrong), and without it "
        "the journal cannot be read"
    )
    hint_template = (
        "Copy the image first. Then `fvdctl check --repair` restores it from the backup copy of "
        "the header; `--dry-run` says what that would do."
    )
    is_corruption = True


# Data files -------------------------------------------------------------------------------


class DataFileMissing(EngineError):
    code = "data_file_missing"
    template = "the data file {data} of {path} does not exist"
    hint_template = "Put the data file back where the image expects it."


class DataFileTooShort(EngineError):
    code = "data_file_too_short"
    template = "the data file {data} of {path} has {actual} bytes, fewer than the {needed} it needs"
    hint_template = "Put the data file that belongs to the image back in its place."
    is_corruption = True


class DataFileShared(EngineError):
    code = "data_file_shared"
    template = "the data file {data} of {path} is also {other}"
    hint_template = "Put the data file that belongs to the image back in its place."
    is_corruption = True


class HeldByBackup(EngineError):
    code = "held_by_backup"
    template = "{path} is the base of {image}: a backup of that was broken off"
    hint_template = (
        "Attach {image} instead, which has all the data; the next backup of it puts both together."
    )


class UnknownDataFormat(EngineError):
    code = "unknown_data_format"
    template = "{path} names the data file format {format}, which is not supported"
    hint_template = "Supported are raw, and nbd for an NBD server that has the other format."


class NeedsZeroedStore(EngineError):
    code = "needs_zeroed_store"
    template = "{path} relies on holes that read zeros, but its data lie on {store}"
    hint_template = (
        "Copy the image to a regular file with `cp --sparse=always` and open that; if the storage "
        "read zeros before the image came there, `fvdctl update IMAGE need_zero_init=off` says so."
    )


# Bases ------------------------------------------------------------------------------------


class BaseMissing(EngineError):
    code = "base_missing"
    template = "the base {base} of {path} does not exist"
    hint_template = "Put the base back where the image expects it."


class BaseTooShort(EngineError):
    code = "base_too_short"
    template = "the base {base} of {path} has {actual} bytes, fewer than the {needed} it needs"
    hint_template = "Put the base that the image was made from back in its place."


class BaseChanged(EngineError):
    code = "base_changed"
    template = "the base {base} of {path} has changed since the image was made: {reason}"
    hint_template = (
        "A changed base corrupts every clone: put the old base back, or add --accept-changed-base "
        "if the content is the same."
    )


class BaseEmpty(EngineError):
    code = "base_empty"
    template = "the base {base} is empty"
    hint_template = "Name a base with content, or leave --base out and give a size."


class PathNotAllowed(EngineError):
    code = "path_not_allowed"
    template = "{base}, named as {role} of {path}, lies outside the allowed directories"
    hint_template = "Allow its directory with --allow-dir {quoted}, or move the {role}."


class UnknownBaseFormat(EngineError):
    code = "unknown_base_format"
    template = "{path} names the base format {format}, which is not supported"
    hint_template = "Supported are raw, fvd, qcow2, vmdk, vhdx and vdi; convert others to raw."


class AmbiguousBaseFormat(EngineError):
    code = "ambiguous_base_format"
    template = "the base {base} looks like {format}, and no --base-format was given"
    hint_template = "{remedy}"


class InvalidUri(EngineError):
    code = "invalid_uri"
    template = "{uri} cannot be used as a URI: {reason}"
    hint_template = "Write it like {example}."


class UriNotAllowed(EngineError):
    code = "uri_not_allowed"
    template = "{uri}, named as {role} of {path}, is not among the URIs that may be followed"
    hint_template = "Allow it with --allow-uri {pattern}, if you trust the image and the server."


class UnsupportedUriFormat(EngineError):
    code = "unsupported_uri_format"
    template = "{path} has its base behind a URI, {uri}, in the format {format}"
    hint_template = "Behind a URI the format must be raw: let the server serve the content."


class UnusableForeignBase(EngineError):
    code = "unusable_foreign_base"
    template = "the base {base} cannot be used as {format}: {reason}"
    hint_template = (
        "Make a file that stands by itself with `qemu-img convert -O qcow2`, and name that."
    )


class UnusableProfile(EngineError):
    code = "unusable_profile"
    template = "the boot profile {path} cannot be used: {reason}"
    hint_template = "Record one with `fvdctl serve --profile record FILE`, or name another file."


class BaseUnreachable(EngineError):
    code = "base_unreachable"
    template = "the base {base} cannot be reached: {reason}"
    hint_template = "Check the address, that the server runs, and that it serves this export."


class StorageHangs(EngineError):
    code = "storage_hangs"
    template = "the storage of the base {base} does not answer"
    hint_template = "See what holds it up (`dmesg` may say), or wait until it answers."


class DataServerUnreachable(EngineError):
    code = "data_server_unreachable"
    template = "the server {data}, which is to hold the data, cannot be used: {reason}"
    hint_template = "Check the address, and that the server serves this export for writing."


class DataServerInUse(EngineError):
    code = "data_server_in_use"
    template = "the server {data}, which shall hold the data, holds data already, or cannot tell"
    hint_template = "Use an empty export, or add --force: what is on this one is lost then."


class ProgramMissing(EngineError):
    code = "program_missing"
    template = "{program}, which {purpose} need, is not installed"
    hint_template = "Install it, on Debian with `apt install {package}`."


class ChainTooDeep(EngineError):
    code = "chain_too_deep"
    template = "the chain of bases of {path} has more than {limit} images"
    hint_template = "Copy one of the images to a raw file and clone that."


class ChainLoop(EngineError):
    code = "chain_loop"
    template = "the chain of bases of {path} comes back to {base}"
    hint_template = (
        "No image can lie under itself: give one of them its real base again with "
        "`fvdctl update IMAGE base_img=FILE base_img_fmt=FORMAT --unsafe`."
    )
    is_corruption = True


# Requests ---------------------------------------------------------------------------------


class InvalidSize(EngineError):
    code = "invalid_size"
    template = "{text} is not a valid size: {reason}"
    hint_template = "Give bytes or a number with k, M, G or T (powers of 1024), such as 20G."


class InvalidOption(EngineError):
    code = "invalid_option"
    template = "{option} {reason}"
    hint_template = "Leave {option} out for its default."


class TailInUse(EngineError):
    code = "tail_in_use"
    template = "{path} cannot shrink to {size} bytes: there is {what} behind it, at {at}"
    hint_template = "Choose a larger size, or lose what lies there with --force."


# Live state and engine --------------------------------------------------------------------


class LiveStateLeft(EngineError):
    code = "live_state_left"
    template = "{path} was left open by a process that died, and its live state is not merged yet"
    hint_template = (
        "Start it again with the same state directory (`fvdctl serve {path} --state DIR`); "
        "--discard-live-state gives up what was not flushed."
    )


class LiveStateMismatch(EngineError):
    code = "live_state_mismatch"
    template = "the live state in {directory} does not fit {path}: {reason}"
    hint_template = (
        "Name the state directory that belongs to the image; --discard-live-state gives up what "
        "was not flushed."
    )


class LiveStateDamaged(LiveStateMismatch):
    """No try will read it: whoever has it decides whether to go on without."""

    code = "live_state_damaged"


class LiveStateUnfinished(LiveStateMismatch):
    """The process died before it served its first request: nothing is lost by starting afresh."""

    code = "live_state_unfinished"


class LiveStateOutdated(LiveStateUnfinished):
    """The host was restarted since: the journal on the disk is all there is."""

    code = "live_state_outdated"


class InvalidStats(EngineError):
    code = "invalid_stats"
    template = "{path} is not a statistics page: {reason}"
    hint_template = "The page was written by another version; restart the device's process."


class EngineMissing(EngineError):
    code = "engine_missing"
    template = "the compiled engine is not installed: {reason}"
    hint_template = "Build it with `make build`, or install the package."


class EngineFailed(EngineError):
    code = "engine_failed"
    template = "{path}: {reason}"
    hint_template = "Look at the image with `fvdctl check` and at the kernel log."


class CloseFailed(EngineError):
    code = "close_failed"
    template = "{path} could not be closed cleanly: {reason}"
    hint_template = (
        "What was flushed is safe, what was written after that may be lost. {remedy}, then "
        "{again}: it goes on from its journal, as after a power cut."
    )


_BY_ERRNO: dict[int, type[EngineError]] = {
    errno.ENOENT: ImageNotFound,
    errno.ENOTDIR: ImageNotFound,
    errno.EROFS: ReadOnlyStore,
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EFBIG: FileTooLarge,
}


def from_os_error(error: OSError, path: str, action: str = "open") -> EngineError:
    """Return the error that says what `error` means for `path`; use it with `raise ... from`."""
    number = error.errno or 0
    if number in (errno.EACCES, errno.EPERM):
        return NoPermission(path=path, action=action)
    if number == errno.EISDIR:
        return NotAFile(path=path, kind="a directory")
    if number in _BY_ERRNO:
        return _BY_ERRNO[number](path=path)
    reason = os.strerror(number) if number else str(error)
    return IoFailed(path=path, reason=f"cannot {action}: {reason}")
