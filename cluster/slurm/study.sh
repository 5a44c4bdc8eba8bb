#!/usr/bin/env bash
# A study as one Slurm job. `slimtune slurm` fills in the two lines `# @…` and submits the script;
# what differs between sites stands first, and `--template FILE` names an edited copy.
# @sbatch
# @study

# -- the site --------------------------------------------------------------------------------------

# Runs on every node before anything else.
prepare() {
    : # module load cuda; export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1
}

# How each command of the study is run. In a container set `python` to the interpreter inside.
in_environment() {
    "$@" # apptainer exec --nv --bind "$PWD" /shared/slimtune.sif "$@"
}

# A folder of each node for temporary files.
scratch() {
    printf '%s\n' "${SLURM_TMPDIR:-/tmp}"
}

# The address by which the other nodes reach this one.
address() {
    in_environment "$python" -c 'import ray; print(ray.util.get_node_ip_address())'
}

start_s=300 # seconds in which all nodes have to join
look_s=10   # seconds between looks of a node that has lost the others

# -- the same everywhere ---------------------------------------------------------------------------

is_open() { (: <"/dev/tcp/$1/$2") 2>/dev/null; }

# Ray over the job's nodes, on ports and in folders of this job; only its own token opens it.
start_ray() {
    local nodes="$SLURM_JOB_NUM_NODES" functions waiting
    head="$(address)"
    port=$((10000 + SLURM_JOB_ID % 10000))
    while is_open "$head" "$port"; do port=$((port + 1)); done
    # Of sockets, whose paths have to be short. Each node has a folder of its own in it: those that
    # share /tmp would take the same names.
    ray_folder="/tmp/slimtune-ray-$SLURM_JOB_ID"
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
    export python job look_s port head ray_folder RAY_AUTH_MODE RAY_AUTH_TOKEN
    functions="$(declare -f)"
    srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none \
        --no-kill --kill-on-bad-exit=1 --wait=0 bash -c "$functions; ray_node" </dev/null &
    ray=$!
    timeout "$start_s" bash -c "$functions; wait_for_nodes" &
    waiting=$!
    wait -n "$ray" "$waiting" && return
    kill "$waiting" 2>/dev/null
    [[ $out_of_time ]] || printf 'slurm: not all %s nodes have joined Ray\n' "$nodes" >&2
    return 1
}

# One node's part of Ray, until its step is told to end; then nothing of it is left.
ray_node() {
    local own options=()
    ray=
    trap 'exit 0' TERM
    trap end_node EXIT
    prepare
    mkdir -p -- "$TMPDIR"
    own="$(address)"
    set -m # process groups of their own
    if [[ $SLURM_PROCID == 0 ]]; then
        printf '%s\n' "$SLURM_STEP_ID" >"$TMPDIR/step"
        options=(--head --port="$port" --include-dashboard=false)
        if in_environment "$python" -c 'import grpc' 2>/dev/null; then # Ray's own client is served
            options+=(--ray-client-server-port="$((port + 10000))")
        fi
        run_ray "${options[@]}"
        return 1 # without the head the others end too
    fi
    while true; do # a node that was cut off, or too busy, joins again
        if timeout "$look_s" bash -c "$(declare -f is_open wait_for_head); wait_for_head"; then
            run_ray --address="$head:$port"
            sleep "$look_s"
        elif batch_host_is_lost; then
            scontrol requeue "$job" # nobody else is left to do that, or to end the job
            return
        fi
    done
}

# Ray with these options on this node, until it ends by itself.
run_ray() {
    local log="$TMPDIR/ray-$SLURM_PROCID.txt"
    in_environment "$python" -m ray.scripts.scripts start "$@" --node-ip-address="$own" \
        --temp-dir="$ray_folder/$SLURM_PROCID" \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 \
        --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
        --disable-usage-stats --block >"$log" 2>&1 &
    ray=$!
    wait "$ray"
    cat -- "$log" >&2
    kill -KILL -- "-$ray" 2>/dev/null
}

