"""Imports the qwen-tts package in an environment that lacks what only its 25 Hz tokenizer asks for.

Run by the Python of that environment (tools/peers.py makes it), so nothing of ours is imported here.
"""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import librosa  # noqa: F401  with transformers before the empty modules: both look for what is installed
import transformers  # noqa: F401

ABSENT = ("sox", "onnxruntime", "torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi")


def qwen_tts() -> Any:
    """The package. Modules that its import names and the 12 Hz models never call are empty ones."""
    for name in ABSENT:
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.__spec__ = ModuleSpec(name, None)  # libraries ask whether a module is there, by its spec
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    import qwen_tts

    return qwen_tts
