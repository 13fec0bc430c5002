"""What of a model LoRA may adapt: its linear layers, by every name that a file may call them. Knows no file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from vllm_omni.layers.linear import Linear
from vllm_omni.layers.moe import SparseMLP
from vllm_omni.layers.weights import Target
from vllm_omni.worker.lora.naming import NamedLayer

WEIGHT = ".weight"


@runtime_checkable
class Locates(Protocol):
    """A model that knows the published names of its weights; see `layers.weights`."""

    def locate(self, name: str) -> Target | None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Some outputs of a layer of the model."""

    layer: str  # its path
    columns: slice
    num_inputs: int

    @property
    def num_outputs(self) -> int:
        return int(self.columns.stop - self.columns.start)


class LoRATarget:
    """The layers of one model, which may stand on the meta device."""

    def __init__(self, model: nn.Module, published: Collection[str], aliases: Mapping[str, str]) -> None:
        """published: names of the checkpoint's tensors. aliases: what else layers are called -> their published name,
        or their path in the model.
        """
        assert isinstance(model, Locates)
        self._locates: Locates = model
        self._aliases = dict(aliases)
        self._linears = {path: part for path, part in model.named_modules() if isinstance(part, Linear)}
        mixtures = [path for path, part in model.named_modules() if isinstance(part, SparseMLP)]
        self._experts = tuple(f"{path}.experts." for path in mixtures)
        self._flat = self._flat_names(name.removesuffix(WEIGHT) for name in published if name.endswith(WEIGHT))

    def find(self, named: NamedLayer) -> Place | None:
        """None for what the model has not, or cannot adapt: a norm, embeddings, the experts of a mixture."""
        if named.is_flat:
            name = self._flat.get(named.flat())
            return None if name is None else self._place(name)
        return next((place for name in named.dotted() if (place := self._place(name)) is not None), None)

    def _place(self, name: str) -> Place | None:
        target = self._locates.locate(self._aliases.get(name, name) + WEIGHT)
        if target is None or not target.parameter.endswith(WEIGHT):
            return None
        path = target.parameter.removesuffix(WEIGHT)
        linear = self._linears.get(path)
        if linear is None or path.startswith(self._experts):
            return None
        rows = slice(0, linear.out_features) if target.rows is None else target.rows
        return Place(path, rows, linear.in_features)

    def _flat_names(self, published: Iterable[str]) -> dict[str, str]:
        """A name whose dots are underscores -> the name; of two that would be one neither."""
        found: dict[str, str] = {}
        twice: set[str] = set()
        for name in dict.fromkeys([*published, *self._linears, *self._aliases]):
            flat = name.replace(".", "_")
            if flat in found and self._place(found[flat]) != self._place(name):
                twice.add(flat)
            found.setdefault(flat, name)
        return {flat: name for flat, name in found.items() if flat not in twice}
