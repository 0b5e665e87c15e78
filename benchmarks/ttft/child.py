"""One contestant in a process of its own: start SGLang, warm up, measure, write JSON after every figure."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.ttft import profile

VOCABULARY = (1000, 150000)  # ordinary tokens


def prompt(tokens: int, seed: int) -> list[int]:
    """Random ids; another seed shares no prefix."""
    return random.Random(seed).choices(range(*VOCABULARY), k=tokens)


class Memory:
    """Peak memory of the GPU while it is open, in GB, sampled."""

    def __enter__(self) -> Memory:
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=100"]
        command.append("--id=" + os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.peak = max(self.peak, int(line) * (1 << 20) / 1e9)
                if self._stop.is_set():
                    break
            process.terminate()


class Contestant:
    """A running engine and what was measured of it."""

    def __init__(self, spec: dict[str, Any], out: Path) -> None:
        import sglang

        self.spec, self.out = spec, out
        self.name = f"{spec['part']} {spec['name']} {spec['chunk'] >> 10}K"
        self.record: dict[str, Any] = {"arguments": spec["arguments"], "ttft": [], "left_out": []}
        began = time.perf_counter()
        self.engine = sglang.Engine(**spec["arguments"])
        self.record["start_seconds"] = time.perf_counter() - began
        self.store()

    def store(self) -> None:
        part = self.out.with_suffix(".part")  # whoever reads meanwhile gets the last one whole
        part.write_text(json.dumps(self.record, indent=1))
        part.replace(self.out)

    def seconds(self, ids: list[int], new: int = 1) -> float:
        began = time.perf_counter()
        self.engine.generate(
            input_ids=ids, sampling_params={"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        )
        return time.perf_counter() - began

    def there_is_time(self, what: str, seconds: float) -> bool:
        """Whether something of about so many seconds still fits; what does not is written down."""
        fits: bool = time.time() + seconds < self.spec["deadline"]
        if not fits:
            self.record["left_out"].append(what)
            self.store()
        return fits

    def measure(self) -> None:
        """Everything the spec asks for, shortest prompts first."""
        spec, seed = self.spec, 1
        self.record["warm_up_seconds"] = [self.seconds(prompt(n, 10_000 + n), 4) for n in spec["warm_up"]]
        tokens_before, last = 1, 0.0
        for tokens in spec["lengths"]:
            repeats = spec["repeats"] if tokens <= 1 << 18 else spec["repeats_long"]
            if not self.there_is_time(f"{tokens} tokens", last * (tokens / tokens_before) ** spec["growth"] * repeats):
                continue
            times = []
            with Memory() as memory:
                for _ in range(repeats):
                    seed += 1
                    times.append(self.seconds(prompt(tokens, seed)))
            # of two the second: the first of a length may compile
            taken = {"tokens": tokens, "seconds": times[-1] if repeats == 2 else statistics.median(times)}
            self.record["ttft"].append(taken | {"all": times, "peak_gb": memory.peak})
            print(f"{self.name}: {tokens} tokens {taken['seconds']:.3f} s, peak {memory.peak:.1f} GB", flush=True)
            tokens_before, last = tokens, taken["seconds"]
            self.store()
        if spec.get("decode") and self.there_is_time("decode", 5):
            self.decode(**spec["decode"])
        if spec.get("mixed") and self.there_is_time("mixed load", 60):
            asyncio.get_event_loop().run_until_complete(self.mixed(**spec["mixed"]))
        asked = spec.get("questions", {"tokens": []})
        for tokens in asked["tokens"]:
            if self.there_is_time(f"questions at {tokens}", 5 * last * (tokens / tokens_before) ** spec["growth"]):
                tokens_before, last = tokens, self.questions(tokens, asked["more"])
        profiled = spec.get("profile")
        if profiled and self.there_is_time("profile", 3 * last * max(1.0, profiled / tokens_before) ** spec["growth"]):
            self.profile(profiled)
        self.store()

    def profile(self, tokens: int) -> None:
        """GPU time of one prefill by stage, as SGLang's profiler records it."""
        with tempfile.TemporaryDirectory() as folder:
            self.engine.start_profile(output_dir=folder, activities=["GPU"], with_stack=False, record_shapes=False)
            seconds = self.seconds(prompt(tokens, 5))
            self.engine.stop_profile()
            steps = self.spec["layers"] * -(-tokens // self.spec["chunk"])  # a layer of a chunk
            self.record["profile"] = {"tokens": tokens, "request_seconds": seconds, **profile.read(Path(folder), steps)}
        print(f"{self.name}: profile\n" + "\n".join(profile.lines(self.record["profile"])), flush=True)

    def decode(self, tokens: int, new: int) -> None:
        """Milliseconds a token after a prompt of `tokens`, between the first token and the last."""
        loop = asyncio.get_event_loop()
        stamps = loop.run_until_complete(self._stream(prompt(tokens, 77), new))
        stamps = loop.run_until_complete(self._stream(prompt(tokens, 78), new))
        self.record["decode"] = {"tokens": tokens, "ms": (stamps[-1] - stamps[0]) / (len(stamps) - 1) * 1e3}
        print(f"{self.name}: decode {self.record['decode']}", flush=True)

    def questions(self, tokens: int, more: int) -> float:
        """Seconds of a prompt that ends with a video, of one with a question after it, of one after a cached video."""
        alone = [self.seconds(prompt(tokens, seed)) for seed in (301, 302)][-1]  # the first of a length may compile
        asked = [self.seconds(prompt(tokens, seed) + prompt(more, seed)) for seed in (303, 304)][-1]
        held = prompt(tokens, 304)
        again = [self.seconds(held + prompt(more, seed)) for seed in range(400, 406)]
        found = {"tokens": tokens, "more": more, "video": alone, "with_question": asked,
                 "cached_video": statistics.median(again[1:])}  # fmt: skip
        self.record.setdefault("questions", []).append(found | {"all": again})
        print(f"{self.name}: {found}", flush=True)
        self.store()
        return asked

    async def _stream(self, ids: list[int], new: int) -> list[float]:
        """When each token came."""
        stamps: list[float] = []
        options = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        async for part in await self.engine.async_generate(input_ids=ids, sampling_params=options, stream=True):
            while len(stamps) < part["meta_info"]["completion_tokens"]:
                stamps.append(time.perf_counter())
        return stamps

    async def mixed(self, tokens: int, chats: int, chat_tokens: int, new: int) -> None:
        """Gaps between tokens of short chats: while one long prompt prefills, and over the chats' whole life."""
        running = [asyncio.create_task(self._stream(prompt(chat_tokens, 500 + n), new)) for n in range(chats)]
        await asyncio.sleep(2.0)
        began = time.perf_counter()
        await self._stream(prompt(tokens, 99), 1)
        ended = time.perf_counter()
        during, always = [], []
        for task in running:
            stamps = await task
            always += [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
            inside = [began, *(t for t in stamps if began <= t <= ended), ended]
            during += [b - a for a, b in zip(inside, inside[1:], strict=False)]
        self.record["mixed"] = {
            "tokens": tokens, "chats": chats, "prefill_seconds": ended - began, "during": spread(during),
            "whole_chats": spread(always),
        }  # fmt: skip
        print(f"{self.name}: mixed {self.record['mixed']}", flush=True)


def spread(seconds: list[float]) -> dict[str, float]:
    """Number, percentiles and longest of gaps, in milliseconds."""
    ordered = sorted(seconds)
    at = {f"p{share}": ordered[int(len(ordered) * share / 100)] * 1e3 for share in (50, 99, 99.9)}
    return {"gaps": len(ordered), **at, "longest": ordered[-1] * 1e3}


def main() -> None:
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    contestant = Contestant(spec, out)
    try:
        contestant.measure()
    finally:
        contestant.engine.shutdown()


if __name__ == "__main__":
    main()
