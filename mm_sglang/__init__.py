"""mm_sglang: sparse prefill for million-token video in SGLang. Importing it imports neither torch nor SGLang."""

__version__ = "0.1.0"
