"""Judges the LoRA of outlines through the package itself: distinct prompts, every second one of a colour and shape that
never stood together in training.

    python -m tools.tiny.image.evaluate_outlines --count 100 --sheet out/outlines.png
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from tools.tiny.image.evaluate import SHEET_COLUMNS, sheet
from tools.tiny.image.outlines import complaint
from tools.tiny.image.world import Scene, canonical, sample_scene
from vllm_omni import DiffusionParams, LoRA, Omni


def prompts(count: int, seed: int) -> list[tuple[str, Scene]]:
    """Words and their meaning; no rings, which are outlines already."""
    rng, found = random.Random(seed), dict[str, Scene]()
    while len(found) < count:
        scene = sample_scene(rng, allow_unseen=len(found) % 2 == 0)
        if all(thing.shape != "ring" for thing in scene.things):
            found.setdefault(canonical(scene), scene)
    return list(found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--sheet", type=Path, help="where to put a contact sheet")
    parser.add_argument("--verbose", action="store_true", help="print every wrong picture")
    args = parser.parse_args()
    asked = prompts(args.count, args.seed)
    with Omni("tiny_image") as omni:
        params = [DiffusionParams(seed=index, lora=[LoRA("outlines")]) for index in range(len(asked))]
        outputs = omni.generate([words for words, _ in asked], params)
    wrong, pictures = [], []
    for (words, scene), output in zip(asked, outputs, strict=True):
        if output.error is not None:
            raise output.error
        pictures.append(output.images[0])
        reason = complaint(np.asarray(output.images[0]), scene)
        if reason:
            wrong.append(f"{words!r}: {reason}")
    print(f"outlines {1 - len(wrong) / len(asked):.0%} of {len(asked)}", *(wrong if args.verbose else ()), sep="\n  ")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures[: 4 * SHEET_COLUMNS]).save(args.sheet)


if __name__ == "__main__":
    main()
