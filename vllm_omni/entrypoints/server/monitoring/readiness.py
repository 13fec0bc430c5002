"""Whether every stage of every model answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.entrypoints.server.context import ServerParts
from vllm_omni.entrypoints.server.http.api_error import scrubbed
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
    stages = {name: stage_status(stage) for name, stage in status["stages"].items()}
    counts = {"waiting": status["queue_size"], "running": status["running_requests"]}
    return {"status": _worst(model, status), "step_s": round(status["step_s"], 3), **counts, "stages": stages}


def _worst(model: ServedModel, status: Mapping[str, Any]) -> str:
    """What keeps a model from answering, or "ready"."""
    if not status["alive"]:
        return "the loop has ended"
    for name, stage in status["stages"].items():
        if stage["state"] != "ready":
            return f"stage {name!r} is {stage['state']}"
    if status["step_s"] > model.config.worker_timeout:
        return f"a step has taken {status['step_s']:.0f} s"
    return "ready"


def stage_status(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What of the status of a stage anybody may know, its cause where it is not ready."""
    cause = {"cause": scrubbed(stage["cause"])} if stage["cause"] else {}
    counts = {name: stage[name] for name in ("tasks", "num_rebuilds", "num_to_restart")}
    return {"status": stage["state"], **counts, **cause}
