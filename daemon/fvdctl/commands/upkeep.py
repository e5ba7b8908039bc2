# SPDX-License-Identifier: Apache-2.0
"""The verbs that look after images: update, resize, check; the first two also of those in use."""

import os
from collections.abc import Sequence

import click

from fvdctl import output
from fvdctl.output import size_text
from fvdengine.check import check_image
from fvdengine.errors import ImageInUse, InvalidOption
from fvdengine.findings import REPAIR, CheckResult, Severity
from fvdengine.options import OpenOptions
from fvdengine.repair import RepairResult, repair_image
from fvdengine.resize import ResizeOptions, resize_image
from fvdengine.update import UpdateOptions, update_image

_IMAGE = click.Path(readable=False)
_SOCKET = click.option(
    "--socket", metavar="PATH",
    help="The daemon's socket (default: FVDD_SOCKET, or /run/fvd/fvdd.sock).",
)  # fmt: skip


def _assignments(words: Sequence[str]) -> dict[str, str]:
    """Read KEY=VALUE words; a key that comes twice is a mistake."""
    found: dict[str, str] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise InvalidOption(
                option=repr(word), reason="is not KEY=VALUE",
                hint="Write it like copy_on_read=on; nothing was changed.",
            )  # fmt: skip
        if key in found:
            raise InvalidOption(
                option=key, reason="is given twice", hint="Give it once; nothing was changed."
            )
        found[key] = value
    return found


