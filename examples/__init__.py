"""Examples that run: the demo, and what `make run` starts."""
