"""A study as a job of a Ray cluster: packed, submitted, watched and stopped from anywhere.

The job's driver runs on the cluster's head, from the code that is sent along. What a job is told
stands in Ray's dashboard, so secrets go by name alone: the cluster's own environment has them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import orchestrator.launch.ray_cluster  # noqa: F401  isort: skip (it sets what ray reads when it is imported)

from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from orchestrator.recipe import Recipe, load_recipe
from orchestrator.recipe_file import override, read
from orchestrator.trial import BadInput

CODE = Path(__file__).resolve().parents[1]
MOST_MB = 100.0  # that a cluster takes with a job
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
STOPPED = 130  # as if the driver had been interrupted: the same command goes on
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """A study to be run: its recipe and overrides, and what goes with it.

    `sends_data` packs what the recipe names by local paths; else the cluster has it under the same
    ones. `pip` and `uv` are files of requirements that Ray installs first. `needs` are names of
    environment variables that the cluster has to have.
    """

    recipe: Path
    overrides: tuple[str, ...] = ()
    sends_data: bool = False
    pip: Path | None = None
    uv: Path | None = None
    needs: tuple[str, ...] = ()


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`. Raises `BadInput` where there is none."""

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        logging.getLogger("ray").setLevel(logging.ERROR)
        self.address = address
        try:
            self._client = JobSubmissionClient(address)
        except (ImportError, RuntimeError) as error:
            raise BadInput(['jobs need more of Ray: pip install "slimtune[jobs]".']) from error
        except (ConnectionError, ValueError, AssertionError, RayError) as error:
            raise BadInput([f"--address {address}: {_first_line(error)}."]) from error

    def submit(self, request: Request) -> str:
        """The job's id. Raises `BadInput` for what is wrong with the request."""
        with packed(request) as (folder, entrypoint):
            environment: dict[str, Any] = {"working_dir": str(folder)}
            for tool in ("pip", "uv"):
                if (file := getattr(request, tool)) is not None:
                    environment[tool] = _requirements(file)
            job_id = f"slimtune-{request.recipe.stem}-{secrets.token_hex(3)}"
            try:
                self._client.submit_job(
                    entrypoint=entrypoint, runtime_env=environment, submission_id=job_id
                )
            except RuntimeError as error:
                raise BadInput([f"the cluster refuses the job: {_first_line(error)}."]) from error
        return job_id

    def follow(self, job_id: str, say: Say) -> int:
        """Hand on what the driver says until it has ended, and return its exit status."""

        async def listen() -> None:
            async for text in self._client.tail_job_logs(job_id):
                say(text)

        asyncio.run(listen())
        return self.status(job_id)[1] or 0

    def status(self, job_id: str) -> tuple[str, int | None]:
        """In a word; and the driver's exit status, None while it runs. Raises `BadInput`."""
        try:
            info = self._client.get_job_info(job_id)
        except RuntimeError as error:
            raise BadInput([f"{self.address} knows no job {job_id}."]) from error
        word = str(info.status.value).lower()
        if not info.status.is_terminal():
            return word, None
        if info.status is JobStatus.STOPPED:
            return word, STOPPED
        failed = 0 if info.status is JobStatus.SUCCEEDED else 1
        return word, info.driver_exit_code if info.driver_exit_code is not None else failed

    def why(self, job_id: str) -> str:
        """What Ray says of how it stands."""
        return str(self._client.get_job_info(job_id).message or "")

    def stop(self, job_id: str) -> bool:
        """Whether it ran. The driver has three seconds to end; the same study goes on later."""
        self.status(job_id)
        return bool(self._client.stop_job(job_id))


# -- what is sent --------------------------------------------------------------------------------


@contextmanager
def packed(request: Request) -> Iterator[tuple[Path, str]]:
    """A folder to send, and the command to run in it. Raises `BadInput`, all problems together."""
    recipe = load_recipe(request.recipe, request.overrides)
    source, written = read(request.recipe)
    paths = local_paths(override(written, request.overrides)[0])
    problems = [
        *_folder_problems(recipe),
        *_needs_problems(request),
        *_size_problems(request, paths),
    ]
    if problems:
        raise BadInput(problems)
    with tempfile.TemporaryDirectory(prefix="slimtune-job-") as temporary:
        folder = Path(temporary)
        shutil.copytree(CODE, folder / CODE.name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "recipe.yaml").write_text(source or yaml.safe_dump(written), encoding="utf-8")
        there = {key: str(path.resolve()) for key, path in paths.items()}
        if request.sends_data:
            there = {key: _copied(path, folder / "data" / key) for key, path in paths.items()}
        arguments = [*request.overrides, *(f"{key}={path}" for key, path in there.items())]
        if not any(text.startswith("name=") for text in request.overrides):
            arguments.append(f"name={recipe.name}")
        run = ["python", "-m", "orchestrator.cli", "run", "recipe.yaml", *arguments]
        needed = [f': "${{{name}:?is not set on the cluster}}" && ' for name in request.needs]
        yield folder, "".join(needed) + "exec " + shlex.join(run)


def local_paths(written: Mapping[str, Any]) -> dict[str, Path]:
    """What a recipe, as it is written, names of this machine, by key: data and models."""
    found: dict[str, Path] = {}
    for key, text in _texts({name: written.get(name) for name in ("model", "task")}):
        if ("/" in text or "." in text) and Path(text).exists():
            found[key] = Path(text)
    return found


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{number}")


def _copied(path: Path, folder: Path) -> str:
    """Its name below the folder that is sent."""
    folder.mkdir(parents=True)
    target = folder / path.name
    shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    return str(target.relative_to(folder.parents[1]))


def _folder_problems(recipe: Recipe) -> list[str]:
    folder = str(recipe.output_dir)
    if Path(folder).is_absolute() or "://" in folder:
        return []
    what = f"output_dir: `{folder}` is relative, and a job's folder goes with the job"
    return [f"{what}; name a folder that all nodes of the cluster share."]


def _needs_problems(request: Request) -> list[str]:
    wrong = [name for name in request.needs if not NAME.fullmatch(name)]
    found = [
        f"--secret {name}: give the name of a variable alone, never a value." for name in wrong
    ]
    files = {"--pip": request.pip, "--uv": request.uv}
    if request.pip and request.uv:
        found.append("--pip and --uv: give one of them.")
    found += [
        f"{key} {file} is no file." for key, file in files.items() if file and not file.is_file()
    ]
    return found


def _size_problems(request: Request, paths: Mapping[str, Path]) -> list[str]:
    if not request.sends_data:
        return []
    size_mb = sum(_size(path) for path in paths.values()) / 1e6
    if size_mb <= MOST_MB:
        return []
    what = f"--send-data: {', '.join(sorted(paths))} take {size_mb:.0f} MB, a job {MOST_MB:.0f}"
    return [f"{what}; put them where the cluster finds them and name that place in the recipe."]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _requirements(file: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line]


def _first_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "401" in text or "uthenticat" in text or "nauthorized" in text:
        return "it asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
    return text.splitlines()[0].rstrip(".")
