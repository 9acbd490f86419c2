"""Measurements beside peers; `python -m benchmarks.NAME` prints a table and, last, a JSON line."""
