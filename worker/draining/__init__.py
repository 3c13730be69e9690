"""What a worker does with lanes: which ones, and when (turns), one pass (drain), its calls (applying)."""
