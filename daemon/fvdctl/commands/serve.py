# SPDX-License-Identifier: Apache-2.0
"""`fvdctl serve`: export an image as an NBD server in the foreground.

The command checks its options and then becomes the worker process, the same program that serves
attached devices; so signals, exit status and output are those of the server itself.
"""

from __future__ import annotations

import os
import sys

import click

from fvdctl.copying import copying_options
from fvdctl.output import SecondsParam

CONNECTIONS_MAX = 64
BUILTIN_GROW = "builtin:lvextend"


def _prefetch_delay(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | None:
    """Seconds until prefetch starts, or `off`, which the image format writes as -1."""
    if value is None:
        return None
    if value == "off":
        return -1
    if not value.isascii() or not value.isdigit():
        raise click.BadParameter("give a number of seconds, or off", context, parameter)
    return int(value)


def _program(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """A program by its path, or the word for our own."""
    if value is None or value == BUILTIN_GROW:
        return value
    if not os.access(value, os.X_OK) or os.path.isdir(value):
        raise click.BadParameter(f"{value} is no program", context, parameter)
    return os.path.abspath(value)


@click.command()
@click.argument("image", type=click.Path(readable=False))
@click.option("--socket", metavar="PATH", help="Listen on a Unix socket.")
@click.option(
    "--tcp", metavar="HOST:PORT",
    help="Listen on TCP; beyond loopback addresses only with TLS. Port 0 picks one.",
)
@click.option("-r", "--read-only", is_flag=True, help="Allow no writes; the image is not changed.")
@click.option(
    "--connections",
    type=click.IntRange(1, CONNECTIONS_MAX),
    default=16,
    show_default=True,
    help="How many connections clients may have at a time.",
)
@click.option(
    "--state",
    metavar="DIR",
    type=click.Path(file_okay=False, readable=False),
    help="Keep the live state in DIR (on tmpfs, for example under /run), so that a server that "
    "was killed can be started again on it and has lost no acknowledged write.",
)
@click.option(
    "--tls-certificates",
    metavar="DIR",
    type=click.Path(file_okay=False, readable=False),
    help="Require TLS; DIR holds server-cert.pem, server-key.pem and ca-cert.pem.",
)
@click.option(
    "--tls-psk",
    metavar="FILE",
    type=click.Path(dir_okay=False, readable=False),
    help="Require TLS with pre-shared keys; FILE is one of psktool's.",
)
@click.option(
    "--tls-verify-peer",
    is_flag=True,
    help="With certificates: serve only clients whose own is signed by ca-cert.pem.",
)
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    help="Serve metrics for Prometheus there; port 0 picks one, which the log tells.",
)
@click.option(
    "--allow-dir",
    metavar="DIR",
    multiple=True,
    type=click.Path(file_okay=False, readable=False),
    help="A directory, besides the image's own, in which its bases may lie.",
)
@click.option(
    "--allow-uri",
    metavar="PATTERN",
    multiple=True,
    help="Allow URIs in images to lead to SCHEME://HOST[:PORT][/PATH]; HOST may be *.DOMAIN or *. "
    "May be given several times.",
)
@click.option(
    "--base-timeout",
    metavar="SECONDS",
    type=SecondsParam(0.1, 86400),
    default=60,
    show_default=True,
    help="How long a request may wait for a remote base before it fails.",
)
@click.option("--accept-changed-base", is_flag=True, help="Open although the base has changed.")
@click.option(
    "--discard-live-state",
    is_flag=True,
    help="Give up what a killed server had acknowledged but not flushed.",
)
@click.option(
    "--copy-on-read/--no-copy-on-read",
    default=None,
    help="Store what is read from the base, whatever the image says.",
)
@click.option(
    "--prefetch-delay",
    metavar="SECONDS|off",
    callback=_prefetch_delay,
    help="When to start to copy the rest of the base, whatever the image says.",
)
@copying_options("polite")
@click.option(
    "--cache",
    type=click.Choice(["writeback", "writethrough", "none"]),
    default="writeback",
    show_default=True,
    help="Answer writes when the page cache has them, when they are durable, or go past the cache.",
)
@click.option(
    "--on-full",
    type=click.Choice(["error", "wait"]),
    default="error",
    show_default=True,
    help="What writes do when the storage of the image is full: fail, or wait for space.",
)
@click.option(
    "--grow-program",
    metavar="PATH|builtin:lvextend",
    callback=_program,
    help="Run this program with a number of bytes and the device's path when a compact image on "
    "a block device needs more storage.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no URI, and log nothing but warnings.")
@click.pass_context
def serve(
    context: click.Context,
    /,
    image: str,
    socket: str | None,
    tcp: str | None,
    **options: object,
) -> None:
    """Serve IMAGE to NBD clients (QEMU, libnbd, nbd-client) until interrupted.

    Prints the NBD URI as soon as clients can connect. Needs no root and no kernel module.
    """
    if (socket is None) == (tcp is None):
        raise click.UsageError("give either --socket PATH or --tcp HOST:PORT", context)
    if options["tls_certificates"] is not None and options["tls_psk"] is not None:
        raise click.UsageError("give either --tls-certificates or --tls-psk", context)
    if options["tls_verify_peer"] and options["tls_certificates"] is None:
        raise click.UsageError("--tls-verify-peer needs --tls-certificates", context)
    where = ["--socket", socket] if socket is not None else ["--tcp", str(tcp)]
    worker = [sys.executable, "-P", "-m", "fvdd.worker"]
    if context.find_root().params.get("debug"):
        worker.append("--debug")
    arguments = [*worker, "serve", *where, *_worker_options(options), "--", image]
    sys.stdout.flush()
    os.execv(sys.executable, arguments)


def _worker_options(options: dict[str, object]) -> list[str]:
    """Spell the options for the worker; what is left to the image is left out."""
    spelled: list[str] = []
    for name in (
        "read_only", "accept_changed_base", "discard_live_state", "tls_verify_peer", "quiet",
    ):  # fmt: skip
        if options[name]:
            spelled.append("--" + name.replace("_", "-"))
    for name in (
        "connections", "state", "metrics", "tls_certificates", "tls_psk", "prefetch_delay",
        "base_timeout", "cache", "on_full", "grow_program", "prefetch_policy", "fetch_size",
    ):  # fmt: skip
        if options[name] is not None:
            # One word, so that -1 is not taken for an option.
            spelled.append(f"--{name.replace('_', '-')}={options[name]}")
    for name in ("allow_dir", "allow_uri"):
        allowed = options[name]
        assert isinstance(allowed, tuple)
        spelled += [f"--{name.replace('_', '-')}={entry}" for entry in allowed]
    profiles = options["profile"]
    assert isinstance(profiles, tuple)
    spelled += [f"--{what}-profile={path}" for what, path in profiles]
    if options["copy_on_read"] is not None:
        spelled.append("--copy-on-read" if options["copy_on_read"] else "--no-copy-on-read")
    return spelled
