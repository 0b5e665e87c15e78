"""Python runs this at the start of every process of the tests.

Importing SGLang takes 12 s of a core, 3 of them in the garbage collector, which finds nothing: a server of three
processes is ready that much sooner when it looks less often.

A server of tests/e2e (FORKED in tests/helpers/asking.py) imports once: the scheduler and the detokenizer, which SGLang
spawns, are forks there, with the modules and hooks of the process that was started. One of test_parity.py and what Ray
starts import and load the plugin for themselves.
"""

import gc
import os

gc.set_threshold(50_000, 50, 50)

if "MM_SGLANG_FORKED" in os.environ:
    from multiprocessing import context

    context._concrete_contexts["spawn"] = context._concrete_contexts["fork"]  # type: ignore[attr-defined]