# Slurm takes nodes that it has given up out of the job.
batch_host_is_lost() {
    local batch_host nodes
    read -r batch_host nodes < <(squeue --noheader --jobs="$job" --format='%B %N')
    [[ $nodes ]] && ! scontrol show hostnames "$nodes" | grep --quiet --line-regexp "$batch_host"
}

end_node() {
    [[ -z $ray ]] || kill -KILL -- "-$ray"
    wait
    rm -rf -- "$TMPDIR" "$ray_folder/$SLURM_PROCID"
    rmdir -- "$ray_folder"
} 2>/dev/null

wait_for_head() { until is_open "$head" "$port"; do sleep 0.5; done; }

wait_for_nodes() {
    wait_for_head
    until in_environment "$python" -c '
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.5)
' "$head:$port" "$SLURM_JOB_NUM_NODES"; do sleep 1; done # a head that has just begun may refuse
}

# The study's own command, and its exit status. In a group of its own it hears INT like a terminal's.
run_study() {
    if [[ $ray ]]; then
        overrides+=("resources.address=$head:$port")
    else
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_ON_NODE}" # the node may have more
    fi
    set -m
    in_environment "$python" -m orchestrator.cli run "$recipe" "${overrides[@]}" &
    driver=$!
    set +m
    while kill -0 "$driver" 2>/dev/null; do wait "$driver"; done # signals interrupt it
    wait "$driver"
}

# Before the time limit: what Ctrl-C does, after which the same command goes on.
stop_study() {
    out_of_time=true
    [[ -z $driver ]] || kill -INT -- "-$driver" 2>/dev/null
}

# What the study has come to so far.
achieved() {
    in_environment "$python" -c '
import sys
from pathlib import Path
from orchestrator.launch.slurm import achieved
print(*achieved(Path(sys.argv[1])))
' "$output_dir"
}

# Whether Slurm had to go on without one of the nodes.
has_lost_nodes() {
    [[ $(squeue --noheader --jobs="$job" --format=%D) != "$SLURM_JOB_NUM_NODES" ]]
}

# Whether the study had to stop before its end.
is_cut_short() {
    if [[ $driver ]]; then
        [[ $out_of_time && $status == 130 ]]
    else
        [[ $out_of_time ]] || has_lost_nodes
    fi
}

# Ends what this job has started, and nothing else.
end() {
    local step
    trap '' TERM USR1
    trap - EXIT
    [[ -z $driver ]] || kill -KILL -- "-$driver" 2>/dev/null
    if [[ $ray ]]; then
        step="$(cat -- "$TMPDIR/step" 2>/dev/null)"
        if [[ $step ]]; then scancel --signal=TERM "$job.$step"; else kill "$ray"; fi
        wait "$ray"
        rm -rf -- "$ray_folder" # also of a node that lost power, where they share /tmp
    fi
    rm -rf -- "$TMPDIR"
} 2>/dev/null

driver='' ray='' out_of_time='' status=1 job="$SLURM_JOB_ID"
trap stop_study USR1
trap 'exit 143' TERM
trap end EXIT
prepare
export TMPDIR="$(scratch)/slimtune-job-$SLURM_JOB_ID"
mkdir -p -- "$TMPDIR"
if [[ $SLURM_ARRAY_TASK_ID ]]; then
    job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" # a number may be that of the whole array too
    output_dir+="/seed-$SLURM_ARRAY_TASK_ID"
    overrides+=("seed=$SLURM_ARRAY_TASK_ID" "output_dir=$output_dir")
fi
before="$(achieved)"
if { [[ $use_ray == false ]] || start_ray; } && [[ -z $out_of_time ]]; then
    run_study
    status=$?
fi
end
if is_cut_short; then
    if has_lost_nodes || [[ $(achieved) != "$before" ]]; then
        scontrol requeue "$job"
    else # the next time would be the same
        printf 'slurm: no trial was finished and no training saved within the time limit;' >&2
        printf ' more time is needed, or a smaller resources.save_steps\n' >&2
        status=1
    fi
fi
exit "$status"
