"""The command: plan · run · status · front · select · export · measure · report · fetch · slurm."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from orchestrator.trial import BadInput

OK, NO_FRONT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One recipe in, a Pareto front of deployable models out.",
)
out, err = Console(), Console(stderr=True)

RecipePath = Annotated[
    Path, typer.Argument(help="The recipe, a YAML file; or the folder of a study that has one.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that replace the recipe's: key.path=value …")
]
StudyPath = Annotated[
    Path, typer.Argument(help="The study's folder, for instance runs/quickstart.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the command; a user's mistake ends with one message and status 2, never a stack trace."""
    with _second_interrupt_ends_now():
        status = _run_app()
        if status == INTERRUPTED:
            err.print("Interrupted. The same command goes on from here.")
    sys.exit(status)


@contextmanager
def _second_interrupt_ends_now() -> Iterator[None]:
    """The first Ctrl-C is a KeyboardInterrupt, as ever; the next one waits for nothing.

    Being asked to terminate, as by `ray job stop` and schedulers, is the same.
    """

    def end_now(signum: int, frame: FrameType | None) -> None:
        err.show_cursor()
        err.print("Ended at once. The same command goes on from here.")
        os._exit(INTERRUPTED)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, end_now)
        raise KeyboardInterrupt

    usual: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    # Else somebody wants it otherwise, or ignored.
    before = {each: usual[each] for each in usual if signal.getsignal(each) is usual[each]}
    for each in before:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _run_app() -> int:
    try:
        return app(prog_name="slimtune", standalone_mode=False) or OK
    except BadInput as error:
        _complain(error.problems)
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # who reads the output has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        what = f"The disk is full: {error.filename or error}; once there is room, the same command goes on."
        _complain([what])
        return NO_FRONT
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own complaints about usage have one
            raise
        _complain([error.format_message()])
        return BAD_INPUT


def _complain(problems: list[str]) -> None:
    for problem in problems:
        _say_failure(problem)
    if len(problems) > 1:
        err.print(f"{len(problems)} problems; nothing was started.")


def _say_failure(text: str) -> None:
    err.print(f"[red]✗[/] {escape(text)}", highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=1, ensure_ascii=False))


