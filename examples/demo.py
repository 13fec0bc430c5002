"""Three loose requests at once through tiny_omni.yaml: a picture, a sound, and a picture with a sound; what was asked,
what the thinker wrote, and when every stage ran.

    make demo        (or: python examples/demo.py -o out/demo)

Writes the pictures (n.png), the sounds (n.wav) with their spectrograms (n-sound.png), a contact sheet (sheet.png) and
the timeline of all stages (timeline.png).
"""

from __future__ import annotations

import argparse
import math
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vllm_omni import Audio, DiffusionParams, Omni, OmniOutput

CONFIG = "tiny_omni.yaml"
PROMPTS = (
    "please paint a crimson ball to the left of a navy box",
    "could you draw me a golden hoop and play a soft chord of a3 and e4 on a string",
    "please play c4 then e4 then g4 quickly as a square wave",
)
COLUMNS = 100
BAR = 42  # characters
CELL, PLOT, MARGIN, LINE = 256, 160, 16, 18  # pixels
INK, PALE, PAPER = "#222222", "#8a8f98", "#ffffff"
COLOURS = ("#3b6ea5", "#d9772b", "#4f9a5f", "#8d5aa8", "#b8860b", "#c0504d", "#5f8a8b")


@dataclass(frozen=True)
class Span:
    """One stage of one request. Seconds since the request was admitted."""

    stage: str
    ready_s: float
    started_s: float
    ended_s: float

    @property
    def words(self) -> str:
        queued_s, ran_s = self.started_s - self.ready_s, self.ended_s - self.started_s
        return f"queued {duration(queued_s)}, ran {duration(ran_s)}"


def spans(output: OmniOutput) -> list[Span]:
    found = []
    for stage, did in output.metrics.items():
        if did.get("skipped"):
            continue
        start = did["started_s"]
        found.append(Span(stage, start - did["queued_s"], start, start + did["ran_s"]))
    return found


def duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def report(prompt: str, output: OmniOutput, end_s: float) -> str:
    """What one request asked, got and did, in lines of at most 100 characters. end_s: where the bars end."""
    lines = paragraph("asked", prompt)
    lines += paragraph("wrote", output.text or "nothing") if output.error is None else []
    lines += [f"   {'':{13 + BAR}} {'queued':>8} {'ran':>8} {'steps':>5} {'tokens':>6} {'cache hits':>10}"]
    for span in spans(output):
        did = output.metrics[span.stage]
        ready, start, end = (round(moment / end_s * BAR) for moment in (span.ready_s, span.started_s, span.ended_s))
        bar = " " * ready + "░" * (start - ready) + "█" * max(end - start, 1)
        queued, ran = duration(did["queued_s"]), duration(did["ran_s"])
        counts = f"{did.get('steps', '-'):>5} {did.get('tokens', '-'):>6} {did.get('cache_hits', '-'):>10}"
        lines.append(f"   {span.stage:12.12} {bar:{BAR}} {queued:>8} {ran:>8} {counts}")
    lines += paragraph("error", str(output.error)) if output.error is not None else []
    return "\n".join(lines)


def paragraph(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=f"   {label:8} ", subsequent_indent=" " * 12)