@click.command()
@click.argument("image", type=_IMAGE, metavar="IMAGE|NAME|DEVICE")
@click.argument("assignments", nargs=-1, required=True, metavar="KEY=VALUE...")
@click.option(
    "--allow-dir", "allow_dirs", multiple=True, metavar="DIR",
    help="Allow a base in DIR, besides the image's own directory. May be given several times.",
)  # fmt: skip
@click.option(
    "--unsafe", is_flag=True,
    help="Take base_img or data_file although nothing shows that it is the former file.",
)
@_SOCKET
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print no notes and warnings.")
def update(
    image: str, assignments: Sequence[str], allow_dirs: Sequence[str], unsafe: bool,
    socket: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Change how an image is run: all of the fields given, or none.

    \b
    sizes (bytes, k, M, G, T)
      journal_buf_size  storage_grow_unit  bytes_per_prefetch
      max_outstanding_copy_on_read_data
    milliseconds
      journal_clean_buf_period  prefetch_throttle_time
      prefetch_read_throughput_measure_time
      prefetch_write_throughput_measure_time
    KB/s (1024 bytes)
      prefetch_min_read_throughput   prefetch_max_read_throughput
      prefetch_min_write_throughput  prefetch_max_write_throughput
    others
      copy_on_read=on|off  prefetch_start_delay=SECONDS|off
      num_prefetch_slots=1..64  add_storage_cmd=TEXT (never run)
      need_zero_init=off
    files that were renamed or moved (named from here)
      base_img  base_img_fmt  data_file  data_file_fmt

    Of an image in use all can change but the files, need_zero_init and add_storage_cmd. Most fields
    take effect at once, prefetch_start_delay, num_prefetch_slots and bytes_per_prefetch when it is
    opened next.
    """
    options = UpdateOptions(allow_dirs=tuple(allow_dirs), unsafe=unsafe)
    given = _assignments(assignments)
    if _may_be_device(image) and _update_running(image, given, socket, unsafe, as_json, quiet):
        return
    try:
        result = update_image(image, given, options)
    except ImageInUse:
        if _update_running(image, given, socket, unsafe, as_json, quiet):
            return
        raise
    output.warn(result.warnings, quiet=quiet)
    if as_json:
        output.emit_json(
            {
                "path": result.path,
                "changes": {
                    name: {"old": old, "new": new} for name, (old, new) in result.changes.items()
                },
                "warnings": result.warnings,
            }
        )
    elif not quiet:
        for name, (old, new) in result.changes.items():
            click.echo(output.printable(f"{name}: {old} -> {new}"))
        if not result.changes:
            click.echo("nothing to change")


@click.command()
@click.argument("image", type=_IMAGE, metavar="IMAGE|NAME|DEVICE")
@click.argument("size")
@click.option("--shrink", is_flag=True, help="Allow the disk to become smaller.")
@click.option("--force", is_flag=True, help="With --shrink: lose what lies behind the new end.")
@click.option(
    "--allow-dir", "allow_dirs", multiple=True, metavar="DIR",
    help="Allow bases in DIR, besides the image's own directory. May be given several times.",
)  # fmt: skip
@click.option(
    "--allow-uri", "allow_uris", multiple=True, metavar="PATTERN",
    help="Allow URIs in images to lead to SCHEME://HOST[:PORT][/PATH]; HOST may be *.DOMAIN or *. "
        "May be given several times.",
)  # fmt: skip
@click.option(
    "--accept-changed-base", is_flag=True,
    help="Go on although a base is not what the image was made from.",
)
@_SOCKET
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print no notes and warnings.")
def resize(
    image: str, size: str, shrink: bool, force: bool, allow_dirs: Sequence[str],
    allow_uris: Sequence[str], accept_changed_base: bool, socket: str | None, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Change the size of a disk to SIZE, or by +SIZE.

    New space reads as zeros. The disk of an attached device grows while it is in use; a file system
    on it then grows by its own program. An image that nobody uses may also become smaller, only
    with --shrink, and only if nothing but zeros lies behind its new end, or with --force.
    """
    if _may_be_device(image) and _resize_device(
        image, size, socket, shrink, force, as_json=as_json, quiet=quiet
    ):
        return
    options = ResizeOptions(
        shrink=shrink, force=force, allow_dirs=tuple(allow_dirs),
        allow_uris=tuple(allow_uris), accept_changed_base=accept_changed_base,
    )  # fmt: skip
    try:
        result = resize_image(image, size, options)
    except ImageInUse:
        if _resize_device(image, size, socket, shrink, force, as_json=as_json, quiet=quiet):
            return
        raise
    output.warn(result.warnings, quiet=quiet)
    if as_json:
        output.emit_json(
            {
                "path": result.path,
                "old_size_bytes": result.old_size,
                "size_bytes": result.new_size,
                "warnings": result.warnings,
            }
        )
    elif not quiet:
        text = f"{result.path}: {size_text(result.old_size)} -> {size_text(result.new_size)}"
        if result.old_size == result.new_size:
            text = f"{result.path} has {size_text(result.new_size)} already"
        click.echo(output.printable(text))


def _may_be_device(word: str) -> bool:
    """Whether a word may mean a device: what is not an image for sure."""
    if "/" in word:
        return os.path.realpath(word).startswith("/dev/nbd")
    return not os.path.lexists(word)


def _update_running(
    word: str, fields: dict[str, str], socket: str | None, unsafe: bool, as_json: bool, quiet: bool
) -> bool:
    """Let whoever has the image open change it; False: nobody does whom we could ask."""
    from fvdctl.commands import running

    answer = running.update(word, fields, socket, unsafe=unsafe)
    if answer is None:
        return False
    if as_json:
        output.emit_json(answer)
    elif not quiet:
        for name, change in answer["changes"].items():
            late = " (when it is opened next)" if name in answer["next_open"] else ""
            click.echo(output.printable(f"{name}: {change['old']} -> {change['new']}{late}"))
        if not answer["changes"]:
            click.echo("nothing to change")
    return True


def _resize_device(
    word: str, size: str, socket: str | None, shrink: bool, force: bool, *, as_json: bool,
    quiet: bool,
) -> bool:  # fmt: skip
    """Let whoever has the image open grow it; False: nobody does whom we could ask."""
    # Here, because nobody else needs an HTTP client.
    from fvdctl.commands import running

    answer = running.resize(word, size, socket, shrink=shrink, force=force)
    if answer is None:
        return False
    if as_json:
        output.emit_json(answer)
    elif not quiet:
        old, new = int(answer["old_size_bytes"]), int(answer["size_bytes"])
        text = f"{answer['name']}: {size_text(old)} -> {size_text(new)}"
        click.echo(output.printable(text))
    return True


@click.command()
@click.argument("image", type=_IMAGE)
@click.option(
    "--allow-dir", "allow_dirs", multiple=True, metavar="DIR",
    help="Allow bases in DIR, besides the image's own directory. May be given several times.",
)  # fmt: skip
@click.option(
    "--allow-uri", "allow_uris", multiple=True, metavar="PATTERN",
    help="Allow URIs in images to lead to SCHEME://HOST[:PORT][/PATH]; HOST may be *.DOMAIN or *. "
        "May be given several times.",
)  # fmt: skip
@click.option(
    "--accept-changed-base", is_flag=True,
    help="Go on although a base is not what the image was made from.",
)
@click.option(
    "--discard-live-state", is_flag=True,
    help="Look at the disk's state, though a dead process left newer live state.",
)
@click.option("--repair", is_flag=True, help="Mend what can be mended, and check again.")
@click.option("--dry-run", is_flag=True, help="With --repair: say what would be done, do nothing.")
@click.option(
    "--header", type=click.Choice(["front", "backup"]),
    help="With --repair: the header to believe where it and its backup copy disagree.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print no notes and warnings.")
def check(
    image: str, allow_dirs: Sequence[str], allow_uris: Sequence[str], accept_changed_base: bool,
    discard_live_state: bool, repair: bool, dry_run: bool, header: str | None, as_json: bool,
    quiet: bool,
) -> int:  # fmt: skip
    """Verify IMAGE: exit status 0 fine, 1 could not check all, 2 corrupt, 3 leaks.

    A base that was modified or replaced is status 1: the image itself may be in order. With
    --repair the status is that of the check afterwards, with --dry-run that of the image as it is.
    """
    for option, is_given in (("--dry-run", dry_run), ("--header", header is not None)):
        if is_given and not repair:
            raise InvalidOption(
                option=option, reason="has no meaning without --repair",
                hint="A check alone changes nothing.",
            )  # fmt: skip
    options = OpenOptions(
        read_only=True,
        allow_dirs=tuple(allow_dirs),
        allow_uris=tuple(allow_uris),
        accept_changed_base=accept_changed_base,
        discard_live_state=discard_live_state,
    )
    if repair:
        mended = repair_image(image, options, dry_run=dry_run, header=header)
        if as_json:
            output.emit_json(mended.as_dict())
        else:
            _print_repair(mended, quiet)
        return mended.exit_status
    result = check_image(image, options)
    if as_json:
        output.emit_json(result.as_dict())
    else:
        _print_check(result, quiet)
    return result.exit_status


def _print_repair(mended: RepairResult, quiet: bool) -> None:
    word = "would" if mended.is_dry_run else "done:"
    for action in mended.actions:
        click.echo(f"{word} {output.printable(action.message)}")
    if not mended.actions and not quiet:
        click.echo("nothing to repair")
    _print_check(mended.after, quiet, is_mended=not mended.is_dry_run)


def _print_check(result: CheckResult, quiet: bool, *, is_mended: bool = False) -> None:
    shown = [item for item in result.findings if item.severity is not Severity.NOTE or not quiet]
    for finding in shown:
        click.echo(f"{finding.severity.value}: {output.printable(finding.message)}")
    for remedy in dict.fromkeys(finding.remedy for finding in shown):
        if remedy == REPAIR and result.exit_status and not is_mended:
            click.echo(f"hint: `{REPAIR} {output.printable(result.path)}` mends what can be mended")
        elif remedy not in ("", REPAIR):
            click.echo(f"hint: {output.printable(remedy)}")
    if quiet:
        return
    if result.blocks:
        click.echo(f"{result.local_blocks} of {result.blocks} blocks of the base are local")
    if result.chunks:
        click.echo(f"{result.mapped_chunks} of {result.chunks} chunks have a place")
    verdict = ("no errors found", "could not be checked completely", "corrupt", "leaks space")
    click.echo(f"{output.printable(result.path)}: {verdict[result.exit_status]}")
