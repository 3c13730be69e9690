"""Changes: from a temporary logical slot to the `data` of `postgres_changes` frames.

The counterpart of the real server's replication poller and of the SQL it runs there. It knows
subscriptions, filters, privileges and row-level security; it knows no websocket, topic or frame.
"""

from standin.changes.bindings import BadSubscription, Binding, binding_id, parse_binding
from standin.changes.feed import ChangeFeed, Delivery
from standin.changes.preflight import problem_with

__all__ = [
    "BadSubscription",
    "Binding",
    "ChangeFeed",
    "Delivery",
    "binding_id",
    "parse_binding",
    "problem_with",
]