def _finite(value: Any) -> Any:
    """JSON values with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        bool,
        typer.Option(
            "--dry-run", help="Every distinct path once, two steps on 32 rows; writes no study."
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="Where to train: cpu, cuda:0. Default: a GPU if there is one."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="End with status 1 if a trial failed with reason `error`."),
    ] = False,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="Where another driver runs the study, do part of its works, and go on where it ends.",
        ),
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

    from orchestrator.guest import help_out
    from orchestrator.launch import CutOff
    from orchestrator.ledger import Held, LeaseLost
    from orchestrator.report.terminal import Progress, front_table
    from orchestrator.study import Study
    from orchestrator.trial import NoBaseline

    progress = Progress(loaded.objectives, console=err)
    try:
        with progress:
            if join:
                help_out(loaded, device=device, tell=progress.note)
            front = Study(loaded, watch=progress, device=device).run()
    except (NoBaseline, Held, LeaseLost, CutOff) as error:
        _say_failure(str(error))
        raise typer.Exit(NO_FRONT) from error
    if as_json:
        _print_json(front)
    else:
        out.print(front_table(front, width=out.width))
        told = _last_line(front, Path(loaded.output_dir), progress.elapsed)
        out.print(told, highlight=False, soft_wrap=True)
    raise typer.Exit(_status(front, strict=strict))


def _last_line(front: dict[str, Any], folder: Path, elapsed: str) -> str:
    counts = {name: count for name, count in front["trials"].items() if count}
    reused = counts.pop("reused", 0)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    told += f" ({reused} by earlier runs)" if reused else ""
    return (
        f"{told} in {elapsed} · hypervolume {front['hypervolume']:.4f}"
        f" · report: {folder / 'report.html'}"
    )


def _status(front: dict[str, Any], *, strict: bool) -> int:
    """The exit status of a finished study, with a word on why it is not 0."""
    errors = [trial for trial in front["all_trials"] if trial["reason"] == "error"]
    if not front["points"]:
        _say_failure(f"no trial keeps the limits: {len(front['over_limit'])} are over one.")
        return NO_FRONT
    for trial in errors if strict else ():
        _say_failure(f"trial {trial['trial_id']} failed: {trial['message']}")
    return NO_FRONT if strict and errors else OK


@app.command()
def status(study: StudyPath, as_json: AsJson = False) -> None:
    """What a study has done and is doing, from its ledger; also while it runs, from anywhere."""
    from orchestrator.report.status_table import status_table
    from orchestrator.status import study_status

    found = study_status(study)
    _print_json(found) if as_json else out.print(status_table(found))


@app.command()
def front(study: StudyPath, as_json: AsJson = False) -> None:
    """The front of a finished study."""
    from orchestrator.front import read_front
    from orchestrator.report.terminal import front_table

    found = read_front(study)
    _print_json(found) if as_json else out.print(front_table(found, width=out.width))


@app.command()
def select(
    study: StudyPath,
    at_most: Annotated[
        list[str] | None, typer.Option("--max", help="metric=value that must not be exceeded.")
    ] = None,
    at_least: Annotated[
        list[str] | None, typer.Option("--min", help="metric=value that must be reached.")
    ] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="The point where the front bends most.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Points of the front within limits, the best first; status 1 if there is none."""
    from orchestrator import pareto
    from orchestrator.front import read_front
    from orchestrator.pareto import Objective
    from orchestrator.report.terminal import front_table

    found = read_front(study)
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
        out.print(front_table(found, chosen=points, width=out.width))
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
    as_json: AsJson = False,
) -> None:
    """Copy a trial's artifact, checked against its hashes; built again if it was not kept."""
    from orchestrator.artifact import DamagedArtifact, verify
    from orchestrator.rebuild import artifact_of, copy_artifact, find_trial

    if folder.exists():
        raise BadInput([f"{folder} exists already; name a new folder."])
    home, place = find_trial(trial, study)
    try:
        source = artifact_of(home, place, note=lambda text: err.print(f"  {text}"))
        description = verify(source)
    except DamagedArtifact as error:
        _say_failure(str(error))
        raise typer.Exit(NO_FRONT) from error
    files = copy_artifact(source, folder)
    if as_json:
        _print_json({"trial_id": description["trial_id"], "folder": str(folder), "files": files})
    else:
        out.print(f"{folder}: {', '.join(files)}", highlight=False, soft_wrap=True)


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
        _say_failure(str(error))
        raise typer.Exit(NO_FRONT) from error
    _print_json(measured) if as_json else out.print(measurement_table(measured))


Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard: http://head:8265."
    ),
]
JobId = Annotated[str, typer.Argument(help="What `submit` has printed.")]


