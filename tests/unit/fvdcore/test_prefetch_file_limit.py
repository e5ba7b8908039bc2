# SPDX-License-Identifier: Apache-2.0
"""Prefetch into an image that may not grow (EFBIG) fails, as into one that is full."""

import errno
import os


def test_a_file_size_limit_counts_as_full(probes, image_of, tmp_path, wait_until):
    """The wire answers EFBIG as "no space" too; retrying for ever would never say so."""
    path = tmp_path / "image"
    path.write_bytes(image_of(bytes_per_prefetch=16384))
    fd = os.open(path, os.O_RDWR)
    image = probes.image.Image(fd, probes.storage.Storage(os.urandom(64 * 4096)))
    log = probes.storage.Storage(b"")
    image.put_log(log)
    log.fail("write", errno.EFBIG, always=True)
    image.prefetch_prepare(0)
    image.prefetch_thread()
    try:
        wait_until(lambda: image.prefetch_state() == "failed", "prefetch to fail", 3)
    finally:
        image.prefetch_end()
        image.free()
        os.close(fd)
