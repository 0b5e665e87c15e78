"""A gang that an event loop asks: replays, refusals, clients that go away, and a gang that starts no more."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from mm_sglang.jobs import driver as module
from mm_sglang.jobs import start
from mm_sglang.jobs.driver import GangDriver, GangFailed, RequestFailed
from mm_sglang.jobs.job import TRIES
from mm_sglang.jobs.patience import ReplicaError
from mm_sglang.jobs.service import ServiceOptions, _fields, start_service
from mm_sglang.parallel.wire import Peer


class FakeReplica:
    """Used by the driver's thread, as the real one; what the test wants of it goes through `todo`."""

    def __init__(self, number: int, gang: Any, hub: Any, on_event: Any) -> None:
        self.gang, self.ready = gang, False
        self.asked: list[str] = []
        self.aborted: list[str] = []
        self.came = threading.Semaphore(0)
        self.todo: str | None = None
        self.closed = self.crashed = False

    def start(self) -> None:
        self.ready = True

    def ask(self, rid: str, **order: Any) -> None:
        self.asked.append(rid)
        self.came.release()

    def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    def watch(self) -> dict[str, str]:
        todo, self.todo = self.todo, None
        if todo == "lose":
            raise ReplicaError("does not start")
        if todo == "crash":
            self.crashed = True
            raise ConnectionError("the head is gone")
        return {self.asked[-1]: "a rank was killed"} if todo == "fail" else {}

    def close(self) -> None:
        self.closed = True
        if self.crashed:
            raise ConnectionError("the head is still gone")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Replica", FakeReplica)
    monkeypatch.setattr(module, "host_for_messages", lambda: "127.0.0.1")
    monkeypatch.setattr(module, "decoder_cpus", lambda gpus, replicas: 0)


def make_driver() -> tuple[GangDriver, FakeReplica]:
    driver = GangDriver(
        at_once=2, replicas=1, model="m", gpus=1, split="context", max_video_tokens=None, config=None, extra=()
    )
    replica: Any = driver.replica
    return driver, replica


async def came(replica: FakeReplica) -> None:
    assert await asyncio.to_thread(replica.came.acquire, timeout=10)


def test_a_request_is_asked_again_and_given_up_after_three_times(fake: None) -> None:
    async def run() -> None:
        driver, replica = make_driver()
        try:
            asked = asyncio.create_task(driver.ask("a.mp4", "?", {}))
            for _ in range(TRIES):
                await came(replica)
                replica.todo = "fail"
            with pytest.raises(GangFailed, match="a rank was killed; tried 3 times"):
                await asyncio.wait_for(asked, 10)
            assert len(set(replica.asked)) == TRIES  # a late answer to an earlier try is nobody's
        finally:
            driver.close()
        assert replica.closed

    asyncio.run(run())


def test_answers_and_refusals_reach_who_asked(fake: None) -> None:
    async def run() -> None:
        driver, replica = make_driver()
        try:
            first, second = (asyncio.create_task(driver.ask(f"{name}.mp4", "?", {})) for name in "ab")
            await came(replica)
            await came(replica)
            driver._hear({"kind": "failed", "rid": replica.asked[1], "error": "ValueError: not a video"})
            driver._hear({"kind": "answer", "rid": replica.asked[0], "text": "yes"})
            assert await first == {"text": "yes"}
            with pytest.raises(RequestFailed, match="not a video"):
                await second
        finally:
            driver.close()

    asyncio.run(run())


def test_a_client_that_goes_away_has_its_request_aborted(fake: None) -> None:
    async def run() -> None:
        driver, replica = make_driver()
        try:
            asked = asyncio.create_task(driver.ask("a.mp4", "?", {}))
            await came(replica)
            asked.cancel()
            for _ in range(100):
                if replica.aborted:
                    break
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)
            assert replica.aborted == replica.asked  # once
        finally:
            driver.close()

    asyncio.run(run())


def test_a_gang_that_starts_no_more_fails_everything(fake: None) -> None:
    async def run() -> None:
        driver, replica = make_driver()
        asked = asyncio.create_task(driver.ask("a.mp4", "?", {}))
        await came(replica)
        replica.todo = "lose"
        with pytest.raises(GangFailed, match="does not start"):
            await asyncio.wait_for(asked, 10)
        with pytest.raises(GangFailed, match="does not start"):
            await asyncio.wait_for(driver.ask("b.mp4", "?", {}), 10)
        assert driver.lost == "does not start"
        driver.close()

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_ray_that_is_gone_fails_everything_too(fake: None) -> None:
    async def run() -> None:
        driver, replica = make_driver()
        asked = asyncio.create_task(driver.ask("a.mp4", "?", {}))
        await came(replica)
        replica.todo = "crash"
        with pytest.raises(GangFailed, match="ConnectionError: the head is gone"):
            await asyncio.wait_for(asked, 10)
        with pytest.raises(GangFailed, match="the head is gone"):
            await asyncio.wait_for(driver.ask("b.mp4", "?", {}), 10)
        await asyncio.wait_for(driver.ready.wait(), 10)  # what waits for a start hears of it
        assert driver.lost is not None
        driver.close()

    asyncio.run(run())


class Telling(FakeReplica):
    """Says that it is ready, as a gang's leader does."""

    def __init__(self, number: int, gang: Any, hub: Any, on_event: Any) -> None:
        super().__init__(number, gang, hub, on_event)
        self.peer = Peer(hub.address, hub.token, "g.orders")

    def start(self) -> None:
        super().start()
        self.peer.send("ready")

    def owns(self, peer: str) -> bool:
        return True

    def hear(self, peer: str, message: Any) -> bool:
        return True


def test_a_replica_from_python(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Replica", Telling)
    monkeypatch.setattr(start, "checked", lambda options: options)

    async def run() -> None:
        starting = asyncio.create_task(start.start_replica(ServiceOptions(model="m", gpus=2, replicas=7)))
        driver = await asyncio.wait_for(starting, 10)
        asked = asyncio.create_task(driver.ask("a.mp4", "?", {}))
        replica: Any = driver.replica
        await came(replica)
        driver._hear({"kind": "answer", "rid": replica.asked[0], "text": "yes"})
        assert await asked == {"text": "yes"} and replica.gang.gpus == 2
        driver.close()

        def no_place(self: FakeReplica) -> None:
            raise ReplicaError("no place")

        monkeypatch.setattr(Telling, "start", no_place)
        with pytest.raises(GangFailed, match="no place"):
            await start.start_replica(ServiceOptions(model="m"))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "needs a JSON object, got list"),
        (b"{", "Expecting property name"),
        (b'{"video": "a"}', "question: needs one"),
        (b'{"video": 1, "question": "?"}', "video: needs str, got int"),
        (b'{"video": "a", "question": "?", "max_tokens": true}', "max_tokens: needs int, got bool"),
        (b'{"video": "a", "question": "?", "temperature": 1}', "unknown: temperature; known: video, question"),
    ],
)
def test_a_request_that_is_none(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _fields(body)


def test_a_request() -> None:
    fields = {"video": "a", "question": "?", "max_tokens": 3, "schema": {"type": "object"}}
    assert _fields(json.dumps(fields).encode()) == fields


@pytest.mark.parametrize("name", ["gpus", "replicas", "at_once"])
def test_a_service_of_nothing(name: str) -> None:
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0: needs at least 1"):
        start_service(ServiceOptions(model="m", **settings))
