# SPDX-License-Identifier: Apache-2.0
"""The status page in a real browser: what it shows is what is, and it loads nothing from afar."""

import re
import struct
import subprocess
import zlib

import pytest

from fvdd.metrics.page import STATUS_PAGE
from fvdtest.prometheus import fetch

WIDTH, HEIGHT = 900, 1200
BROWSER = (
    "chromium-headless-shell", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
    "--disable-dev-shm-usage", f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=9000",
)  # fmt: skip
LOCAL, BASE = (0x22, 0xAA, 0x77), (0xBB, 0xBB, 0xBB)


def browse(folder, *words):
    done = subprocess.run(
        [*BROWSER, f"--user-data-dir={folder / 'profile'}", *map(str, words)],
        capture_output=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def pixels(path):
    """How often each colour is in a PNG of 8 bits a channel."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed = 8, b""
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, color = struct.unpack_from(">2I2B", chunk)
        elif kind == b"IDAT":
            packed += chunk
        at += 12 + length
    assert depth == 8
    step = {2: 3, 6: 4}[color]
    raw, stride = zlib.decompress(packed), width * step
    found, before = {}, bytes(stride)
    for y in range(height):
        line = raw[y * (stride + 1) : (y + 1) * (stride + 1)]
        before = unfiltered(line[0], line[1:], before, step)
        for x in range(0, stride, step):
            color = tuple(before[x : x + 3])
            found[color] = found.get(color, 0) + 1
    return found


def unfiltered(kind, line, above, step):
    """One line of a PNG without its filter (RFC 2083, section 6)."""
    out = bytearray(line)
    for x in range(len(line)):
        left = out[x - step] if x >= step else 0
        corner = above[x - step] if x >= step else 0
        if kind == 4:
            guess = left + above[x] - corner
            near = min((left, above[x], corner), key=lambda value: abs(guess - value))
        else:
            near = (0, left, above[x], (left + above[x]) // 2)[kind]
        out[x] = (out[x] + near) & 255
    return bytes(out)


def test_the_page_shows_every_device_with_its_map(observed, tmp_path):
    url = observed.metrics.removesuffix("metrics")
    page = browse(tmp_path, "--dump-dom", url)
    names = re.findall(r'<section data-name="([^"]+)"', page)
    assert names == ["copies", "fetches", "small-journal"]
    assert len(re.findall(r'<svg class="strip"[^>]*data-drawn="1"', page)) == 3
    assert page.count("<polyline") == 6
    assert "3 devices" in page
    for text in ("attached", "64.0 MiB", "all local in", "restarted 1 times", ">answers<"):
        assert text in page


def test_the_page_can_be_looked_at(observed, tmp_path):
    picture = tmp_path / "page.png"
    url = observed.metrics.removesuffix("metrics")
    browse(tmp_path, f"--screenshot={picture}", url)
    found = pixels(picture)
    assert sum(found.values()) == WIDTH * HEIGHT
    # Two devices are local in part, one wholly: their strips are 18 pixels high.
    assert found.get(LOCAL, 0) > 200 * 18
    assert found.get(BASE, 0) > 50 * 18


def test_the_page_names_nothing_from_elsewhere():
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", STATUS_PAGE)
    banned = r"@import|url\(|innerHTML|insertAdjacentHTML|document\.write"
    assert not re.findall(banned, STATUS_PAGE)


def test_the_browser_is_told_so(observed):
    import urllib.request

    url = observed.metrics.removesuffix("metrics")
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("cells", ["0", "513", "x", ""])
def test_a_map_has_a_bound(observed, cells):
    url = observed.metrics.removesuffix("metrics")
    with pytest.raises(OSError, match="422"):
        fetch(f"{url}v1/devices/copies/map?cells={cells}")


def test_a_picture_is_decoded_as_it_is(tmp_path):
    """The decoder of this file, on a picture with each of the filters."""
    rows = [bytes([kind, *[9] * 6]) for kind in range(5)]
    body = zlib.compress(b"".join(rows))
    head = struct.pack(">2I5B", 2, 5, 8, 2, 0, 0, 0)
    path = tmp_path / "x.png"
    chunks = b"".join(
        struct.pack(">I4s", len(data), kind) + data + bytes(4)
        for kind, data in ((b"IHDR", head), (b"IDAT", body))
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    found = pixels(path)
    assert sum(found.values()) == 10
    assert found[9, 9, 9] == 3
    assert found[18, 18, 18] == 3
