"""Python runs this at the start of every process of the tests.

Importing SGLang takes 12 s of a core, 3 of them in the garbage collector, which finds nothing: a server of three
processes is ready that much sooner when it looks less often.
"""

import gc

gc.set_threshold(50_000, 50, 50)
