"""One contestant in a process of its own: start SGLang, warm up, measure, write JSON after every figure."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

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
        self.record: dict[str, Any] = {"name": spec["name"], "arguments": spec["arguments"], "ttft": []}
        began = time.perf_counter()
        self.engine = sglang.Engine(**spec["arguments"])
        self.record["start_seconds"] = time.perf_counter() - began
        self.store()

    def store(self) -> None:
        self.out.write_text(json.dumps(self.record, indent=1))

    def seconds(self, ids: list[int], new: int = 1) -> float:
        began = time.perf_counter()
        self.engine.generate(
            input_ids=ids, sampling_params={"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        )
        return time.perf_counter() - began

    def measure(self) -> None:
        """Everything the spec asks for, shortest prompts first."""
        spec, seed = self.spec, 1
        warm = [self.seconds(prompt(tokens, 10_000 + tokens), 4) for tokens in spec["warm_up"]]
        self.record["warm_up_seconds"] = warm
        for tokens in spec["lengths"]:
            times = []
            with Memory() as memory:
                for _ in range(spec["repeats"] if tokens <= 1 << 18 else spec["repeats_long"]):
                    seed += 1
                    times.append(self.seconds(prompt(tokens, seed)))
            taken = {"tokens": tokens, "seconds": statistics.median(times), "all": times, "peak_gb": memory.peak}
            self.record["ttft"].append(taken)
            print(f"{spec['name']}: {tokens} tokens {taken['seconds']:.3f} s, peak {memory.peak:.1f} GB", flush=True)
            self.store()
        if spec.get("decode"):
            self.decode(**spec["decode"])
        if spec.get("mixed"):
            asyncio.get_event_loop().run_until_complete(self.mixed(**spec["mixed"]))
        self.store()

    def decode(self, tokens: int, new: int) -> None:
        """Milliseconds a token after a prompt of `tokens`, between the first token and the last."""
        loop = asyncio.get_event_loop()
        stamps = loop.run_until_complete(self._stream(prompt(tokens, 77), new))
        stamps = loop.run_until_complete(self._stream(prompt(tokens, 78), new))
        self.record["decode"] = {"tokens": tokens, "ms": (stamps[-1] - stamps[0]) / (len(stamps) - 1) * 1e3}
        print(f"{self.spec['name']}: decode {self.record['decode']}", flush=True)

    async def _stream(self, ids: list[int], new: int) -> list[float]:
        """When each token came."""
        stamps: list[float] = []
        options = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        async for part in await self.engine.async_generate(input_ids=ids, sampling_params=options, stream=True):
            while len(stamps) < part["meta_info"]["completion_tokens"]:
                stamps.append(time.perf_counter())
        return stamps

    async def mixed(self, tokens: int, chats: int, chat_tokens: int, new: int) -> None:
        """Gaps between tokens of `chats` short chats while one long prompt prefills."""
        running = [asyncio.create_task(self._stream(prompt(chat_tokens, 500 + n), new)) for n in range(chats)]
        await asyncio.sleep(2.0)
        began = time.perf_counter()
        await self._stream(prompt(tokens, 99), 1)
        ended = time.perf_counter()
        gaps = []
        for task in running:
            stamps = [began, *(t for t in await task if began <= t <= ended), ended]
            gaps += [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
        gaps.sort()
        self.record["mixed"] = {
            "tokens": tokens, "chats": chats, "prefill_seconds": ended - began, "gaps": len(gaps),
            "p50_ms": gaps[len(gaps) // 2] * 1e3, "p99_ms": gaps[int(len(gaps) * 0.99)] * 1e3,
            "longest_ms": gaps[-1] * 1e3,
        }  # fmt: skip
        print(f"{self.spec['name']}: mixed {self.record['mixed']}", flush=True)


def main() -> None:
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    contestant = Contestant(spec, out)
    try:
        contestant.measure()
    finally:
        contestant.engine.shutdown()


if __name__ == "__main__":
    main()
