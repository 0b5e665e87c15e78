"""Ranges of frames: complete, in order, cut at keyframes; and their pixels the same as of the whole video at once."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mm_sglang.demo.video import render_video
from mm_sglang.parallel.decoding import BATCH, Decoder, parts, resize
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
    hub = Hub("127.0.0.1", ahead=2)
    sender = threading.Thread(target=decoder().decode, args=(video, wanted, 5, size, hub.address, hub.token))
    sender.start()
    found = np.zeros((5 + len(wanted), *size, 3), dtype=np.uint8)
    count, end = 0, time.monotonic() + 30
    while count < len(wanted):
        assert time.monotonic() < end
        for _, message in hub.receive(5.0):
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
