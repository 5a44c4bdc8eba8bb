"""What the doctor found, in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]
SHOWN = ("torch", "transformers", "ray", "deepspeed")


def doctor_table(found: Json) -> RenderableType:
    """The driver's versions, the nodes, and for each problem the one thing to do."""
    driver = found["driver"]
    versions = [
        f"{name} {driver['packages'][name]}" for name in SHOWN if name in driver["packages"]
    ]
    head = Text(f"driver: Python {driver['python']}, {', '.join(versions)}", style="dim")
    nodes = Table()
    nodes.add_column("node")
    for name in ("cores", "GPUs", "memory GB", "free disk GB", "free shared GB"):
        nodes.add_column(name, justify="right")
    for node in found["nodes"]:
        sizes = (node["memory_gb"], node["disk_free_gb"], node["shm_free_gb"])
        told = ("–" if size is None else f"{size:g}" for size in sizes)
        nodes.add_row(escape(node["name"]), str(node["cores"]), _gpus(node["gpus"]), *told)
    return Group(head, nodes, *_findings(found))


def _gpus(gpus: list[str]) -> str:
    return f"{len(gpus)} × {gpus[0]}" if gpus else "–"


def _findings(found: Json) -> list[RenderableType]:
    if not found["findings"]:
        return [Text("Nothing is wrong.", style="green")]
    lines: list[RenderableType] = []
    for each in found["findings"]:
        mark = ("✗ ", "red") if each["is_fatal"] else ("! ", "yellow")
        remedy = (f"\n  → {each['remedy']}", "bold") if each["remedy"] else ""
        where = "" if each["where"] == "recipe" else f"{each['where']} "
        lines.append(Text.assemble(mark, where, each["what"], remedy))
    return lines
