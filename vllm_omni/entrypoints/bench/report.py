"""What a load has brought, as JSON, as lines of a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_omni import __version__
from vllm_omni.entrypoints.bench.answer import MEASURES
from vllm_omni.entrypoints.bench.load import Run
from vllm_omni.entrypoints.bench.summary import PERCENTILES, parse_limits, summarise
from vllm_omni.entrypoints.cli.text_table import aligned
from vllm_omni.utils.plots.load_plot import draw_load


def result(run: Run, goodput: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All of it, as it is written: settings, summary, and every answer with its times (seconds from its start)."""
    answers = [
        {
            "work": answer.work,
            "began_s": answer.began_s - run.began_s,
            "status": answer.status,
            "tokens": answer.tokens,
            **answer.measures(),
        }
        for answer in run.answers
    ]
    summary = summarise(run, parse_limits(goodput))
    return {"vllm_omni": __version__, "settings": dict(settings), "summary": summary, "answers": answers}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """For a terminal: the whole load, then each work."""
    summary = found["summary"]
    yield f"{summary['num_ok']} of {summary['num_requests']} requests answered in {summary['wall_s']:.2f} s"
    yield f"  {summary['requests_per_s']:.2f} requests/s   {summary['tokens_per_s']:.1f} tokens/s"
    goodput = summary["goodput"]
    if goodput["limits_s"]:
        limits = ", ".join(f"{name} <= {limit:g} s" for name, limit in goodput["limits_s"].items())
        yield f"  goodput: {goodput['requests_per_s']:.2f} requests/s, {goodput['share']:.1%} ({limits})"
    for status, count in summary["errors"].items():
        yield f"  error {status}: {count} times, such as: {summary['first_errors'][status]}"
    yield ""
    head = ["seconds", "answers", "mean", *(f"p{rank}" for rank in PERCENTILES), "max"]
    rows = [head, *_rows("", summary["latency_s"])]
    if len(summary["works"]) > 1:
        for name, about in summary["works"].items():
            rows += _rows(f"{name}: ", about["latency_s"])
    yield from aligned(rows)


def draw(run: Run, path: Path) -> None:
    """Writes a PNG: the distribution of every time, and what each request took, when."""
    measured = [answer.measures() for answer in run.answers]
    times = {words: [found[name] for found in measured if name in found] for name, words in MEASURES.items()}
    times = {words: values for words, values in times.items() if values}
    ends: dict[str, list[tuple[float, float, bool]]] = {}
    for answer in run.answers:
        took_s = (answer.ended_s or answer.began_s) - answer.began_s
        ends.setdefault(answer.work, []).append((answer.began_s - run.began_s, took_s, answer.is_ok))
    draw_load(times, ends, path)


def _rows(prefix: str, latency_s: Mapping[str, Mapping[str, float]]) -> Iterator[Sequence[str]]:
    for name, about in latency_s.items():
        columns = ("mean", *(f"p{rank}" for rank in PERCENTILES), "max")
        yield [prefix + MEASURES[name], f"{about['count']:.0f}", *(f"{about[column]:.4f}" for column in columns)]
