# SPDX-License-Identifier: Apache-2.0
"""The verb metrics: print what Prometheus would read, or leave it where node_exporter finds it.

node_exporter's textfile collector reads every *.prom file of a directory at each scrape, so the
file must be whole at any moment: it is written beside its place under a name that the collector
does not read, and renamed.
"""

from __future__ import annotations

import contextlib
import os
import stat

import click

from fvdapi.client import Client
from fvdctl import output
from fvdctl.commands.online import daemon_options

TEXTFILE_MODE = 0o644
OWN_PREFIX = "fvd_"


@click.command()
@click.option(
    "--textfile",
    type=click.Path(dir_okay=False, readable=False),
    metavar="PATH",
    help="Write them to PATH, which ends with .prom, for node_exporter's textfile collector: "
    "atomically, and without those of the process, which node_exporter has its own of.",
)
@daemon_options
def metrics(textfile: str | None, socket: str | None, as_json: bool, quiet: bool) -> None:
    """Print the daemon's metrics, as Prometheus reads them."""
    if textfile is not None and as_json:
        raise click.UsageError("--textfile and --json exclude each other")
    if textfile is not None and not textfile.endswith(".prom"):
        raise click.UsageError(f"'{textfile}' does not end with .prom: node_exporter skips it")
    if textfile is not None and not _may_be_replaced(textfile):
        raise click.ClickException(
            f"{textfile} is no regular file, and is as it was: name one, or one that is not there "
            "yet"
        )
    with Client(socket) as client:
        if as_json:
            families = [family.model_dump(mode="json") for family in client.metric_families()]
            output.emit_json(families)
        elif textfile is not None:
            text = own_families(client.metrics())
            try:
                write_textfile(textfile, text)
            except OSError as error:
                raise click.ClickException(
                    f"{textfile} cannot be written ({error.strerror}), and is as it was: make room "
                    "for it, or name a file in a folder that may be written"
                ) from error
        else:
            click.echo(client.metrics(), nl=False)


def _may_be_replaced(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return True  # not there, or it says why when it is written


def own_families(text: str) -> str:
    """The families of fvd alone: others may come twice where several programs are read."""
    kept = []
    # Names hold what Python takes for ends of lines, and the format does not.
    for line in text.split("\n"):
        words = line.split(" ", maxsplit=3)
        is_head = words[0] == "#" and len(words) > 2
        if (words[2] if is_head else line).startswith(OWN_PREFIX):
            kept.append(f"{line}\n")
    return "".join(kept)


def write_textfile(path: str, text: str) -> None:
    """Replace the file, or leave it as it is; readers see the old or the new one whole."""
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # of a process that was killed and had our number
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, TEXTFILE_MODE)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), TEXTFILE_MODE)
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
