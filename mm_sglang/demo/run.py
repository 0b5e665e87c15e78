"""`mm-sglang demo`: questions about an mp4 through two SGLang servers, dense and mm_sparse, and what was skipped.

Its own mp4 has needles among photographs, so that answers are right or wrong.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mm_sglang.config import SparseConfig, default_config
from mm_sglang.demo.client import ask
from mm_sglang.demo.needles import hide
from mm_sglang.demo.picture import Panel, draw
from mm_sglang.demo.questions import Question, ask_in_turn, compare, time_to_first_token
from mm_sglang.demo.report import density_table, prompt_chunks, recalls, replay
from mm_sglang.demo.server import Server
from mm_sglang.demo.tables import machine, print_tables
from mm_sglang.demo.trained import trained_model
from mm_sglang.demo.video import PHOTOGRAPHS, render_video
from mm_sglang.kernels.inspection import by_pattern
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import TextTail
from mm_sglang.kernels.plan import Plan
from mm_sglang.serve import server_command
from mm_sglang.trace import read_trace

TRACED_LAYER = 3  # of configs/demo.yaml: the layer whose heads run every pattern
VIDEO_S = 64.0
NEEDLES = 5
SIDE = 336  # pixels: the largest frames that the model was trained on; 144 tokens a pair of frames
FLAGS = (
    "--dtype", "float32", "--chunked-prefill-size", "2048",
    "--max-total-tokens", "65536", "--max-running-requests", "4",
)  # fmt: skip


def run_demo(*, out: Path, video: Path | None, question: str | None, seed: int = 0) -> int:
    """The whole demo; prints its tables and where it put the picture and report.json.

    Args:
        video: an mp4; None has one rendered.
        question: asked instead of those about the rendered video's needles; needed with a video.
        seed: of the rendered video and its needles.

    Raises:
        ValueError: a video that is no file, has no question or is refused by the server; no weights in the package.
    """
    if video is not None and not video.is_file():
        raise ValueError(f"--video {video}: needs an mp4 file")
    if video is not None and question is None:
        raise ValueError(f"--video {video}: needs --question")
    model = trained_model()
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine()}
    with steps(4) as step, ExitStack() as stack:
        step("making the video")
        questions = [Question(text=question)] if question is not None else []
        if video is None:
            needles = hide(NEEDLES, seconds=VIDEO_S, seed=seed)
            facts = render_video(
                out / "video.mp4", seconds=VIDEO_S, width=SIDE, height=SIDE, seed=seed, needles=needles
            )
            video = facts.path
            report["video"] = asdict(facts) | {"path": str(facts.path), "photographs": [p.name for p in PHOTOGRAPHS]}
            report["video"]["needles"] = [asdict(needle) for needle in needles]
            questions = questions or [Question(text=needle.question, truth=needle.glyph) for needle in needles]
        else:
            report["video"] = {"path": str(video), "bytes": video.stat().st_size}

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

        step("questions, one server at a time")
        replies = {name: ask_in_turn(server, video, questions) for name, server in servers.items()}

        step("tables and picture")
        chunks = prompt_chunks(read_trace(trace))
        layout, plans, tensors = replay(trace, [line for line in chunks if line["layer"] == TRACED_LAYER], config)
        draw_layer(layout, plans, out / "skipped.png")
        report |= {
            "tokens": layout.counts(),
            "frames": [[item.frames, item.rows, item.cols] for item in layout.items],
            "prompt_tokens": replies["dense"][0].prompt_tokens,
            "chunks": [[line["prefix"], line["queries"]] for line in chunks if line["layer"] == TRACED_LAYER],
            "dense_layers": list(config.dense_layers),
            "density": [asdict(row) for row in density_table(chunks)],
            "time_to_first_token_s": {name: time_to_first_token(given) for name, given in replies.items()},
            "questions": compare(questions, replies),
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


def draw_layer(layout: TokenLayout, plans: Sequence[Plan], path: Path) -> None:
    panels = []
    for pattern, heads, _, _ in by_pattern(plans[-1]):
        if isinstance(pattern, TextTail):
            continue
        head = heads[0]
        title = f"layer {TRACED_LAYER}, head {head}: {pattern.kind}"
        panels.append(Panel(title=title, head=head, plans=tuple(plans)))
    counts = ", ".join(f"{n:,} {name}" for name, n in layout.counts().items() if n)
    draw(panels, layout, f"What mm_sparse computed of {layout.length:,} prompt tokens ({counts})", path)
