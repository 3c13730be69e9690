"""HTTP of the processes: health, whose request it is, what it tells in numbers, and what operators decide."""

from worker.web.bearer import Bearer
from worker.web.desk import Desk, desk_routes
from worker.web.health import StatusProvider, health_app
from worker.web.hooks import hook_route
from worker.web.metrics import metrics_route
from worker.web.page import page_routes
from worker.web.serving import Served, serve

__all__ = [
    "Bearer",
    "Desk",
    "Served",
    "StatusProvider",
    "desk_routes",
    "health_app",
    "hook_route",
    "metrics_route",
    "page_routes",
    "serve",
]
