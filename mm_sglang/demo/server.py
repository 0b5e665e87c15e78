"""A real SGLang server as a child process: started on a free port, waited for, and gone with everything it spawned."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mm_sglang.ports import leased_port

START_TIMEOUT_S = 300.0


class Server:
    """`with Server(command, environment, log) as server:` gives `server.url` of a server that answers.

    Args:
        command: argv of `sglang serve …` without --host and --port, which are added here.
        environment: variables on top of this process's own.
        log: file for the server's output.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.port, self._lease = leased_port()
        self.url = f"http://127.0.0.1:{self.port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                env=os.environ | dict(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that the schedulers it spawns can be ended with it
            )

    def __enter__(self) -> Server:
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait(self) -> None:
        """Until it serves. RuntimeError with the log's own last error when it ends or takes too long instead."""
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}: {self.last_error()}")
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise RuntimeError(f"the server did not answer within {START_TIMEOUT_S:.0f} s: {self.last_error()}")

    def last_error(self) -> str:
        """The log's last line that names an error, Python's or uvicorn's, else its last line."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
        return next((line for line in reversed(lines) if "Error: " in line or "ERROR: " in line), lines[-1])

    def flush_cache(self) -> None:
        """Empty the radix cache, so that the next request prefills all of its tokens.

        The scheduler is still busy for a moment after an answer's last token, and refuses then unless told to wait.
        """
        request = urllib.request.Request(self.url + "/flush_cache?timeout=30", method="POST")
        with urllib.request.urlopen(request, timeout=60):
            pass

    def stop(self) -> None:
        """Kill the whole session: SGLang's orderly shutdown sleeps 5 s for GPU crash dumps that a CPU does not have."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._lease.close()
