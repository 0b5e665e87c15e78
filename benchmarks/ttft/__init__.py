"""Time to first token of SGLang, stock and with mm_sparse."""
