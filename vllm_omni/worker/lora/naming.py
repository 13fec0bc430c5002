"""How LoRA files call what is in them: as PEFT and diffusers do, as kohya's scripts and ComfyUI do. Knows no model.

| from | a tensor's name |
|---|---|
| PEFT | `base_model.model.LAYER.lora_A.weight`, `lora_B` |
| diffusers | `transformer.LAYER.lora_A.weight`, or `.lora.down.weight`, `up` |
| ComfyUI, ai-toolkit | `diffusion_model.LAYER.lora_A.weight` |
| kohya | `lora_unet_LAYER.lora_down.weight`, `lora_up`, `alpha`; the dots within LAYER are underscores |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vllm_omni.errors import CheckpointError
from vllm_omni.utils.checks import brief

DOWN, UP, ALPHA = "down", "up", "alpha"
KINDS = (
    (re.compile(r"\.lora_A(\.[^.]+)?\.weight$"), DOWN),
    (re.compile(r"\.lora_B(\.[^.]+)?\.weight$"), UP),
    (re.compile(r"\.lora(_|\.)down\.weight$"), DOWN),
    (re.compile(r"\.lora(_|\.)up\.weight$"), UP),
    (re.compile(r"\.alpha$"), ALPHA),
)
OTHERS = {  # what is no plain LoRA: part of a name -> what it is
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon with a Tucker core",
    "lora_embedding_": "a LoRA of embeddings",
    ".bias": "a LoRA with biases",
    ".diff": "whole differences of weights",
    ".modules_to_save": "whole layers",
}
DOTTED_PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
TEXT_ENCODERS = ("text_encoder", "lora_te", "te_", "te.", "te1.", "te2.", "text_model.")
PEFT_PREFIX = DOTTED_PREFIXES[0]
MAX_LISTED = 8


@dataclass(slots=True)
class NamedLayer:
    """What a file holds of one layer: its tensors by kind."""

    name: str  # as the file calls it
    tensors: dict[str, str] = field(default_factory=dict)

    @property
    def is_flat(self) -> bool:
        """Whether its dots were made underscores."""
        return self.name.startswith(FLAT_PREFIXES)

    def dotted(self) -> Iterator[str]:
        """Its name with fewer and fewer of the known prefixes."""
        name = self.name
        yield name
        while prefix := next((each for each in DOTTED_PREFIXES if name.startswith(each)), None):
            name = name.removeprefix(prefix)
            yield name

    def flat(self) -> str:
        return next(self.name.removeprefix(prefix) for prefix in FLAT_PREFIXES if self.name.startswith(prefix))


def named_layers(tensors: Iterable[str], where: str) -> list[NamedLayer]:
    """The layers of a file, each with both its matrices; CheckpointError for what is no LoRA."""
    found: dict[str, NamedLayer] = {}
    for name in tensors:
        layer, kind = _split(name, where)
        known = found.setdefault(layer, NamedLayer(layer)).tensors
        if kind in known:
            raise CheckpointError(f"{where}: {brief(name)} and {brief(known[kind])} are the same of one layer")
        known[kind] = name
    if not found:
        raise CheckpointError(f"{where}: holds no tensor, expected a LoRA")
    for each in found.values():
        if DOWN not in each.tensors or UP not in each.tensors:
            raise CheckpointError(f"{where}: {brief(each.name)} has {sorted(each.tensors)}, expected down and up")
    return list(found.values())


def is_of_text_encoder(name: str) -> bool:
    return name.startswith(TEXT_ENCODERS)


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = sorted(names)
    more = len(every) - MAX_LISTED
    return ", ".join(f"{name:.120}" for name in every[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _split(name: str, where: str) -> tuple[str, str]:
    """(layer, kind)."""
    for pattern, kind in KINDS:
        match = pattern.search(name)
        if match is not None and match.start() > 0:
            return name[: match.start()], kind
    other = next((words for part, words in OTHERS.items() if part in name), None)
    if other is not None:
        raise CheckpointError(f"{where}: {brief(name)} is of {other}, expected a plain LoRA")
    raise CheckpointError(f"{where}: {brief(name)} is no part of a LoRA, expected lora_A and lora_B, or down and up")
