"""Benchmarks: numbers are checked first, then variants are timed interleaved in one process and reported as ratios."""
