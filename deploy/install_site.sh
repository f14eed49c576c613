#!/usr/bin/env bash
# Install ray-slurm-provider and Ray for everybody, into a directory that all hosts see.
#
#   deploy/install_site.sh PREFIX [OPTION...]
#
#   --python PYTHON   interpreter to build on; all hosts must have it at this path  [python3]
#   --ray VERSION     version of Ray                                                [the newest]
#   --modules DIR     directory for the environment module                          [PREFIX/modulefiles]
#
# Running it again brings the installation up to date. Users need no right to write there, and it writes nowhere else.
# The site file goes to PREFIX/etc/ray-slurm/site.yaml or /etc/ray-slurm/site.yaml: ray-slurm deploy --site.
set -euo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; }
fail() {
    echo "install_site: $1" >&2
    exit "${2:-1}"
}

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prefix='' python=python3 ray='ray[default]' modules=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --python | --ray | --modules)
            [ $# -ge 2 ] || fail "$1 needs a value" 2
            case $1 in
                --python) python=$2 ;;
                --ray) ray="ray[default]==$2" ;;
                --modules) modules=$2 ;;
            esac
            shift 2
            ;;
        -*) usage >&2; fail "unknown option $1" 2 ;;
        *)
            [ -z "$prefix" ] || fail "two prefixes: $prefix and $1" 2
            prefix=$1
            shift
            ;;
    esac
done
[ -n "$prefix" ] || { usage >&2; fail "PREFIX is missing" 2; }
python=$(command -v "$python") || fail "there is no such Python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is older than Python 3.10"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python lacks the module venv (Debian: python3-venv)"
if [ -e "$prefix" ] && [ -n "$(ls -A "$prefix")" ] && [ ! -e "$prefix/etc/ray-slurm" ]; then
    fail "$prefix is there already and is no installation of ray-slurm-provider; choose another directory"
fi

umask 022
mkdir -p "$prefix" || fail "$prefix cannot be made"
prefix=$(cd "$prefix" && pwd -P)
case $prefix in *[[:space:]]*) fail "$prefix: the first line of scripts cannot hold a path with blanks" ;; esac
mkdir -p "$prefix/etc/ray-slurm"

echo "Installing into $prefix"
[ -x "$prefix/bin/python" ] || "$python" -m venv "$prefix"
"$prefix/bin/python" -m pip install --quiet --disable-pip-version-check "$ray" "$clone"
# The code of a clone changes without a new version number.
"$prefix/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$clone"
# Nobody else can write there: what Python would keep of the modules is made now.
"$prefix/bin/python" -m compileall -q "$prefix/lib" >/dev/null 2>&1 || true

version=$("$prefix/bin/python" -I -c 'import ray_slurm_provider; print(ray_slurm_provider.__version__)')
templates=$("$prefix/bin/python" -I -c 'from ray_slurm_provider.deployment.document import template_directory as d; print(d())')
modules=${modules:-$prefix/modulefiles}
mkdir -p "$modules/ray-slurm"
cat >"$modules/ray-slurm/$version" <<MODULE
#%Module1.0
# Environment Modules and Lmod read this form.
proc ModulesHelp { } {
    puts stderr "Ray clusters whose nodes are SLURM jobs: ray up CLUSTER.yaml; ray-slurm --help"
    puts stderr "Templates: $templates"
}
module-whatis "Ray with ray-slurm-provider $version"
conflict ray-slurm
prepend-path PATH "$prefix/bin"
# Ray runs what a cached YAML in TMPDIR names, so no other user may write there; sockets of Ray stay in /tmp.
set tmp \$env(HOME)/.cache/ray-slurm
catch { file mkdir \$tmp; file attributes \$tmp -permissions 0700 }
if {(![info exists env(TMPDIR)] || \$env(TMPDIR) eq \$tmp) && [file isdirectory \$tmp] && [file owned \$tmp]} {
    setenv TMPDIR \$tmp
    setenv RAY_TMPDIR /tmp
}
MODULE
chmod -R u+rwX,go+rX,go-w "$prefix"

cat <<TEXT
Installed: ray-slurm-provider $version, $("$prefix/bin/ray" --version)
  module use $modules && module load ray-slurm      or  PATH=$prefix/bin:\$PATH
Templates: $templates
Next, for the site's defaults and limits, in a shell with the module:
  ray-slurm deploy --site
TEXT
