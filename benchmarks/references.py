"""What it gains to compute the keys and values of references once per request, as FLUX.2 [klein]'s KV checkpoints do,
in place of once per step: whole edits of random weights of middle size, the same pictures either way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.dit import largest_difference
from benchmarks.edits import Case, Row, Side, Weights, num_blocks
from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import SideProcess, duels

NUM_STEPS = 4  # of a distilled checkpoint
DTYPE = "bfloat16"
CASES: Mapping[str, Row] = {
    "256 px, one reference of 256 px": Row(256, (256,)),
    "256 px, four references of 256 px": Row(256, (256,) * 4),
}
QUICK_CASES = {"32 px, four references": Row(32, (32,) * 4)}
COLUMNS = ("edit", "once per request, edits a second", "in every step", "gain", "largest difference")
NOTE = (
    f"{NUM_STEPS} steps, one request. In every step a picture's tokens attend to the references' keys and values;"
    " these do not change, as references attend to each other alone."
)


class Editing(Side):
    """One of both ways. keeps: whether what references are remembered as is kept from step to step."""

    def __init__(self, folder: str, is_quick: bool, keeps: bool) -> None:
        super().__init__("FLUX.2", folder, DTYPE, is_quick)
        self._model = self._family.ours(self._folder, self._dtype)
        self._keeps = keeps

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        """The latents behind the last step, by the plainest sampler."""
        import torch

        from vllm_omni.models.flux2.transformer import Condition

        (latents,), texts, (references,) = self.given(case, repeat)
        with torch.inference_mode():
            text = self._model.embed_text(texts[0])
            embedded = [self._model.embed_reference(each) for each in references]
            remembered = self._model.remember(embedded)
            for step in range(NUM_STEPS):
                if step and not self._keeps:
                    remembered = self._model.remember(embedded)
                time = torch.tensor([1 - step / NUM_STEPS]) * 1000
                tokens = self._model.embed([latents], time, [Condition(text, remembered=remembered)])
                (velocity,) = self._model.unembed(self._model.run_blocks(tokens, 0, num_blocks(self._family.config)))
                latents = latents - velocity.float() / NUM_STEPS
        return [latents.numpy()]


def run(options: Options, limits: Limits | None = None) -> Report:
    cases = QUICK_CASES if options.is_quick else CASES
    asked: list[tuple[str, float, Any]] = [(words, 1, Case((row,))) for words, row in cases.items()]
    with tempfile.TemporaryDirectory() as folder:
        with SideProcess("weights", options.threads, Weights) as writer:
            writer.call("write", "FLUX.2", folder, options.is_quick)
        with (
            SideProcess("once", options.threads, Editing, folder, options.is_quick, True) as once,
            SideProcess("in every step", options.threads, Editing, folder, options.is_quick, False) as anew,
        ):
            found = duels(once, anew, asked, largest_difference, options)
    table = Table(f"Edits of FLUX.2, {DTYPE}", COLUMNS, [duel.cells() for duel in found])
    return Report("references", [table], [NOTE], {"duels": [duel.figures() for duel in found]})
