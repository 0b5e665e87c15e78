"""The offline search for each head's pattern (`mm-sglang search`)."""