@app.command()
def submit(
    recipe: RecipePath,
    address: Address,
    overrides: Overrides = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and end.")] = False,
    send_data: Annotated[
        bool,
        typer.Option(
            "--send-data", help="Send local data along; else the cluster has the paths too."
        ),
    ] = False,
    pip: Annotated[Path | None, typer.Option(help="Requirements that pip installs first.")] = None,
    uv: Annotated[Path | None, typer.Option(help="Requirements that uv installs first.")] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(help="A variable that the cluster has to have, by its name."),
    ] = None,
) -> None:
    """Run the study as a job of a Ray cluster, and end as it does; the same again goes on with it."""
    from orchestrator.launch.ray_jobs import Jobs, Request

    wanted = Request(
        recipe,
        tuple(overrides or ()),
        sends_data=send_data,
        pip=pip,
        uv=uv,
        needs=tuple(secret or ()),
    )
    jobs = Jobs(address)
    job_id = jobs.submit(wanted)
    if detach:
        print(job_id)
        return
    err.print(f"{job_id} on {address}", highlight=False)
    try:
        status = jobs.follow(job_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        err.print(f"It goes on there; slimtune job stop {job_id} ends it.", highlight=False)
        raise
    if status and (why := jobs.why(job_id)):
        err.print(escape(why.splitlines()[0]), highlight=False, soft_wrap=True)
    raise typer.Exit(status)


job = typer.Typer(no_args_is_help=True, help="Studies that were submitted to a Ray cluster.")
app.add_typer(job, name="job")


@job.command("status")
def job_status(job_id: JobId, address: Address, as_json: AsJson = False) -> None:
    """How a job stands: pending, running, succeeded, failed or stopped."""
    from orchestrator.launch.ray_jobs import Jobs

    word, status = Jobs(address).status(job_id)
    _print_json({"job": job_id, "state": word, "exit_status": status}) if as_json else print(word)


@job.command("logs")
def job_logs(job_id: JobId, address: Address) -> None:
    """What a job says, until it has ended; the exit status is its own."""
    from orchestrator.launch.ray_jobs import Jobs

    raise typer.Exit(Jobs(address).follow(job_id, lambda text: print(text, end="", flush=True)))


@job.command("stop")
def job_stop(job_id: JobId, address: Address) -> None:
    """End a job as Ctrl-C would; the same submission goes on later."""
    from orchestrator.launch.ray_jobs import Jobs

    print("stopping" if Jobs(address).stop(job_id) else "has ended already")


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe; without it only machines are looked at.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster, host:port or auto. Default: the recipe's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whether a study can run where it is to run, and what to do where it cannot; then status 2."""
    from orchestrator.doctor import examine
    from orchestrator.recipe import load_recipe
    from orchestrator.report.doctor_table import doctor_table

    loaded = load_recipe(recipe, overrides or []) if recipe else None
    found = examine(loaded, address=address)
    _print_json(found) if as_json else out.print(doctor_table(found))
    raise typer.Exit(OK if found["can_run"] else BAD_INPUT)


@app.command()
def report(study: StudyPath, as_json: AsJson = False) -> None:
    """Write report.html anew from front.json."""
    from orchestrator.front import read_front
    from orchestrator.report import write_report

    read_front(study)
    path = write_report(study)
    _print_json({"report": str(path)}) if as_json else out.print(str(path), soft_wrap=True)


@app.command()
def fetch(
    recipe: RecipePath,
    overrides: Overrides = None,
    to: Annotated[
        str | None,
        typer.Option(help="A folder or URI that gets it all. Default: the hub's own caches."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring models, tokenizers and data here, once and pinned, for machines that see no network."""
    from orchestrator.fetch import fetch as bring
    from orchestrator.fetch import fetched_table

    told = bring(recipe, overrides or [], to=to)
    if as_json:
        _print_json(told)
    else:
        out.print(fetched_table(told))
        out.print(
            f"{told['file']} says the same. Without network:", highlight=False, soft_wrap=True
        )
        print(f"  {told['command']}")


@app.command()
def slurm(
    recipe: RecipePath,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="key.path=value …, then after `--` further flags of sbatch."),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Machines of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each.")] = 0,
    no_ray: Annotated[
        bool, typer.Option("--no-ray", help="On one node, one trial after another, without Ray.")
    ] = False,
    template: Annotated[
        Path | None, typer.Option(help="The site's copy of cluster/slurm/study.sh.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--print", help="Print the script; submit nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the study as a job of Slurm; with --array=0-4 among its flags once for each of these seeds."""
    from orchestrator.launch.slurm import TEMPLATE, Job, batch_script, parted, submit

    overrides, flags = parted(arguments or [])
    job = Job(num_nodes=nodes, gpus_per_node=gpus_per_node, use_ray=not no_ray, flags=flags)
    script = batch_script(recipe, overrides, job, template=template or TEMPLATE)
    number = None if show else submit(script)
    if as_json:
        _print_json({"job_id": number, "script": script})
    else:
        print(script if number is None else f"Submitted job {number}.", end="" if show else "\n")


if __name__ == "__main__":
    main()
