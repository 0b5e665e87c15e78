"""Benchmarks: one command a table, see README.md."""
