#!/usr/bin/env bash
# Install what the tests need and run them all, those on a real SLURM included.
#
#   ./tests/run.sh [PYTEST ARGUMENT...]
#   ./tests/run.sh --ray 2.55.0 [PYTEST ARGUMENT...]   contract tests and one cluster test with that Ray
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$clone"

# shellcheck source=deploy/prerequisites.sh
. deploy/prerequisites.sh
install_prerequisites sshd:openssh-server ip:iproute2

if [ "${1:-}" = --ray ]; then
    version=${2:?--ray needs a version, for example 2.55.0}
    shift 2
    venv=$clone/.venv-ray-$version
    EXTRAS="[dev]" make_venv "$venv" "$clone" "ray[default]==$version"
    set -- tests/contract tests/slurm/test_one_cluster.py "$@"
else
    venv=$clone/.venv
    EXTRAS="[dev]" make_venv "$venv" "$clone"
fi
exec "$venv/bin/python" -m pytest "$@"
