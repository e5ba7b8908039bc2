# SPDX-License-Identifier: Apache-2.0
"""What a device is, as labels."""

import pytest

from fvdd.metrics.exposition import Exposition
from fvdd.metrics.identity import Identity, strip_secrets, write_identities


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("/srv/base.raw", "/srv/base.raw"),
        ("https://user:secret@host:8443/a?token=x#y", "https://host:8443/a"),
        ("nbd://host/export", "nbd://host/export"),
        ("nbd://me:pass@[fe80::1]:10809/export", "nbd://[fe80::1]:10809/export"),
        ("nbd+unix:///golden?socket=/run/nbd.sock", "nbd+unix:///golden?socket=/run/nbd.sock"),
        ("nbds+unix://me@/g?socket=/s&token=x#y", "nbds+unix:///g?socket=/s"),
        # Nobody could have attached these; a scrape must not fail of them all the same.
        ("nbd://[x/y", "nbd://[x/y"),
        ("http://host:99999/x?token=y", "http://host:99999/x"),
        ("://?#@", "://?#@"),
        ("/srv/a://b?c", "/srv/a://b?c"),
    ],
)
def test_secrets_stay_out_of_labels(base, shown):
    assert strip_secrets(base) == shown


def test_all_is_in_one_sample():
    out = Exposition()
    base = "nbd://me:pass@host/export"
    write_identities(
        out, [Identity("nbd0", "/dev/nbd0", "web", "/i.fvd", "nbd", base, "raw", "fvd:web:1")]
    )
    assert out.text().splitlines()[2:] == [
        'fvd_device_info{device="nbd0",devpath="/dev/nbd0",name="web",image="/i.fvd",attach="nbd",'
        'base="nbd://host/export",base_format="raw",cookie="fvd:web:1"} 1'
    ]
