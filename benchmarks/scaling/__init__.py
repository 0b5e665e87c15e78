"""Time to first token over several GPUs: context parallelism, and stock tensor parallelism."""
