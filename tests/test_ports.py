"""Ports that are bound late: each is given once, and none that somebody has."""

from __future__ import annotations

import socket

import pytest

from mm_sglang import ports


def test_a_port_is_given_once_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    first, lease = ports.leased_port()
    lease.close()
    monkeypatch.setattr(ports, "PORTS", range(first, first + 3))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        given = [ports.leased_port() for _ in range(2)]
        assert sorted(port for port, _ in given) == [first, first + 2]
        with pytest.raises(RuntimeError, match=f"no free port from {first} to {first + 2}: needs one"):
            ports.leased_port()
        for _, lease in given:
            lease.close()
        again, lease = ports.leased_port()
        assert again in (first, first + 2)
        lease.close()
