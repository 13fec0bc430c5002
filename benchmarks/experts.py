"""The experts of one layer, in bfloat16: in one call of the kernels, one by one, and as transformers computes them.

    python -m benchmarks.experts --hidden 1024 --intermediate 384 --chosen 6 --threads 2

The three take turns on the same random weights and rows; each figure is the least of its repeats. The limit is the time
in which the weights of the experts that are touched come out of memory, as one product with as many weights takes it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from vllm_omni.layers.experts import ExpertsConfig
from vllm_omni.layers.linear import Linear, pack_linears
from vllm_omni.layers.moe import SparseMLP
from vllm_omni.models.qwen3_moe.model import Qwen3MoeConfig as OwnConfig

ROWS = (1, 8, 32, 512)  # three decode steps and a prefill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 2048, "intermediate": 768, "experts": 128, "chosen": 8, "repeats": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        ours, theirs = make_sides(args)
        plain = Linear(args.hidden, 3 * args.intermediate * args.experts, bias=False).bfloat16()
        pack_linears(plain)
        probe = torch.randn(1, args.hidden).bfloat16()
        per_expert_s = least({"plain": lambda: plain(probe)}, args.repeats)["plain"] / args.experts
        print(f"{'rows':>5} {'one call':>10} {'one by one':>11} {'ratio':>6} {'theirs':>10} {'ratio':>6} {'limit':>10}")
        for rows in ROWS:
            show(rows, torch.randn(rows, args.hidden).bfloat16(), ours, theirs, per_expert_s, args.repeats)


def make_sides(args: argparse.Namespace) -> tuple[SparseMLP, Any]:
    """The same weights in both."""
    keys = {
        "hidden_size": args.hidden,
        "moe_intermediate_size": args.intermediate,
        "num_experts": args.experts,
        "num_experts_per_tok": args.chosen,
        "norm_topk_prob": True,
    }
    theirs = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**keys)).bfloat16().eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=args.hidden**-0.5)
    shape = {"vocab_size": 1, "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 2}
    config = OwnConfig.from_json({**shape, **keys}, "benchmark")
    assert isinstance(config.experts, ExpertsConfig)
    ours = config.experts.make_mlp(config, 0).bfloat16().eval()
    assert isinstance(ours, SparseMLP)
    ours.gate.weight.copy_(theirs.gate.weight)
    experts: Any = ours.experts
    for expert, gate_up, down in zip(experts, theirs.experts.gate_up_proj, theirs.experts.down_proj, strict=True):
        expert.gate_up_proj.weight.copy_(gate_up)
        expert.down_proj.weight.copy_(down)
    pack_linears(ours)
    return ours, theirs


def show(rows: int, states: Tensor, ours: SparseMLP, theirs: Any, per_expert_s: float, repeats: int) -> None:
    weights, chosen = ours.route(states)
    native = ours.native()
    assert native is not None, "the kernels are not built, or do not run here"
    times = least(
        {
            "call": lambda: native.mix(states, *reversed(ours.route(states))),
            "loop": lambda: ours._mix(states, chosen, weights),
            "theirs": lambda: theirs(states[None]),
        },
        repeats,
    )
    call, loop, their = times["call"], times["loop"], times["theirs"]
    limit = per_expert_s * len(chosen.unique())
    cells = [f"{rows:5}", f"{call * 1e3:7.3f} ms", f"{loop * 1e3:8.3f} ms", f"{loop / call:6.2f}"]
    print(*cells, f"{their * 1e3:7.3f} ms", f"{their / call:6.2f}", f"{limit * 1e3:7.3f} ms")


def least(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds by side; the first turn of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: min(spent[1:]) for name, spent in times.items()}


if __name__ == "__main__":
    main()
