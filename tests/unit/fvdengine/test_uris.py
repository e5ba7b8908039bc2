# SPDX-License-Identifier: Apache-2.0
"""URIs of bases: which are understood, which patterns allow them, and all that is refused."""

import os

import pytest

from fvdengine import uris
from fvdengine.errors import InvalidOption, InvalidUri, UriNotAllowed

GOOD = {
    "https://host/a?token=x": ("https", "host", None, "/a"),
    "http://host:8080/": ("http", "host", 8080, "/"),
    "ssh://user@host:22/a/b": ("ssh", "host", 22, "/a/b"),
    "nbd://host": ("nbd", "host", None, ""),
    "nbd://host:10809/": ("nbd", "host", 10809, "/"),
    "nbd://Host.Example.org/export%20name": ("nbd", "host.example.org", None, "/export name"),
    "nbds://10.0.0.1:1/a/b": ("nbds", "10.0.0.1", 1, "/a/b"),
    "nbd://[2001:db8::1]:10809/x": ("nbd", "2001:db8::1", 10809, "/x"),
    "nbd+unix:///?socket=/run/x.sock": ("nbd+unix", "", None, "/run/x.sock"),
    "nbds+unix:///export?socket=/run/a%20b": ("nbds+unix", "", None, "/run/a b"),
}

BAD = {
    "nbd://": "names no host",
    "nbd:///export": "names no host",
    "nbd://host:0/": "port 0",
    "nbd://host:99999/": "ort",
    "nbd://host:port/": "ort",
    "nbd://user@host/": "names a user",
    "nbd://user:secret@host/": "password",
    "nbd://:secret@host/": "password",
    "nbd://host/#fragment": "fragment",
    "nbd://host/#": "fragment",
    "nbd://host/?tls-psk-file=/etc/shadow": "parameters",
    "nbd://host/a b": "%XX",
    "nbd://host/\n": "%XX",
    "nbd://hóst/": "%XX",
    "nbd://host/\x00": "%XX",
    "nbd://host/%00": "NUL",
    "nbd://ho$t/": "not a name",
    "nbd://-host/": "not a name",
    "nbd://host\\@other/": "backslash",
    "nbd://[::1/": "nvalid",
    "nbd://host/a/../b": "..",
    "nbd://host/a/%2e%2e/b": "..",
    "nbd://host/" + "x" * 1100: "longer",
    "nbd+unix:///export": "socket=PATH",
    "nbd+unix:///?socket=": "absolute",
    "nbd+unix:///?socket=relative": "absolute",
    "nbd+unix:///?socket=/a%00b": "absolute",
    "nbd+unix:///?socket=/a&socket=/b": "only parameter",
    "nbd+unix:///?socket=/a&tls-certificates=/b": "only parameter",
    "nbd+unix:///?Socket=/a": "only parameter",
    "nbd+unix://host/?socket=/a": "no host",
    "https://user@host/": "names a user",
    "https://user:secret@host/": "password",
    "ssh://user:secret@host/x": "password",
    "ssh://a%00b@host/x": "NUL",
    "ssh://host": "names no file",
    "ssh://host/": "names no file",
    "ssh://host/a?b=c": "parameters",
    "gopher://host/": "scheme is not one of",
    "file:///etc/passwd": "scheme is not one of",
    "nbd+vsock://1/": "scheme is not one of",
    "host:10809": "no scheme",
    "": "characters",
}


@pytest.mark.parametrize(("text", "expected"), GOOD.items())
def test_uris_are_taken_apart(text, expected):
    uri = uris.parse_uri(text)
    assert (uri.scheme, uri.host, uri.port, uri.path) == expected
    assert uri.text == text
    assert uri.is_nbd == text.startswith("nbd")
    assert uris.is_allowed(uri, [uri.pattern])
    uris.check_patterns([uri.pattern])


@pytest.mark.parametrize(("text", "reason"), BAD.items())
def test_bad_uris_are_refused_with_a_reason(text, reason):
    with pytest.raises(InvalidUri) as caught:
        uris.parse_uri(text)
    assert reason in caught.value.message


@pytest.mark.parametrize("text", ["base.raw", "/a/b", "nbd:x", "://x", "a b://x", "../nbd://x"])
def test_paths_are_no_uris(text):
    assert not uris.is_uri(text)


