"""`mm-sglang demo`: one mp4 and one question through two SGLang servers, dense and mm_sparse, and what was skipped."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mm_sglang.config import SparseConfig, default_config
from mm_sglang.demo.client import Answer, Part, ask
from mm_sglang.demo.picture import Panel, draw
from mm_sglang.demo.report import density_table, prompt_chunks, recalls, replay
from mm_sglang.demo.server import Server
from mm_sglang.demo.tables import machine, print_tables
from mm_sglang.demo.tiny_model import make_tiny_model
from mm_sglang.demo.video import PHOTOGRAPHS, render_video
from mm_sglang.kernels.inspection import by_pattern
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.plan import Plan
from mm_sglang.serve import server_command
from mm_sglang.trace import read_trace

TRACED_LAYER = 3  # of configs/demo.yaml: the layer whose heads run every pattern
REPEATS = 2  # timed requests a server, after the first one
ANSWER_TOKENS = 16
FLAGS = (
    "--dtype", "float32", "--chunked-prefill-size", "2048",
    "--max-total-tokens", "65536", "--max-running-requests", "4",
)  # fmt: skip


def run_demo(*, out: Path, video: Path | None, question: str) -> int:
    """The whole demo; prints its tables and where it put the picture and report.json.

    Raises:
        ValueError: a video that is no file, or that the server refuses.
    """
    if video is not None and not video.is_file():
        raise ValueError(f"--video {video}: needs an mp4 file")
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "question": question}
    with steps(5) as step, ExitStack() as stack:
        step("making the model and the video")
        model = make_tiny_model(out / "model")
        if video is None:
            facts = render_video(out / "video.mp4")
            video = facts.path
            report["video"] = asdict(facts) | {"path": str(facts.path), "photographs": [p.name for p in PHOTOGRAPHS]}
        else:
            report["video"] = {"path": str(video), "bytes": video.stat().st_size}
        prompt: list[Part] = [("video", video), ("text", question)]

        step("starting two SGLang servers: dense (torch_native) and mm_sparse")
        settings = yaml.safe_load(default_config().with_name("demo.yaml").read_text(encoding="utf-8"))
        trace = out / "trace"
        shutil.rmtree(trace, ignore_errors=True)
        settings["trace"] = {"dir": str(trace.resolve()), "tensors": [TRACED_LAYER]}
        config = SparseConfig.from_mapping(settings)
        sparse = ["--json-model-override-args", json.dumps({"mm_sparse": settings})]
        servers = {
            "dense": start(model, ["--attention-backend", "torch_native"], out / "dense.log", stack),
            "mm_sparse": start(model, sparse, out / "mm_sparse.log", stack),
        }
        warm = render_video(out / "warm_up.mp4", seconds=4.0, width=224, height=168).path
        for server in servers.values():
            server.wait()
            ask(server.url, [("video", warm), ("text", "warm up")], 4)

        step("time to first token, one server at a time")
        timed = {name: time_to_first_token(server, prompt) for name, server in servers.items()}
        step("answers")
        answers = {name: or_value_error(server, prompt, ANSWER_TOKENS) for name, server in servers.items()}

        step("tables and picture")
        chunks = prompt_chunks(read_trace(trace))
        layout, plans, tensors = replay(trace, [line for line in chunks if line["layer"] == TRACED_LAYER], config)
        draw_layer(layout, plans, out / "skipped.png")
        report |= {
            "tokens": layout.counts(),
            "frames": [[item.frames, item.rows, item.cols] for item in layout.items],
            "prompt_tokens": answers["dense"].prompt_tokens,
            "chunks": [[line["prefix"], line["queries"]] for line in chunks if line["layer"] == TRACED_LAYER],
            "dense_layers": list(config.dense_layers),
            "density": [asdict(row) for row in density_table(chunks)],
            "time_to_first_token_s": timed,
            "answers": {name: answer.tokens for name, answer in answers.items()},
            "recall": {"layer": TRACED_LAYER, "patterns": [asdict(entry) for entry in recalls(plans, tensors)]},
            "picture": str(out / "skipped.png"),
        }
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print_tables(report)
    return 0


@contextmanager
def steps(count: int) -> Iterator[Any]:
    """A progress line: call what is yielded with the name of each step as it begins."""
    with tqdm(total=count, bar_format="[{n_fmt}/{total_fmt}] {desc} ({elapsed})") as bar:

        def step(name: str) -> None:
            bar.set_description_str(name, refresh=False)
            bar.update()
            bar.refresh()

        yield step


def start(model: Path, extra: Sequence[str], log: Path, stack: ExitStack) -> Server:
    """A server that is starting; it ends with the stack."""
    command, environment = server_command(str(model), config=None, extra=[*FLAGS, *extra], cores=1)
    server = Server(command, environment, log)
    stack.callback(server.stop)
    return server


def or_value_error(server: Server, prompt: Sequence[Part], tokens: int) -> Answer:
    """`ask`; what the server refuses (HTTP 400) is the user's video, so it is a ValueError here."""
    import openai

    try:
        return ask(server.url, prompt, tokens)
    except openai.BadRequestError as error:
        said = error.body.get("message") if isinstance(error.body, dict) else error
        raise ValueError(f"the server refused the video: {said}") from error


def time_to_first_token(server: Server, prompt: Sequence[Part]) -> dict[str, float]:
    """Seconds: of the first request with this video, and the median of repeats that find nothing in the radix cache."""
    seconds = []
    for _ in range(1 + REPEATS):
        server.flush_cache()
        begin = time.perf_counter()
        or_value_error(server, prompt, 1)
        seconds.append(time.perf_counter() - begin)
    return {"first": seconds[0], "repeat": statistics.median(seconds[1:])}


def draw_layer(layout: TokenLayout, plans: Sequence[Plan], path: Path) -> None:
    panels = []
    for pattern, heads, _, _ in by_pattern(plans[-1]):
        head = heads[0]
        title = f"layer {TRACED_LAYER}, head {head}: {pattern.kind}"
        panels.append(Panel(title=title, head=head, plans=tuple(plans)))
    counts = ", ".join(f"{n:,} {name}" for name, n in layout.counts().items() if n)
    draw(panels, layout, f"What mm_sparse computed of {layout.length:,} prompt tokens ({counts})", path)
