"""A Ray cluster of this machine's own for a test, and what the processes of its jobs talk to."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mm_sglang.ports import leased_port

JOB_SERVER = importlib.util.find_spec("aiohttp_cors") is not None  # one of what ray[default] adds to ray
UP_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Head:
    address: str  # for RAY_ADDRESS
    server: str  # for `ray job submit --address`
    environment: dict[str, str]


@contextmanager
def ray_head(log: Path, *, gpus: int) -> Iterator[Head]:
    """`ray start --head`, with a job server if what it needs is installed; all of it ends with the block."""
    (port, server, agent), _leases = zip(*(leased_port() for _ in range(3)), strict=True)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={port}", f"--num-gpus={gpus}", "--num-cpus=2",
        f"--include-dashboard={JOB_SERVER}", f"--dashboard-port={server}",
        f"--dashboard-agent-listen-port={agent}",
    ]  # fmt: skip
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    with log.open("w") as file:
        head = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        _wait_for(head, log, [port, *([server] if JOB_SERVER else [])])
        yield Head(address=f"127.0.0.1:{port}", server=f"http://127.0.0.1:{server}", environment=environment)
    finally:
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # it ended by itself, and what is raised says why
            family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        head.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        head.wait()


def _wait_for(head: subprocess.Popen[bytes], log: Path, ports: list[int]) -> None:
    end = time.monotonic() + UP_S
    for port in ports:
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            assert head.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)


@dataclass
class Talk:
    """Who was seen to listen where, and who was connected to which port; a worker is known by its Ray job's number."""

    listens: dict[int, set[str]] = field(default_factory=dict)  # port -> owners
    speaks: dict[int, set[str]] = field(default_factory=dict)  # port -> who is connected to it

    def look(self, drivers: dict[str, str]) -> None:
        """`drivers`: a text in a driver's command line, and its name.

        Only at this process's descendants: jobs of another Ray on this machine have the same numbers.
        """
        names: dict[int, str] = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                name = next((name for text, name in drivers.items() if text in command), None)
                if name := name or process.environ().get("RAY_JOB_ID"):
                    names[process.pid] = name
        for connection in psutil.net_connections("tcp"):  # all at once: process by process is a second of a core
            if connection.pid not in names:
                continue
            if connection.status == psutil.CONN_LISTEN:
                self.listens.setdefault(connection.laddr.port, set()).add(names[connection.pid])
            elif connection.raddr:
                self.speaks.setdefault(connection.raddr.port, set()).add(names[connection.pid])

    def pairs(self) -> set[tuple[str, str]]:
        """(who listens, who is connected to it)."""
        return {
            (owner, other) for port, owners in self.listens.items() for owner in owners
            for other in self.speaks.get(port, set())
        }  # fmt: skip

    def require_apart(self, first: str, second: str) -> None:
        """Each driver was connected with the workers of one Ray job, its own, and these with nobody else."""
        pairs = self.pairs()
        workers = {
            driver: {other for owner, other in pairs if owner == driver and other.isalnum()}
            for driver in (first, second)
        }
        (mine,), (others,) = workers[first], workers[second]
        assert mine != others
        for number, driver in ((mine, first), (others, second)):
            assert (number, number) in pairs  # its engine's ports and its process group's store
            assert {other for owner, other in pairs if owner in (number, driver)} <= {number, driver}
