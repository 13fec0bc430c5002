"""What specs say of their engines' imports is there to import."""

from __future__ import annotations

from importlib import import_module

import pytest

from vllm_omni.engine.ar.spec import ARSpec
from vllm_omni.engine.base import StageSpec
from vllm_omni.engine.diffusion.spec import DiffusionSpec


@pytest.mark.parametrize("spec", [ARSpec, DiffusionSpec])
def test_what_an_engine_wants_of_a_library_is_there(spec: type[StageSpec]) -> None:
    assert spec.imports
    for name in spec.imports:
        module, _, attribute = name.partition(":")
        assert isinstance(getattr(import_module(module), attribute), type)
