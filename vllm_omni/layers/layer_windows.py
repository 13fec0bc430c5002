"""Which layers of a decoder see a window of the past instead of all of it, as transformers' config files say it. Knows
no model; a window of W tokens is a token itself and the W - 1 before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW_KEYS = ("use_sliding_window", "layer_types")  # what a family that reads windows reads, and others refuse
DEFAULT_WINDOW = 4096  # transformers', where a file has no `sliding_window`
NO_WINDOWS: tuple[int | None, ...] = ()


def read_windows(
    raw: Mapping[str, Any], where: str, *, is_used: bool = True, first_layer: int = 0
) -> tuple[int | None, ...]:
    """The window of each layer, None for one that sees everything; empty where no layer has one.

    is_used: whether the file switches windows on; first_layer: the first one that has one where `layer_types` is
    missing. ConfigError for a pattern that is no pattern of these layers.
    """
    num_layers = int(raw["num_hidden_layers"])
    window = raw.get("sliding_window", DEFAULT_WINDOW) if is_used else None
    if window is not None:
        check_number(f"{where}: sliding_window", window, 1, integer=True, raises=ConfigError)
    types = raw.get("layer_types")
    if types is None:
        types = [SLIDING if window is not None and index >= first_layer else FULL for index in range(num_layers)]
    if not isinstance(types, list) or any(kind not in (FULL, SLIDING) for kind in types):
        raise ConfigError(
            f"{where}: layer_types: got {brief(types)}, expected a list of {FULL!r} and {SLIDING!r}, one for each layer"
        )
    if SLIDING in types and len(types) != num_layers:
        raise ConfigError(f"{where}: layer_types: got {len(types)}, expected {num_layers}, one for each layer")
    if window is None and SLIDING in types:
        raise ConfigError(f"{where}: layer_types: got {SLIDING!r}, but no sliding_window is set; set it in the file")
    windows = tuple(window if kind == SLIDING else None for kind in types)
    return windows if any(windows) else NO_WINDOWS


def read_qwen_windows(raw: Mapping[str, Any], where: str, default_first: int = 28) -> tuple[int | None, ...]:
    """`read_windows` in the keys of Qwen's files: windows are switched on, from layer `max_window_layers` on."""
    first = raw.get("max_window_layers", default_first)
    check_number(f"{where}: max_window_layers", first, 0, integer=True, raises=ConfigError)
    return read_windows(raw, where, is_used=bool(raw.get("use_sliding_window")), first_layer=first)


def common_window(windows: tuple[int | None, ...]) -> int | None:
    """The widest window where every layer has one, else None: what is behind it no layer will read again."""
    found = [window for window in windows if window is not None]
    return max(found) if found and len(found) == len(windows) else None
