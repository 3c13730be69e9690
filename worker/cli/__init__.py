"""The command line: what people type, and how the answers are printed."""
