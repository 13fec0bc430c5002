"""From the layout of a prompt to its rows: sums of projected text, embeddings of codes and a voice.

Legend: T rows of the prompt, D hidden size of the talker.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.engine.ar.talker.inputs import TalkerInputs, TextRows
from vllm_omni.models.qwen3_tts.cloned_voice import ClonedVoice
from vllm_omni.models.qwen3_tts.prompt import Row
from vllm_omni.models.qwen3_tts.talker import Talker


class PromptRows:
    """What one talker is fed. Its pad row is computed once."""

    def __init__(self, model: Talker, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._pad = self.text([model.config.text.pad])[0]

    @torch.inference_mode()
    def text(self, token_ids: list[int]) -> Tensor:
        """[T, D]"""
        return self._model.embed_text(self._ids(token_ids))

    @torch.inference_mode()
    def frames(self, first_codes: Tensor, codes: Tensor) -> Tensor:
        """first_codes: [n], codes: [n, all others] -> [n, D]."""
        embedded: Tensor = self._model.codec_embedding(first_codes)
        return embedded + self._model.code_predictor.summed_rows(codes)

    @torch.inference_mode()
    def inputs(self, rows: list[Row], voice: ClonedVoice | None) -> TalkerInputs:
        """Of a prompt; its text is still to come."""
        return TalkerInputs(self._prompt(rows, voice), TextRows((), (), self._pad))

    def _prompt(self, rows: list[Row], voice: ClonedVoice | None) -> Tensor:
        prompt = self._pad.new_zeros(len(rows), len(self._pad))
        texts = [(place, row.text) for place, row in enumerate(rows) if row.text is not None]
        codes = [(place, row.code) for place, row in enumerate(rows) if row.code is not None]
        frames = [place for place, row in enumerate(rows) if row.frame is not None]
        prompt[self._ids([place for place, _ in texts])] = self.text([token for _, token in texts])
        places = self._ids([place for place, _ in codes])
        prompt[places] += self._model.codec_embedding(self._ids([code for _, code in codes]))
        if voice is not None:
            prompt[[place for place, row in enumerate(rows) if row.is_voice]] += voice.embedding.to(prompt)
        if frames:
            assert voice is not None and voice.frames is not None
            spoken = voice.frames.to(self._device)
            prompt[self._ids(frames)] += self.frames(spoken[:, 0], spoken[:, 1:])
        return prompt

    def _ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