def contact_sheet(prompts: Sequence[str], outputs: Sequence[OmniOutput]) -> Image.Image:
    """Pictures and spectrograms side by side, each with what was asked and what was written under it."""
    captions = []
    for prompt, output in zip(prompts, outputs, strict=True):
        got = f"wrote: {output.text}" if output.error is None else f"error: {output.error}"
        captions.append([(line, PALE) for line in wrapped(f"asked: {prompt}")] + [(line, INK) for line in wrapped(got)])
    below = MARGIN + CELL + MARGIN // 2 + PLOT + MARGIN // 2
    height = below + max(map(len, captions)) * LINE + MARGIN
    sheet = Image.new("RGB", (MARGIN + len(outputs) * (CELL + MARGIN), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (output, caption) in enumerate(zip(outputs, captions, strict=True)):
        left = MARGIN + index * (CELL + MARGIN)
        shown = [image.resize((CELL, CELL), Image.Resampling.BICUBIC) for image in output.images[:1]]
        shown += [spectrogram(audio).resize((CELL, PLOT)) for audio in output.audios[:1]]
        y = below - sum(picture.height + MARGIN // 2 for picture in shown)  # what there is stands above its words
        for picture in shown:
            sheet.paste(picture, (left, y))
            draw.rectangle((left, y, left + CELL - 1, y + picture.height - 1), outline="#d0d4da")
            y += picture.height + MARGIN // 2
        for row, (line, ink) in enumerate(caption):
            draw.text((left, below + row * LINE), line, fill=ink, font=font())
    return sheet


def spectrogram(audio: Audio) -> Image.Image:
    """The picture that `audio.plot` makes."""
    with tempfile.TemporaryDirectory() as folder:
        audio.plot(Path(folder) / "sound.png")
        with Image.open(Path(folder) / "sound.png") as image:
            return image.convert("RGB")


def timeline(prompts: Sequence[str], outputs: Sequence[OmniOutput], end_s: float, width: int = 900) -> Image.Image:
    """A row per stage of every request on one axis of time; a pale bar is waiting, a full one is work."""
    rows = sum(len(spans(output)) + 1 for output in outputs)
    picture = Image.new("RGB", (width, MARGIN * 4 + rows * 24), PAPER)
    draw = ImageDraw.Draw(picture)
    left, right, y = 90, width - 2 * MARGIN, MARGIN
    colours = dict(
        zip(dict.fromkeys(span.stage for output in outputs for span in spans(output)), COLOURS, strict=False)
    )

    def x(moment_s: float) -> float:
        return left + (right - left) * moment_s / end_s

    for tick in ticks(end_s):
        draw.line((x(tick), MARGIN, x(tick), picture.height - 2 * MARGIN), fill="#e6e8ec")
        draw.text((x(tick), picture.height - 1.5 * MARGIN), f"{tick:g} s", PALE, font(), anchor="ma")
    for prompt, output in zip(prompts, outputs, strict=True):
        draw.text((MARGIN, y + 12), prompt, fill=INK, font=font(), anchor="lm")
        for span in spans(output):
            y += 24
            draw.text((MARGIN, y + 12), span.stage, fill=PALE, font=font(), anchor="lm")
            draw.rectangle((x(span.ready_s), y + 9, x(span.started_s), y + 15), fill="#d0d4da")
            draw.rectangle((x(span.started_s), y + 5, x(span.ended_s), y + 19), fill=colours.get(span.stage, INK))
            draw_beside(draw, x(span.ended_s), y + 12, span.words, right)
        y += 24
    return picture


def ticks(end_s: float) -> list[float]:
    """Round moments from 0 to end_s, four to ten of them."""
    step = 10.0 ** math.floor(math.log10(end_s))
    step = next(step / divisor for divisor in (1, 2, 5) if end_s / (step / divisor) >= 4)
    return [n * step for n in range(int(end_s / step) + 1)]


def draw_beside(draw: ImageDraw.ImageDraw, x: float, y: float, words: str, right: int) -> None:
    """Behind a bar that ends at x, or inside it where there is no room behind."""
    fits = x + 6 + font().getlength(words) < right
    draw.text((x + 6 if fits else x - 6, y), words, PALE if fits else PAPER, font(), anchor="lm" if fits else "rm")


def wrapped(text: str) -> list[str]:
    """Lines that fit into a cell of the sheet."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font().getlength(longer) <= CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=13)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/demo"), help="a folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    begin = time.perf_counter()
    with Omni(CONFIG, progress=False) as omni:
        loaded_s = time.perf_counter() - begin
        params = [DiffusionParams(seed=args.seed + index) for index in range(len(PROMPTS))]
        outputs = omni.generate(list(PROMPTS), params)
    total_s = time.perf_counter() - begin - loaded_s
    print(f"{CONFIG}: a Qwen3 writes a scene, a sound or both; one DiT draws, another plays, side by side.")
    print(f"Loaded in {loaded_s:.1f} s, then {len(PROMPTS)} requests at once in {total_s:.1f} s.  ░ queued  █ ran\n")

    end_s = max((span.ended_s for output in outputs for span in spans(output)), default=1.0)
    for index, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True), start=1):
        print(str(index) + report(prompt, output, end_s)[1:] + "\n")
        for image in output.images:
            image.save(args.output / f"{index}.png")
        for audio in output.audios:
            audio.save(args.output / f"{index}.wav")
            audio.plot(args.output / f"{index}-sound.png")
    contact_sheet(PROMPTS, outputs).save(args.output / "sheet.png")
    timeline(PROMPTS, outputs, end_s).save(args.output / "timeline.png")
    print(f"Pictures, sounds, sheet.png and timeline.png are in {args.output.resolve()}")
    return int(any(output.error is not None for output in outputs))


if __name__ == "__main__":
    raise SystemExit(main())
