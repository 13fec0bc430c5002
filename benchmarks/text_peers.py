"""Tokens per second of a language model of Qwen3-0.6B's shape in bfloat16: ours and other engines', in one run and in
turn, greedy, end-of-sequence ignored.

Peers besides transformers have environments of their own (benchmarks/peers); one that is not there is named, and the
run goes on. All are given token ids and asked for token ids.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits, decode_parameters, layer_parameters
from benchmarks.measure import Options, Report, Table, with_spread
from benchmarks.peers.environments import DEFAULT_FOLDER, TEXT_PEERS, PeerEnvironment
from benchmarks.peers.process import PeerProcess
from benchmarks.sides import Asked, Duel, SideError, SideProcess, rounds, tell
from benchmarks.text import LARGE, SMALL, Case, Ours, Transformers, equal_share, pool_of, written_model

PROMPT_LENGTH = 128
NEW_TOKENS = 64
PEERS = ("transformers", *TEXT_PEERS)
MEANING = (
    f"Prefill counts the tokens of prompts; decode those written after the first, {NEW_TOKENS} a sequence of "
    f"{PROMPT_LENGTH} tokens, without the time of the prompts; mixed (prompts of 16 to 256 tokens, 16 to 128 new ones) "
    "all that are written, prompts in the time. Limit: all products at this machine's peak, every weight read once a "
    "step at its memory's rate, attention left out. Nobody reads along, so that all sides read prompts as "
    "fast as can be while others write."
)


@dataclass(frozen=True, slots=True)
class Load:
    """amount: the tokens that count, of prompts or written. is_decode: reading the prompts is left out of the time."""

    case: Case
    amount: int
    is_decode: bool = False

    @classmethod
    def prefill(cls, count: int, length: int, vocab_size: int) -> Load:
        return cls(Case((length,) * count, (1,) * count, vocab_size), count * length)

    @classmethod
    def decode(cls, count: int, length: int, new_tokens: int, vocab_size: int) -> Load:
        """The first token comes from the prompt, so that one more is written."""
        return cls(Case((length,) * count, (new_tokens + 1,) * count, vocab_size), count * new_tokens, is_decode=True)

    @classmethod
    def mixed(cls, count: int, vocab_size: int) -> Load:
        case = Case.mixed(count, vocab_size)
        return cls(case, sum(case.new_tokens))

    def limit(self, limits: Limits, config: Mapping[str, Any], dtype: str) -> float:
        """Tokens per second, were all products at their peak rate and every weight read once a step at the memory's."""
        seconds = 0.0
        if not self.is_decode:
            read = limits.prefill_tokens_per_s(layer_parameters(config), dtype)
            seconds += sum(self.case.prompt_lengths) / read
        for step in range(1, max(self.case.new_tokens)):
            batch = sum(count > step for count in self.case.new_tokens)
            seconds += 1 / limits.decode_steps_per_s(decode_parameters(config), batch, dtype)
        return self.amount / seconds


def run(
    options: Options, limits: Limits | None = None, environments: Mapping[str, PeerEnvironment] = TEXT_PEERS
) -> Report:
    config, dtype = (SMALL, "float32") if options.is_quick else (LARGE, "bfloat16")
    chosen = loads(options, config["vocab_size"])
    notes = [MEANING]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = str(written_model(Path(temporary), config, dtype, options.threads))
        settings = pool_of(load.case for load in chosen.values())
        us = stack.enter_context(SideProcess("ours", options.threads, Ours, folder, dtype, settings))
        wanted = options.beside or ("transformers", *environments)
        peers: list[SideProcess | PeerProcess] = []
        if "transformers" in wanted:
            peers.append(stack.enter_context(SideProcess("transformers", options.threads, Transformers, folder, dtype)))
        others = [peer for name, peer in environments.items() if name in wanted]
        peers += _processes(others, folder, dtype, options, stack, notes)
        cases = [(name, load.amount, load) for name, load in chosen.items()]
        found = []
        for row in rounds(us, peers, cases, equal_share, options, ask):
            found.append(row)
            tell([peer.name for peer in peers], row)
        memory = [[side.name, f"{side.peak_memory_mb():.0f}"] for side in (us, *peers)]
    bounds = {name: load.limit(limits, config, dtype) for name, load in chosen.items()} if limits else {}
    names = [peer.name for peer in peers]
    return Report(
        "text_peers",
        [
            _rates(f"{decode_parameters(config) / 1e6:.1f} M, {dtype}", names, found, bounds),
            _ratios(names, found),
            Table("Peak memory, MiB", ("side", "after all cases"), memory),
        ],
        notes=notes,
        figures={
            "duels": [{"peer": name, **duel.figures()} for row in found for name, duel in zip(names, row, strict=True)],
            "limits": bounds,
            "peak_memory_mb": dict(memory),
        },
    )


