"""`vllm-omni voices`: the voices of a folder that a stage's `voices` names. Loads no model."""

from __future__ import annotations

import argparse
import dataclasses
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from vllm_omni.entrypoints.cli.as_json import print_json
from vllm_omni.entrypoints.cli.text_table import aligned

if TYPE_CHECKING:
    from vllm_omni.voices import VoiceStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `voices`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    adding = actions.add_parser("add", help="keep the voice of a sound file")
    adding.add_argument("name", metavar="NAME", help="letters, digits, - and _")
    adding.add_argument("sound", metavar="SOUND", help="a file with 3 to 15 s of one voice")
    adding.add_argument("--text", metavar="WORDS", help="what is said in it (default: the speaker alone is imitated)")
    adding.add_argument(
        "--consent", metavar="WORDS", required=True, help="who agreed that this voice is cloned, and how; kept with it"
    )
    adding.set_defaults(run=_add)
    listing = actions.add_parser("list", help="say which voices there are")
    listing.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    listing.set_defaults(run=_list)
    removing = actions.add_parser("remove", help="delete a voice")
    removing.add_argument("name", metavar="NAME")
    removing.set_defaults(run=_remove)
    for action in (adding, listing, removing):
        action.add_argument("--folder", required=True, metavar="FOLDER", help="`voices.folder` of the stage")


def _add(args: argparse.Namespace) -> int:
    from vllm_omni.config.schema import LimitsConfig
    from vllm_omni.media.reference_sound import read_reference

    sound = read_reference(args.sound, limits=LimitsConfig(), name="sound")
    facts = _store(args).add(args.name, sound, text=args.text, consent=args.consent)
    print(f"{facts.name}: {facts.duration_s:.1f} s kept")
    return 0


def _list(args: argparse.Namespace) -> int:
    facts = _store(args).facts()
    if args.json:
        print_json([dataclasses.asdict(each) for each in facts])
        return 0
    rows = [("name", "s", "since", "consent", "text")]
    for each in facts:
        since = datetime.fromtimestamp(each.created, timezone.utc).date().isoformat()
        rows.append((each.name, f"{each.duration_s:.1f}", since, each.consent, each.text or "-"))
    print("\n".join(aligned(rows)) if facts else "no voices")
    return 0


def _remove(args: argparse.Namespace) -> int:
    _store(args).remove(args.name)
    print(f"{args.name}: removed")
    return 0


def _store(args: argparse.Namespace) -> VoiceStore:
    from vllm_omni.config.schema import VoicesConfig
    from vllm_omni.voices import VoiceStore

    return VoiceStore(VoicesConfig(args.folder))
