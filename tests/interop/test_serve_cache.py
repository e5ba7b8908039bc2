# SPDX-License-Identifier: Apache-2.0
"""`fvdctl serve --cache`: what was acknowledged past the cache survives a kill."""

import os
from pathlib import Path

from fvdtest.images import make_image
from fvdtest.nbd_client import NbdClient
from fvdtest.serve import Server

MIB = 1 << 20


def flags_of(pid: int, image: Path) -> int:
    """All flags with which the process has the file open."""
    flags = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if link.readlink() == image:
            said = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
            flags |= int(said.split("flags:")[1].split()[0], 8)
    return flags


def test_acknowledged_writes_past_the_cache_survive_a_kill(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image.fvd", size=8 * MIB, compact=True)
    options = ("--cache", "none", "--state", str(tmp_path / "state"))
    data = os.urandom(MIB + 300)
    server = Server(image, *options, directory=tmp_path)
    assert flags_of(server.pid, image) & os.O_DIRECT
    with NbdClient.attach(server.uri) as client:
        client.write(1001, data)
        server.kill()
    with (
        Server(image, *options, directory=tmp_path) as server,
        NbdClient.attach(server.uri) as client,
    ):
        assert client.read(1001, len(data)) == data
