"""Entry point `sglang.srt.platforms`: the plain-CPU platform, only when asked for by SGLANG_PLATFORM.

SGLang's own CPU device needs `sgl_kernel`'s CPU build (AMX), which is not on PyPI. Installing mm_sglang must not
change how anybody else's CPU server runs, so nothing is activated unless the name is given.
"""

import os

NAME = "mm_sglang_cpu"


def activate() -> str | None:
    """Dotted path of the platform class if SGLANG_PLATFORM names it, else None (SGLang's protocol)."""
    return "mm_sglang.cpu.platform.PlainCpuPlatform" if os.environ.get("SGLANG_PLATFORM") == NAME else None
