"""The words that ACE-Step's models read, formatted as they were trained to read them. Knows strings alone.

Caption and lyrics follow diffusers' pipeline_ace_step (`_format_prompt`, `_build_metadata_string`). The planner's
prompt follows the codes phase of the 5 Hz language model in ace-step/ACE-Step-1.5 (acestep/llm_inference.py:
`_format_metadata_as_cot`, `build_formatted_prompt_with_cot`), rendered as Qwen3's chat template does.
"""

from __future__ import annotations

import yaml

CAPTION = "# Instruction\n{}\n\n# Caption\n{}\n\n# Metas\n{}<|endoftext|>\n"
LYRICS = "# Languages\n{}\n\n# Lyric\n{}<|endoftext|>"
INSTRUCTIONS = {
    "text2music": "Fill the audio semantic mask based on the given conditions:",
    "repaint": "Repaint the mask area based on the given conditions:",
    "cover": "Generate audio semantic tokens based on the given conditions:",
}
PLANNER_SYSTEM = "# Instruction\nGenerate audio semantic tokens based on the given conditions:\n\n"


def format_metas(bpm: int | None, timesignature: str | None, keyscale: str | None, duration_s: float) -> str:
    """One line each, N/A for what is not known; seconds are cut to whole ones."""
    return (
        f"- bpm: {bpm or 'N/A'}\n- timesignature: {timesignature or 'N/A'}\n- keyscale: {keyscale or 'N/A'}\n"
        f"- duration: {int(duration_s)} seconds\n"
    )


def format_caption(instruction: str, caption: str, metas: str) -> str:
    """What the text encoder reads; an instruction ends in a colon."""
    return CAPTION.format(instruction if instruction.endswith(":") else instruction + ":", caption, metas)


def format_lyrics(language: str, lyrics: str) -> str:
    """What is looked up in the text encoder's embeddings."""
    return LYRICS.format(language, lyrics)


def format_planner_prompt(
    caption: str, lyrics: str, bpm: int | None, timesignature: str | None, keyscale: str | None, duration_s: float
) -> str:
    """A chat whose last turn holds the known facts as YAML, sorted, within the marks of thinking."""
    facts = {
        "bpm": bpm,
        "duration": int(duration_s),
        "keyscale": keyscale,
        "timesignature": None if timesignature is None else int(timesignature),
    }
    known = {key: value for key, value in facts.items() if value is not None}
    thoughts = yaml.safe_dump(known, allow_unicode=True, sort_keys=True).strip()
    turns = {
        "system": PLANNER_SYSTEM,
        "user": f"# Caption\n{caption}\n\n# Lyric\n{lyrics}\n",
        "assistant": f"<think>\n{thoughts}\n</think>\n\n",
    }
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns.items())
