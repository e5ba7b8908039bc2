# SPDX-License-Identifier: Apache-2.0
"""The worker's command line: `serve` in the foreground, or `device` as a child of fvdd.

Users meet the first through `fvdctl serve`, which becomes this process; so errors are told here
in fvdctl's words. A worker imports the engine, the handshake and the standard library, nothing
else: it must start within a tenth of a second, and hold little memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fvdd import log
from fvdd.worker.failure import as_failure
from fvdd.worker.opened import (
    BASE_TIMEOUT_DEFAULT,
    CACHE_MODES,
    ON_FULL,
    PREFETCH_POLICIES,
    OpenRequest,
)
from fvdd.worker.process import end_with_parent, prepare_process
from fvdd.worker.service import WorkerService

CONNECTIONS_MAX: Final = 64  # what one engine holds open


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker to its end; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.mode == "device":
            return _run_device(arguments)
        return _run_serve(arguments)
    except Exception as error:
        if arguments.debug:
            raise
        failure = as_failure(error)
        print(f"fvdctl: {_printable(failure.message)}", file=sys.stderr)
        if failure.hint:
            print(f"hint: {_printable(failure.hint)}", file=sys.stderr)
        return failure.exit_status


def _printable(text: str) -> str:
    """Names of untrusted images are part of the sentence: a terminal must not act on them."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _run_device(arguments: argparse.Namespace) -> int:
    log.setup(arguments.log_level)
    ends_with_parent: bool = arguments.ends_with_parent
    if ends_with_parent:
        end_with_parent()
    prepare_process("fvd-worker", outlives_shutdown=not ends_with_parent)
    control = socket.socket(fileno=arguments.control_fd)
    control.set_inheritable(False)

    async def run() -> int:
        return await WorkerService(arguments.dir, ends_with_parent).run(control)

    return asyncio.run(run())


def _run_serve(arguments: argparse.Namespace) -> int:
    # What only this needs would make the start of a device's worker longer by half.
    from fvdd.attach.export import CONNECTIONS_DEFAULT, TcpAddress, UnixAddress
    from fvdd.attach.tls import TlsOptions
    from fvdd.worker.foreground import ServeRequest, serve

    log.setup("warning" if arguments.quiet else arguments.log_level)
    prepare_process("fvdctl-serve")
    opening = OpenRequest(
        image=arguments.image,
        read_only=arguments.read_only,
        allow_dirs=tuple(arguments.allow_dir),
        allow_uris=tuple(arguments.allow_uri),
        base_timeout=arguments.base_timeout,
        accept_changed_base=arguments.accept_changed_base,
        discard_live_state=arguments.discard_live_state,
        copy_on_read=arguments.copy_on_read,
        prefetch_delay=arguments.prefetch_delay,
        prefetch_policy=arguments.prefetch_policy,
        fetch_size=arguments.fetch_size,
        record_profile=arguments.record_profile,
        replay_profile=arguments.replay_profile,
        cache=arguments.cache,
        on_full=arguments.on_full,
        grow_program=arguments.grow_program,
    )
    tls = None
    if arguments.tls_certificates or arguments.tls_psk:
        tls = TlsOptions(
            arguments.tls_certificates, arguments.tls_psk, arguments.tls_verify_peer
        )
    request = ServeRequest(
        opening=opening,
        address=(
            UnixAddress(arguments.socket, tls=tls is not None)
            if arguments.socket
            else TcpAddress.parse(arguments.tcp, tls=tls is not None)
        ),
        connections=arguments.connections or CONNECTIONS_DEFAULT,
        state_dir=arguments.state,
        metrics=arguments.metrics,
        tls=tls,
        quiet=arguments.quiet,
    )
    return asyncio.run(serve(request))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fvdd.worker", allow_abbrev=False)
    parser.add_argument("--log-level", default=os.environ.get("FVD_LOG_LEVEL", "info"))
    parser.add_argument("--debug", action="store_true")
    modes = parser.add_subparsers(dest="mode", required=True)
    device = modes.add_parser("device", allow_abbrev=False)
    device.add_argument("--control-fd", type=int, required=True)
    device.add_argument("--dir", type=Path)
    device.add_argument("--ends-with-parent", action="store_true")
    foreground = modes.add_parser("serve", allow_abbrev=False)
    foreground.add_argument("image")
    address = foreground.add_mutually_exclusive_group(required=True)
    address.add_argument("--socket")
    address.add_argument("--tcp")
    foreground.add_argument("-r", "--read-only", action="store_true")
    foreground.add_argument("--connections", type=_connections, default=None)
    foreground.add_argument("--state")
    foreground.add_argument("--metrics")
    secrets = foreground.add_mutually_exclusive_group()
    secrets.add_argument("--tls-certificates")
    secrets.add_argument("--tls-psk")
    foreground.add_argument("--tls-verify-peer", action="store_true")
    foreground.add_argument("--allow-dir", action="append", default=[])
    foreground.add_argument("--allow-uri", action="append", default=[])
    foreground.add_argument("--base-timeout", type=float, default=BASE_TIMEOUT_DEFAULT)
    foreground.add_argument("--accept-changed-base", action="store_true")
    foreground.add_argument("--discard-live-state", action="store_true")
    foreground.add_argument("--copy-on-read", action=argparse.BooleanOptionalAction)
    foreground.add_argument("--prefetch-delay", type=int)
    foreground.add_argument(
        "--prefetch-policy", choices=PREFETCH_POLICIES, default=PREFETCH_POLICIES[0]
    )
    foreground.add_argument("--fetch-size", type=int)
    foreground.add_argument("--record-profile", default="")
    foreground.add_argument("--replay-profile", default="")
    foreground.add_argument("--cache", choices=CACHE_MODES, default=CACHE_MODES[0])
    foreground.add_argument("--on-full", choices=ON_FULL, default=ON_FULL[0])
    foreground.add_argument("--grow-program", default="")
    foreground.add_argument("-q", "--quiet", action="store_true")
    return parser


def _connections(text: str) -> int:
    count = int(text)
    if not 1 <= count <= CONNECTIONS_MAX:
        raise argparse.ArgumentTypeError(f"must be 1 to {CONNECTIONS_MAX}")
    return count
