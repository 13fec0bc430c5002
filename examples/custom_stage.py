"""A stage kind of one's own, added without touching the package: `duotone` maps brightness onto two colours.

It has YAML keys (dark, light), per-request parameters (strength), limits that are checked before work begins, and its
place in the graph: text -> image -> duotone.

    python examples/custom_stage.py "a large pink star" --strength 0.8 -o duotone.png
"""

from __future__ import annotations

import argparse
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni import DiffusionParams, Omni
from vllm_omni.engine.base import Activity, EngineContext, MemoryPlan, StageEngine, StageSpec
from vllm_omni.engine.boundary import stage_error
from vllm_omni.errors import InvalidRequestError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec
from vllm_omni.registry import register

PICTURES = TensorSpec(("N", "H", "W", 3))  # uint8
Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class DuotoneOptions:
    """The stage's own YAML keys."""

    dark: Colour = (20, 20, 80)
    light: Colour = (255, 240, 200)


@dataclass(frozen=True, slots=True, kw_only=True)
class DuotoneParams(StageParams):
    """What a request may set. strength: 0 keeps the picture, 1 (when unset) leaves two colours and what is between."""

    strength: float | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise InvalidRequestError(f"strength: got {self.strength}, expected 0 to 1")


class DuotoneSpec(StageSpec):
    """What is known before anything is loaded. Everything that could be wrong is checked by DuotoneParams already."""

    options_type = DuotoneOptions
    params_type = DuotoneParams
    signature = StageSignature(
        inputs={"image": PICTURES},
        outputs={"image": PICTURES},
        required_inputs=frozenset({"image"}),
        results=frozenset({"image"}),
    )

    def plan_memory(self) -> MemoryPlan:
        return MemoryPlan(activation_bytes=self.limits.max_pixels * 3 * 4)  # one picture in float32

    def load(self, context: EngineContext) -> StageEngine:
        return DuotoneEngine(self, context)


class DuotoneEngine(StageEngine):
    """What runs. One task is done per step."""

    def __init__(self, spec: DuotoneSpec, context: EngineContext) -> None:
        self._stage = spec.stage
        options: DuotoneOptions = spec.stage.options
        self._colours = torch.tensor([options.dark, options.light], device=context.device).float()
        self._tasks: deque[StageTask] = deque()

    def submit(self, task: StageTask) -> None:
        self._tasks.append(task)

    def step(self) -> list[StageEvent]:
        task = self._tasks.popleft()
        assert isinstance(task.params, DuotoneParams)  # what `params_type` promises
        try:
            image = self._duotone(task.inputs["image"], task.params.strength)
            payload = StagePayload(task.request_id, self._stage.name, {"image": image})
        except Exception as error:  # this task fails, the others go on
            return [StageFailed(task.request_id, stage_error(self._stage.name, error))]
        return [StageDone(payload, {"steps": 1})]

    def abort(self, request_id: str) -> None:
        self._tasks = deque(task for task in self._tasks if task.request_id != request_id)

    def activity(self) -> Activity:
        return Activity.BUSY if self._tasks else Activity.IDLE

    def _duotone(self, image: Tensor, strength: float | None) -> Tensor:
        """image: [N, H, W, 3] uint8 -> the same shape; the input is shared with other stages and stays as it is."""
        dark, light = self._colours
        picture = image.float()
        toned = dark + picture.mean(-1, keepdim=True) / 255 * (light - dark)
        return torch.lerp(picture, toned, 1.0 if strength is None else strength).round().to(torch.uint8)


CONFIG = {
    "name": "custom-stage",
    "model": "asset://tiny-image",
    "stages": {
        "text": {
            "kind": "ar",
            "model": "${model}/text_encoder",
            "task": "encode",
            "tokenizer": "${model}/tokenizer",
            "outputs": {"hidden_states": {"layers": [-2]}},
        },
        "image": {
            "kind": "dit",
            "model": "${model}",
            "inputs": {"prompt_embeds": "text.hidden_states"},
            "defaults": {"num_inference_steps": 9, "guidance_scale": 0.0},
        },
        "print": {"kind": "duotone", "dark": [60, 0, 90], "inputs": {"image": "image.image"}},
    },
    "outputs": ["print"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red circle left of a blue square")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="out.png")
    args = parser.parse_args()

    register("stage kind", "duotone", f"{__name__}:DuotoneSpec")
    params = {"image": DiffusionParams(seed=args.seed), "print": DuotoneParams(strength=args.strength)}
    with Omni(CONFIG) as omni:
        output = omni.generate(args.prompt, params)[0]
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    output.images[0].save(args.output)
    print(f"{args.output}: {output.images[0].width} x {output.images[0].height} pixels in two colours")


if __name__ == "__main__":
    main()
