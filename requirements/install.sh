#!/bin/sh
# Installs the gateway into .venv. Called by the Makefile, from the repository root:
#   requirements/install.sh run         torch, run.lock and the gateway itself
#   requirements/install.sh dev         dev.lock, into build/dev, which sees the packages of .venv
#   requirements/install.sh clients     further clients that the tests run, into build/clients
#   requirements/install.sh site        what builds the documentation as a site, into build/site-env
#   requirements/install.sh verify      do the installed packages fit each other and pyproject.toml?
#   requirements/install.sh lock-tools  what requirements/lock.py needs, into build/lock
#   requirements/install.sh index       print the package index that torch would come from; empty for PyPI
# Reads PYTHON, TORCH_INDEX and EXTRAS, which the Makefile explains, and pip's own settings (PIP_INDEX_URL, pip.conf ...).
set -eu

PIP_VERSION=26.3
UV_VERSION=0.13.9
PACKAGING_VERSION=26.3

# torch from PyPI needs this driver of NVIDIA's, and torch for CUDA 12.6 the other one:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVER=580
CUDA_12_DRIVER=525
CUDA_12_INDEX=https://download.pytorch.org/whl/cu126
# Where the kernel shows the version of the driver.
NVIDIA_VERSION=${NVIDIA_VERSION:-/proc/driver/nvidia/version}

VENV=.venv
PIP="$VENV/bin/python -m pip --disable-pip-version-check --no-input"

# These point Python and pip at other folders than the virtual environment.
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX

main() {
    case "${1:-}" in
        run) install_run ;;
        dev) install_dev ;;
        clients) install_clients ;;
        site) install_site ;;
        verify) verify ;;
        lock-tools) install_lock_tools ;;
        index)
            choose_index >&2
            echo "$index"
            ;;
        *) fail "usage: requirements/install.sh run | dev | clients | site | verify | lock-tools | index" ;;
    esac
}

install_run() {
    be_alone
    choose_index
    choose_extras
    make_venv
    begin
    printf '%s\n' $extras >"$VENV/.extras"
    rm -f "$VENV/.installed-run"
    say "pip $PIP_VERSION"
    pip_install "pip==$PIP_VERSION"
    say "$(grep -o '^torch==[^ ]*' requirements/torch.lock)${index:+ from $index}"
    pip_install ${index:+--extra-index-url "$index"} -r requirements/torch.lock -c requirements/run.lock
    printf %s "$index" >"$VENV/.torch-index"
    say "packages of requirements/run.lock"
    pip_install --no-deps -r requirements/run.lock
    for extra in $extras; do
        say "packages of requirements/$extra.lock"
        pip_install --no-deps -r "requirements/$extra.lock"
    done
    say "the gateway"
    pip_install --no-deps --build-constraint requirements/build.lock -e .
    end run
}

# The environment of tests and checks is separate from .venv and sees it: .venv's packages come after those of build/dev.
install_dev() {
    be_alone
    # The last install was cut off: nothing in .venv can be relied on.
    [ ! -e "$VENV/.unfinished" ] || install_run
    make_environment build/dev requirements/dev.lock "$VENV/bin/python"
    site='import sysconfig; print(sysconfig.get_path("purelib"))'
    echo "import site; site.addsitedir('$("$VENV/bin/python" -c "$site")')" \
        >"$(build/dev/bin/python -c "$site")/serving.pth"
    touch build/dev/.installed
}

# Clients that cannot share an environment with the gateway, nor all with each other.
install_clients() {
    for name in clients-apart infinity-client datadog; do
        make_environment "build/clients/$name" "requirements/$name.lock"
    done
    if command -v npm >/dev/null 2>&1; then
        say "packages of tests/clients/node/package-lock.json"
        rm -rf build/clients/node
        mkdir build/clients/node
        cp tests/clients/node/package.json tests/clients/node/package-lock.json build/clients/node
        npm ci --prefix build/clients/node --ignore-scripts --no-audit --no-fund --loglevel=error
    fi
    touch build/clients/.installed
}

install_site() {
    make_environment build/site-env requirements/site.lock
    touch build/site-env/.installed
}

# Make $1 and fill it from the lock $2, with the Python $3. uv takes seconds where pip takes minutes, and here is no
# torch, which uv would take with CUDA.
make_environment() {
    say "packages of $2"
    rm -rf "$1"
    mkdir -p "$(dirname "$1")"
    "${3:-build/lock/bin/python}" -m venv --without-pip "$1"
    index=${PIP_INDEX_URL:-$(build/lock/bin/python -m pip config get global.index-url 2>/dev/null || true)}
    build/lock/bin/uv pip sync --quiet ${index:+--default-index "$index"} --python "$1/bin/python" "$2"
}

verify() {
    # infinity-emb's claim on numpy is known to be wrong; see run.lock.
    problems=$(build/dev/bin/python -m pip --disable-pip-version-check check | grep -v -e '^infinity-emb .* requirement numpy<2' -e '^No broken requirements' || true)
    [ -z "$problems" ] || fail "$problems" "After a change of pyproject.toml: make lock"
}

install_lock_tools() {
    find_python
    rm -rf build/lock
    "$python" -m venv build/lock
    build/lock/bin/python -m pip --disable-pip-version-check install -q "uv==$UV_VERSION" "packaging==$PACKAGING_VERSION"
    touch build/lock/.installed
}

