"""Trains the small speaking model from what `tools.tiny.talker.spoken` wrote to the folder that ships.

    python -m tools.tiny.talker.train --data runs/tiny-talker/data.safetensors --folder runs/tiny-talker --device cuda

It ends by the clock. A codec that is there already is left alone, and the talker has all the time. Beside the model lie
codec.safetensors and talker.safetensors in float32, to go on from.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.tiny.talker import train_codec, train_talker
from tools.tiny.talker.clock import Clock
from tools.tiny.talker.publish import publish
from tools.tiny.talker.spoken import Spoken

CODEC_SHARE = 0.66  # of the time
CODEC_BATCH, TALKER_BATCH, TALKER_RATE = 32, 256, 2e-3
QUICK_BATCH = 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the model, in tiny-talker/, and the log")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=270.0, help="of training; reading and writing come on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", type=Path, dest="start", help="talker.safetensors, or the folder, to go on from")
    parser.add_argument("--batch", type=int, default=TALKER_BATCH, help="sentences of a step of the talker")
    parser.add_argument("--rate", type=float, default=TALKER_RATE, help="highest learning rate of the talker")
    parser.add_argument("--quick", action="store_true", help="a step of everything, to see that it runs")
    args = parser.parse_args(arguments)
    begun, device = time.perf_counter(), torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.folder.mkdir(parents=True, exist_ok=True)
    seconds = 1e-3 if args.quick else args.seconds
    codec_batch, talker_batch = (QUICK_BATCH, QUICK_BATCH) if args.quick else (CODEC_BATCH, args.batch)
    spoken, log = Spoken.load(args.data), args.folder / "log.jsonl"
    torch.manual_seed(args.seed)
    kept = args.folder / "codec.safetensors"
    if not kept.exists():
        train_codec.train(spoken, Clock("codec", CODEC_SHARE * seconds, log), codec_batch, device).save(kept)
        seconds *= 1 - CODEC_SHARE
    codec = train_codec.Codec.load(kept, device)
    learner = train_talker.begun(spoken.vocab_size, args.start).to(device)
    clock = Clock("talker", seconds, log)
    kept = args.folder / "talker.safetensors"
    talker = train_talker.train(learner, spoken, codec.codes, clock, talker_batch, args.rate, kept)
    publish(args.folder / "tiny-talker", spoken, codec, talker)
    print(f"done after {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
