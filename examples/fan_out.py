"""Fan-out: one encoder feeds two diffusion stages with settings of their own, a draft and a careful picture with a step
cache. Both stages share one copy of the weights, and both run at once. The graph is in fan_out.yaml.

    python examples/fan_out.py "a green ring above an orange diamond" -o out/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_omni import DiffusionParams, Omni


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a green ring above an orange diamond")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--careful-steps", type=int, help="steps of the careful stage (default: as in the YAML)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="a folder")
    args = parser.parse_args()

    params = {
        "draft": DiffusionParams(seed=args.seed),
        "careful": DiffusionParams(seed=args.seed, num_inference_steps=args.careful_steps),
    }
    with Omni(Path(__file__).with_name("fan_out.yaml")) as omni:
        output = omni.generate(args.prompt, params)[0]
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    args.output.mkdir(parents=True, exist_ok=True)
    for stage, result in output.results.items():
        path = args.output / f"{stage}.png"
        result.images[0].save(path)
        did = output.metrics[stage]
        print(f"{stage:8} {did['steps']:3} steps, {did['cache_hits']} of them reused, {did['ran_s']:.2f} s: {path}")


if __name__ == "__main__":
    main()
