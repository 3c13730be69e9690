"""HTTP of the processes: health, and whose request it is; what else answers has its place beside them."""

from worker.web.bearer import Bearer
from worker.web.health import StatusProvider, health_app
from worker.web.serving import Served, serve

__all__ = ["Bearer", "Served", "StatusProvider", "health_app", "serve"]
