# SPDX-License-Identifier: Apache-2.0
"""The relay between kernel and worker: whole messages, each answered once, whoever dies."""

import os
import random
import socket
import struct
import threading
import time

import pytest

from fvdd.worker.relay import Relay, take_memory
from fvdtest.daemon import wait_until

READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3


def request(kind, cookie, length=0, data=b"", offset=0, magic=0x25609513):
    return struct.pack(">IHHQQI", magic, 0, kind, cookie, offset, length) + data


def exactly(sock, length):
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def content(offset, length):
    return random.Random(offset).randbytes(length)


class Worker:
    """Answers in any order; dies after `lives` requests, perhaps in the middle of an answer."""

    def __init__(self, source, lives=None):
        self.ours, self.theirs = socket.socketpair()
        self.source, self.lives = source, lives
        self.writes = {}
        self.waiting = []
        self.disconnected = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            while self.lives is None or self.lives > 0:
                kind, cookie, offset, length = self.take()
                if kind == DISCONNECT:
                    self.disconnected = True
                    continue
                self.waiting.append((kind, cookie, offset, length))
                if self.lives is not None:
                    self.lives -= 1
                while self.waiting and (len(self.waiting) > 3 or self.source.random() < 0.7):
                    self.answer(self.waiting.pop(self.source.randrange(len(self.waiting))))
        except (EOFError, OSError):
            pass
        self.ours.close()

    def take(self):
        """A request. When none comes, what waits is answered."""
        while True:
            self.ours.settimeout(0.01 if self.waiting else None)
            try:
                header = exactly(self.ours, 28)
                break
            except TimeoutError:
                self.answer(self.waiting.pop())
        self.ours.settimeout(None)
        magic, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", header)
        assert magic == 0x25609513
        if kind == WRITE:
            self.writes[offset] = exactly(self.ours, length)
        return kind, cookie, offset, length

    def answer(self, asked):
        kind, cookie, offset, length = asked
        data = content(offset, length) if kind == READ else b""
        reply = struct.pack(">IIQ", 0x67446698, 0, cookie) + data
        if self.lives == 0:
            reply = reply[: self.source.randrange(len(reply))]
        self.ours.sendall(reply)


class Kernel:
    """Sends requests and checks their answers."""

    def __init__(self):
        self.sock, self.given = socket.socketpair()
        self.sock.settimeout(20)
        self.asked = {}
        self.answered = 0
        self.cookie = 0

    def ask(self, kind, length, offset):
        self.cookie += 1
        self.asked[self.cookie] = (kind, length, offset)
        data = content(offset, length) if kind == WRITE else b""
        self.sock.sendall(request(kind, self.cookie, length, data, offset))

    def take(self):
        magic, error, cookie = struct.unpack(">IIQ", exactly(self.sock, 16))
        assert (magic, error) == (0x67446698, 0)
        kind, length, offset = self.asked.pop(cookie)  # a second answer finds nothing
        if kind == READ:
            assert exactly(self.sock, length) == content(offset, length)
        self.answered += 1


@pytest.mark.parametrize("deaths", [0, 1, 5])
def test_every_request_is_answered_once_over_any_number_of_deaths(rng, deaths):
    kernel = Kernel()
    relay_of = Relay([kernel.given], [b""])
    workers = [Worker(rng, rng.randrange(1, 40) if deaths else None)]
    relay_of.serve_by([workers[0].theirs])

    def replace():
        for left in reversed(range(deaths)):
            workers[-1].thread.join()
            workers.append(Worker(rng, rng.randrange(1, 40) if left else None))
            relay_of.serve_by([workers[-1].theirs])

    writes = {}
    room = threading.Semaphore(8)
    ends = threading.Event()
    source = random.Random(rng.random())

    def ask():
        count = 0
        while not ends.is_set():
            room.acquire()
            kind = source.choice([READ, WRITE, FLUSH])
            length = source.choice([512, 4096, 300_000]) if kind != FLUSH else 0
            count += 1
            if kind == WRITE:
                writes[count] = content(count, length)
            kernel.ask(kind, length, count)

    replacing, asking = threading.Thread(target=replace), threading.Thread(target=ask)
    replacing.start()
    asking.start()
    while kernel.answered < 400 or replacing.is_alive():
        kernel.take()
        room.release()
    ends.set()
    room.release()
    asking.join()
    while kernel.asked:
        kernel.take()
    seen = {}
    for worker in workers:
        seen |= worker.writes
    assert seen == writes
    (descriptor,) = relay_of.part(5)
    os.close(descriptor)


