"""The stand-in's server side: Phoenix websocket, tokens, limits, faults and admin.

It knows how clients are spoken to. Where changes come from is `standin.changes`' business.
"""

from standin.server.behaviour import Behaviour
from standin.server.faults import FaultError, Faults
from standin.server.service import LOCAL_JWT_SECRET, Standin, StandinError

__all__ = ["LOCAL_JWT_SECRET", "Behaviour", "FaultError", "Faults", "Standin", "StandinError"]
