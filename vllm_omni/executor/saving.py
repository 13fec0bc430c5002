"""A request that runs, as a request that goes on from where it is: its prompt, every parameter filled in, and what the
stages need that are in the middle of it. Writes no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vllm_omni.core.routing.request_plan import RequestPlan
from vllm_omni.errors import InvalidRequestError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.replica_set import ReplicaSet
from vllm_omni.payload import SavedStage
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief


def resumable(
    request: OmniRequest, plan: RequestPlan, pipeline: Pipeline, stages: Mapping[str, ReplicaSet]
) -> OmniRequest:
    """Stages that are done, have not begun, or cannot be saved run again where something still needs them.
    InvalidRequestError where no stage is in the middle of something that can be saved.
    """
    saved: dict[str, SavedStage] = {}
    for stage in plan.stages:
        fingerprint = pipeline.specs[stage].fingerprint()
        content = None if fingerprint is None else stages[stage].save_state(request.request_id)
        if fingerprint is not None and content is not None:
            saved[stage] = SavedStage(fingerprint, content)
    if not saved:
        able = [name for name, spec in pipeline.specs.items() if spec.fingerprint() is not None]
        raise InvalidRequestError(
            f"request {request.request_id!r}: nothing of it can be saved now; expected a denoising step of "
            + (
                f"stage {' or '.join(map(repr, able))}"
                if able
                else "a stage that can be saved, which this config lacks"
            )
        )
    params = {name: stage.seeded_params for name, stage in plan.stages.items()}
    return dataclasses.replace(request, params=params, fields=_kept_fields(request, saved, pipeline), saved=saved)


def check_saved(request: OmniRequest, pipeline: Pipeline) -> None:
    """InvalidRequestError unless the stages that go on are those, in all that counts, which were saved."""
    for stage, saved in request.saved.items():
        spec = pipeline.specs.get(stage)
        mine = None if spec is None else spec.fingerprint()
        fix = f"go on with the config, model and overrides of the run that was saved (here {pipeline.config.name!r})"
        if mine is None:
            raise InvalidRequestError(f"the saved stage {stage!r}: got none here that could go on with it; {fix}")
        for name in sorted({*mine, *saved.fingerprint}):
            if mine.get(name) != saved.fingerprint.get(name):
                raise InvalidRequestError(
                    f"the saved stage {stage!r}: {name}: got {brief(mine.get(name))}, expected "
                    f"{brief(saved.fingerprint.get(name))} as in the run that was saved; {fix}"
                )


def _kept_fields(request: OmniRequest, saved: Mapping[str, SavedStage], pipeline: Pipeline) -> dict[str, object]:
    """All but media that only stages read which have made of them what the saved ones need."""
    own = {key for stage in saved for key in pipeline.specs[stage].request_keys}
    others = {key for spec in pipeline.specs.values() for key in spec.media_keys} - own
    return {key: value for key, value in request.fields.items() if key not in others}