@pytest.mark.parametrize(
    ("text", "example"),
    [
        ("ssh://host", "ssh://USER@HOST/PATH"), ("s3://bucket", "s3://BUCKET/KEY"),
        ("HTTPS://u@host/x", "https://HOST/PATH"), ("nbd://host:0", "nbd://HOST:PORT/EXPORT or"),
        ("nbds+unix:///x", "nbds+unix:///EXPORT?socket=PATH"),
        ("gopher://host/", "nbd://HOST:PORT"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_an_example_of_its_kind(text, example):
    with pytest.raises(InvalidUri) as caught:
        uris.parse_uri(text)
    assert example in caught.value.hint


def test_a_user_is_a_part_of_what_would_allow_it():
    uri = uris.parse_uri("ssh://a%20b@host:22/x")
    assert uri.user == "a b"
    assert uri.pattern == "ssh://a%20b@host:22"
    assert uris.is_allowed(uri, [uri.pattern])


@pytest.mark.parametrize("text", ["nbd://h", "HTTP://h", "x+y-z.1://"])
def test_uris_are_known_by_their_scheme(text):
    assert uris.is_uri(text)


@pytest.mark.parametrize(
    ("text", "pattern", "allowed"),
    [
        ("nbd://host/", "nbd://host", True),
        ("nbd://host:1234/", "nbd://host", True),
        ("nbd://host:1234/", "nbd://host:1234", True),
        ("nbd://host:1234/", "nbd://host:1235", False),
        ("nbd://host/", "nbd://host:1234", False),
        ("nbd://HOST/", "nbd://host", True),
        ("nbd://host/", "nbds://host", False),
        ("nbd://host/", "nbd://other", False),
        ("nbd://host/", "nbd://*", True),
        ("nbd://a.example.org/", "nbd://*.example.org", True),
        ("nbd://a.b.example.org/", "nbd://*.example.org", True),
        ("nbd://example.org/", "nbd://*.example.org", False),
        ("nbd://evil-example.org/", "nbd://*.example.org", False),
        ("nbd://example.org.evil/", "nbd://example.org", False),
        ("nbd://[::1]/", "nbd://[::1]", True),
        ("ssh://me@host/a", "ssh://host", True),
        ("ssh://me@host/a", "ssh://me@host", True),
        ("ssh://root@host/a", "ssh://me@host", False),
        ("ssh://host/a", "ssh://me@host", False),
        ("ssh://a%20b@host/a", "ssh://a%20b@host", True),
        ("nbd://host/a/b", "nbd://host/a", True),
        ("nbd://host/a", "nbd://host/a/", True),
        ("nbd://host/ab", "nbd://host/a", False),
        ("nbd://host/", "nbd://host/a", False),
        ("nbd://host/a", "nbd://", False),
        ("nbd://host/a", "nbd", False),
        ("nbd://host/a", "*", False),
        ("nbd://host/a", "nbd://host/a?x", False),
        ("nbd://host/a", "nbd://[", False),
        ("nbd+unix:///?socket=/run/a/s", "nbd+unix:///run/a", True),
        ("nbd+unix:///?socket=/run/a/s", "nbd+unix:///run/a/s", True),
        ("nbd+unix:///?socket=/run/ab/s", "nbd+unix:///run/a", False),
        ("nbd+unix:///?socket=/run/a/../b/s", "nbd+unix:///run/a", False),
        ("nbd+unix:///?socket=/run/a/s", "nbd+unix://", True),
        ("nbd+unix:///?socket=/run/a/s", "nbd://*", False),
        ("nbd+unix:///?socket=/run/a/s", "nbd+unix:///?socket=/run/a/s", True),
    ],
)
def test_patterns(text, pattern, allowed):
    uri = uris.parse_uri(text)
    assert uris.is_allowed(uri, [pattern]) is allowed
    assert uris.is_allowed(uri, ["nbd://nobody", pattern]) is allowed


def test_a_socket_behind_a_link_lies_where_the_link_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "open").mkdir()
    os.symlink(tmp_path / "real/s", tmp_path / "open/s")
    uri = uris.parse_uri(f"nbd+unix:///?socket={tmp_path}/open/s")
    assert not uris.is_allowed(uri, [f"nbd+unix://{tmp_path}/open"])
    assert uris.is_allowed(uri, [f"nbd+unix://{tmp_path}/real"])


def test_a_refusal_names_what_would_allow_it():
    uri = uris.parse_uri("nbd://host:7/x")
    with pytest.raises(UriNotAllowed) as caught:
        uris.check_allowed(uri, (), "/a/image.fvd")
    assert "--allow-uri nbd://host:7" in caught.value.hint
    assert "/a/image.fvd" in caught.value.message
    uris.check_allowed(uri, ["nbd://host:7"], "/a/image.fvd")


@pytest.mark.parametrize("pattern", ["", "host", "nbd", "nbd:/x", "nbd://a b", "gopher://x"])
def test_patterns_that_mean_nothing_are_refused(pattern):
    with pytest.raises(InvalidOption, match="--allow-uri"):
        uris.check_patterns([pattern])
