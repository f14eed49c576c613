#!/usr/bin/env bash
# From a bare Debian or Ubuntu machine to a Ray cluster that grows and shrinks in a real SLURM.
#
#   ./deploy/quickstart.sh          everything, and back to where it began
#   ./deploy/quickstart.sh --keep   leave the cluster running and say how to use it
set -euo pipefail

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0"; }
keep=no
for word in "$@"; do
    case $word in
        --keep) keep=yes ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Short, for Unix sockets lie below it; below /tmp, for SLURM's daemons want directories that only we can write.
work=${RAY_SLURM_QUICKSTART_DIR:-/tmp/ray-slurm-quickstart-$(id -u)}
sandbox=$work/slurm
yaml=$work/quickstart.yaml
began=$(date +%s)

say() { printf '\n== %s\n' "$*"; }
seconds_since() { echo $(($(date +%s) - $1)); }
# What lies in such a directory tells what is run.
is_private() { [ -d "$1" ] && [ ! -L "$1" ] && [ -O "$1" ] && [ -z "$(find "$1" -maxdepth 0 -perm /022)" ]; }

if { [ -e "$work" ] || [ -L "$work" ]; } && ! is_private "$work"; then
    echo "quickstart: $work must be a directory of yours, and writable by nobody else;" \
        "remove it or set RAY_SLURM_QUICKSTART_DIR" >&2
    exit 1
fi

# shellcheck source=deploy/prerequisites.sh
. "$clone/deploy/prerequisites.sh"
install_prerequisites
make_venv "$clone/.venv" "$clone"
PATH=$clone/.venv/bin:$PATH
installed=$(seconds_since "$began")

watcher=
workload=
finish() {
    code=$?
    trap - EXIT
    for child in $watcher $workload; do kill "$child" 2>/dev/null || true; done
    if [ "$code" -ne 0 ] && is_private "$work" && [ -f "$yaml" ]; then
        echo "quickstart: something failed; taking everything down again" >&2
        take_down >/dev/null 2>&1 || true
    fi
    exit "$code"
}
# Ray runs what a cached YAML in TMPDIR names.
private_tmp() {
    export TMPDIR="$work/tmp"
    mkdir -p "$TMPDIR"
    chmod 700 "$TMPDIR"
}
take_down() {
    if ray-slurm sandbox env --state-dir "$sandbox" >/dev/null 2>&1; then
        private_tmp
        ray-slurm sandbox run --state-dir "$sandbox" -- ray down "$yaml" --yes || true
    fi
    ray-slurm sandbox down --state-dir "$sandbox"
    rm -rf "$work"
}
other=$(cat "$work/quickstart.pid" 2>/dev/null || true)
if [ -n "$other" ] && grep -qs quickstart.sh "/proc/$other/cmdline"; then
    echo "quickstart: another one is running (process $other); set RAY_SLURM_QUICKSTART_DIR for a second" >&2
    exit 1
fi
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [ -e "$work" ]; then
    say "Clearing away what an earlier run left"
    take_down
fi

say "Starting a real SLURM: 3 nodes of 4 CPUs"
step=$(date +%s)
mkdir -p "$(dirname "$work")"
mkdir -m 755 "$work"
echo $$ >"$work/quickstart.pid"
ray-slurm sandbox up --nodes 3 --cpus 4 --memory 8G --state-dir "$sandbox"
eval "$(ray-slurm sandbox env --state-dir "$sandbox")"
sinfo
slurm_took=$(seconds_since "$step")

say "Starting a Ray cluster in it: ray up $yaml"
step=$(date +%s)
# The template as it is, with a place of its own and a short idle time, so that you see it shrink.
sed -e "s|^cluster_name: .*|cluster_name: quickstart|" \
    -e "s|^    state_dir: .*|    state_dir: $work/state|" \
    -e "s|^idle_timeout_minutes: .*|idle_timeout_minutes: 0.25|" \
    "$clone/cluster_configs/minimal.yaml" >"$yaml"
export RAY_UP_enable_autoscaler_v2=1 RAY_USAGE_STATS_ENABLED=0
private_tmp
ray up "$yaml" --no-config-cache --yes
up_took=$(seconds_since "$step")

say "12 tasks of one CPU: more than one node has. The cluster grows by submitting jobs"
step=$(date +%s)
ray-slurm nodes "$yaml" --watch &
watcher=$!
ray exec "$yaml" --no-config-cache "python $(printf %q "$clone/examples/estimate_pi.py")" >"$work/workload.log" 2>&1 &
workload=$!
wait "$workload" || { cat "$work/workload.log" >&2; exit 1; }
workload=
grep -E '^(pi is|[0-9]+ tasks|SLURM job)' "$work/workload.log"
jobs_used=$(grep -c '^SLURM job' "$work/workload.log")
work_took=$(seconds_since "$step")

if [ "$keep" = yes ]; then
    kill "$watcher"; watcher=
    trap - EXIT
    cat <<TEXT

== The cluster is running. In this shell, or another:

  source $clone/.venv/bin/activate
  eval "\$(ray-slurm sandbox env --state-dir $sandbox)"
  export TMPDIR=$TMPDIR

  ray-slurm nodes $yaml --watch          the jobs, live
  ray exec $yaml "python $clone/examples/estimate_pi.py"
  eval "\$(ray-slurm env $yaml)" && ray status

When you are done:

  ray down $yaml --yes && ray-slurm sandbox down --state-dir $sandbox && rm -r $work
TEXT
    exit 0
fi

say "Nothing to do any more. The cluster shrinks to its head"
step=$(date +%s)
deadline=$(($(date +%s) + 180))
until [ "$(squeue --noheader --me | wc -l)" -le 1 ]; do
    [ "$(date +%s)" -lt "$deadline" ] || { echo "quickstart: the workers did not go" >&2; exit 1; }
    sleep 1
done
shrink_took=$(seconds_since "$step")
sleep 3 # let the table show the last change
kill "$watcher"
watcher=

say "Taking it down: ray down $yaml"
step=$(date +%s)
ray down "$yaml" --yes
[ -z "$(squeue --noheader --me)" ] || { echo "quickstart: jobs are left" >&2; squeue >&2; exit 1; }
ray-slurm sandbox down --state-dir "$sandbox"
rm -rf "$work"
down_took=$(seconds_since "$step")
trap - EXIT

say "Shown: a Ray cluster on a real SLURM that grew to $jobs_used jobs for 12 tasks and shrank again" \
    "(install $installed s, SLURM up $slurm_took s, ray up $up_took s, work $work_took s, shrink $shrink_took s, down $down_took s)"
