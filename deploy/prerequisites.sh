# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh: what a bare Debian or Ubuntu machine lacks.

# install_prerequisites [TOOL:PACKAGE...]: install the Debian packages of these and of the usual tools that are
# missing; says so first. Uses sudo when not root.
install_prerequisites() {
    local missing=() pair tool package
    for pair in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client rsync:rsync "$@"; do
        tool=${pair%%:*} package=${pair##*:}
        PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || missing+=("$package")
    done
    if ! find_python >/dev/null; then
        missing+=(python3 python3-venv)
    elif ! "$(find_python)" -c 'import ensurepip, venv' 2>/dev/null; then
        missing+=("$("$(find_python)" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')")
    fi
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "Missing on this machine: ${missing[*]}. Installing with apt-get."
    local sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || {
            echo "sudo is not here; as root: apt-get install ${missing[*]}" >&2
            return 1
        }
        sudo=(sudo)
    fi
    command -v apt-get >/dev/null || {
        echo "apt-get is not here; install these in your system's way: ${missing[*]}" >&2
        return 1
    }
    "${sudo[@]}" apt-get update -qq
    # The daemons are ours to start: the packages' own services would only fail without a configuration.
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    find_python >/dev/null || {
        echo "Python 3.10 or newer is needed; this system has $(python3 --version 2>&1)" >&2
        return 1
    }
}

# Print a Python of 3.10 or newer.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# make_venv DIR REQUIREMENT...: a virtual environment with this package in it.
make_venv() {
    local venv=$1 clone=$2
    shift 2
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "Making a virtual environment in $venv"
        rm -rf "$venv"
        "$(find_python)" -m venv "$venv"
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$clone${EXTRAS:-}" "$@"
    # pip compiles what it installs, but not what is editable.
    "$venv/bin/python" -m compileall -q "$clone/ray_slurm_provider"
}
