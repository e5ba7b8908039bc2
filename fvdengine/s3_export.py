# SPDX-License-Identifier: Apache-2.0
"""An object of S3 as an export, run by nbdkit's plugin for Python; by itself it tells length and
ETag of the object as JSON. It runs on the system's interpreter, which has boto3, not on ours.

nbdkit's own S3 plugin is not used: it shows an object that was removed as zeros. Here every read
names the ETag that it expects, so that an object that was removed or replaced is an error.
Credentials are found by boto3: AWS_ACCESS_KEY_ID and its like, AWS_SHARED_CREDENTIALS_FILE, the
host's role; without any, requests are not signed, as public objects need it. FVD_S3_ENDPOINT names
a server other than Amazon's.
"""

import errno
import json
import os
import sys
import threading
from contextlib import closing
from typing import Any

import boto3
import botocore
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

API_VERSION = 2
READERS = 16
SECONDS = 20.0

given = {"bucket": "", "key": "", "tag": ""}
opened: dict[str, Any] = {}
opening = threading.Lock()


class Object:
    """The object, and the ETag by which all reads know it."""

    def __init__(self, bucket: str, key: str, tag: str, seconds: float = SECONDS) -> None:
        session = boto3.Session()
        endpoint = os.environ.get("FVD_S3_ENDPOINT") or None
        settings: dict[str, Any] = {
            "connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 0},
            "max_pool_connections": READERS,
        }  # fmt: skip
        if endpoint is not None:
            settings["s3"] = {"addressing_style": "path"}
        if session.get_credentials() is None:
            settings["signature_version"] = botocore.UNSIGNED
        region = session.region_name or "us-east-1"
        self.client = session.client("s3", region, endpoint_url=endpoint, config=Config(**settings))
        self.words = {"Bucket": bucket, "Key": key}
        told = self.client.head_object(**self.words)
        self.length = int(told["ContentLength"])
        self.tag = str(told["ETag"])
        if tag not in ("", self.tag):
            raise RuntimeError("the object is another one than it was")

    def read(self, length: int, offset: int) -> bytes:
        """Read a part; raise where it is not all of it, or not of this object."""
        place = f"bytes={offset}-{offset + length - 1}"
        told = self.client.get_object(**self.words, Range=place, IfMatch=self.tag)
        with closing(told["Body"]) as body:
            data = bytes(body.read())
        if len(data) != length:
            raise RuntimeError(f"{len(data)} bytes came of {length}")
        return data


# -- what nbdkit calls -------------------------------------------------------------------------


def thread_model() -> int:
    import nbdkit

    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    if key not in given:
        raise RuntimeError(f"unknown parameter {key}")
    given[key] = value


def open(readonly: bool) -> Object:  # noqa: A001 (nbdkit's name)
    with opening:
        if "object" not in opened:
            opened["object"] = Object(given["bucket"], given["key"], given["tag"])
        return opened["object"]  # type: ignore[no-any-return]


def get_size(handle: Object) -> int:
    return handle.length


def can_multi_conn(handle: Object) -> bool:
    return True


def pread(handle: Object, buffer: bytearray, offset: int, flags: int) -> None:
    import nbdkit

    try:
        buffer[:] = handle.read(len(buffer), offset)
    except Exception:
        nbdkit.set_error(errno.EIO)
        raise


def tell(bucket: str, key: str, seconds: float) -> dict[str, object]:
    """Length and ETag, or the problem."""
    try:
        found = Object(bucket, key, "", seconds)
    except (BotoCoreError, ClientError, OSError, ValueError) as error:
        return {"problem": str(error)}
    return {"length": found.length, "tag": found.tag}


if __name__ == "__main__" and len(sys.argv) == 4:
    print(json.dumps(tell(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
