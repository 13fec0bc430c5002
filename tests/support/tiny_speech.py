"""What is asked of every folder of the tiny speaking model."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen2_5OmniForConditionalGeneration


def assert_loads_whole(folder: Path) -> None:
    """transformers finds every weight that it expects and no other, and the one voice."""
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder)
    assert list(model.speaker_map) == ["Reader"]
    # The class itself refuses to tell what it found.
    parent = super(Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniForConditionalGeneration)
    found = parent.from_pretrained(folder, output_loading_info=True)[1]
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
