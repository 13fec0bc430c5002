"""Reports as a terminal shows them, as JSON, and as one markdown page of all that was measured last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.measure import Report, Table

PAGE = "README.md"
ORDER = (
    "images",
    "dit",
    "videos",
    "lora",
    "edits",
    "references",
    "audio",
    "speech",
    "speech_peers",
    "decode_memory",
    "text",
    "text_peers",
    "quantization",
    "halves",
    "startup",
    "hops",
    "cache",
    "audio_cache",
    "random_cache",
    "serving",
    "routing",
    "products",
    "limits",
)


def show(report: Report, console: Console) -> None:
    for table in report.tables:
        drawn = RichTable(title=table.title, title_justify="left", title_style="bold")
        for index, column in enumerate(table.columns):
            drawn.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    for note in report.notes:
        console.print(note)


def as_json(report: Report, machine: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**asdict(report), "machine": dict(machine), "settings": dict(settings)}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_page(folder: Path) -> Path:
    """The page of a folder, made anew from the JSON of every suite in it."""
    parts = ["# Measured", "Made by `make bench` (`python benchmarks/run.py`). Times are medians (lowest - highest)."]
    for suite in ORDER:
        file = folder / f"{suite}.json"
        if file.is_file():
            parts += _section(json.loads(file.read_text(encoding="utf-8")))
    page = folder / PAGE
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _section(content: Mapping[str, Any]) -> list[str]:
    about = content["machine"]
    libraries = ", ".join(f"{name} {about[name]}" for name in ("python", "torch", "transformers", "diffusers"))
    parts = [
        f"## {content['suite']}",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; {libraries}.",
    ]
    for table in content["tables"]:
        parts += [f"**{table['title']}**", _markdown(Table(**table))]
    return [*parts, *content["notes"]]


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    return "\n".join([line(table.columns), line(rule), *map(line, table.rows)])
