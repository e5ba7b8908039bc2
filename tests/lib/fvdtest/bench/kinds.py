# SPDX-License-Identifier: Apache-2.0
"""The servers as a table: how an image is made and how it is served. No code knows a product.

Words may hold {image}, {size} (bytes), {socket}, {state} (a folder in memory) and, for clones,
{base} and {base_format}. {hole} is an empty base of the disk's size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

Words = tuple[str, ...]
FVDCTL: Words = (sys.executable, "-P", "-m", "fvdctl")
RAW_FILE: Words = ("truncate", "-s", "{size}", "{image}")


@dataclass(frozen=True)
class Kind:
    """A server. own: the product's own kind of image, as a base of a clone; empty: it has none.
    shares: kinds with the same name here use the same image where all of it is written."""

    name: str
    suffix: str
    serve: Words
    make: tuple[Words, ...] = ()
    clone: tuple[Words, ...] = ()
    own: str = ""
    ours: bool = False
    shares: str = ""
    packages: Words = field(default=())


def fvd(
    name: str, *options: str, make: tuple[Words, ...] | None = None, cache: str = "writeback",
    **more: object,
) -> Kind:  # fmt: skip
    """One of our own: live state on, metrics on."""
    create = (*FVDCTL, "create", "-q", "{image}")
    return Kind(
        name, ".fvd",
        serve=(*FVDCTL, "serve", "{image}", "--socket", "{socket}", "--state", "{state}",
               "--metrics", "127.0.0.1:0", "--cache", cache),
        make=make or ((*create, "{size}", *options),),
        clone=((*create, "--base", "{base}", "--base-format", "{base_format}", *options),),
        own="fvd", ours=True, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def hole_clone(*options: str) -> tuple[Words, ...]:
    """A clone of a base that is one hole: what is written is local, the rest is not."""
    return (
        ("truncate", "-s", "{size}", "{hole}"),
        (*FVDCTL, "create", "-q", "{image}", "--base", "{hole}", "--base-format", "raw", *options),
    )


def qemu_raw(aio: str, cache: str = "") -> Kind:
    named = f"-{cache}" if cache else ""
    return Kind(
        f"qemu-raw-{aio.replace('_', '-')}{named}", ".raw",
        serve=("qemu-nbd", "-t", "-e", "16", "-k", "{socket}", f"--cache={cache or 'writeback'}",
               f"--aio={aio}", "--discard=unmap", "-f", "raw", "{image}"),
        make=(RAW_FILE,), shares="raw", packages=("qemu-utils",),
    )  # fmt: skip


def qcow2(name: str, options: str = "", driver: str = "") -> Kind:
    """driver: more of --image-opts, to be followed by those of the file."""
    wanted = ("-o", options) if options else ()
    opts = driver or "driver=qcow2,file.driver=file,file.filename={image}"
    return Kind(
        name, ".qcow2",
        serve=("qemu-nbd", "-t", "-e", "16", "-k", "{socket}", "--cache=writeback",
               "--discard=unmap", "--image-opts", opts),
        make=(("qemu-img", "create", "-q", "-f", "qcow2", *wanted, "{image}", "{size}"),),
        clone=(("qemu-img", "create", "-q", "-f", "qcow2", *wanted, "-b", "{base}", "-F",
                "{base_format}", "{image}"),),
        own="qcow2", packages=("qemu-utils",),
    )  # fmt: skip


def nbdkit(name: str, *words: str, clones: bool = False, **more: object) -> Kind:
    make = () if clones else (RAW_FILE,)
    link: tuple[Words, ...] = (("ln", "-sf", "{base}", "{image}"),) if clones else ()
    return Kind(
        name, ".raw", serve=("nbdkit", "-f", "-U", "{socket}", *words), make=make, clone=link,
        packages=("nbdkit",), **more,  # type: ignore[arg-type]
    )  # fmt: skip



KINDS = {
    kind.name: kind
    for kind in (
        fvd("fvd-raw"),
        fvd("fvd-compact", "--compact"),
        fvd("fvd-clone", make=hole_clone()),
        fvd("fvd-data", "--compact", "--data-file", "{image}.data"),
        fvd("fvd-compact-cor", "--compact", "--copy-on-read"),
        fvd("fvd-compact-64k", "--compact", "--block-size", "64K", "--chunk-size", "64K"),
        fvd("fvd-none", "--compact", cache="none", shares="fvd-compact"),
        fvd("fvd-writethrough", "--compact", cache="writethrough", shares="fvd-compact"),
        qemu_raw("threads"),
        qemu_raw("io_uring"),
        *(qemu_raw(aio, cache) for aio in ("threads", "io_uring")
          for cache in ("none", "writethrough")),
        qcow2("qcow2"),
        qcow2("qcow2-extended", "extended_l2=on,cluster_size=128k"),
        qcow2("qcow2-cache", driver="driver=qcow2,l2-cache-size=67108864,"
              "file.driver=file,file.filename={image}"),
        qcow2("qcow2-metadata", "preallocation=metadata"),
        qcow2("qcow2-cor", driver="driver=copy-on-read,file.driver=qcow2,"
              "file.file.driver=file,file.file.filename={image}"),
        nbdkit("nbdkit-file", "file", "{image}", shares="raw"),
        nbdkit("nbdkit-cow", "--filter=cow", "file", "{image}", clones=True),
        nbdkit("nbdkit-cor", "--filter=cow", "file", "{image}", "cow-on-read=true", clones=True),
        nbdkit("nbdkit-null", "null", "{size}", shares="raw"),
    )
}  # fmt: skip
