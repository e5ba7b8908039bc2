# SPDX-License-Identifier: Apache-2.0
"""The lines of `fvdctl top`: rates between two looks, order, and what fits into 80x24."""

import pytest

from fvdapi.activity import Activity, ActivityList, DeviceMap
from fvdapi.models import DeviceState, PrefetchState
from fvdctl.view import (
    HELP_ALL,
    Picture,
    all_lines,
    fitted,
    one_lines,
    percent,
    sorted_devices,
    time_text,
)

MIB = 1 << 20


def device(name, **values):
    known = {
        "device": "/dev/nbd0", "image": f"/srv/{name}.fvd", "state": DeviceState.ATTACHED,
        "size_bytes": 100 * MIB, "local_bytes": 25 * MIB, "remaining_bytes": 75 * MIB,
        "journal_size_bytes": MIB, "connections": 1, "connections_alive": 1,
    }  # fmt: skip
    return Activity(name=name, **(known | values))


def picture(*devices, before=()):
    old = ActivityList(clock=10.0, devices=tuple(before)) if before else None
    return Picture(ActivityList(clock=12.0, version="1", devices=devices), old)


BUSY = device(
    "busy",
    # Whole blocks come from the base: bytes would make one read of ten most of them.
    counters={"io_bytes_read": 9 * MIB, "read_bytes_image": MIB, "read_bytes_base": 60 * MIB},
    durations={"read": [0] * 20 + [100]},
    reads_of_base=12,
)
BUSY_BEFORE = device(
    "busy", counters={"io_bytes_read": MIB}, durations={"read": [0] * 20 + [80]}, reads_of_base=10
)
IDLE = device("idle", local_bytes=100 * MIB, remaining_bytes=0, prefetch=PrefetchState.DONE)


def test_rates_are_between_two_looks():
    found = picture(BUSY, before=[BUSY_BEFORE]).figures()["busy"]
    assert found.read == 4 * MIB
    assert found.hit == pytest.approx(0.9)
    assert found.read_p99 == pytest.approx(2**21 / 1e9)
    assert found.write_p99 is None
    assert found.local == 0.25


def test_a_first_look_has_no_rates():
    found = picture(BUSY).figures()["busy"]
    assert found.read == 0
    assert found.hit is None


def test_counters_that_began_anew_are_no_negative_rate():
    assert picture(BUSY_BEFORE, before=[BUSY]).figures()["busy"].read == 0


@pytest.mark.parametrize(
    ("sort", "names"),
    [("name", ["busy", "idle"]), ("read", ["busy", "idle"]), ("latency", ["busy", "idle"]),
     ("local", ["busy", "idle"])],
)  # fmt: skip
def test_order(sort, names):
    shown = picture(IDLE, BUSY, before=[BUSY_BEFORE])
    found = sorted_devices(shown.now.devices, shown.figures(), sort)
    assert [one.name for one in found] == names


@pytest.mark.parametrize("count", [0, 1, 19, 20, 64])
@pytest.mark.parametrize("chosen", ["", "d05", "d63"])
def test_all_devices_fit_into_a_small_terminal(count, chosen):
    devices = [device(f"d{number:02}") for number in range(count)]
    lines = all_lines(picture(*devices), "name", chosen, 80, 24)
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    assert lines[-1] == HELP_ALL
    rows = [line for line in lines if line[2:3] == "d" and line[3:5].isdigit()]
    assert len(rows) == min(count, 19)
    if chosen in [one.name for one in devices]:
        assert any(line.startswith(f"> {chosen}") for line in rows)


def test_a_row_says_what_matters():
    lines = all_lines(picture(BUSY, IDLE, before=[BUSY_BEFORE]), "name", "busy", 80, 24)
    assert lines[3].split() == [
        ">", "busy", "attached", "4M", "0", "2.1ms", "-", "90%", "25.0%", "disabled", "0%",
    ]  # fmt: skip
    assert lines[4].split()[-3:] == ["100%", "done", "0%"]


def test_trouble_is_seen_in_the_row():
    base = {"topic": "base", "text": "the base cannot be read", "word": "NO BASE"}
    past = {"topic": "errors", "text": "1 requests failed"}
    sick = device("sick", troubles=(past, base))
    assert "NO BASE" in all_lines(picture(sick), "name", "sick", 80, 24)[3]
    failed = device("gone", troubles=(base,), state="failed")
    assert "failed" in all_lines(picture(failed), "name", "gone", 80, 24)[3]
    healed = device("healed", troubles=(past,), counters={"io_errors_read_eio": 1})
    assert "attached" in all_lines(picture(healed), "name", "healed", 80, 24)[3]


def test_trouble_of_one_device_is_told_whole():
    text = "the base cannot be read: no good answer since 2026-11-23 05:10:02+00:00, 48m ago"
    sick = device("sick", troubles=({"topic": "base", "text": text, "word": "NO BASE"},) * 2)
    lines = one_lines(picture(sick), "sick", None, 80, 24)
    told = " ".join(line.removeprefix("TROUBLE").strip() for line in lines)
    assert told.count(f"base: {text}") == 2
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)


def test_a_wrong_request_is_no_error_of_the_device():
    counters = {"io_errors_read_einval": 5, "io_errors_write_eperm": 1, "io_errors_read_eio": 2}
    assert picture(device("x", counters=counters)).figures()["x"].errors == 2


def test_one_device_has_its_map_and_all_figures():
    strip = DeviceMap(name="busy", size_bytes=1, local=(8, 0), base=(0, 8), zero=(0, 0))
    lines = one_lines(picture(BUSY, before=[BUSY_BEFORE]), "busy", strip, 80, 24)
    text = "\n".join(lines)
    assert len(lines) <= 24
    assert "[#.]" in text
    for word in (
        "25M of 100M (25.0%)", "4M/s, 99 of 100 within 2.1ms", "90.0%",
        "0, worker restarted 0 times",
    ):  # fmt: skip
        assert word in text
    assert one_lines(picture(BUSY), "gone", None, 80, 24)[0] == "gone is not attached any more"


def test_names_cannot_move_the_cursor():
    evil = device("x", image="/srv/\x1b[2J.fvd", reason="\x1b]0;title\x07")
    for lines in (
        all_lines(picture(evil), "name", "x", 80, 24), one_lines(picture(evil), "x", None, 80, 24),
    ):  # fmt: skip
        assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("height", "lines"),
    [(0, []), (1, ["thre"]), (2, ["one", "thre"]), (3, ["one", "two", "thre"])],
)
def test_the_last_line_stays_in_the_smallest_window(height, lines):
    assert fitted(["one", "two", "three"], 4, height) == lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (4.1e-6, "4.1us"), (0.000999, "999us"), (0.0021, "2.1ms"), (1.5, "1.5s"),
     (59, "59s"), (90, "2m"), (7200, "2h")],
)  # fmt: skip
def test_durations_are_short(seconds, text):
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(None, "-"), (0.0, "0%"), (0.9999, "99%"), (1.0, "100%")]
)
def test_shares_are_not_rounded_up(share, text):
    assert percent(share) == text
