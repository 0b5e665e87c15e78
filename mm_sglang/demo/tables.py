"""The demo's report as a person reads it, and the line that says where it was made."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Versions, commit and processor: without them no figure can be trusted."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    packages = ("mm-sglang", "sglang", "torch", "transformers")
    return {
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "not a checkout",
    } | {name: version(name) for name in packages}


def print_tables(report: dict[str, Any]) -> None:
    video, tokens, made = report["video"], report["tokens"], report["machine"]
    print(f"\non          {made['processor']}, sglang {made['sglang']}, torch {made['torch']}, commit {made['commit']}")
    if "photographs" in video:
        size = f"{video['width']}x{video['height']}, H.264, {video['bytes'] / 1e6:.1f} MB"
        print(f"video       {video['path']}: {video['seconds']:.0f} s, {video['frames']} frames of {size}")
        times = ", ".join(f"{needle['second']:.1f}" for needle in video["needles"])
        print(f"            {len(video['needles'])} needles at {times} s")
        print(f"            photographs from scikit-image's wheel: {', '.join(video['photographs'])}")
    else:
        print(f"video       {video['path']}, {video['bytes'] / 1e6:.1f} MB")
    for frames, rows, cols in report["frames"]:
        print(f"frames      {frames} temporal frames of {rows} x {cols} tokens")
    print(
        f"prompt      {report['prompt_tokens']:,} tokens: " + ", ".join(f"{n:,} {name}" for name, n in tokens.items())
    )
    print(f"chunks      {len(report['chunks'])}: " + ", ".join(f"{n} at {start}" for start, n in report["chunks"]))

    print(f"\n{'layer':>5}  {'pattern':15}{'heads':>6}{'tiles':>9}{'of causal':>11}{'density':>9}{'partial':>9}")
    for layer in report["dense_layers"]:
        print(f"{layer:>5}  left whole to the dense backend")
    for row in report["density"]:
        density, partial = row["tiles"] / row["causal_tiles"], row["partial_tiles"] / row["tiles"]
        print(
            f"{row['layer']:>5}  {row['pattern']:15}{row['heads']:>6}{row['tiles']:>9,}{row['causal_tiles']:>11,}"
            f"{density:>9.1%}{partial:>9.1%}"
        )

    dense, sparse = (report["time_to_first_token_s"][name] for name in ("dense", "mm_sparse"))
    print(f"\n{'time to first token, seconds':50}{'dense':>7}{'mm_sparse':>11}{'ratio':>7}")
    for key, name in (
        ("first", "first request with this video"),
        ("repeat", "later ones (its embedding cached, no radix hit)"),
    ):
        print(f"{name:50}{dense[key]:>7.2f}{sparse[key]:>11.2f}{dense[key] / sparse[key]:>6.2f}x")
    print("Dense is SGLang's torch_native, which computes the rows of the prefix again in every chunk: a ratio of")
    print("this run on this CPU, and no figure for a GPU.")

    print_questions(report["questions"])
    print()
    for entry in report["recall"]["patterns"]:
        print(
            f"layer {report['recall']['layer']} {entry['pattern']:15} keeps {entry['recall']:.1%} of dense attention's "
            f"weight; output differs by {entry['error']:.1%}"
        )
    print(f"\npicture     {report['picture']}")


def print_questions(rows: Sequence[dict[str, Any]]) -> None:
    """Questions with a truth as a table with counts, others with their answers."""
    if rows[0]["truth"] is None:
        for row in rows:
            print(f"\n{row['question']}")
            for name, text in row["answers"].items():
                print(f"    {name:11}{text!r}")
        print("The model knows only the words of benchmarks/tiny_model/words.py, and questions made of them.")
        return
    print(f"\n{'question':51}{'truth':>5}{'dense':>10}{'mm_sparse':>12}")
    for row in rows:
        dense, sparse = (
            f"{row['answers'][name]} {'right' if row['right'][name] else 'wrong'}" for name in ("dense", "mm_sparse")
        )
        print(f"{row['question']:51}{row['truth']:>5}{dense:>10}{sparse:>12}")
    dense, sparse = (f"{sum(row['right'][name] for row in rows)} of {len(rows)}" for name in ("dense", "mm_sparse"))
    print(f"{'right':56}{dense:>10}{sparse:>12}")
