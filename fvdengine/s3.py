# SPDX-License-Identifier: Apache-2.0
"""Bases in S3: what the object's length and ETag are, and how nbdkit is told to read it.

Both is done by s3_export.py on the interpreter of the system. Credentials come from the environment
and from the files that it names, see there; never from an image and never on a command line.
"""

import json
import subprocess
from pathlib import Path

from fvdengine.children import python_plugin
from fvdengine.errors import ProgramMissing
from fvdengine.uris import Uri
from fvdengine.web import Answer

SCRIPT = str(Path(__file__).with_name("s3_export.py"))
SYSTEM_PYTHON = "/usr/bin/python3"
PURPOSE = "bases behind s3"
START_SECONDS = 10.0  # for the interpreter, beside the time for the answer


def ask(uri: Uri, seconds: float) -> Answer:
    """Ask what the object is; raise ProgramMissing, which names the Debian package."""
    words = [SYSTEM_PYTHON, "-I", SCRIPT, uri.host, uri.path[1:], str(seconds)]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds + START_SECONDS,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise ProgramMissing(
            program=SYSTEM_PYTHON, purpose=PURPOSE, package="python3"
        ) from None
    except subprocess.TimeoutExpired:
        return Answer(problem="no answer")
    if done.returncode != 0:
        if "No module named" in done.stderr:
            raise ProgramMissing(program="boto3", purpose=PURPOSE, package="python3-boto3")
        lines = done.stderr.strip().splitlines()
        return Answer(problem=lines[-1] if lines else "no answer")
    told = json.loads(done.stdout)
    tag = str(told.get("tag", ""))[:1000]
    return Answer(int(told.get("length", 0)), tag, str(told.get("problem", "")))


def nbdkit_argv(socket: str, uri: Uri, tag: str) -> list[str]:
    """The command that serves the object, read-only, on a Unix socket; only while it has the ETag
    `tag`, where one is known."""
    words = [*python_plugin(socket, PURPOSE), SCRIPT]
    return [*words, f"bucket={uri.host}", f"key={uri.path[1:]}", f"tag={tag}"]
