"""Whether every stage of every model answers."""

from __future__ import annotations

from typing import Any

from vllm_omni.entrypoints.server.context import ServerParts
from vllm_omni.entrypoints.server.models import ServedModel


def readiness(parts: ServerParts) -> dict[str, Any]:
    """`status` is "ready", or what keeps the server from being so, and the same of every model and stage."""
    models = {model.name: _model_status(model) for model in parts.models}
    states = [about["status"] for about in models.values()]
    if parts.runs.is_draining:
        states.insert(0, "draining")
    worst = next((state for state in states if state != "ready"), "ready")
    return {"status": worst, "models": models}


def _model_status(model: ServedModel) -> dict[str, Any]:
    status = model.get_status()
    if status is None:
        return {"status": "loading"}
    stages = {name: "ready" if stage["alive"] else "dead" for name, stage in status["stages"].items()}
    dead = [name for name, state in stages.items() if state != "ready"]
    state = "dead" if not status["alive"] else f"stage {dead[0]!r} is {stages[dead[0]]}" if dead else "ready"
    return {
        "status": state,
        "stages": stages,
        "waiting": status["queue_size"],
        "running": status["running_requests"],
    }
