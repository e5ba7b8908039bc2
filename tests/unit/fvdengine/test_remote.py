# SPDX-License-Identifier: Apache-2.0
"""Images over remote bases: created, opened with and without the server, changes noticed."""

import os
import random
import time
from dataclasses import replace

import pytest

from fvdcore import EngineFault
from fvdengine import chain, remote
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.errors import (
    BaseChanged,
    BaseEmpty,
    BaseTooShort,
    BaseUnreachable,
    InvalidOption,
    InvalidUri,
    ProgramMissing,
    UnsupportedUriFormat,
    UriNotAllowed,
)
from fvdengine.header import BASE_URI, Header
from fvdengine.info import image_info
from fvdengine.mapping import ExtentKind, map_image
from fvdengine.opening import open_device, open_plan
from fvdengine.options import CreateOptions, OpenOptions
from fvdtest.remote import Nbdkit

SIZE = 1 << 20


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "golden.raw"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


@pytest.fixture
def server(tmp_path, base):
    with Nbdkit(tmp_path, "file", base) as server:
        yield server


@pytest.fixture
def image(tmp_path, server):
    path = tmp_path / "clone.fvd"
    create_image(path, CreateOptions(base=server.uri, journal_size=65536))
    return path


@pytest.fixture
def allowed(server):
    return OpenOptions(read_only=True, allow_uris=(f"nbd+unix://{server.socket}",))


def header_of(path):
    return Header.unpack(path.read_bytes()[:8192])


def test_create_records_name_length_and_identity(image, server):
    header = header_of(image)
    assert header.base_img == server.uri
    assert header.base_img_size == SIZE
    assert header.extension.base_kind == BASE_URI
    assert header.extension.base_length == SIZE
    assert any(header.extension.base_id)


def test_an_image_over_a_uri_opens_only_where_that_is_allowed(image, server, base, allowed):
    with pytest.raises(UriNotAllowed, match="golden|nbd"):
        open_plan(image, OpenOptions(read_only=True))
    with pytest.raises(UriNotAllowed):
        open_plan(image, replace(allowed, allow_uris=("nbd://*", "nbd+unix:///nowhere")))
    with open_plan(image, allowed) as plan:
        assert plan.warnings == []
        device = open_device(plan)
    assert device.read(0, SIZE) == base.read_bytes()
    device.close()


def test_bad_patterns_are_refused(image, allowed):
    with pytest.raises(InvalidOption, match="--allow-uri"):
        open_plan(image, replace(allowed, allow_uris=("what",)))


def test_without_the_server_an_open_warns_and_serves_what_is_local(image, server, base, allowed):
    writing = replace(allowed, read_only=False, base_timeout=20.0)
    with open_plan(image, writing) as plan:
        device = open_device(plan)
    device.write(0, b"local" * 4096)
    device.close()
    server.kill()
    begin = time.monotonic()
    with open_plan(image, writing) as plan:
        assert any("cannot be reached now" in warning for warning in plan.warnings)
        device = open_device(plan)
    assert device.read(0, 20480) == b"local" * 4096
    assert time.monotonic() - begin < 5
    server.start()
    assert device.read(0, SIZE) == b"local" * 4096 + base.read_bytes()[20480:]
    device.close()


def test_base_timeout_bounds_a_read(image, server, allowed):
    server.kill()
    with open_plan(image, replace(allowed, base_timeout=0.3)) as plan:
        device = open_device(plan)
    begin = time.monotonic()
    with pytest.raises(EngineFault, match="Input/output error"):
        device.read(0, 4096)
    assert time.monotonic() - begin < 5
    device.close()


def test_a_base_of_another_length_is_refused(image, server, base, allowed):
    server.kill()
    os.truncate(base, SIZE + 4096)
    server.start()
    with pytest.raises(BaseChanged, match=f"had {SIZE} bytes and has {SIZE + 4096}"):
        open_plan(image, allowed)
    with open_plan(image, replace(allowed, accept_changed_base=True)) as plan:
        assert any("has changed" in warning for warning in plan.warnings)
    server.kill()
    os.truncate(base, SIZE - 4096)
    server.start()
    with pytest.raises(BaseTooShort):
        open_plan(image, replace(allowed, accept_changed_base=True))


