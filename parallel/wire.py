"""Messages between a job's driver and its engines: msgpack over ZeroMQ, a random token on every one, no pickle.

ZeroMQ has no authentication of its own. A hub binds to loopback or a private address only, and drops whatever does not
carry its token.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgpack
import zmq

Message = dict[str, Any]
LARGEST = 256 << 20  # bytes of one message; a range of decoded frames is the largest
FLUSH_MS = 1000  # how long a closing peer may take to hand over what it has sent


def _pack(token: str, message: Message) -> bytes:
    return bytes(msgpack.packb({**message, "token": token}))


def _unpack(token: str, data: bytes) -> Message | None:
    """The message, or None for anything that is not one of ours."""
    try:
        message = msgpack.unpackb(data)
    except (ValueError, msgpack.exceptions.UnpackException):
        return None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        return None
    given = message.pop("token", None)
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), token.encode()):
        return None
    return message


class Hub:
    """The end that many peers connect to; one thread uses it.

    Args:
        host: loopback or a private address of this machine.

    Raises:
        ValueError: an address that others than the cluster can reach.
    """

    def __init__(self, host: str) -> None:
        if not ipaddress.ip_address(host).is_private:  # loopback counts as private
            raise ValueError(f"address {host}: needs loopback or a private one, messages are not encrypted")
        self.token = secrets.token_hex(16)
        self.refused = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)
        self.address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"

    def receive(self, wait_s: float) -> Iterator[tuple[str, Message]]:
        """What has come, as (peer, message), oldest first; waits for the first one at most `wait_s`."""
        wait_ms = int(wait_s * 1000)
        while self._socket.poll(wait_ms):
            wait_ms = 0
            parts = self._socket.recv_multipart()
            message = _unpack(self.token, parts[1]) if len(parts) == 2 else None
            if message is None:
                self.refused += 1
            else:
                yield parts[0].decode(errors="replace"), message

    def send(self, peer: str, message: Message) -> None:
        """To a peer that has said something before; what goes to one that is gone is dropped."""
        self._socket.send_multipart([peer.encode(), _pack(self.token, message)])

    def close(self) -> None:
        self._context.destroy(linger=0)


class Peer:
    """One process's end, named `name`; any thread may send, one may receive."""

    def __init__(self, address: str, token: str, name: str) -> None:
        self._token = token
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.connect(address)

    def send(self, kind: str, *, wait: bool = False, **fields: Any) -> None:
        """Never blocks unless told to: a hub that is gone must not stop a scheduler."""
        with self._lock, suppress(zmq.Again):
            self._socket.send(_pack(self._token, {"kind": kind, **fields}), 0 if wait else zmq.DONTWAIT)

    def receive(self) -> Message | None:
        """The next message, waited for; for a peer that only one thread uses."""
        return _unpack(self._token, self._socket.recv())

    def close(self) -> None:
        """What a hub has not taken a second later is lost: whoever must know that it arrived waits for an answer."""
        self._context.destroy(linger=FLUSH_MS)
