"""The command `mm-sglang`. Bad input is one clear line on stderr and exit code 2; what fails here, code 1."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mm_sglang import __version__
from mm_sglang.jobs.arguments import add_job_run, job_run

PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)  # of bad input


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="mm-sglang", description="Sparse prefill for long video in SGLang.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mm-sglang {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{demo,serve,job,search,report,convert,check}"
    )

    demo = commands.add_parser("demo", help="a real mp4 through SGLang, dense and sparse, on this machine")
    demo.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for what it makes (default: demo_out)")
    demo.add_argument("--video", type=Path, help="an mp4 of your own (default: 64 s of photographs, rendered)")
    demo.add_argument("--question", help="about it (default: those about the needles in the rendered one)")
    demo.add_argument("--seed", type=int, default=0, help="of the rendered one and its needles (default: 0)")

    serve = commands.add_parser(
        "serve",
        allow_abbrev=False,
        help="SGLang's own server with mm_sparse switched on",
        description="Runs `sglang serve MODEL` with the flags that mm_sparse needs here, and prints that command. "
        "Every further option goes to SGLang as it is and wins over the defaults.",
    )
    serve.add_argument("model", metavar="MODEL", help="folder or Hugging Face name")
    serve.add_argument(  # not --config: that one is SGLang's own
        "--sparse-config", metavar="FILE", help="YAML file of head patterns (default: the one in the package)"
    )

    serve.add_argument(
        "--max-video-tokens", type=int, metavar="N",
        help="make room for videos of N tokens: context, frames, pixels, vision cache, upload size, watchdog",
    )  # fmt: skip

    serve.add_argument(
        "--context-parallel", type=int, metavar="N",
        help="spread each prefill over N GPUs, in blocks of 128 tokens, weights and KV cache whole on each",
    )  # fmt: skip

    job = commands.add_parser("job", help="questions about many videos, on a Ray cluster")
    job_commands = job.add_subparsers(dest="job_command", required=True, metavar="{run}")
    add_job_run(job_commands)

    search = commands.add_parser(
        "search", allow_abbrev=False, help="the offline search for each head's pattern, on videos of yours"
    )
    search.add_argument("model", metavar="MODEL", help="folder or Hugging Face name")
    search.add_argument("--videos", type=Path, nargs="+", required=True, metavar="FILE", help="calibration videos")
    search.add_argument("--out", type=Path, required=True, metavar="FILE.yaml", help="settings for --sparse-config")
    search.add_argument(
        "--density", type=float, default=0.1, help="share of dense attention's tiles to compute (default: %(default)s)"
    )
    search.add_argument(
        "--families", nargs="+", metavar="NAME", help="patterns it may choose, by their names in its report "
        "(default: all of them)",
    )  # fmt: skip
    search.add_argument(
        "--max-video-tokens", type=int, metavar="N",
        help="take the videos as serve --max-video-tokens N will (default: SGLang's limits, about 115000 tokens)",
    )  # fmt: skip

    report = commands.add_parser("report", help="one HTML page of what a search chose")
    report.add_argument("config", type=Path, metavar="FILE.yaml", help="written by mm-sglang search")
    report.add_argument("--out", type=Path, metavar="FILE.html", help="default: beside the configuration")

    convert = commands.add_parser("convert", help="MInference's head configuration (JSON) as settings of ours")
    convert.add_argument("source", type=Path, metavar="FILE.json", help="of minference/configs")
    convert.add_argument("--out", type=Path, required=True, metavar="FILE.yaml", help="settings for --sparse-config")

    commands.add_parser("check", help="what this machine can run, and why not the rest")

    argv = sys.argv[1:] if argv is None else argv
    if len(argv) > 1 and argv[0] == "serve" and argv[1].startswith("-") and argv[1] not in ("-h", "--help"):
        serve.error("MODEL comes first, then options")  # or the value of an option of SGLang's would pass for it
    options, rest = parser.parse_known_args(argv)
    if rest and options.command not in ("serve", "job"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "demo":
            from mm_sglang.demo.run import run_demo

            return run_demo(out=options.out, video=options.video, question=options.question, seed=options.seed)
        if options.command == "serve":
            from mm_sglang.serve import run_server

            return run_server(
                options.model, config=options.sparse_config, extra=rest, max_video_tokens=options.max_video_tokens,
                context_parallel=options.context_parallel,
            )  # fmt: skip
        if options.command == "job":
            return job_run(options, rest)
        if options.command == "convert":
            from mm_sglang.minference_config import convert as run_convert

            run_convert(options.source, options.out)
            return 0
        if options.command == "report":
            from mm_sglang.report import report as run_report

            page = options.out or options.config.with_suffix(".html")
            run_report(options.config, page)
            print(page)
            return 0
        if options.command == "search":
            import torch

            from mm_sglang.search.run import EVERY
            from mm_sglang.search.run import search as run_search

            device = "cuda" if torch.cuda.is_available() else "cpu"
            run_search(
                options.model, options.videos, options.out, target=options.density, device=device,
                families=options.families or EVERY, max_video_tokens=options.max_video_tokens,
            )  # fmt: skip
            print(f"{options.out}: hand it to mm-sglang serve --sparse-config")
            return 0
        from mm_sglang.check import print_check

        return print_check()
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError) as error:  # bad input, a server that did not start, a full disk
        print(f"mm-sglang {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, *PATHS)) else 1
