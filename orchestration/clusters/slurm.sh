#!/usr/bin/env bash
@OPTIONS@
# Written by `comp cluster slurm`; submit it with sbatch.
set -euo pipefail
umask 077

@EXPORTS@
@SECRETS@
@SETUP@
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    export RAY_AUTH_TOKEN
fi

export num_nodes=${SLURM_JOB_NUM_NODES:-1}
head_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# COMP_HEAD_IP chooses among several networks of the head.
export head_ip=${COMP_HEAD_IP:-$(getent ahostsv4 "$head_host" | awk 'NR == 1 { print $1 }')}
export port=$((20000 + 10 * (SLURM_JOB_ID % 1000)))
export RAY_ADDRESS="$head_ip:$port"

node_options=(--num-cpus=@CPUS@ --num-gpus=@GPUS@ --disable-usage-stats)
head_options=(
    --dashboard-host=127.0.0.1 "--dashboard-port=$((port + 1))"
    "--ray-client-server-port=$((port + 2))" "--dashboard-agent-listen-port=$((port + 3))"
)

# Every host runs this, as a part of the step that ends with the job.
one_node() {
    if [ "$SLURM_NODEID" -eq 0 ]; then
        exec ray start --head "--node-ip-address=$head_ip" "--port=$port" "$@" --block
    fi
    until (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null; do sleep 1; done
    exec ray start "--address=$head_ip:$port" --num-cpus=@CPUS@ --num-gpus=@GPUS@ \
        --disable-usage-stats "--dashboard-agent-listen-port=$((port + 4))" --block
}
export -f one_node

on_own_hosts() {
    srun --ntasks-per-node=1 ray symmetric-run --address="$RAY_ADDRESS" \
        --min-nodes="$num_nodes" "${node_options[@]}" -- @COMMAND@
}

on_shared_hosts() {
    srun --overlap --ntasks-per-node=1 bash -c 'one_node "$@"' one_node \
        "${node_options[@]}" "${head_options[@]}" &
    local nodes=$! code=0
    comp cluster status --address "$RAY_ADDRESS" --wait-nodes "$num_nodes" --timeout 600 >&2 &&
        @COMMAND@ || code=$?
    kill -TERM "$nodes" 2>/dev/null || true
    wait "$nodes" 2>/dev/null || true
    return "$code"
}

if [ @EXCLUSIVE@ = 1 ] && ray symmetric-run --help >/dev/null 2>&1; then
    on_own_hosts &
else
    on_shared_hosts &
fi
work=$!

# Slurm sends SIGTERM a while before the time limit: stages end, and the job queues up again.
out_of_time=0
trap 'out_of_time=1; pkill -TERM -P "$work" -f "comp study" || true' TERM
code=0
while true; do
    code=0
    wait "$work" || code=$?
    kill -0 "$work" 2>/dev/null || break
done
if [ "$out_of_time" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
