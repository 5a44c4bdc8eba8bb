"""launch.sh finds Python, installs once, and hands over what it was given. Nothing is installed here."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Stands in for Python: tells the log what it was asked, makes a venv of itself, installs a command.
PYTHON = """#!/bin/bash
echo "python $*" >> "$LOG"
case "$*" in
    *version_info*) exit "${TOO_OLD:-0}" ;;
    *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *"pip --version"*) ;;
    *"pip install"*)
        [[ -z "${NO_NETWORK:-}" ]] || exit 1
        printf '#!/bin/bash\\nprintf "%%s\\\\n" "$@"\\nexit "${STATUS:-0}"\\n' > .venv/bin/slimtune
        chmod +x .venv/bin/slimtune ;;
    *'version("torch")'*) echo 2.13.0+cpu ;;
    *pytest*) printf '%s\\n' "$@" ;;
    *"orchestrator.cli"*) printf '%s\\n' "$PYTHONPATH" "${@:3}" ;;
esac
"""


class Clone:
    """A clone of the repository as far as launch.sh sees it, in a folder with an awkward name."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a 'quoted' folder"
        self.log = folder / "log"
        self.bin = folder / "bin"
        for made in (self.root, self.bin):
            made.mkdir()
        for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(REPOSITORY / name, self.root)
        self.command("python3", PYTHON)
        for name in ("python3.13", "python3.12", "python3.11"):
            self.command(name, "#!/bin/bash\nexit 1\n")
        self.command("nvidia-smi", "#!/bin/bash\nexit 9\n")

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def launch(
        self, *arguments: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        kept = {
            k: v for k, v in os.environ.items() if k not in ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")
        }
        path = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(
            [self.root / "launch.sh", *arguments],
            cwd=cwd or self.root,
            env=kept | {"PATH": path, "LOG": str(self.log)} | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "pip install" in line]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_help_says_every_form_and_installs_nothing(clone):
    done = clone.launch("--help")
    assert done.returncode == 0
    forms = ("run RECIPE", "slurm RECIPE", "test [--system]", "--no-venv", "VERB")
    for form in (*forms, "PIP_EXTRA_INDEX_URL"):
        assert form in done.stdout
    assert clone.log.read_text() == "" and not (clone.root / ".venv").exists()


def test_without_arguments_it_installs_and_runs_the_quickstart(clone):
    done = clone.launch()
    assert done.stdout.splitlines() == ["run", "recipes/quickstart.yaml"]
    assert clone.installs() == [
        "python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ."
    ]
    assert "no NVIDIA driver found: taking torch==" in done.stderr
    assert "torch build: 2.13.0+cpu" in done.stderr


def test_the_second_time_starts_no_python_at_all(clone):
    clone.launch()
    done = clone.launch()
    assert done.stdout.splitlines() == ["run", "recipes/quickstart.yaml"]
    assert clone.log.read_text() == "" and done.stderr == ""


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_it_installs_again_when_what_it_installs_from_changed(clone, name):
    clone.launch()
    with (clone.root / name).open("a") as stream:
        stream.write("\n# changed\n")
    clone.launch()
    assert len(clone.installs()) == 1


def test_it_installs_again_when_the_folder_was_moved(clone, tmp_path):
    clone.launch()
    clone.root = clone.root.rename(tmp_path / "elsewhere")
    clone.launch()
    assert len(clone.installs()) == 1


def test_an_installation_that_failed_is_tried_again(clone):
    assert clone.launch(NO_NETWORK="1").returncode == 1
    clone.launch()
    assert len(clone.installs()) == 1


def test_arguments_and_status_pass_through_from_any_folder(clone, tmp_path):
    done = clone.launch(
        "run", "my recipe.yaml", 'task.name=it\'s "x" $HOME *', cwd=tmp_path, STATUS="130"
    )
    assert done.stdout.splitlines() == ["run", "my recipe.yaml", 'task.name=it\'s "x" $HOME *']
    assert done.returncode == 130


def test_other_verbs_go_to_slimtune(clone):
    assert clone.launch("front", "runs/quickstart", "--json").stdout.split() == [
        "front",
        "runs/quickstart",
        "--json",
    ]


def test_run_without_a_recipe_is_bad_input(clone):
    done = clone.launch("run")
    assert done.returncode == 2 and "run needs a recipe" in done.stderr
    assert not (clone.root / ".venv").exists()


def test_tests_get_their_extras_and_their_arguments(clone):
    done = clone.launch("test", "-k", "a or b")
    assert done.stdout.splitlines() == ["-m", "pytest", "-ra", "--durations=10", "-k", "a or b"]
    assert clone.installs()[0].endswith("-e .[deepspeed,demo,dev,jobs,postgresql,s3,tune]")
    assert clone.launch("test").stdout and clone.installs() == []
    assert clone.launch("front").stdout and clone.installs() == []


def test_a_run_before_the_tests_does_not_stand_in_for_their_extras(clone):
    clone.launch()
    clone.launch("test")
    assert clone.installs()[0].endswith("-e .[deepspeed,demo,dev,jobs,postgresql,s3,tune]")


def test_no_venv_uses_the_active_python_as_it_is(clone):
    done = clone.launch("--no-venv", "run", "x.yaml", PYTHONPATH="/before")
    assert done.stdout.splitlines() == [f"{clone.root}:/before", "run", "x.yaml"]
    assert clone.launch("--no-venv", "test", "-x").stdout.split()[-1] == "-x"
    assert clone.installs() == [] and not (clone.root / ".venv").exists()


def test_a_python_that_is_too_old_is_not_taken(clone):
    done = clone.launch(TOO_OLD="1")
    assert done.returncode == 2
    assert "no Python 3.11, 3.12 or 3.13 found" in done.stderr


def test_a_cpu_build_on_a_machine_with_a_driver_is_said(clone):
    clone.command("nvidia-smi", "#!/bin/bash\nexit 0\n")
    done = clone.launch()
    assert "NVIDIA driver found" in done.stderr
    assert "warning: this build cannot use the GPU" in done.stderr


def test_system_packages_are_asked_for_only_where_missing(clone):
    for name in ("chromium", "slurmctld", "pg_ctlcluster", "redis-server"):
        clone.command(name, "#!/bin/bash\n")
    clone.command("apt-get", '#!/bin/bash\necho "apt-get $*" >> "$LOG"\n')
    clone.command("id", "#!/bin/bash\necho 0\n")
    assert clone.launch("test", "--system", "-x").stdout.split()[-1] == "-x"
    assert "apt-get" not in clone.log.read_text()


@pytest.mark.parametrize(("user", "asked"), [("0", True), ("1000", False)])
def test_only_root_installs_system_packages(clone, user, asked):
    if shutil.which("slurmctld"):
        pytest.skip("slurm is installed here")
    clone.command("apt-get", '#!/bin/bash\necho "apt-get $*" >> "$LOG"\n')
    clone.command("id", f"#!/bin/bash\necho {user}\n")
    done = clone.launch("test", "--system")
    assert done.returncode == 0
    assert ("slurm-wlm" in clone.log.read_text()) == asked
    assert ("needs root" in done.stderr) != asked


def test_constraints_pin_exact_versions_without_a_local_part():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line for line in pins)
    assert len({line.split("==")[0].lower().replace("_", "-") for line in pins}) == len(pins)
