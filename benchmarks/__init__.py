"""Benchmarks: how fast the daemon is on this machine, as one command with figures as JSON.

Not tests: nothing here passes or fails by a time. What the figures mean is in docs/performance.md.
"""
