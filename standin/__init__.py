"""The stand-in: a local Supabase Realtime for tests, the demo and people's own experiments.

Not production code, and nothing of it is imported there. `python -m standin` runs it alone.
"""

from standin.server import LOCAL_JWT_SECRET, Behaviour, FaultError, Faults, Standin, StandinError

__all__ = ["LOCAL_JWT_SECRET", "Behaviour", "FaultError", "Faults", "Standin", "StandinError"]
