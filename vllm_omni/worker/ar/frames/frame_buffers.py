"""What a step of a frame writer reads and gives, at fixed places, so that it can be captured: knows no model.

Legend: B rows, C codes that are written, E width of the talker.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_omni.layers.batched_draw import DrawSettings
from vllm_omni.layers.table_draw import NUM_SETTINGS, settings_table
from vllm_omni.utils.device import CopyFence, host_buffer


class FrameBuffers:
    """For up to max_rows frames. Numbers of the host go to the device in one copy, which nobody waits for."""

    def __init__(
        self, max_rows: int, num_codes: int, vocab_size: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """num_codes: C. vocab_size: codes of a codebook. size: E."""
        self._vocab_size = vocab_size
        # columns: the uniform of each code, the settings, the first code
        host = host_buffer(num_codes + NUM_SETTINGS + 1, max_rows, device=device).view(torch.float64)
        self._host, self._columns = host, host.numpy()  # written through these
        # rows of padding draw, too, and what they draw must be a code
        self._columns[num_codes:-1] = settings_table([DrawSettings(temperature=0)] * max_rows, vocab_size)
        self._on_device = host.to(device)  # the same on a CPU
        self._fence = CopyFence(device)
        self._num_codes = num_codes
        self.states = torch.zeros(max_rows, size, device=device, dtype=dtype)  # the talker's
        self.codes = torch.zeros(max_rows, num_codes, device=device, dtype=torch.int64)  # that were written
        self.rows = torch.zeros(max_rows, size, device=device, dtype=dtype)  # the sums of their embeddings

    def fill(
        self, states: Tensor, first_codes: Sequence[int], uniforms: Sequence[Tensor], settings: Sequence[DrawSettings]
    ) -> None:
        """states: [B, E]; uniforms: [C] float64 of each row, on the CPU."""
        count = len(first_codes)
        self._fence.wait()
        self._columns[: self._num_codes, :count] = torch.stack(tuple(uniforms), 1).numpy()
        self._columns[self._num_codes : -1, :count] = settings_table(settings, self._vocab_size)
        self._columns[-1, :count] = first_codes
        if self._on_device is not self._host:
            self._on_device.copy_(self._host, non_blocking=True)
            self._fence.record()
        self.states[:count].copy_(states)

    def uniforms(self, count: int) -> Tensor:
        """[C, count] float64."""
        return self._on_device[: self._num_codes, :count]

    def settings(self, count: int) -> Tensor:
        """[NUM_SETTINGS, count] float64, as settings_table gives it."""
        return self._on_device[self._num_codes : -1, :count]

    def first_codes(self, count: int) -> Tensor:
        """[count] int64."""
        return self._on_device[-1, :count].long()