def loads(options: Options, vocab_size: int) -> dict[str, Load]:
    if options.is_quick:
        return {
            "prefill, 2 x 8": Load.prefill(2, 8, vocab_size),
            "decode, 2 at once": Load.decode(2, 8, 4, vocab_size),
        }
    return {
        f"prefill, 8 x {PROMPT_LENGTH}": Load.prefill(8, PROMPT_LENGTH, vocab_size),
        **{f"decode, {n} at once": Load.decode(n, PROMPT_LENGTH, NEW_TOKENS, vocab_size) for n in (1, 8, 32)},
        "mixed, 32 sequences": Load.mixed(32, vocab_size),
    }


def ask(side: Asked, load: Load, repeat: int) -> tuple[float, Any]:
    """Prompts never come twice, so that none is answered from a cache."""
    seconds, written = side.call("write", load.case.prompts(2 * repeat), load.case.new_tokens)
    if load.is_decode:
        first = replace(load.case, new_tokens=(1,) * len(load.case.new_tokens))
        seconds -= side.call("write", first.prompts(2 * repeat + 1), first.new_tokens)[0]
    return seconds, written


def _processes(
    environments: Iterable[PeerEnvironment],
    folder: str,
    dtype: str,
    options: Options,
    stack: ExitStack,
    notes: list[str],
) -> list[PeerProcess]:
    """Those that are there and load the model; `notes` says what became of each."""
    place = Path(options.peers) if options.peers else DEFAULT_FOLDER
    found = []
    for peer in environments:
        if peer.versions(place) is None:
            notes.append(peer.how_to_make(place))
            continue
        command = [str(peer.python(place)), "-m", peer.module]
        process = PeerProcess(peer.name, command, peer.variables(peer.root(place), options.threads))
        try:
            stack.enter_context(process).call("load", folder, dtype, options.threads)
        except SideError as error:
            notes.append(f"Not measured, since it did not load the model: {error}")
            continue
        found.append(process)
        notes.append(f"{peer.name} {peer.version(place)}, in an environment of its own.")
    return found


def _rates(title: str, names: list[str], found: list[list[Duel]], bounds: Mapping[str, float]) -> Table:
    rows = []
    for duels in found:
        amount, name = duels[0].amount, duels[0].case
        sides = (duels[0].us_s, *(duel.peer_s for duel in duels))
        limit = f"{bounds[name]:.0f}" if bounds else ""
        rows.append([name, limit, *(with_spread([amount / seconds for seconds in side], 1) for side in sides)])
    return Table(f"Tokens per second, random Qwen3, {title}", ("case", "limit", "ours", *names), rows)


def _ratios(names: list[str], found: list[list[Duel]]) -> Table:
    rows = []
    for duels in found:
        row = [duels[0].case]
        for duel in duels:
            row += [with_spread(duel.ratios), duel.agreement]
        rows.append(row)
    columns = [column for name in names for column in (f"ours / {name}", "equal tokens")]
    return Table("How many times as fast", ("case", *columns), rows)
