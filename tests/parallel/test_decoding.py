"""Ranges of frames: complete, in order, cut at keyframes; and their pixels the same as of the whole video at once."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from mm_sglang.demo.video import render_video
from mm_sglang.parallel import wire
from mm_sglang.parallel.decoding import BATCH, TAKEN, UNDER_WAY, Decoder, Decoders, parts, resize
from mm_sglang.parallel.wire import Hub


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_complete_in_order_and_share_no_keyframe(seed: int) -> None:
    chance = random.Random(seed)
    frames = chance.randint(1, 300)
    keys = sorted({0, *chance.sample(range(frames), chance.randint(0, min(frames, 20) - 1))})
    wanted = sorted(chance.sample(range(frames), chance.randint(1, frames)))
    found = parts(wanted, keys, chance.randint(1, 12))
    assert [frame for _, run in found for frame in run] == wanted
    assert all(wanted[at : at + len(run)] == run for at, run in found)
    groups = [{max(key for key in keys if key <= frame) for frame in run} for _, run in found]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_no_frames_are_no_parts() -> None:
    assert parts([], [0], 4) == []


def decoder() -> Decoder:
    made = Decoder.__new__(Decoder)  # without its heartbeat, which asks Ray where it is
    made.path, made.reader = "", None
    return made


def test_pixels(tmp_path: Path) -> None:
    from decord import VideoReader, cpu

    video = str(render_video(tmp_path / "video.mp4", seconds=5.0, width=224, height=168).path)
    facts = decoder().facts(video)
    assert (facts.frames, facts.fps, facts.height, facts.width) == (40, 8.0, 168, 224) and facts.keyframes[0] == 0
    wanted, size = list(range(3, 40, 3)), (56, 84)
    assert len(wanted) > BATCH
    hub = Hub("127.0.0.1")
    sender = threading.Thread(target=decoder().decode, args=(video, wanted, 5, size, hub.address, hub.token))
    sender.start()
    found = np.zeros((5 + len(wanted), *size, 3), dtype=np.uint8)
    count, end = 0, time.monotonic() + 30
    while count < len(wanted):
        assert time.monotonic() < end
        for peer, message in hub.receive(5.0):
            hub.send(peer, {"kind": TAKEN})
            block = np.frombuffer(message["data"], dtype=np.uint8).reshape(-1, *size, 3)
            found[message["at"] : message["at"] + len(block)] = block
            count += len(block)
    sender.join()
    hub.close()
    whole = resize(VideoReader(video, ctx=cpu(0)).get_batch(wanted).asnumpy(), size)
    assert (found[5:] == whole).all() and not found[:5].any()


def test_what_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "text.mp4"
    path.write_text("hello")
    with pytest.raises(ValueError, match="not a video, or truncated"):
        decoder().facts(str(path))


def test_a_busy_reader_loses_no_frames(tmp_path: Path) -> None:
    """It takes its time for longer than a closing peer waits, and finds no more than was agreed."""
    video = str(render_video(tmp_path / "video.mp4", seconds=5.0, width=224, height=168).path)
    hub = Hub("127.0.0.1")
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(decoder().decode, video, list(range(40)), 0, (56, 84), hub.address, hub.token)
        there: list[int] = []
        while len(there) < 40 // BATCH:
            time.sleep(wire.FLUSH_MS / 1000 + 0.2)
            waiting = list(hub.receive(5.0))
            assert 0 < len(waiting) <= UNDER_WAY
            for peer, message in waiting:
                there.append(message["at"])
                hub.send(peer, {"kind": TAKEN})
        assert sent.result(timeout=10) == 40 and there == list(range(0, 40, BATCH))
    hub.close()


class Actor:
    """A Ray actor as far as Decoders see one: one call after the other."""

    def __init__(self) -> None:
        self.pool, self.decoder = ThreadPoolExecutor(1), decoder()
        self.facts, self.decode = (self._method(name) for name in ("facts", "decode"))

    def _method(self, name: str) -> Any:
        def remote(*arguments: Any) -> Future[Any]:
            return self.pool.submit(getattr(self.decoder, name), *arguments)

        return type("Method", (), {"remote": staticmethod(remote)})


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Decoders]]:
    def ray_wait(asked: list[Future[Any]], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done, rest = wait(asked, timeout, FIRST_COMPLETED)
        return list(done), list(rest)

    def ray_get(asked: Future[Any]) -> Any:
        error = asked.exception()
        if error is not None:
            raise ray.exceptions.RayTaskError("decode", str(error), error)
        return asked.result()

    monkeypatch.setattr(ray, "wait", ray_wait)
    monkeypatch.setattr(ray, "get", ray_get)

    def make(count: int) -> Decoders:
        made = Decoders.__new__(Decoders)  # without Ray
        made.actors = [Actor() for _ in range(count)]
        made._turns = itertools.cycle(made.actors)
        return made

    yield make
    for thread in threading.enumerate():  # with Ray's own `wait` again it would start a Ray in this process
        if "_turn_away" in thread.name:
            thread.join(10)
            assert not thread.is_alive()


def test_videos_at_once_share_the_actors_and_a_damaged_one_does_not_hold_them(
    tmp_path: Path, actors: Callable[[int], Decoders]
) -> None:
    good = str(render_video(tmp_path / "good.mp4", seconds=12.0, width=224, height=168).path)
    decoders, size, heard = actors(2), (56, 84), list[int]()

    def fetch(path: str, wanted: list[int]) -> Any:
        return decoders.decode(path, decoders.facts(path), wanted, size, "127.0.0.1", heard.append)

    facts = decoders.facts(good)
    with ThreadPoolExecutor() as pool:
        first, second = (pool.submit(fetch, good, list(range(start, 96, 2))) for start in (0, 1))
        broken = pool.submit(fetch, good, [*range(48), 10**6])  # no such frame
        with pytest.raises(ValueError, match="truncated or damaged"):
            broken.result(timeout=60)
        frames = first.result(timeout=60), second.result(timeout=60)
    assert facts.frames == 96 and heard.count(48) >= 2
    for start, found in enumerate(frames):
        whole = decoder()._open(good).get_batch(list(range(start, 96, 2))).asnumpy()
        assert (found == resize(whole, size)).all()
    for actor in decoders.actors:  # free again
        assert actor.facts.remote(good).result(timeout=10) == facts
