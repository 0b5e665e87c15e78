"""The hub takes messages with its token and nothing else, and listens where only the cluster can reach it."""

from __future__ import annotations

import msgpack
import pytest
import zmq

from mm_sglang.parallel.wire import Hub, Message, Peer


def test_messages_go_both_ways() -> None:
    hub = Hub("127.0.0.1")
    peer = Peer(hub.address, hub.token, "a.1")
    peer.send("beat", used=3)
    assert list(hub.receive(5.0)) == [("a.1", {"kind": "beat", "used": 3})]
    hub.send("a.1", {"kind": "ask", "rid": "x"})
    assert peer.receive() == {"kind": "ask", "rid": "x"}
    hub.send("nobody", {"kind": "ask"})  # who is gone is not waited for
    peer.close()
    hub.close()


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb({"kind": "answer", "token": "wrong"}),
        msgpack.packb({"kind": "answer"}),
        msgpack.packb({"kind": 3, "token": None}),
        msgpack.packb([1, 2]),
        b"\xc1 not msgpack",
        b"",
    ],
)
def test_a_message_without_the_token_is_dropped(data: bytes) -> None:
    hub, context = Hub("127.0.0.1"), zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(hub.address)
    stranger.send(data)
    peer = Peer(hub.address, hub.token, "ours")
    heard: list[tuple[str, Message]] = []
    while not heard or not hub.refused:
        peer.send("beat")
        heard += list(hub.receive(0.1))
    assert {name for name, _ in heard} == {"ours"} and hub.refused == 1
    peer.close()
    context.destroy(linger=0)
    hub.close()


def test_a_public_address_is_refused() -> None:
    with pytest.raises(ValueError, match="address 8.8.8.8: needs loopback or a private one"):
        Hub("8.8.8.8")


def test_two_hubs_share_neither_port_nor_token() -> None:
    first, second = Hub("127.0.0.1"), Hub("127.0.0.1")
    assert first.address != second.address and first.token != second.token
    first.close()
    second.close()