def test_parting_leaves_the_stream_between_two_messages(rng):
    kernel = Kernel()
    relay = Relay([kernel.given], [b""])
    relay.serve_by([Worker(rng).theirs])
    kernel.ask(WRITE, 100_000, 1)
    kernel.take()
    (descriptor,) = relay.part(5)
    # What comes now stays in the socket, for whoever has it next.
    kernel.ask(READ, 512, 2)
    again = Relay([socket.socket(fileno=descriptor)], [b""])
    again.serve_by([Worker(rng).theirs])
    kernel.take()
    assert not kernel.asked
    again.close()


def test_message_that_began_before_the_relay_is_completed(rng):
    kernel = Kernel()
    message = request(WRITE, 1, 4096, content(7, 4096), 7)
    kernel.asked[1] = (WRITE, 4096, 7)
    relay = Relay([kernel.given], [message[:1000]])
    worker = Worker(rng)
    relay.serve_by([worker.theirs])
    kernel.sock.sendall(message[1000:])
    kernel.take()
    assert worker.writes == {7: content(7, 4096)}
    relay.close()


def test_parting_waits_for_answers_and_goes_on_where_they_do_not_come():
    kernel = Kernel()
    relay = Relay([kernel.given], [b""])
    ours, theirs = socket.socketpair()
    relay.serve_by([theirs])
    kernel.ask(READ, 512, 1)
    exactly(ours, 28)
    begin = time.monotonic()
    assert relay.part(0.2) is None
    assert time.monotonic() - begin < 5
    # It still relays.
    kernel.ask(FLUSH, 0, 0)
    exactly(ours, 28)
    for cookie, length in ((1, 512), (2, 0)):
        ours.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + content(1, length))
    kernel.take()
    kernel.take()
    assert relay.part(5) is not None


def test_error_answers_bring_no_data():
    kernel = Kernel()
    relay = Relay([kernel.given], [b""])
    ours, theirs = socket.socketpair()
    relay.serve_by([theirs])
    kernel.ask(READ, 512, 1)
    exactly(ours, 28)
    ours.sendall(struct.pack(">IIQ", 0x67446698, 5, 1))
    assert struct.unpack(">IIQ", exactly(kernel.sock, 16)) == (0x67446698, 5, 1)
    relay.close()


@pytest.mark.parametrize(
    "answer",
    [struct.pack(">IIQ", 0x67446699, 0, 1), struct.pack(">IIQ", 0x67446698, 0, 99)],
    ids=["magic", "cookie"],
)
def test_worker_that_talks_nonsense_is_given_up_and_its_requests_are_kept(rng, answer):
    kernel = Kernel()
    relay = Relay([kernel.given], [b""])
    ours, theirs = socket.socketpair()
    relay.serve_by([theirs])
    kernel.ask(READ, 512, 1)
    exactly(ours, 28)
    ours.sendall(answer)
    wait_until(lambda: not relay.is_served, "the worker to be given up", 10)
    relay.serve_by([Worker(rng).theirs])
    kernel.take()
    relay.close()


@pytest.mark.parametrize(
    "message",
    [b"", request(READ, 1, magic=1), request(WRITE, 1, length=1 << 31)],
    ids=["end", "magic", "length"],
)
def test_end_and_nonsense_of_the_kernel_end_the_worker_s_connection(message):
    kernel = Kernel()
    relay = Relay([kernel.given], [b""])
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    relay.serve_by([theirs])
    kernel.sock.sendall(message)
    kernel.sock.shutdown(socket.SHUT_WR)
    assert ours.recv(1) == b""
    assert relay.part(5) is not None


def test_disconnect_is_passed_on_and_not_waited_for(rng):
    kernel = Kernel()
    relay = Relay([kernel.given], [b""])
    worker = Worker(rng)
    relay.serve_by([worker.theirs])
    kernel.sock.sendall(request(DISCONNECT, 9))
    wait_until(lambda: worker.disconnected, "the disconnect", 10)
    assert relay.part(5) is not None


def test_memory_that_holds_less_is_refused():
    fd = os.memfd_create("received")
    os.pwrite(fd, b"abc", 0)
    assert take_memory(fd, 3) == b"abc"
    with pytest.raises(OSError, match="less was received"):
        take_memory(fd, 4)
    os.close(fd)
