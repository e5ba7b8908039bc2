# SPDX-License-Identifier: Apache-2.0
"""The table of devices: what is right is read, what is wrong is named with its line."""

import pytest

from fvdapi.errors import ApiError
from fvdctl import fvdtab
from fvdtest import tree

TEXT = """
# devices of this host
web   /srv/web.fvd   allow-dir=/srv/golden,connections=2,allow-dir=/a  # the shop
logs\t/srv/logs.fvd  -
ro    /srv/ro.fvd    read-only,no-copy-on-read,prefetch-delay=off,sector-size=4096,device=/dev/nbd7
far   /srv/far.fvd   prefetch-policy=eager,fetch-size=1M
"""


@pytest.fixture
def table(tmp_path):
    def write(text):
        path = tmp_path / "fvdtab"
        path.write_text(text)
        return str(path)

    return write


def test_entries_become_requests(table):
    path = table(TEXT)
    assert [entry.name for entry in fvdtab.load(path)] == ["web", "logs", "ro", "far"]
    web = fvdtab.request_of(fvdtab.find("web", path))
    assert (web.image, web.connections) == ("/srv/web.fvd", 2)
    assert web.allow_dirs == ("/srv/golden", "/a")
    assert fvdtab.request_of(fvdtab.find("logs", path)).model_dump(exclude_defaults=True) == {
        "name": "logs", "image": "/srv/logs.fvd",
    }  # fmt: skip
    far = fvdtab.request_of(fvdtab.find("far", path))
    assert (far.prefetch_policy, far.fetch_size) == ("eager", 1 << 20)
    ro = fvdtab.request_of(fvdtab.find("ro", path))
    assert (ro.read_only, ro.copy_on_read, ro.prefetch_delay) == (True, False, -1)
    assert (ro.sector_size, ro.device) == (4096, "/dev/nbd7")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("web /srv/web.fvd", "line 1: expected NAME IMAGE OPTIONS"),
        ("\nweb /srv/web.fvd - -", "line 2: expected"),
        ("a/b /srv/web.fvd -", "'a/b' cannot be the name"),
        ("web web.fvd -", "absolute path"),
        ("web /a -\nweb /b -", "line 2: 'web' is there already"),
        ("web /a connections", "the option 'connections' is not known"),
        ("web /a connections=x", "'connections=x'"),
        ("web /a allow-dir=rel", "'allow-dir=rel'"),
        ("web /a read-only=1", "'read-only=1'"),
        ("web /a ,", "the option ''"),
        ("web /a fetch-size=big", "'fetch-size=big'"),
        ("web /a prefetch-policy", "'prefetch-policy'"),
    ],
)
def test_mistakes_are_named_with_their_line(table, text, words):
    with pytest.raises(ApiError) as caught:
        fvdtab.load(table(text))
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("option", ["connections=99", "sector-size=1000", "wait=soon"])
def test_values_out_of_range_are_refused(table, option):
    with pytest.raises(ApiError, match="the entry of 'web'"):
        fvdtab.request_of(fvdtab.find("web", table(f"web /a {option}")))


def test_what_is_not_there(table, tmp_path):
    with pytest.raises(ApiError) as caught:
        fvdtab.find("other", table(TEXT))
    assert (caught.value.code, caught.value.exit_status) == ("device_not_found", 4)
    with pytest.raises(ApiError, match="cannot be read"):
        fvdtab.load(str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ApiError, match="not UTF-8"):
        fvdtab.load(str(tmp_path / "binary"))


def test_table_that_is_shipped_is_empty_and_right():
    assert fvdtab.load(str(tree.ROOT / "packaging/etc/fvdtab")) == []
