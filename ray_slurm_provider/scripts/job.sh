# Everything below is the same in every job of ray-slurm-provider.

# Write why this node does not come up where `ray up` and the autoscaler read it, and end the job.
ray_slurm_fail() {
    trap - EXIT
    printf '%s\n' "$1" | tee "$RAY_SLURM_DIR/nodes/$RAY_CLOUD_INSTANCE_ID.reason" >&2
    exit "${2:-1}"
}

# Run one command of the YAML in this very shell: what it exports stays in force.
ray_slurm_step() {
    ray_slurm_current=$1
    printf '+ %s\n' "$2"
    eval "$2"
    ray_slurm_code=$?
    [ "$ray_slurm_code" -eq 0 ] || ray_slurm_fail "$ray_slurm_current failed with exit code $ray_slurm_code: $2" "$ray_slurm_code"
}

# A command that ends the shell itself is told as well.
trap 'ray_slurm_code=$?; ray_slurm_fail "the job ended with exit code $ray_slurm_code in $ray_slurm_current" "$ray_slurm_code"' EXIT
ray_slurm_current="its first lines"

# The head starts when `ray up` has put everything in place; usually it has, long before the job runs.
ray_slurm_wait_for_go() {
    ray_slurm_current="the wait for ray up"
    ray_slurm_waited=0
    until [ -e "$1" ]; do
        # Listing the directory makes a network file system look again.
        ls "$RAY_SLURM_DIR/nodes" >/dev/null 2>&1 || ray_slurm_fail "the cluster directory $RAY_SLURM_DIR cannot be seen on $(hostname): is state_dir on a shared file system?"
        [ "$ray_slurm_waited" -lt 6000 ] || ray_slurm_fail "ray up was interrupted before it had put everything in place; run it again"
        sleep 0.1
        ray_slurm_waited=$((ray_slurm_waited + 1))
    done
}

# Become the node agent, or another module: no shell stays behind that could die before Ray does.
ray_slurm_become_agent() {
    ray_slurm_current="the start of the node agent"
    if [ -n "$1" ]; then
        ray_slurm_python=$1
        [ -x "$ray_slurm_python" ] || ray_slurm_fail "the Python $ray_slurm_python cannot be seen on $(hostname): put the environment on a shared file system, or name another with provider.slurm.python"
    else
        ray_slurm_python=$(command -v python || command -v python3) || ray_slurm_fail "the setup commands leave no python on PATH ($PATH)"
    fi
    ray_slurm_why=$("$ray_slurm_python" -c 'import ray_slurm_provider.agent' 2>&1) || ray_slurm_fail "the Python $ray_slurm_python on $(hostname) cannot import ray_slurm_provider (${ray_slurm_why##*$'\n'}): install it there, or activate the right environment in setup"
    trap - EXIT
    # Not as an argument: everybody on the host may read those.
    RAY_SLURM_SPEC=$2 exec "$ray_slurm_python" -u -m "${3:-ray_slurm_provider.agent}"
}
