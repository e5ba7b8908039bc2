# SPDX-License-Identifier: Apache-2.0
"""The configuration: defaults, what is refused in which words, the order of the four times."""

import pytest

from fvdapi.errors import ApiError
from fvdd.config import Config, Timeouts, load, metrics_address, parse


def test_defaults_pass_their_own_check():
    assert parse({}) == Config()


def test_file_overrides_defaults(tmp_path):
    path = tmp_path / "fvdd.toml"
    path.write_text('[timeouts]\nresend_timeout = 3\n[daemon]\nallow_dirs = ["/srv"]\n')
    config = load(str(path))
    assert config.timeouts.resend_timeout == 3.0
    assert config.daemon.allow_dirs == ("/srv",)
    assert config.restarts.count_max == 5


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"demon": {}}, "unknown section 'demon'"),
        ({"daemon": {"sokket": "/x"}}, "unknown key 'daemon.sokket'"),
        ({"daemon": 3}, "'daemon' must be a section"),
        ({"daemon": {"socket": 3}}, "daemon.socket must be a string"),
        ({"daemon": {"socket": "here"}}, "absolute path"),
        ({"daemon": {"allow_dirs": "/srv"}}, "list of strings"),
        ({"daemon": {"allow_dirs": ["srv"]}}, "absolute paths"),
        ({"daemon": {"log_level": "loud"}}, "log_level"),
        ({"daemon": {"metrics": "9809"}}, "HOST:PORT"),
        ({"daemon": {"metrics": "host:99999"}}, "HOST:PORT"),
        ({"timeouts": {"resend_timeout": "2s"}}, "must be a number"),
        ({"timeouts": {"resend_timeout": True}}, "must be a number"),
        ({"timeouts": {"resend_timeout": -1}}, "out of range"),
        ({"timeouts": {"resend_timeout": 0.5}}, "at least 1 s"),
        ({"timeouts": {"resend_timeout": 60}}, "resend_timeout (60 s) must be below"),
        ({"timeouts": {"kernel_timeout": 30}}, "base_timeout (60 s) must be below"),
        ({"timeouts": {"kernel_timeout": 90.5}}, "whole seconds"),
        ({"timeouts": {"dead_timeout": 30}}, "must be below timeouts.dead_timeout"),
        ({"timeouts": {"dead_timeout": 80}}, "several connections"),
        ({"restarts": {"count_max": 2.5}}, "whole number"),
        ({"storage": {"cache": "unsafe"}}, "writeback, writethrough or none"),
        ({"restarts": {"count_max": 0}}, "out of range"),
    ],
)
def test_mistake_is_named(tree, words):
    with pytest.raises(ApiError) as caught:
        parse(tree)
    assert caught.value.code == "invalid_config"
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", ["[daemon", "daemon = ", "\x00", "[daemon]\nsocket='a'\nsocket='b'"]
)
def test_file_that_is_not_toml_is_refused(tmp_path, text):
    path = tmp_path / "fvdd.toml"
    path.write_text(text)
    with pytest.raises(ApiError, match="is not TOML"):
        load(str(path))


def test_missing_file_is_refused_only_when_it_was_named(tmp_path, monkeypatch):
    with pytest.raises(ApiError, match="no configuration file"):
        load(str(tmp_path / "none.toml"))
    monkeypatch.setattr("fvdd.config.DEFAULT_CONFIG", str(tmp_path / "none.toml"))
    assert load(None) == Config()


def test_one_connection_is_never_cut_off():
    times = Timeouts().for_connections(1)
    assert (times.kernel_timeout, times.resend_timeout) == (0, 2.0)


def test_several_connections_get_time_for_the_base():
    # With several connections the driver cuts off whenever its timer fires: the timer must be
    # longer than the base may take, and is the resend timer as well.
    times = Timeouts().for_connections(4)
    assert times.kernel_timeout > times.base_timeout
    assert times.resend_timeout == times.kernel_timeout


def test_kernel_timeout_of_the_user_is_the_resend_timer_too():
    times = Timeouts(kernel_timeout=120).for_connections(1)
    assert (times.kernel_timeout, times.resend_timeout) == (120, 120)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("off", None),
        ("127.0.0.1:9809", ("127.0.0.1", 9809)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_metrics_address(text, expected):
    assert metrics_address(text) == expected
