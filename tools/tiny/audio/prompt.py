"""The text that the sound model's text encoder reads for a prompt, as diffusers' `AceStepPipeline` writes it when no
tempo, metre or key is given.
"""

from __future__ import annotations

from diffusers.pipelines.ace_step.pipeline_ace_step import SFT_GEN_PROMPT, TASK_INSTRUCTIONS

METAS = "- bpm: N/A\n- timesignature: N/A\n- keyscale: N/A\n- duration: {} seconds\n"


def sound_prompt(words: str, duration_s: float) -> str:
    """duration_s is cut to whole seconds, as the pipeline does."""
    return SFT_GEN_PROMPT.format(TASK_INSTRUCTIONS["text2music"], words, METAS.format(int(duration_s)))
