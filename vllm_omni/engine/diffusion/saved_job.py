"""A task of the diffusion stage as plain values and tensors, so that it can go on in another process: what it was
given, its finished outputs, and the samples on their way. What a stranger may have written is checked as it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, device

from vllm_omni.engine.diffusion.job import DiffusionJob
from vllm_omni.errors import InvalidRequestError
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.kept import on_device
from vllm_omni.worker.diffusion.diffusion_runner import DiffusionRunner
from vllm_omni.worker.diffusion.saved_sample import sample_content

KEYS = frozenset({"inputs", "num_steps", "num_reused", "running", "outputs", "latents"})


@dataclass(frozen=True, slots=True)
class SavedJob:
    """Of `job_content`, read."""

    inputs: Mapping[str, Any]  # by port
    num_steps: int  # of the outputs that were finished
    num_reused: int
    running: Mapping[int, Any]  # output -> its sample, for `restore_sample`
    outputs: Mapping[int, Tensor]  # finished ones, of those that somebody reads
    latents: Mapping[int, Tensor]

    @classmethod
    def read(cls, content: Mapping[str, Any], signature: StageSignature, num_outputs: int, where: device) -> SavedJob:
        """where: the stage's device. InvalidRequestError for what is not of such a stage and so many outputs."""
        if content.keys() != KEYS:
            raise InvalidRequestError(f"the saved task: got {brief(sorted(content))}, expected {sorted(KEYS)}")
        for name in ("num_steps", "num_reused"):
            check_number(f"the saved {name}", content[name], 0, integer=True, raises=InvalidRequestError)
        running = _by_output("running", content["running"], num_outputs)
        outputs, latents = (_by_output(name, content[name], num_outputs) for name in ("outputs", "latents"))
        if not running or running.keys() & (outputs.keys() | latents.keys()):
            raise InvalidRequestError(
                f"the saved task: got {len(running)} samples on their way and {len(outputs)} finished of {num_outputs}"
            )
        for each in (*outputs.values(), *latents.values()):
            if not isinstance(each, Tensor):
                raise InvalidRequestError(f"the saved task: got {brief(each)}, expected a finished tensor")
        inputs = _inputs(content["inputs"], signature)
        return cls(
            on_device(inputs, where),
            content["num_steps"],
            content["num_reused"],
            running,
            on_device(outputs, where),
            on_device(latents, where),
        )

    def begin(self, job: DiffusionJob) -> None:
        """Tells the job what was finished before."""
        job.outputs.update(self.outputs)
        job.latents.update(self.latents)
        job.num_steps, job.num_reused = self.num_steps, self.num_reused


def job_content(job: DiffusionJob, signature: StageSignature, runner: DiffusionRunner) -> dict[str, Any]:
    """job: prepared, with samples on their way."""
    return {
        "inputs": {port: value for port, value in job.inputs.items() if port in signature.inputs and value is not None},
        "num_steps": job.num_steps,
        "num_reused": job.num_reused,
        "running": {str(i): sample_content(state, runner.caches_of(state)) for i, state in job.running.items()},
        "outputs": {str(index): output for index, output in job.outputs.items()},
        "latents": {str(index): latents for index, latents in job.latents.items()},
    }


def _by_output(name: str, value: object, num_outputs: int) -> dict[int, Any]:
    known = {str(index): index for index in range(num_outputs)}
    if not isinstance(value, Mapping) or not value.keys() <= known.keys():
        raise InvalidRequestError(f"the saved {name}: got {brief(value)}, expected outputs 0 to {num_outputs - 1}")
    return {known[index]: item for index, item in value.items()}


def _inputs(value: object, signature: StageSignature) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not value.keys() <= signature.inputs.keys():
        raise InvalidRequestError(f"the saved inputs: got {brief(value)}, expected some of {sorted(signature.inputs)}")
    for port, item in value.items():
        spec = signature.inputs[port]
        if isinstance(spec, TensorSpec) and not (
            isinstance(item, Tensor) and item.numel() and spec.fits(TensorSpec(tuple(item.shape)))
        ):
            got = list(item.shape) if isinstance(item, Tensor) else brief(item)
            raise InvalidRequestError(f"the saved input {port!r}: got {got}, expected {spec}")
    return value
