"""Whether a server can write texts now, and why not: for people, load balancers and Prometheus."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from aiohttp import web

from flowspec_edge.origin.status import ServiceStatus
from flowspec_edge.version import __version__
from flowspec_edge.web.guard import Guard
from flowspec_edge.web.metrics import CONTENT_TYPE, Metrics, Status
from flowspec_edge.web.turns import Turns

READY = ServiceStatus(is_ready=True, reason="")
"""Of a generator that has nothing to tell."""


class HealthRoutes:
    """``GET /health``, ``GET /ready`` and ``GET /metrics``.

    Without a key, where keys are needed, ``/health`` tells whether, and not why.
    """

    def __init__(self, model: str, guard: Guard, turns: Turns, metrics: Metrics, status: Status | None) -> None:
        self._model, self._guard, self._turns, self._metrics = model, guard, turns, metrics
        self._status = status or (lambda: READY)

    def install(self, app: web.Application) -> None:
        app.router.add_get("/health", self._report_health)
        app.router.add_get("/ready", self._report_ready)
        app.router.add_get("/metrics", self._report_metrics)

    async def _report_health(self, request: web.Request) -> web.Response:
        status = self._status()
        told: dict[str, Any] = {"status": "ok" if status.is_ready else "unavailable", **self._guard.proof(request)}
        if self._guard.lets_read(request):
            told |= {
                "reason": status.reason,
                "model": self._model,
                "version": __version__,
                "running": self._turns.num_writing,
                "waiting": self._turns.num_waiting,
                "max_running": self._turns.limits.max_sessions,
                "stages": [asdict(stage) for stage in status.stages],
                "boards": list(status.boards),
                "kept": asdict(status.kept),
                "link_bytes": {"sent": status.sent_bytes, "received": status.received_bytes},
            }
        return web.json_response(told, status=_http_status(status))

    async def _report_ready(self, request: web.Request) -> web.Response:
        status = self._status()
        return web.json_response({"ready": status.is_ready, "reason": status.reason}, status=_http_status(status))

    async def _report_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.write(), headers={"Content-Type": CONTENT_TYPE})


def _http_status(status: ServiceStatus) -> int:
    return 200 if status.is_ready else 503
