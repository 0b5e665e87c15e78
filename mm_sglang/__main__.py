"""`python -m mm_sglang` is the command `mm-sglang`."""

import sys

from mm_sglang.cli import main

sys.exit(main())
