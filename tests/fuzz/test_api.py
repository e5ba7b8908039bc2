# SPDX-License-Identifier: Apache-2.0
"""Requests drawn from the OpenAPI document of fvdd, good and bad: it fails none of them.

What cannot be done is refused in the form that the document promises; a status of 500 is a defect,
and so is any other form. A device named in half of them is there, whatever they did to the last.
"""

import itertools
import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from fvdengine.create import create_image
from fvdengine.options import CreateOptions
from fvdtest.daemon import running_daemon

NAME = "web"
FEW = 2
MANY = 12  # of each kind
REQUEST_S = 60  # then an answer is taken for missing; none takes a second
SIZE = 1 << 20
TRACED_S = 0.05
ENDLESS = "/v1/events"


class Caller:
    """Sends drawn requests to a running fvdd, and sees that the device is there."""

    def __init__(self, folder, daemon):
        self._folder = folder
        self._numbers = itertools.count()
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(daemon.socket)), base_url="http://fvdd",
            timeout=REQUEST_S,
        )  # fmt: skip
        self.statuses = {}

    def document(self):
        return self._http.get("/openapi.json").json()

    def new_path(self):
        return self._folder / f"{next(self._numbers)}.fvd"

    def prepare(self):
        """Attach a fresh image unless the device is there."""
        if self._http.get(f"/v1/devices/{NAME}").status_code == 200:
            return
        path = self.new_path()
        create_image(path, CreateOptions(size=SIZE))
        answer = self._http.post("/v1/devices", json={"image": str(path), "name": NAME})
        assert answer.status_code == 201, answer.text

    def tame(self, body):
        """Files stay in the folder of the test, and nothing is watched for an hour."""
        if not isinstance(body, dict):
            return body
        body = dict(body)
        for field in ("target", "image"):
            if isinstance(body.get(field), str) and body[field].startswith("/"):
                body[field] = str(self.new_path())
        seconds = body.get("seconds")
        if isinstance(seconds, int | float) and seconds > TRACED_S:
            body["seconds"] = TRACED_S
        return body

    def call(self, case):
        """Send a request and judge the answer."""
        drawn = case.as_transport_kwargs(base_url="http://fvdd")
        content = {}
        if "json" in drawn:
            content = {"json": self.tame(drawn["json"])}
        elif drawn.get("data") is not None:
            content = {"content": drawn["data"]}
        with self._http.stream(
            drawn["method"], drawn["url"], params=drawn.get("params"), **content
        ) as answer:
            if answer.status_code < 400 and case.path == ENDLESS:
                return
            text = answer.read()
        self.statuses.setdefault(case.path, set()).add(answer.status_code)
        assert answer.status_code != 500, (drawn, text)
        if answer.status_code >= 400:
            error = json.loads(text)["error"]
            assert error["code"], (drawn, text)
            assert error["message"], (drawn, text)


@pytest.fixture
def caller(tmp_path):
    with running_daemon(tmp_path) as daemon:
        yield Caller(tmp_path, daemon)


def cases_of(operation):
    """Requests as the document wants them and as it does not, half of them for our device."""
    has_name = "{name}" in operation.path
    return st.one_of([
        operation.as_strategy(mode, path_parameters={"name": NAME} if known else None)
        for mode in GenerationMode
        for known in ((True, False) if has_name else (False,))
    ])  # fmt: skip


def fuzz(caller, operation, requests):
    """So many requests of one kind."""

    @settings(
        max_examples=requests, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(cases_of(operation))
    def send(case):
        caller.prepare()
        caller.call(case)

    send()
    print(operation.label, sorted(caller.statuses.get(operation.path, ())))


def fuzz_all(caller, requests):
    document = schemathesis.openapi.from_dict(caller.document())
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        fuzz(caller, operation, requests)
    assert set().union(*caller.statuses.values()) >= {200, 404, 422}


def test_no_request_makes_fvdd_fail(caller):
    fuzz_all(caller, FEW)


@pytest.mark.proof
def test_none_of_many_requests_makes_fvdd_fail(caller):
    fuzz_all(caller, MANY)
