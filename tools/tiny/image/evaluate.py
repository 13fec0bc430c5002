"""Judges a tiny image model through the package itself: draws held-out prompts and lets the detector look at every
picture.

    python -m tools.tiny.image.evaluate --count 200 --sheet out/sheet.png
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.tiny.image.judge import complaint
from tools.tiny.image.loose import is_held_out, loose
from tools.tiny.image.world import Scene, canonical, sample_scene
from vllm_omni import DiffusionParams, Omni

SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Case:
    """One kind of prompt: how many things, whether with unseen pairs, and whether in loose words."""

    name: str
    accepts: Callable[[Scene], bool]
    num_things: int | None = None
    unseen: bool = False
    is_loose: bool = False


CASES = (
    Case("single objects", lambda scene: True, num_things=1),
    Case("pairs with a relation", lambda scene: scene.layout is not None, num_things=2),
    Case("three objects", lambda scene: True, num_things=3),
    Case("unseen (colour, shape)", lambda scene: scene.has_unseen and len(scene.things) < 3, unseen=True),
    Case("held-out loose words", lambda scene: True, is_loose=True),
)


def prompts_for(case: Case, count: int, seed: int) -> list[tuple[str, Scene]]:
    """Distinct prompts with their meaning; loose ones are never from the training set."""
    rng, found = random.Random(f"{seed} {case.name}"), dict[str, Scene]()
    while len(found) < count:
        scene = sample_scene(rng, allow_unseen=case.unseen, num_things=case.num_things)
        if not case.accepts(scene):
            continue
        words = loose(scene, rng) if case.is_loose else canonical(scene)
        if not case.is_loose or is_held_out(words):
            found[words] = scene
    return list(found.items())


def judge_case(
    omni: Omni, case: Case, count: int, seed: int, params: dict[str, object]
) -> tuple[float, list[str], list[Image.Image]]:
    """(share of right pictures, what was wrong, all pictures)."""
    prompts = prompts_for(case, count, seed)
    outputs = omni.generate(
        [words for words, _ in prompts],
        [DiffusionParams(seed=seed + i, **params) for i in range(count)],  # type: ignore[arg-type]
    )
    wrong, pictures = [], []
    for (words, scene), output in zip(prompts, outputs, strict=True):
        if output.error is not None:
            raise output.error
        pictures.append(output.images[0])
        reason = complaint(np.asarray(output.images[0]), scene)
        if reason:
            wrong.append(f"{words!r}: {reason}" + (f" (wrote {output.text!r})" if case.is_loose else ""))
    return 1 - len(wrong) / count, wrong, pictures


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """A contact sheet, left to right, top to bottom."""
    size = pictures[0].width
    whole = Image.new("RGB", (SHEET_COLUMNS * size, -(-len(pictures) // SHEET_COLUMNS) * size), "white")
    for index, picture in enumerate(pictures):
        whole.paste(picture, (index % SHEET_COLUMNS * size, index // SHEET_COLUMNS * size))
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset://tiny-image")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind (default 200)")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the config's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the config's)")
    parser.add_argument("--sheet", type=Path, help="where to put a contact sheet")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="config overrides")
    parser.add_argument("--json", type=Path, help="where to put the figures")
    parser.add_argument("--verbose", action="store_true", help="print every wrong picture")
    args = parser.parse_args()
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    params = {name: value for name, value in given.items() if value is not None}
    shares, pictures = {}, []
    for config in ("tiny_image.yaml", "tiny_scene.yaml"):
        with Omni(config, model=args.model, overrides=args.set) as omni:
            for case in CASES:
                if case.is_loose == (config == "tiny_scene.yaml"):
                    share, wrong, drawn = judge_case(omni, case, args.count, args.seed, params)
                    shares[case.name] = share
                    pictures += drawn[:SHEET_COLUMNS]
                    print(f"{case.name:26s} {share:7.1%} of {args.count}", *(wrong if args.verbose else ()), sep="\n  ")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures).save(args.sheet)
    if args.json:
        args.json.write_text(json.dumps({"count": args.count, **params, "right": shares}, indent=2) + "\n")


if __name__ == "__main__":
    main()
