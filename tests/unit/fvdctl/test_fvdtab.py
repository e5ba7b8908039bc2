# SPDX-License-Identifier: Apache-2.0
"""The table of devices: what is right is read, what is wrong is named with its line."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdapi.errors import ApiError
from fvdctl import fvdtab
from fvdctl.commands.device import attach
from fvdengine.create import create_image
from fvdengine.options import CreateOptions
from fvdtest import tree

TEXT = """
# devices of this host
web   /srv/web.fvd   allow-dir=/srv/golden,connections=2,allow-dir=/a,cache=none  # the shop
logs\t/srv/logs.fvd  -
ro    /srv/ro.fvd    read-only,no-copy-on-read,prefetch-delay=off,sector-size=4096,device=/dev/nbd7
far   /srv/far.fvd   prefetch-policy=eager,fetch-size=1M
full  /srv/full.fvd  on-full=wait,profile=record:/var/a,profile=replay:/var/b,transport=nbd
"""


@pytest.fixture
def table(tmp_path):
    def write(text):
        path = tmp_path / "fvdtab"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def request(path, name="web"):
    return fvdtab.find(name, path)[0]


def test_entries_become_requests(table):
    path = table(TEXT)
    assert [entry.name for entry in fvdtab.load(path)] == ["web", "logs", "ro", "far", "full"]
    assert fvdtab.find("web", path)[1] == []
    web = request(path)
    assert (web.image, web.connections, web.cache) == ("/srv/web.fvd", 2, "none")
    assert web.allow_dirs == ("/srv/golden", "/a")
    assert request(path, "logs").model_dump(exclude_defaults=True) == {
        "name": "logs", "image": "/srv/logs.fvd",
    }  # fmt: skip
    far = request(path, "far")
    assert (far.prefetch_policy, far.fetch_size) == ("eager", 1 << 20)
    ro = request(path, "ro")
    assert (ro.read_only, ro.copy_on_read, ro.prefetch_delay) == (True, False, -1)
    assert (ro.sector_size, ro.device) == (4096, "/dev/nbd7")
    full = request(path, "full")
    assert (full.on_full, full.record_profile, full.replay_profile) == ("wait", "/var/a", "/var/b")


def test_options_are_those_of_attach():
    known = {*fvdtab._FLAGS, *fvdtab._VALUES}
    others = {"--name", "--socket", "--json", "-q", "--quiet", "-r"}
    spelled = {name for one in attach.params for name in (*one.opts, *one.secondary_opts)}
    assert {f"--{name}" for name in known} == {name for name in spelled if name[0] == "-"} - others


def test_comment_begins_a_line_or_comes_after_a_blank(table):
    path = table(
        "#web /x -\n  # web /y -\nweb /srv/a#b.fvd allow-dir=/srv/#c\t#-\nlogs /srv/logs.fvd - # -"
    )
    found, faults = fvdtab.find("web", path)
    assert (found.image, found.allow_dirs, faults) == ("/srv/a#b.fvd", ("/srv/#c",), [])
    assert request(path, "logs").image == "/srv/logs.fvd"


def test_mark_that_some_editors_begin_a_file_with_is_no_part_of_a_name(table):
    found, faults = fvdtab.find("web", table(b"\xef\xbb\xbfweb /srv/web.fvd -\n"))
    assert (found.image, faults) == ("/srv/web.fvd", [])


MISTAKES = [
    ("web", "line 1: expected NAME IMAGE OPTIONS"),
    ("web /srv/web.fvd", "line 1: expected NAME IMAGE OPTIONS"),
    ("\nweb /srv/web.fvd - -", "line 2: expected"),
    ("web web.fvd -", "absolute path"),
    ("web /a -\nweb /b -", "line 2: 'web' is there already, on line 1"),
    ("web /a connections", "line 1: 'connections' cannot be"),
    ("web /a connections=x", "line 1: 'connections=x' cannot be"),
    ("web /a allow-dir=rel", "'allow-dir=rel'"),
    ("web /a read-only=1", "the option 'read-only=1' is not known"),
    ("web /a bogus", "the option 'bogus' is not known"),
    ("web /a ,", "the option ''"),
    ("web /a fetch-size=big", "'fetch-size=big'"),
    ("web /a fetch-size=", "'fetch-size='"),
    ("web /a prefetch-policy", "'prefetch-policy'"),
    ("web /a profile=/var/a", "'profile=/var/a' cannot be"),
    ("web /a profile=record:a", "'profile=record:a' cannot be"),
    ("# web\nweb /a on-full=maybe", "line 2: on-full=maybe cannot be: input should be 'error'"),
    ("web /a connections=0", "line 1: connections=0 cannot be: input should be greater"),
    ("web /a connections=99", "connections=99 cannot be: input should be less than or equal to"),
    ("web /a sector-size=1000", "sector-size=1000 cannot be: input should be 512 or 4096"),
    ("web /a wait=soon", "wait=soon cannot be: input should be 'node', 'partitions'"),
    ("web /a device=/dev/sda", "device=/dev/sda cannot be: it is a node of the nbd driver"),
    ("web /a device=nbd0", "it is a node of the nbd driver, such as /dev/nbd0"),
    (b"web /\xff -", "line 1: it is not UTF-8"),
]


@pytest.mark.parametrize(("text", "words"), MISTAKES)
def test_a_mistake_is_named_with_its_line_and_costs_its_own_device(table, text, words):
    with pytest.raises(ApiError) as caught:
        fvdtab.find("web", table(text))
    assert words in caught.value.message
    assert "type=" not in caught.value.message
    assert caught.value.hint
    raw = text if isinstance(text, bytes) else text.encode()
    found, faults = fvdtab.find("mine", table(raw + b"\nmine /srv/mine.fvd -"))
    assert found.image == "/srv/mine.fvd"
    assert faults == [caught.value.message]


@pytest.mark.parametrize("other", ["a/b /x -", "\0", "b\u00a0/x\u2028-", "-"])
def test_lines_that_name_no_device_are_warned_of(table, other):
    found, (fault,) = fvdtab.find("web", table(f"{other}\nweb /a -"))
    assert found.image == "/a"
    assert "line 1: " in fault
    with pytest.raises(ApiError) as caught:  # perhaps it was meant by that line
        fvdtab.find("web", table(other))
    assert "no device called 'web'" in caught.value.message
    assert caught.value.hint.endswith(fault)


GOOD = st.sampled_from(["-", "read-only", "connections=2,allow-dir=/a", "cache=none,wait=node"])
# Bytes of any kind, and lines that are nearly right.
HOSTILE = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")),
    st.sampled_from([text.encode() for text, _ in MISTAKES if isinstance(text, str)]),
    st.builds(lambda junk, value: b"odd /x " + junk + b"=" + value, st.binary(max_size=20),
              st.binary(max_size=20)),
    st.builds(lambda key, value: f"odd /x {key}={value}".encode(), st.sampled_from(
        [*fvdtab._VALUES, *fvdtab._FLAGS]), st.text("0123456789-/.kMx\u0660\u00b2", max_size=20)),
).map(lambda line: line.replace(b"\n", b" "))  # fmt: skip


@given(lines=st.lists(st.one_of(HOSTILE, GOOD), max_size=12))
def test_whatever_a_table_holds_good_lines_go_on_and_others_are_named(tmp_path_factory, lines):
    """Good lines are given as their options alone: their names are made unlike all others."""
    good = {number: f"good{number}" for number, one in enumerate(lines, 1) if isinstance(one, str)}
    content = [
        f"{good[number]} /srv/{number}.fvd {one}".encode() if number in good else one
        for number, one in enumerate(lines, 1)
    ]
    path = tmp_path_factory.getbasetemp() / "fvdtab"
    path.write_bytes(b"\n".join(content))
    entries = fvdtab.load(str(path))
    written = [
        number for number, line in enumerate(content, 1) if line.strip()[:1] not in (b"", b"#")
    ]
    assert len(entries) == len(written)
    for number, entry in zip(written, entries, strict=True):
        assert (entry.request is None) == (entry.fault is not None)
        if entry.fault is not None:
            assert number not in good
            assert f"line {number}: " in entry.fault.message
            assert entry.fault.hint
        if number in good:
            assert entry.request.image == f"/srv/{number}.fvd"
            assert fvdtab.find(good[number], str(path))[0] == entry.request
    names = [entry.name for entry in entries if entry.request is not None]
    assert len(names) == len(set(names))


def test_what_is_not_there(table, tmp_path):
    with pytest.raises(ApiError) as caught:
        fvdtab.find("other", table(TEXT))
    assert (caught.value.code, caught.value.exit_status) == ("device_not_found", 4)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ApiError, match="cannot be read"):
            fvdtab.load(str(path))
    with pytest.raises(ApiError, match="no table"):
        fvdtab.load("/dev/zero")


def test_table_that_is_shipped_is_empty_and_right():
    assert fvdtab.load(str(tree.ROOT / "packaging/etc/fvdtab")) == []


# After a snapshot


@pytest.mark.parametrize(
    ("options", "new", "line"),
    [
        ("-", "/srv/web2.fvd", "write there: web /srv/web2.fvd -"),
        ("cache=none", "/srv/web2.fvd", "write there: web /srv/web2.fvd cache=none"),
        ("-", "/new/web.fvd", "write there: web /new/web.fvd allow-dir=/srv"),
        ("wait=node", "/new/web.fvd", "write there: web /new/web.fvd wait=node,allow-dir=/srv"),
        ("allow-dir=/", "/new/web.fvd", "write there: web /new/web.fvd allow-dir=/"),
        ("-", "/srv/a#b", "write there: web /srv/a#b -"),
        ("-", "/srv/a b", "/srv/a b cannot stand in the table: give it a name without"),
    ],
)
def test_line_that_a_snapshot_needs_is_told(table, options, new, line):
    path = table(f"# mine\nlogs /srv/logs.fvd -\nweb /srv/web.fvd {options}\nbad\n")
    warning = str(*fvdtab.moved_on("web", "/srv/web.fvd", new, path))
    assert warning.startswith(f"{path}, line 3: 'web' is still on /srv/web.fvd, which")
    assert line in warning
    if line.startswith("write"):
        assert warning.endswith(line)
        found = request(table(warning.partition("write there: ")[2]))
        assert (found.name, found.image) == ("web", new)


def test_folder_that_cannot_stand_in_the_table_is_told(table):
    path = table("web /srv/,/link -\n")
    warning = str(*fvdtab.moved_on("web", "/srv/,/link", "/new/web.fvd", path))
    assert "/srv/, cannot stand in the table: move /srv/,/link elsewhere" in warning


def test_table_that_does_not_have_the_old_image_needs_nothing(table, tmp_path):
    path = table("web /srv/web2.fvd -\nother /srv/web.fvd read-only\nweb /srv/web.fvd -\n")
    assert fvdtab.moved_on("web", "/srv/web.fvd", "/srv/web2.fvd", path) == []
    assert fvdtab.moved_on("web", "/a", "/b", str(tmp_path / "none")) == []


@pytest.fixture
def chain(tmp_path):
    """Three images, each over the one before it; in folders of their own."""
    paths, base = [], None
    for number in range(3):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        paths.append(str(folder / "web.fvd"))
        options = CreateOptions(
            size=1 << 20, base=base, base_format=base and "fvd", allow_dirs=[tmp_path]
        )
        create_image(paths[-1], options)
        base = paths[-1]
    return paths


@pytest.mark.parametrize("name", ["web", "www"])
def test_line_with_any_image_below_is_told_under_whatever_name(table, chain, name):
    old, middle, new = chain
    path = table(f"{name} {old} -\nlogs /srv/logs.fvd -\n")
    (found,) = fvdtab.moved_on("web", middle, new, path)
    assert found.text.startswith(f"{path}, line 1: '{name}' is still on {old}, which the next")
    if name == "web":
        folders = ",".join(f"allow-dir={os.path.dirname(one)}" for one in (middle, old))
        assert found.remedy == f"write there: web {new} {folders}"
    else:  # perhaps one that others are made of, which was meant
        assert found.remedy == f"{new} is over it: name that there, or add the option read-only"
    # Left just now, it is that device's whatever the line calls it.
    (found,) = fvdtab.moved_on("db", old, middle, path)
    assert found.remedy == f"write there: {name} {middle} allow-dir={os.path.dirname(old)}"
    assert fvdtab.stale("web", new, table(f"{name} {old} read-only\n{name}2 {new} -\n")) == []


def test_image_is_known_by_another_name_of_it(table, chain, tmp_path):
    (tmp_path / "link").symlink_to(chain[0])
    os.link(chain[1], tmp_path / "other.fvd")
    path = table(f"a {tmp_path}/link -\nb {tmp_path}/other.fvd -\nc {chain[2]} -\n")
    assert [one.text[len(path) :][:13] for one in fvdtab.stale("web", chain[2], path)] == [
        ", line 1: 'a'", ", line 2: 'b'",
    ]  # fmt: skip


def test_storage_that_hangs_is_not_looked_at(table, chain, monkeypatch):
    """fvdctl doctor is what one calls then."""
    asked, answers, same = [], fvdtab.patience.answers, os.path.samefile

    def ask(path):
        asked.append(path)
        return not path.startswith("/hangs/") and answers(path)

    def look(path, other):
        assert not str(path).startswith("/hangs/")
        return same(path, other)

    monkeypatch.setattr(fvdtab.patience, "answers", ask)
    monkeypatch.setattr(os.path, "samefile", look)
    path = table(f"x /hangs/x.fvd -\ny /hangs/y.fvd -\na {chain[0]} -\n")
    assert [one.text[len(path) :][:13] for one in fvdtab.stale("web", chain[2], path)] == [
        ", line 3: 'a'",
    ]  # fmt: skip
    assert [one for one in asked if one.startswith("/hangs/")] == ["/hangs/x.fvd"]
    asked.clear()
    assert fvdtab.stale("web", chain[0], path) == []
    assert not [one for one in asked if one.startswith("/hangs/")], "it is over nothing"
