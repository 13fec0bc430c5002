"""vLLM's CPU build as a peer: run by the Python of its own environment. Its defaults, which compile the model, and what
its documentation recommends: cores bound, tcmalloc and Intel's OpenMP loaded first (see environments.py).
"""

from __future__ import annotations

from vllm import LLM, SamplingParams

from benchmarks.peers.protocol import serve

MAX_SEQUENCES = 32
MAX_TOKENS = 512  # prompt and answer


class VllmCpu:
    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        # Every prompt is new: looking for known prefixes would only cost.
        self._llm = LLM(
            model=folder,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=MAX_TOKENS,
            max_num_seqs=MAX_SEQUENCES,
            enable_prefix_caching=False,
        )

    def write(self, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        params = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False) for count in new_tokens
        ]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(VllmCpu)
