"""Trains the small speaking model from what `tools.tiny.talker.spoken` wrote to the folder that ships.

    python -m tools.tiny.talker.train --data runs/tiny-talker/data.safetensors --folder runs/tiny-talker --device cuda

It ends by the clock; a codec that is there already is left alone. On an H200 four and a half minutes are enough; it runs on a CPU, but would need hours.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.tiny.talker import train_codec, train_talker
from tools.tiny.talker.publish import publish
from tools.tiny.talker.spoken import Spoken

CODEC_SHARE = 0.66  # of the time
CODEC_BATCH, TALKER_BATCH = 32, 256
QUICK_BATCH = 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the model, in tiny-talker/, and the log")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=270.0, help="of training; reading and writing come on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a step of everything, to see that it runs")
    args = parser.parse_args(arguments)
    begun, device = time.perf_counter(), torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.folder.mkdir(parents=True, exist_ok=True)
    seconds = 1e-3 if args.quick else args.seconds
    codec_batch, talker_batch = (QUICK_BATCH, QUICK_BATCH) if args.quick else (CODEC_BATCH, TALKER_BATCH)
    spoken, log = Spoken.load(args.data), args.folder / "log.jsonl"
    kept = args.folder / "codec.safetensors"
    if not kept.exists():
        train_codec.train(spoken, CODEC_SHARE * seconds, codec_batch, device, log, args.seed).save(kept)
    codec = train_codec.Codec.load(kept, device)
    share = 1 - CODEC_SHARE
    talker = train_talker.train(spoken, codec.codes, share * seconds, talker_batch, device, log, args.seed)
    publish(args.folder / "tiny-talker", spoken, codec, talker)
    print(f"done after {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