# Set $index to the package index that torch comes from, empty for PyPI: TORCH_INDEX if it is set, else the one that
# $VENV was made with, else the one whose torch runs with the driver of this machine's NVIDIA card.
choose_index() {
    index=${TORCH_INDEX:-$(cat "$VENV/.torch-index" 2>/dev/null || true)}
    [ -z "$index" ] || return 0
    driver=$(driver_version)
    major=${driver%%.*}
    if [ -z "$major" ] || [ "$major" -ge "$DRIVER" ]; then
        return 0
    fi
    if [ "$major" -lt "$CUDA_12_DRIVER" ]; then
        echo "NVIDIA's driver $driver is too old for torch: upgrade it to $DRIVER or newer (for WSL2: on Windows)." \
            "Until then models run on the CPU." >&2
        return 0
    fi
    index=$CUDA_12_INDEX
    say "NVIDIA's driver $driver is older than $DRIVER: torch for CUDA 12.6 (TORCH_INDEX=... chooses another)"
}

# Set $extras to the locks to install next to run.lock: those in EXTRAS, and those that are in $VENV already, because an
# update of run.lock must not leave their packages behind.
choose_extras() {
    extras=$(printf '%s\n' $(cat "$VENV/.extras" 2>/dev/null || true) ${EXTRAS:-} | sort -u)
    for extra in $extras; do
        case "$extra" in
            cluster | stores) ;;
            *) fail "EXTRAS takes cluster, stores, or both as EXTRAS=\"cluster stores\", but got: $extra" ;;
        esac
    done
}

# Print the version of NVIDIA's driver, such as 550.54.14; nothing without one. In WSL2 only nvidia-smi knows it, and with
# a broken card that may hang.
driver_version() {
    version=$(awk '/^NVRM/ { for (i = 1; i <= NF; i++) if ($i ~ /^[0-9]+(\.[0-9]+)+$/) { print $i; exit } }' \
        "$NVIDIA_VERSION" 2>/dev/null || true)
    smi=$(command -v nvidia-smi || command -v /usr/lib/wsl/lib/nvidia-smi || true)
    if [ -z "$version" ] && [ -n "$smi" ]; then
        version=$(timeout 10 "$smi" --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
            | grep -E -m 1 '^[0-9]+(\.[0-9]+)+$' || true)
    fi
    echo "$version"
}

# Make $VENV unless a good one is there. pip takes a torch that is there for the one of any index.
make_venv() {
    if [ "$(cat "$VENV/.made-in" 2>/dev/null)" = "$PWD" ] && [ ! -e "$VENV/.unfinished" ] \
        && { [ ! -e "$VENV/.torch-index" ] || [ "$(cat "$VENV/.torch-index")" = "$index" ]; } \
        && $PIP --version >/dev/null 2>&1; then
        return
    fi
    find_python
    say "virtual environment in $VENV with Python $version ($python)"
    rm -rf "$VENV"
    mkdir "$VENV"
    begin
    "$python" -m venv "$VENV"
    echo "$PWD" >"$VENV/.made-in"
}

# Stop while another install, from another terminal perhaps, is at work on $VENV.
be_alone() {
    other=$(cat "$VENV/.unfinished" 2>/dev/null || true)
    if [ -n "$other" ] && [ "$other" != $$ ] && kill -0 "$other" 2>/dev/null; then
        fail "Process $other is installing into $VENV; try again when it is done." \
            "If that process is something else: make clean"
    fi
}

# Between begin and end, $VENV is marked as half made. pip can't tell a package that was cut off in the middle from a
# whole one, so the next run starts with an empty environment when it finds the mark. Files come from pip's cache then.
begin() {
    echo $$ >"$VENV/.unfinished"
}

end() {
    rm "$VENV/.unfinished"
    touch "$VENV/.installed-$1"
}

# Set $python to a command that runs a fitting Python, and $version to its version.
find_python() {
    seen=''
    for python in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        command -v "$python" >/dev/null 2>&1 || continue
        # A command that exists may still fail: pyenv has one for every version that is installed anywhere.
        if ! version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null); then
            seen="$seen
  $python is there, but doesn't run"
            continue
        fi
        case "$version" in
            3.11.* | 3.12.* | 3.13.*) ;;
            *)
                seen="$seen
  $python is Python $version"
                continue
                ;;
        esac
        if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            seen="$seen
  $python is Python $version, but without its venv module: apt-get install python${version%.*}-venv"
            continue
        fi
        return
    done
    fail "The gateway needs Python 3.11, 3.12 or 3.13 with its venv module. Found${PYTHON:+ as PYTHON=$PYTHON}:${seen:-
  none}" \
        "Install one, for example with: apt-get install python3.11 python3.11-venv" \
        "One that isn't on the PATH is named so: make install PYTHON=/path/to/python3.12"
}

# On a terminal pip shows what it fetches and how far it is; elsewhere a line a package is only noise.
pip_install() {
    if [ -t 1 ]; then
        $PIP install "$@"
    else
        $PIP install --quiet "$@"
    fi
}

say() {
    echo "==> $1"
}

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

main "$@"