def test_a_base_that_changed_while_it_was_away_is_never_read(image, server, base, allowed):
    server.kill()
    with open_plan(image, replace(allowed, base_timeout=0.5)) as plan:
        device = open_device(plan)
    os.truncate(base, SIZE + 512)
    server.start()
    with pytest.raises(EngineFault, match="Input/output error"):
        device.read(0, 4096)
    device.close()


def test_a_successor_does_not_ask_the_server(image, server, allowed, monkeypatch):
    monkeypatch.setattr("fvdcore.export_length", lambda *_, **__: pytest.fail("it was asked"))
    top = chain.open_layer(os.open(image, os.O_RDONLY), str(image), "fvd")
    layers = chain.open_chain(top, replace(allowed, takeover=True), [])
    assert layers[1].length == SIZE
    for layer in layers:
        layer.close()


def test_an_older_writer_leaves_only_the_least_length(image):
    header = header_of(image)
    assert chain.remembered(header) == remote.Remembered(SIZE, True)
    forgotten = replace(header, extension=replace(header.extension, base_kind=0))
    assert chain.remembered(forgotten) == remote.Remembered(SIZE, False)


def test_info_check_and_map(image, server, allowed):
    found = image_info(image, allowed)
    assert found.bases[0].path == server.uri
    assert found.bases[0].length == SIZE
    assert found.bases[0].problem is None
    assert check_image(image, allowed).exit_status == 0
    extents = list(map_image(image, allowed))
    assert [(one.start, one.length, one.kind) for one in extents] == [(0, SIZE, ExtentKind.BASE)]
    server.kill()
    found = image_info(image, allowed)
    assert any("cannot be reached" in warning for warning in found.warnings)


def test_info_says_that_a_uri_is_not_allowed(image):
    found = image_info(image, OpenOptions(read_only=True))
    assert "not among the URIs" in found.bases[0].problem


@pytest.mark.parametrize(
    ("base", "error"),
    [
        ("nbd://user:pw@host/x", InvalidUri),
        ("gopher://host/x", InvalidUri),
        ("nbd+unix:///?socket=/nonexistent/socket", BaseUnreachable),
    ],
)
def test_create_refuses_and_leaves_nothing(tmp_path, base, error):
    path = tmp_path / "new.fvd"
    with pytest.raises(error):
        create_image(path, CreateOptions(base=base))
    assert not path.exists()


def test_create_refuses_other_formats_behind_a_uri(tmp_path, server):
    with pytest.raises(UnsupportedUriFormat, match="fvd"):
        create_image(tmp_path / "new.fvd", CreateOptions(base=server.uri, base_format="fvd"))


def test_create_cannot_search_holes_behind_a_uri(tmp_path, server):
    with pytest.raises(InvalidOption, match="--detect-holes"):
        create_image(tmp_path / "new.fvd", CreateOptions(base=server.uri, detect_holes=65536))


def test_create_refuses_an_empty_export(tmp_path):
    (tmp_path / "empty").touch()
    with Nbdkit(tmp_path, "file", tmp_path / "empty") as server, pytest.raises(BaseEmpty):
        create_image(tmp_path / "new.fvd", CreateOptions(base=server.uri))


def test_no_descriptor_is_left(image, server, allowed, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with open_plan(image, allowed):
        pass
    with pytest.raises(BaseUnreachable):
        create_image(tmp_path / "x.fvd", CreateOptions(base="nbd+unix:///?socket=/none"))
    with pytest.raises(UriNotAllowed):
        open_plan(image)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_missing_library_names_its_package(tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise EngineFault(2, "look at the export", -1, "libnbd is not installed")

    monkeypatch.setattr("fvdcore.export_length", fail)
    with pytest.raises(ProgramMissing) as caught:
        create_image(tmp_path / "x.fvd", CreateOptions(base="nbd://localhost/"))
    assert "libnbd0" in caught.value.hint


def test_identities_differ_with_tag_and_length():
    made = [
        remote.Remote("nbd://h", -1, length, tag=tag).identity
        for length in (1, 2) for tag in ("", "a", "b")
    ]  # fmt: skip
    assert len(set(made)) == 6
