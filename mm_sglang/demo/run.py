"""`mm-sglang demo`: one mp4 and one question through two SGLang servers, dense and mm_sparse, and what was skipped."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mm_sglang.config import SparseConfig, default_config
from mm_sglang.demo.client import ask
from mm_sglang.demo.picture import Panel, draw
from mm_sglang.demo.report import Recall, density_table, prompt_chunks, recalls, replay
from mm_sglang.demo.server import Server
from mm_sglang.demo.tiny_model import make_tiny_model
from mm_sglang.demo.video import PHOTOGRAPHS, render_video
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.serve import server_command
from mm_sglang.trace import read_trace

TRACED_LAYER = 3  # of configs/demo.yaml: the layer whose heads run every pattern
REPEATS = 2  # timed requests a server, after the first one
ANSWER_TOKENS = 16
FLAGS = (
    "--dtype", "float32", "--chunked-prefill-size", "2048",
    "--max-total-tokens", "65536", "--max-running-requests", "4",
    "--sleep-on-idle",  # an idle scheduler polls at full speed otherwise, on a core the other server needs
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds to the first token: of the first request with this video, the median of repeats without radix hits."""

    first: float
    repeat: float
    prompt_tokens: int


def run_demo(*, out: Path, video: Path | None, question: str) -> int:
    """The whole demo; prints its tables and where it put the picture. Raises ValueError on a video that is no file."""
    if video is not None and not video.is_file():
        raise ValueError(f"--video {video}: needs an mp4 file")
    out.mkdir(parents=True, exist_ok=True)
    steps = tqdm(total=5, bar_format="[{n_fmt}/{total_fmt}] {desc} ({elapsed})", leave=True)

    def step(text: str) -> None:
        steps.set_description_str(text)
        steps.update()

    step("making the model and the video")
    model = make_tiny_model(out / "model")
    shown = "given" if video is None else str(video)
    if video is None:
        facts = render_video(out / "video.mp4")
        video = facts.path
        size = f"{facts.width}x{facts.height}, H.264, {facts.bytes / 1e6:.1f} MB"
        shown = f"{facts.seconds:.0f} s, {facts.frames} frames of {size}"
    trace = out / "trace"
    shutil.rmtree(trace, ignore_errors=True)

    settings = yaml.safe_load(default_config().with_name("demo.yaml").read_text(encoding="utf-8"))
    settings["trace"] = {"dir": str(trace.resolve()), "tensors": [TRACED_LAYER]}
    config = SparseConfig.from_mapping(settings)
    with ExitStack() as stack:
        step("starting two SGLang servers, dense (torch_native) and mm_sparse")
        servers = {
            name: _start(model, extra, out / f"{name}.log")
            for name, extra in (
                ("dense", ["--attention-backend", "torch_native"]),
                ("mm_sparse", ["--json-model-override-args", _json({"mm_sparse": settings})]),
            )
        }
        for server in servers.values():
            stack.enter_context(server)
        warm = render_video(out / "warm_up.mp4", seconds=4.0, width=224, height=168).path
        for server in servers.values():
            ask(server.url, [("video", warm), ("text", "warm up")], 4)
        step("time to first token, one server at a time")
        timings, answers = {}, {}
        for name, server in servers.items():
            timings[name] = _time(server, video, question)
        step("answers")
        for name, server in servers.items():
            answers[name] = ask(server.url, [("video", video), ("text", question)], ANSWER_TOKENS).tokens
    step("tables and picture")
    chunks = prompt_chunks(read_trace(trace))
    layout, plans, tensors = replay(trace, [line for line in chunks if line["layer"] == TRACED_LAYER], config)
    picture = out / "skipped.png"
    _draw(layout, plans, config, picture)
    steps.close()
    _print(shown, timings, answers, chunks, recalls(plans, tensors), layout, picture, video == out / "video.mp4")
    return 0


def _json(value: object) -> str:
    import json

    return json.dumps(value)


