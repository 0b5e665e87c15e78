"""Context parallelism: a prefill's rows over several ranks, in SGLang's own groups and runner."""
