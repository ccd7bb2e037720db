"""Benchmarks of fastdistill: correctness first, then milliseconds, GB/s and the machine's limit.

`python -m bench --help` lists the commands; NOTES.md says what is measured and what came of it.
"""
