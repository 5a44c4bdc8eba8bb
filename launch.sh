#!/usr/bin/env bash
# From a fresh clone to a Pareto front in one command; `./launch.sh --help` says how.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
venv="$root/.venv"
use_venv=true

usage() {
    cat <<'EOF'
usage: ./launch.sh [--no-venv] [VERB …]

  ./launch.sh                               install what is missing, run recipes/quickstart.yaml
  ./launch.sh run RECIPE [key.path=value …] run a study; the same command again goes on with it
  ./launch.sh test [--system] [pytest …]    install what the tests need and run them; --system also
                                            installs chromium, slurm, postgresql and redis with
                                            apt-get where it can (as root)
  ./launch.sh slurm RECIPE [key.path=value …] --nodes 4 --gpus-per-node 8 [-- SBATCH-FLAG …]
                                            run a study as a job of Slurm
  ./launch.sh VERB …                        any other verb goes to slimtune: plan, status, front,
                                            select, export, measure, report, fetch, doctor, submit,
                                            job
  ./launch.sh --help                        this text

  --no-venv   use the active environment as it is and install nothing

The first call makes .venv with Python 3.11 to 3.13 and the pinned versions of constraints.txt;
later calls install again only when pyproject.toml or constraints.txt has changed.
PYTHON=/path/to/python3 chooses the interpreter.

torch comes from wherever pip is configured to look. For another build (CPU only: a few hundred MB
instead of several GB; or another CUDA version) name its index before the first call:
  PIP_INDEX_URL=…        in place of the configured index
  PIP_EXTRA_INDEX_URL=…  beside it
EOF
}

say() { printf '%s\n' "launch: $*" >&2; }
die() {
    say "$@"
    exit 2
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11, 3.12 or 3.13 found; install one or set PYTHON=/path/to/python3"
}

# What an installation was made from. The folder is in it because scripts in a venv name their path.
fingerprint() {
    { printf '%s\n' "$root" && cat -- "$root/pyproject.toml" "$root/constraints.txt"; } | cksum
}

# current NAME: is the set of packages NAME (run, test) installed and up to date? Starts no Python.
current() {
    [[ -x "$venv/bin/python" && -x "$venv/bin/slimtune" && -f "$venv/.installed-$1" ]] &&
        [[ "$(<"$venv/.installed-$1")" == "$(fingerprint)" ]]
}

make_venv() {
    local python
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1 && supported "$venv/bin/python"; then
        return
    fi
    python="$(find_python)"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear -- "$venv" >&2 ||
        die "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
}

has_driver() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }

announce_torch() {
    local pin
    pin="$(grep '^torch==' -- "$root/constraints.txt")"
    if has_driver; then
        say "NVIDIA driver found: taking $pin with CUDA if pip is offered it"
    else
        say "no NVIDIA driver found: taking $pin as pip is offered it, a CPU build is enough (see --help)"
    fi
}

report_torch() {
    local version
    version="$("$1" -c 'from importlib.metadata import version; print(version("torch"))')" ||
        die "torch is not installed in the environment of $1"
    say "torch build: $version"
    if [[ "$version" == *+cpu ]] && has_driver; then
        say "warning: this build cannot use the GPU; --help says how to choose another"
    fi
}

# install NAME EXTRAS…: one pip call, then the stamps that `current` reads.
install() {
    local name="$1" extras="$2" quiet=()
    make_venv
    rm -f -- "$venv"/.installed-*
    announce_torch
    [[ -t 2 ]] || quiet=(--quiet)
    say "installing the pinned packages into .venv; the first time this takes minutes"
    (cd -- "$root" && .venv/bin/python -m pip install "${quiet[@]}" --disable-pip-version-check \
        -c constraints.txt -e ".$extras" >&2)
    report_torch "$venv/bin/python"
    fingerprint >"$venv/.installed-run"
    [[ "$name" == run ]] || fingerprint >"$venv/.installed-$name"
}

# The system packages that the tests of clusters, stores and the report want.
install_system() {
    local missing=()
    command -v chromium >/dev/null || missing+=(chromium)
    command -v ip >/dev/null || missing+=(iproute2)
    command -v slurmctld >/dev/null || missing+=(slurm-wlm)
    command -v pg_ctlcluster >/dev/null || missing+=(postgresql)
    command -v redis-server >/dev/null || missing+=(redis-server)
    [[ ${#missing[@]} -gt 0 ]] || return 0
    if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
        say "not installing ${missing[*]}: that needs root and apt-get; their tests will be skipped"
        return 0
    fi
    say "installing with apt-get: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2 ||
        say "warning: apt-get failed; the tests that need ${missing[*]} will be skipped"
}

run_slimtune() {
    if [[ "$use_venv" == true ]]; then
        case "${1:-}" in
            submit | job) current jobs || install jobs "[jobs]" ;;
            *) current run || install run "" ;;
        esac
        exec "$venv/bin/slimtune" "$@"
    fi
    local python="${PYTHON:-python3}"
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -c \
        'import sys; sys.argv[0] = "slimtune"; from orchestrator.cli import main; sys.exit(main())' "$@"
}

run_tests() {
    local python="${PYTHON:-python3}"
    if [[ "${1:-}" == --system ]]; then
        shift
        install_system
    fi
    if [[ "$use_venv" == true ]]; then
        current test || install test "[deepspeed,demo,dev,jobs,postgresql,s3,tune]"
        python="$venv/bin/python"
    else
        report_torch "$python"
    fi
    # The whole suite, much of which waits, on two cores; single files start sooner without.
    local parallel=(-n 3 --dist loadfile)
    [[ $# == 0 || "$1" == -m ]] || parallel=()
    [[ ${#parallel[@]} == 0 ]] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    cd -- "$root"
    exec "$python" -m pytest -ra --durations=10 "${parallel[@]}" "$@"
}

if [[ "${1:-}" == --no-venv ]]; then
    use_venv=false
    shift
fi
case "${1:-}" in
    "")
        cd -- "$root"
        run_slimtune run recipes/quickstart.yaml
        ;;
    -h | --help | help) usage ;;
    test) run_tests "${@:2}" ;;
    run)
        [[ $# -ge 2 ]] || die "run needs a recipe, for instance: ./launch.sh run recipes/quickstart.yaml"
        run_slimtune "$@"
        ;;
    *) run_slimtune "$@" ;;
esac