def _start(model: Path, extra: Sequence[str], log: Path) -> Server:
    command, environment = server_command(str(model), config=None, extra=[*FLAGS, *extra], cores=1)
    return Server(command, environment, log)


def _time(server: Server, video: Path, question: str) -> Timing:
    seconds, prompt_tokens = [], 0
    for _ in range(1 + REPEATS):
        server.flush_cache()
        start = time.perf_counter()
        prompt_tokens = ask(server.url, [("video", video), ("text", question)], 1).prompt_tokens
        seconds.append(time.perf_counter() - start)
    return Timing(first=seconds[0], repeat=statistics.median(seconds[1:]), prompt_tokens=prompt_tokens)


def _draw(layout: TokenLayout, plans: Sequence[Any], config: SparseConfig, path: Path) -> None:
    groups = plans[-1].groups
    panels = [
        Panel(
            title=f"layer {TRACED_LAYER}, head {int(g.heads[0])}: {g.pattern.kind}",
            head=int(g.heads[0]),
            plans=tuple(plans),
        )
        for g in groups
    ]
    counts = ", ".join(f"{n:,} {name}" for name, n in layout.counts().items() if n)
    draw(panels, layout, f"What mm_sparse computed of {layout.length:,} prompt tokens ({counts})", path)


def _print(
    shown: str,
    timings: dict[str, Timing],
    answers: dict[str, list[int]],
    chunks: Sequence[dict[str, Any]],
    recall: Sequence[Recall],
    layout: TokenLayout,
    picture: Path,
    ours: bool,
) -> None:
    say: Callable[..., None] = print
    video = next(item for item in layout.items if item.frames > 1)
    first = [line for line in chunks if line["layer"] == TRACED_LAYER]
    say(f"\nvideo      {shown}")
    if ours:
        say(f"           photographs: {', '.join(p.name for p in PHOTOGRAPHS)} (from scikit-image's wheel)")
    say(f"frames     {video.frames} temporal frames of {video.rows} x {video.cols} tokens")
    say("tokens     " + ", ".join(f"{n:,} {name}" for name, n in layout.counts().items()))
    say(f"chunks     {len(first)} sparse: " + ", ".join(f"{c['queries']} at {c['prefix']}" for c in first))
    say(f"\n{'layer':>5}  {'pattern':15} {'heads':>5} {'tiles':>9} {'of causal':>9} {'density':>8} {'partial':>8}")
    for row in density_table(chunks):
        say(
            f"{row.layer:>5}  {row.pattern:15} {row.heads:>5} {row.tiles:>9,} {row.causal_tiles:>9,} "
            f"{row.tiles / row.causal_tiles:>8.1%} {row.partial_tiles / row.tiles:>8.1%}"
        )
    say("    0  dense layer: left to the dense backend whole")
    dense, sparse = timings["dense"], timings["mm_sparse"]
    say(f"\n{'time to first token, s':32} {'dense':>8} {'mm_sparse':>10} {'ratio':>6}")
    for name, a, b in (
        ("first request with this video", dense.first, sparse.first),
        (f"later ones, median of {REPEATS}", dense.repeat, sparse.repeat),
    ):
        say(f"{name:32} {a:>8.2f} {b:>10.2f} {a / b:>5.2f}x")
    say("dense is SGLang's torch_native on this CPU, which computes the prefix's rows again in every chunk;")
    say("absolute times and this ratio say nothing of a GPU.")
    equal = sum(a == b for a, b in zip(answers["dense"], answers["mm_sparse"], strict=True))
    say(f"\nagreement  {equal} of {ANSWER_TOKENS} greedy tokens equal dense (random weights: a flat, hard case)")
    for entry in recall:
        say(
            f"           layer {TRACED_LAYER} {entry.pattern:15} attention recall {entry.recall:.3f}, "
            f"output error {entry.error:.3f} (relative, against dense of the same q, k, v)"
        )
    say(f"\npicture    {picture}")
