"""HTTP of the processes: health now; what else answers over HTTP has its place beside it."""

from worker.web.health import StatusProvider, health_app
from worker.web.serving import Served, serve

__all__ = ["Served", "StatusProvider", "health_app", "serve"]
