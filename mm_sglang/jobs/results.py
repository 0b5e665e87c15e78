"""A job's results: one JSON line an input, whole or not there, whatever kills the job; a later job goes on from it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

Line = dict[str, Any]


class Results:
    """The file under `path`, locked against other jobs. `done` holds the keys that are answered.

    Opening it drops a torn last line, and the error lines of inputs that are about to be tried again: an input has one
    line. Lines of other jobs stay.

    Raises:
        ValueError: it cannot be written, is in use, or is not a file of results.
    """

    def __init__(self, path: Path, again: Collection[str] = ()) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _locked(path)
        except BlockingIOError as error:
            raise ValueError(f"--out {path}: another job is writing it") from error
        except OSError as error:
            raise ValueError(f"--out {path}: cannot be written ({error.strerror})") from error
        self.done: set[str] = set()
        self.retry(again)

    def retry(self, keys: Collection[str]) -> None:
        """Drop what stands in the way of trying these inputs again, and see what is done."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        kept = b""
        for number, line in enumerate(whole.splitlines(keepends=True), 1):
            entry = _entry(line)
            if entry is None:
                raise ValueError(f"--out {self.path}: line {number} is not a result of a job")
            if "error" not in entry:
                self.done.add(entry["key"])
            elif entry["key"] in keys:
                continue
            kept += line
        if kept != content:
            with self._writing():
                self._replace(kept)

    def add(self, line: Line) -> None:
        """On the disk when this returns.

        Raises:
            ValueError: it cannot be. What was there is kept; a torn last line goes when the file is next opened.
        """
        with self._writing():
            self._file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        if "error" not in line:
            self.done.add(line["key"])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"{len(self.done)} answers are kept"
            raise ValueError(f"--out {self.path}: cannot be written ({error.strerror}); {kept}") from error

    def _replace(self, content: bytes) -> None:
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        file = scratch.open("w+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(scratch, self.path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = file

    def close(self) -> None:
        with suppress(OSError):  # of what `add` could not write, and has told
            self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _locked(path: Path) -> BinaryIO:
    """Open for appending and locked; BlockingIOError if somebody else has it."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else it was replaced in between
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _entry(line: bytes) -> Line | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("key"), str) else None
