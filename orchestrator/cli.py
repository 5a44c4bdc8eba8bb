"""The command: plan · run · front · select · export · measure · report."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestrator.trial import BadInput

OK, NO_FRONT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One recipe in, a Pareto front of deployable models out.",
)
out, err = Console(), Console(stderr=True)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that replace the recipe's: key.path=value …")
]
StudyPath = Annotated[
    Path, typer.Argument(help="The study's folder, for instance runs/quickstart.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the command; a user's mistake ends with one message and status 2, never a stack trace."""
    try:
        sys.exit(app(standalone_mode=False) or OK)
    except BadInput as error:
        _complain(error.problems)
        sys.exit(BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        err.print("Interrupted. The same command goes on from here.")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own complaints about usage have one
            raise
        _complain([error.format_message()])
        sys.exit(BAD_INPUT)


def _complain(problems: list[str]) -> None:
    for problem in problems:
        err.print(f"[red]✗[/] {_plain(problem)}", highlight=False, soft_wrap=True)
    err.print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was started.")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Every configuration with its exact size and cost, and why others cannot work. Starts nothing."""
    from orchestrator.plan import make_plan, plan_table
    from orchestrator.recipe import load_recipe

    made = make_plan(load_recipe(recipe, overrides or []))
    if as_json:
        _print_json(made)
    else:
        out.print(plan_table(made))


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option(help="Every distinct path once, two steps on 32 rows; writes no study.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="Where to train: cpu, cuda:0. Default: a GPU if there is one."),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="End with status 1 if any trial failed with reason `error`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the study, or go on with it, and print its front."""
    from orchestrator.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from orchestrator.dry_run import dry_run as try_paths
        from orchestrator.dry_run import dry_run_table

        tried = try_paths(loaded, device=device)
        _print_json(tried) if as_json else out.print(dry_run_table(tried))
        raise typer.Exit(OK if tried["works"] else NO_FRONT)

    from orchestrator.launch.inline import Inline
    from orchestrator.report.terminal import Progress, front_table
    from orchestrator.study import NoBaseline, Study

    launcher = Inline(loaded, Path(loaded.output_dir), device=device)
    progress = Progress(loaded.objectives, console=err)
    try:
        with progress:
            front = Study(loaded, launcher=launcher, watch=progress).run()
    except NoBaseline as error:
        err.print(f"[red]✗[/] {_plain(str(error))}")
        raise typer.Exit(NO_FRONT) from error
    if as_json:
        _print_json(front)
    else:
        out.print(front_table(front))
        out.print(_last_line(front, Path(loaded.output_dir)), highlight=False, soft_wrap=True)
    failed = [t for t in front["all_trials"] if t["reason"] == "error"]
    raise typer.Exit(NO_FRONT if not front["points"] or (strict and failed) else OK)


def _last_line(front: dict[str, Any], folder: Path) -> str:
    counts = front["trials"]
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{told} · report: {folder / 'report.html'} · hypervolume {front['hypervolume']:.4f}"


@app.command()
def front(study: StudyPath, as_json: AsJson = False) -> None:
    """The front of a finished study."""
    from orchestrator.report.terminal import front_table

    found = _front_of(study)
    _print_json(found) if as_json else out.print(front_table(found))


@app.command()
def select(
    study: StudyPath,
    at_most: Annotated[
        list[str] | None, typer.Option("--max", help="metric=value that must not be exceeded.")
    ] = None,
    at_least: Annotated[
        list[str] | None, typer.Option("--min", help="metric=value that must be reached.")
    ] = None,
    knee: Annotated[bool, typer.Option(help="The point where the front bends most.")] = False,
    as_json: AsJson = False,
) -> None:
    """Points of the front within limits, the best first; status 1 if there is none."""
    from orchestrator import pareto
    from orchestrator.pareto import Objective
    from orchestrator.report.terminal import front_table

    found = _front_of(study)
    objectives = [Objective(**objective) for objective in found["objectives"]]
    metrics = [point["metrics"] for point in found["points"]]
    try:
        chosen = pareto.select(
            metrics, objectives, max=_limits(at_most, "--max"), min=_limits(at_least, "--min")
        )
    except ValueError as error:
        raise BadInput([str(error)]) from error
    if knee and chosen:
        best = pareto.knee(pareto.normalise([metrics[i] for i in chosen], objectives))
        chosen = [chosen[best]]
    points = [found["points"][index] for index in chosen]
    if as_json:
        _print_json(points)
    elif points:
        out.print(front_table(found | {"points": points}))
    else:
        err.print("No point of the front keeps these limits.")
    raise typer.Exit(OK if points else NO_FRONT)


def _limits(texts: list[str] | None, option: str) -> dict[str, float]:
    limits: dict[str, float] = {}
    problems = []
    for text in texts or []:
        name, _, value = text.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            problems.append(f"{option} {text}: expected metric=number, as in latency_ms=5.")
    if problems:
        raise BadInput(problems)
    return limits


@app.command()
def export(
    trial: Annotated[str, typer.Argument(help="The trial's id, or the start of it.")],
    folder: Annotated[Path, typer.Argument(help="Where the artifact goes; must not exist.")],
    study: Annotated[
        Path | None, typer.Option(help="The study's folder. Default: the one in runs/ that has it.")
    ] = None,
) -> None:
    """Copy a trial's artifact, checked against its hashes; built again if it was not kept."""
    from orchestrator.artifact import DamagedArtifact, verify
    from orchestrator.rebuild import artifact_of, find_trial

    if folder.exists():
        raise BadInput([f"{folder} exists already; name a new folder."])
    home, place = find_trial(trial, study)
    try:
        source = artifact_of(home, place, note=lambda text: err.print(f"  {text}"))
        verify(source)
    except DamagedArtifact as error:
        err.print(f"[red]✗[/] {_plain(str(error))}")
        raise typer.Exit(NO_FRONT) from error
    shutil.copytree(source, folder)
    out.print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


@app.command()
def measure(
    artifact: Annotated[Path, typer.Argument(help="An artifact's folder.")],
    study: Annotated[
        Path | None,
        typer.Option(help="Its study, for quality and speed-up. Default: found above it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure an artifact again, here, on this machine."""
    from orchestrator.artifact import DamagedArtifact
    from orchestrator.rebuild import measure_again
    from orchestrator.report.terminal import measurement_table

    try:
        measured = measure_again(artifact, study)
    except DamagedArtifact as error:
        err.print(f"[red]✗[/] {_plain(str(error))}")
        raise typer.Exit(NO_FRONT) from error
    _print_json(measured) if as_json else out.print(measurement_table(measured))


@app.command()
def report(study: StudyPath, as_json: AsJson = False) -> None:
    """Write report.html anew from front.json."""
    from orchestrator.report import write_report

    _front_of(study)
    path = write_report(study)
    _print_json({"report": str(path)}) if as_json else out.print(str(path))


def _front_of(study: Path) -> dict[str, Any]:
    from orchestrator.front import read_front

    try:
        return read_front(study)
    except FileNotFoundError as error:
        raise BadInput([f"{study} has no front.json; run its recipe first."]) from error


if __name__ == "__main__":
    main()
