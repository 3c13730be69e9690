"""Worked examples to copy: one derive handler and one change handler, with their tables."""
