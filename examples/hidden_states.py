"""Hidden states in Python: one AR stage that only encodes, several prompts in one batch, two layers tapped.

Prints how alike the prompts are (cosine of their last tokens' states, less the mean): the model that ships puts a
"crimson ball" next to a "red circle". -o keeps the states in a safetensors file.

    python examples/hidden_states.py
    python examples/hidden_states.py "a dog" "a puppy" "a bus" --model path/to/Qwen3-0.6B -o states.safetensors
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file

from vllm_omni import Omni

PROMPTS = ["a red circle", "please draw a crimson ball", "a blue square", "could you paint a navy box"]


def config(model: str) -> dict[str, object]:
    """A config may be a mapping as well as a YAML file."""
    text = {
        "kind": "ar",
        "model": model,
        "task": "encode",
        "outputs": {"hidden_states": {"layers": [-2]}, "first_layers": {"layers": [0, 1]}},
    }
    return {"name": "states", "stages": {"text": text}, "outputs": ["text.hidden_states", "text.first_layers"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument(
        "--model", default="asset://tiny-image/text_encoder", help="folder or hub id of a Llama, Qwen2 or Qwen3"
    )
    parser.add_argument("-o", "--output", help="a .safetensors file")
    args = parser.parse_args()

    with Omni(config(args.model)) as omni:
        outputs = omni.generate(args.prompts)
    for output in outputs:
        if output.error is not None:
            raise SystemExit(f"error: {output.error}")
    states = [output.tensors["text.hidden_states"] for output in outputs]  # [T, D] each, T tokens with the template
    last = torch.stack([state[-1].float() for state in states])  # [prompts, D]
    last = torch.nn.functional.normalize(last - last.mean(0), dim=-1)
    for prompt, state, row in zip(args.prompts, states, last @ last.T, strict=True):
        print(f"{prompt:30.30} {list(state.shape)!s:>10}  " + "  ".join(f"{value:+.2f}" for value in row))
    print(f"first_layers {list(outputs[0].tensors['text.first_layers'].shape)}: two layers side by side")
    if args.output:
        save_file({f"{i}.{name}": t for i, o in enumerate(outputs) for name, t in o.tensors.items()}, args.output)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
