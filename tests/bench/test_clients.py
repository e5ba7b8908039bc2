# SPDX-License-Identifier: Apache-2.0
"""What fio and nbdcopy are told, and what is understood of what they tell."""

import json

import pytest

from fvdtest.bench import clients
from fvdtest.bench.clients import ClientError


def fio_text(error=0, reads=0, writes=0, runtime=2000):
    def side(number):
        percentile = {"percentile": {"99.000000": 7000, "99.900000": 9000}} if number else {}
        return {
            "total_ios": number, "io_bytes": number * 4096, "runtime": runtime if number else 0,
            "clat_ns": percentile,
        }  # fmt: skip

    job = {"error": error, "read": side(reads), "write": side(writes)}
    return "fio: connected to NBD server\n" + json.dumps({"jobs": [job]})


def test_rates_and_percentiles_are_taken():
    seen = clients.parse_fio(fio_text(reads=5000))
    assert (seen.requests, seen.bytes, seen.seconds) == (5000, 5000 * 4096, 2.0)
    assert (seen.requests_per_second, seen.p99_us, seen.p999_us) == (2500, 7, 9)
    assert seen.bytes_per_second == 2500 * 4096


def test_mixed_jobs_add_up():
    assert clients.parse_fio(fio_text(reads=10, writes=30)).requests == 40


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (fio_text(error=5, reads=9), "errno 5"),
        (fio_text(), "made no request"),
        ("fio: what is this option?", "no result"),
        ('{"jobs": []}', "no result"),
    ],
)
def test_what_is_no_result_is_an_error(text, words):
    with pytest.raises(ClientError, match=words):
        clients.parse_fio(text)


def test_time_is_told_in_whole_milliseconds():
    # fio reads "0.8s" as no limit at all.
    words = clients.fio_words("/s", ["--rw=read"], 0.8)
    assert "--runtime=800ms" in words
    assert words[-1] == "--rw=read"


def test_client_that_fails_is_an_error_with_its_words():
    with pytest.raises(ClientError, match="(?s)sh -c.*gone wrong"):
        clients.call(["sh", "-c", "echo gone wrong >&2; exit 2"], 10)


def test_client_that_does_not_end_is_ended():
    with pytest.raises(ClientError, match="did not end"):
        clients.call(["sleep", "60"], 0.05)


def test_nothing_takes_no_time_for_ever():
    assert clients.Measured(1, 1, 0.0).requests_per_second == 0.0
    assert clients.Measured(1, 1, 0.0).bytes_per_second == 0.0
