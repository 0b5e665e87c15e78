"""TCP ports for what binds them late: a server that first loads its model, rank 0 of a gang."""

from __future__ import annotations

import random
import socket

LEASE = "\0mm_sglang-port-{}"  # an abstract socket: one process of the host holds a name, and its death gives it back
PORTS = range(20_000, 22_000)  # of nobody: Ray's workers are below, SGLang's own choices and the kernel's above


def leased_port() -> tuple[int, socket.socket]:
    """A port that is free on this host, that nobody else who asks here gets, and what holds it until it is closed.

    The kernel's own choice (bind to 0) won't do: any connection made before the server binds may be given the same
    port, and an SGLang server that could not bind does not end.
    """
    for port in random.sample(PORTS, len(PORTS)):
        lease = socket.socket(socket.AF_UNIX)
        try:
            lease.bind(LEASE.format(port))
            with socket.socket() as probe:
                probe.bind(("", port))
            return port, lease
        except OSError:
            lease.close()
    raise RuntimeError(f"no free port from {PORTS.start} to {PORTS.stop - 1}: needs one")
