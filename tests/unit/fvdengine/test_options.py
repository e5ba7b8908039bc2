# SPDX-License-Identifier: Apache-2.0
"""The defaults are those that the format names."""

from dataclasses import FrozenInstanceError

import pytest

from fvdengine.errors import InvalidOption, InvalidUri
from fvdengine.options import CreateOptions, OpenOptions, check_create_options


def test_defaults_write_nothing_unasked():
    options = CreateOptions()
    assert options.copy_on_read is False
    assert options.prefetch_delay_seconds == -1
    assert options.force is False


def test_open_is_strict_by_default():
    options = OpenOptions()
    assert options.allow_dirs == ()
    assert not any([options.accept_changed_base, options.discard_live_state, options.takeover])


def test_options_cannot_be_changed_later():
    with pytest.raises(FrozenInstanceError):
        OpenOptions().read_only = True  # type: ignore[misc]


GOOD = [
    {"size": 512}, {"size": 4096, "compact": True, "chunk_size": 4096},
    {"size": 4096, "journal_size": 0}, {"base": "b"}, {"base": "b", "journal_size": 0},
    {"size": 512, "data_file": "nbd+unix:///x?socket=/y", "data_file_format": "nbd"},
    {"size": 512, "compact": True, "journal_size": 65536},
]  # fmt: skip


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_what_can_be_made_is_let_through(values):
    check_create_options(CreateOptions(**values))


@pytest.mark.parametrize("uri", ["nbd://user:secret@host/x", "nbd:///x", "nbd+unix:///x?socket=y"])
def test_server_that_cannot_be_reached_is_refused(uri):
    options = CreateOptions(size=512, data_file=uri, data_file_format="nbd")
    with pytest.raises(InvalidUri):
        check_create_options(options)


def test_journal_of_nothing_is_refused():
    with pytest.raises(InvalidOption, match="no use in an image without a base"):
        check_create_options(CreateOptions(size=512, journal_size=65536))


USELESS = [
    ("--copy-on-read", {"copy_on_read": True}),
    ("--prefetch-delay", {"prefetch_delay_seconds": 0}),
    ("--prefetch-slots", {"prefetch_slots": 4}),
    ("--bytes-per-prefetch", {"bytes_per_prefetch": 4096}),
    ("--prefetch-min-read", {"prefetch_min_read_kb": 0}),
    ("--max-outstanding-copy-on-read", {"max_outstanding_copy_on_read": 1 << 22}),
    ("--journal-size", {"journal_size": 65536}),
    ("--journal-buffer", {"journal_buffer": 4096}),
    ("--journal-period", {"journal_period_ms": 1}),
]


@pytest.mark.parametrize(("option", "values"), USELESS, ids=[option for option, _ in USELESS])
def test_option_without_effect_is_refused_by_name(option, values):
    with pytest.raises(InvalidOption, match="has no use") as caught:
        check_create_options(CreateOptions(size=4096, **values))
    assert caught.value.message.startswith(f"{option} ")
    assert caught.value.hint.startswith("Add --base")
    assert f"leave {option} out" in caught.value.hint
    check_create_options(CreateOptions(base="b", **values))
