"""How long a replica is waited for, and what is said of one that does not start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds before something counts as dead."""

    silence: float = 4.0  # no heartbeat of a process that serves
    start_silence: float = 30.0  # the same while it imports and loads, which can keep Python's lock
    start: float = 600.0  # from placed to serving
    place: float = 60.0  # for the first time: GPUs that are not there by then are somebody else's
    place_again: float = 600.0  # after a node was lost: somebody may bring another
    stall: float = 300.0  # the gang has work and gets nowhere: SGLang's own watchdog takes as long
    starts: int = 4  # failed starts in a row before the job gives up


class ReplicaError(RuntimeError):
    """A replica that does not start any more."""


class Refused(ReplicaError):
    """Its own settings are the reason: no replica of them will ever start."""


# Of settings, whatever process raises them; what chance may bring (a port, memory, a lost peer) is a RuntimeError.
START_ERRORS = (AssertionError, ImportError, NotImplementedError, ValueError, SystemExit)


def refusal(error: BaseException) -> str | None:
    """One line if the next start would end the same way; SGLang wraps such errors once."""
    for each in (error, error.__cause__):
        if isinstance(each, START_ERRORS):
            return " ".join(str(each).split()) or type(each).__name__
    return None
