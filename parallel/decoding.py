"""Videos decoded and resized by Ray CPU actors: keyframe ranges at once, pixels as uint8 straight to whoever asked.

Only paths, numbers of frames and errors go through Ray. A video's frames come over a hub of its own, which answers each
message: an actor has no more than two under way, knows when its last has arrived, and stops when nobody wants the rest.
Of a video no more than two ranges an actor are asked for at a time. Several videos share the actors, which do what they
are asked in order; so nothing here has a time limit. A gang that gets nowhere is its driver's to end (Patience.stall).
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mm_sglang.parallel.beat import start_beat
from mm_sglang.parallel.wire import Hub, Peer

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

Frames = npt.NDArray[np.uint8]  # [frames, height, width, 3]
BATCH = 8  # frames of a message
UNDER_WAY = 2  # messages of a range that its reader has not answered yet
PARTS_AN_ACTOR = 4
TICK_S = 0.1
TAKEN, STOP = "taken", "stop"  # what a reader answers


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    frames: int
    fps: float
    height: int
    width: int
    keyframes: tuple[int, ...]


class Decoder:
    """A Ray actor with one CPU. It keeps the video it read last open: opening means to index the whole file."""

    def __init__(self, hub: str, token: str, name: str) -> None:
        self.path = ""
        self.reader: Any = None
        start_beat(Peer(hub, token, name), dict)

    def facts(self, path: str) -> VideoFacts:
        reader = self._open(path)
        height, width = reader[0].shape[:2]
        return VideoFacts(
            frames=len(reader), fps=float(reader.get_avg_fps()), height=int(height), width=int(width),
            keyframes=tuple(int(key) for key in reader.get_key_indices()),
        )  # fmt: skip

    def decode(self, path: str, wanted: list[int], at: int, size: tuple[int, int], hub: str, token: str) -> int:
        """Send frames `wanted`, resized to `size`, as the result's frames from `at` on; returns how many were taken."""
        reader = self._open(path)
        peer, sent, taken = Peer(hub, token, f"frames from {at}"), 0, 0
        ends = range(0, len(wanted), BATCH)
        try:
            while taken < len(ends):
                if sent < len(ends) and sent - taken < UNDER_WAY:
                    begin = ends[sent]
                    try:
                        frames = reader.get_batch(wanted[begin : begin + BATCH]).asnumpy()
                    except Exception as error:
                        raise ValueError(f"the video is truncated or damaged: {_last_line(error)}") from error
                    peer.send("frames", wait=True, at=at + begin, data=resize(frames, size).tobytes())
                    sent += 1
                else:
                    if (peer.receive() or {}).get("kind") == STOP:
                        break
                    taken += 1
        finally:
            peer.close()
        return min(taken * BATCH, len(wanted))

    def _open(self, path: str) -> Any:
        from decord import VideoReader, cpu

        if path != self.path:
            self.path, self.reader = "", None
            try:
                self.reader = VideoReader(path, ctx=cpu(0), num_threads=1)
            except Exception as error:
                raise ValueError(f"not a video, or truncated: {path} ({_last_line(error)})") from error
            self.path = path
        return self.reader


class Decoders:
    """One for each of the placement group's bundles from `first` on; they are of the gang `name` and fail with it."""

    def __init__(
        self, group: PlacementGroup, first: int, hub: str, token: str, name: str, on_death: Callable[[str], None]
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.on_death = on_death
        self.actors = [
            ray.remote(Decoder)
            .options(num_cpus=1, num_gpus=0, scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle))
            .remote(hub, token, f"{name}.decoder{bundle - first}")
            for bundle in range(first, group.bundle_count)
        ]
        self._turns = itertools.cycle(self.actors)

    def facts(self, path: str) -> VideoFacts:
        asked = next(self._turns).facts.remote(path)
        facts: VideoFacts = self._result(asked)
        return facts

    def decode(
        self, path: str, facts: VideoFacts, wanted: Sequence[int], size: tuple[int, int], host: str,
        progress: Callable[[int], None],
    ) -> Frames:  # fmt: skip
        """The frames `wanted`, in order. `progress` hears of how many are there."""
        import ray

        result: Frames = np.empty((len(wanted), *size, 3), dtype=np.uint8)
        ranges = parts(wanted, facts.keyframes, PARTS_AN_ACTOR * len(self.actors))
        hub, running, begun, there = Hub(host), {}, 0, np.zeros(len(wanted), dtype=bool)
        idle = [actor for actor in self.actors for _ in range(2)]
        try:
            while not there.all():
                while idle and begun < len(ranges):
                    actor, (at, those) = idle.pop(), ranges[begun]
                    running[actor.decode.remote(path, those, at, size, hub.address, hub.token)] = actor
                    begun += 1
                for peer, message in hub.receive(TICK_S):
                    block = np.frombuffer(message["data"], dtype=np.uint8).reshape(-1, *size, 3)
                    result[message["at"] : message["at"] + len(block)] = block
                    there[message["at"] : message["at"] + len(block)] = True
                    hub.send(peer, {"kind": TAKEN})
                    progress(int(there.sum()))
                for each in ray.wait(list(running), num_returns=len(running), timeout=0)[0]:
                    self._result(each)
                    idle.append(running.pop(each))
        finally:
            threading.Thread(target=_turn_away, args=(hub, list(running)), daemon=True).start()
        return result

    def _result(self, asked: Any) -> Any:
        import ray

        try:
            return ray.get(asked)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError:
            self.on_death("a decoder ended (killed or crashed)")
            raise


def _turn_away(hub: Hub, running: list[Any]) -> None:
    """Close the hub once nobody sends to it any more: an actor whose reader is gone would wait for it for ever."""
    import ray

    while running:
        for peer, _ in hub.receive(TICK_S):
            hub.send(peer, {"kind": STOP})
        running = ray.wait(running, num_returns=len(running), timeout=0)[1]
    hub.close()


def parts(wanted: Sequence[int], keyframes: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    """About `count` runs of `wanted` as (number of the first, frames), cut where a keyframe begins: no frame is decoded
    for two of them."""
    least = -(-len(wanted) // count)
    found: list[tuple[int, list[int]]] = []
    run: list[int] = []
    for number, frame in enumerate(wanted):
        same = run and bisect.bisect_right(keyframes, frame) == bisect.bisect_right(keyframes, run[-1])
        if len(run) >= least and not same:
            found.append((number - len(run), run))
            run = []
        run.append(frame)
    return [*found, (len(wanted) - len(run), run)] if run else found


def resize(frames: Frames, size: tuple[int, int]) -> Frames:
    """As SGLang does with Qwen's videos, so that it finds nothing left to do."""
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize as resized

    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [frames, 3, height, width]
    found = resized(planes, list(size), interpolation=InterpolationMode.BILINEAR)
    return np.ascontiguousarray(found.permute(0, 2, 3, 1).numpy())


def _last_line(error: Exception) -> str:
    """A decoder's own words, without its stack trace."""
    lines = [line.strip() for line in str(error).split("Stack trace")[0].splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
