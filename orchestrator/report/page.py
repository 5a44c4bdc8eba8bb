"""report.html: the front as a picture and a table, every trial, the environment, on one page.

The page carries its style, script and data, and asks the network for nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.report import wording
from orchestrator.stages import write_atomically

Json = dict[str, Any]
Describe = Callable[[Json], str]
HERE = Path(__file__).parent
SHAPES = {"baseline": "diamond", "dense int8": "triangle", "random twin": "cross"}


def write_report(study: Path) -> Path:
    """Write report.html from a finished study's front.json and manifest.json."""
    front = json.loads((study / "front.json").read_text(encoding="utf-8"))
    manifest = study / "manifest.json"
    facts = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    path = study / "report.html"
    write_atomically(path, render(front, facts, name=study.name))
    return path


def render(front: Json, manifest: Json, *, name: str = "study") -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    front = _finite(front)
    describe = _describer(front)
    environment.globals |= {"wording": wording, "link": _link, "describe": describe}
    shown = _shown(front, describe)
    return environment.get_template("page.html").render(
        name=front.get("study", name),
        front=front,
        manifest=manifest,
        environment=manifest.get("facts", {}).get("environment", {}),
        quality=front.get("quality", front["objectives"][0]["name"]),
        objectives=[objective["name"] for objective in front["objectives"]],
        points=shown,
        groups=_groups(shown),
        headlines=_headlines(front),
        trials=front.get("all_trials", []),
        chart=_chart(front, shown, describe),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )


def _describer(front: Json) -> Describe:
    """What says a configuration in a line that no other on the page has."""
    groups = ("points", "references", "over_limit", "dominated", "all_trials")
    configs = (trial["config"] for group in groups for trial in front.get(group, []))
    return partial(wording.describe, shown=wording.telling_apart(configs))


def _shown(front: Json, describe: Describe) -> list[Json]:
    """Every measured point once, with its group, its number on the front and what the role is."""
    groups = [
        (name, front.get(name, [])) for name in ("points", "references", "over_limit", "dominated")
    ]
    found: dict[str, Json] = {}
    for group, points in groups:
        for point in points:
            found.setdefault(point["trial_id"], {**point, "group": group, "number": None})
    for number, point in enumerate(front["points"], start=1):
        found[point["trial_id"]]["number"] = number
    numbers = {trial_id: point["number"] for trial_id, point in found.items() if point["number"]}
    over = {point["trial_id"] for point in front.get("over_limit", [])}
    several = len({point["config"]["model"] for point in found.values()}) > 1
    for point in found.values():
        role = point.get("role", "trial")
        point["reference"] = role != "trial"
        point["over_limit"] = point["trial_id"] in over
        point["close"] = [f"#{numbers[i]}" for i in point["within_noise_of"] if i in numbers]
        point["title"] = _title(point, describe, several=several)
    return list(found.values())


def _title(point: Json, describe: Describe, *, several: bool) -> str:
    """What a point is called: its role if it is a reference, with the base model if there are several."""
    role = point.get("role", "trial")
    if role == "trial":
        return describe(point["config"])
    name = "dense" if role == "baseline" else role
    return f"{name} · {point['config']['model']}" if several else str(name)


def _groups(shown: Sequence[Json]) -> list[tuple[str, str, str, list[Json]]]:
    """Points for the table: (group, heading, explanation, points)."""
    told = {
        "points": ("On the front", "no other point within the limits is better in every objective"),
        "references": ("References", "always shown, for comparison"),
        "over_limit": ("Over a limit", "measured, but not allowed on the front"),
        "dominated": ("Dominated", "another point is at least as good in every objective"),
    }
    groups = [(name, *told[name], [p for p in shown if p["group"] == name]) for name in told]
    return [group for group in groups if group[-1]]


def _headlines(front: Json) -> list[tuple[str, str]]:
    """The few numbers that say how it went: (number, words)."""
    counts = front["trials"]
    finished = sum(count for name, count in counts.items() if name != "reused")
    tiles = [(str(len(front["points"])), f"on the front, of {finished} trials")]
    for objective in front["objectives"]:
        metric = objective["name"]
        values = [
            p["metrics"][metric] for p in front["points"] if p["metrics"].get(metric) is not None
        ]
        if values:
            best = min(values) if objective["direction"] == "min" else max(values)
            versus = wording.compare(metric, best, front["baseline"]["metrics"].get(metric))
            told = f"best {wording.label(metric)}" + (
                f", {versus} than dense" if "×" in versus else ""
            )
            tiles.append((wording.number(metric, best), told))
    tiles.append((f"{front['hypervolume']:.3f}", "hypervolume, in units of dense"))
    return tiles


def _chart(front: Json, shown: Sequence[Json], describe: Describe) -> Json:
    """What the script draws from."""
    objectives = front["objectives"]
    quality = front.get("quality", objectives[0]["name"])
    names = [objective["name"] for objective in objectives]
    costs = [name for name in names if name != quality] or [quality]
    others = sorted({name for p in shown for name in p["metrics"]} - set(names))
    return {
        "metrics": [{"name": name, "label": wording.label(name)} for name in [*names, *others]],
        "objectives": objectives,
        "limits": front.get("limits") or [o for o in objectives if "max" in o or "min" in o],
        "axes": {"x": costs[0], "y": quality, "color": costs[1] if len(costs) > 1 else ""},
        "points": [_mark(point, front["baseline"]["metrics"], describe) for point in shown],
    }


def _mark(point: Json, dense: Mapping[str, float], describe: Describe) -> Json:
    """One point of the picture with the words of its tooltip."""
    role = point.get("role", "trial")
    words = {
        name: [
            wording.number(name, value),
            wording.interval(name, point["intervals"].get(name)),
            wording.versus_dense(name, point["metrics"], dense),
        ]
        for name, value in point["metrics"].items()
    }
    return {
        "id": point["trial_id"],
        "number": point["number"],
        "title": point["title"],
        "config": describe(point["config"]),
        "reference": point["reference"],
        "over": point["over_limit"],
        "shape": SHAPES.get(role, "circle" if role == "trial" else "square"),
        "metrics": point["metrics"],
        "intervals": point["intervals"],
        "words": words,
    }


def _finite(value: Any) -> Any:
    """JSON values with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _link(parts: Iterable[str]) -> str:
    """A relative address from the parts of a path, quoted."""
    from urllib.parse import quote

    return "/".join(quote(part) for part in parts)
