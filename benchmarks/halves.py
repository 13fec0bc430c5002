"""What is published in bfloat16, computed in float32, as on a processor that does not multiply bfloat16: weights held
as they were published against weights made float32, and against transformers in float32. (Its bfloat16 is no peer
there: without such instructions torch multiplies it a hundred times slower.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_shapes import TINY_QWEN3, TINY_VAE, TINY_Z_IMAGE
from benchmarks.limits import Limits, decode_parameters
from benchmarks.measure import Options, Report, Table
from benchmarks.quantization import MIDDLE_Z_IMAGE, Drawing, Pictures, Text, psnr
from benchmarks.sides import SideProcess, duels, rounds
from benchmarks.text import LARGE, SMALL, Case, ModelMaker, Transformers, equal_share, pool_of

OURS, WHOLE, PEER = "held in bfloat16", "made float32", "transformers"
HELD, MADE = "bfloat16", "none"  # by the key `quantization`


def run(options: Options, limits: Limits | None = None) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rates, ratios, memory, figures = _texts(folder, options)
        pictures, distances = _pictures(folder, options)
    return Report(
        "halves",
        [
            Table("Tokens written per second", ("case", OURS, WHOLE, PEER), rates),
            Table("How many times as fast as each", ("case", WHOLE, PEER), ratios),
            Table("Peak memory, MiB", ("side", "after all cases"), memory),
            Table("Pictures per second", ("case", OURS, WHOLE, "ratio", "difference"), pictures),
        ],
        notes=[] if limits is None else [limits.decode_note(LARGE, "float32"), "In bfloat16 half as much is read."],
        figures={"texts": figures, "pictures": distances},
    )


def _texts(
    folder: Path, options: Options
) -> tuple[list[list[str]], list[list[str]], list[list[str]], list[dict[str, Any]]]:
    config = SMALL if options.is_quick else LARGE
    cases = [
        (f"{decode_parameters(config) / 1e6:.0f} M: {count} x {tokens} tokens", float(count * tokens), case)
        for count, tokens in (((2, 4),) if options.is_quick else ((1, 32), (8, 32), (32, 32)))
        for case in [Case.alike(count, tokens, config["vocab_size"])]
    ]
    target = str(folder / "qwen3")
    with SideProcess("model maker", options.threads, ModelMaker) as maker:
        maker.call("make", Path(target), config, "bfloat16")
    rates, ratios, figures = [], [], []
    pool = pool_of(case for _, _, case in cases)
    with (
        SideProcess(OURS, options.threads, Text, target, "float32", pool, HELD) as held,
        SideProcess(WHOLE, options.threads, Text, target, "float32", pool, MADE) as made,
        SideProcess(PEER, options.threads, Transformers, target, "float32") as peer,
    ):
        sides = [held, made, peer]
        for found in rounds(held, sides[1:], cases, equal_share, options):
            case, ours, *_ = found[0].cells()
            rates.append([case, ours, *(duel.cells()[2] for duel in found)])
            ratios.append([case, *(f"{duel.cells()[3]}, {duel.agreement} equal" for duel in found)])
            figures += [{"peer": side.name, **duel.figures()} for side, duel in zip(sides[1:], found, strict=True)]
        memory = [[side.name, f"{side.peak_memory_mb():.0f}"] for side in sides]
    return rates, ratios, memory, figures


def _pictures(folder: Path, options: Options) -> tuple[list[list[str]], list[dict[str, Any]]]:
    from benchmarks.random_weights import z_image_folder

    transformer = TINY_Z_IMAGE if options.is_quick else MIDDLE_Z_IMAGE
    target = str(z_image_folder(folder / "z-image", transformer=transformer, vae=TINY_VAE, text_encoder=TINY_QWEN3))
    shapes = ((1, 64),) if options.is_quick else ((1, 256), (1, 512))
    cases = [(f"random Z-Image: {n} x {side} px", float(n), Pictures(n, side, 4)) for n, side in shapes]

    def distance(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
        worst = min(psnr(a, b) for a, b in zip(ours, theirs, strict=True))
        return "none" if worst == float("inf") else f"{worst:.1f} dB"

    with (
        SideProcess(OURS, options.threads, Drawing, target, HELD, "float32") as held,
        SideProcess(WHOLE, options.threads, Drawing, target, MADE, "float32") as made,
    ):
        found = duels(held, made, cases, distance, options)
    return [duel.cells() for duel in found], [duel.figures() for duel in found]
