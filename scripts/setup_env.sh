# shellcheck shell=bash
# Sourced by quickstart and test. `llmq_setup demo,test` leaves llmq with those extras installed in $VENV.
#
# Needs Python >= 3.10 and a C++ compiler. Debian and Ubuntu split Python: ensurepip and Python.h are packages of their own.
# Where they are missing they are installed through apt as root, or unpacked below $VENV without root. pip's own settings
# (PIP_* variables, pip.conf) hold everywhere.
#
#   LLMQ_PYTHON  the interpreter to use (default: the first fit one on PATH)
#   LLMQ_VENV    the environment's folder (default: .venv in the repository)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${LLMQ_VENV:-$ROOT/.venv}
STAMP=$VENV/llmq-installed   # line 1: fingerprint of the sources, line 2: extras

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
# Print a command as a user would type it, then run it.
run() { printf '\n$ %s\n' "$*" >&2; "$@"; }

is_fit() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local name
    if [ -n "${LLMQ_PYTHON:-}" ]; then
        is_fit "$LLMQ_PYTHON" || die "LLMQ_PYTHON=$LLMQ_PYTHON does not run, or is older than Python 3.10"
        PYTHON=$LLMQ_PYTHON
        return
    fi
    for name in python3 python3.11 python3.12 python3.13 python3.14 python3.10; do
        if is_fit "$name"; then PYTHON=$(command -v "$name"); return; fi
    done
    die "no Python >= 3.10 on PATH; install one, or name it: LLMQ_PYTHON=/path/to/python3 $0"
}

# $1: the interpreter. Each answers whether that part of Python is there.
has_pip_source() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }
has_headers() {
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null
}
has_compiler() { command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null; }

python_version() { "$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# Debian's names for what this interpreter lacks, e.g. "python3.11-venv libpython3.11-dev".
missing_packages() {
    local version
    version=$(python_version)
    has_pip_source "$PYTHON" || printf 'python%s-venv ' "$version"
    has_headers "$PYTHON" || printf 'libpython%s-dev ' "$version"
    has_compiler || printf 'g++ '
}

# Install the packages in $@ with apt, if we may.
apt_install() {
    local sudo=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null || return 1
        sudo=(sudo -n)
    fi
    say "installing with apt: $*"
    "${sudo[@]}" apt-get update -qq || return 1
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes \
        apt-get install -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends "$@" >/dev/null
}

# Fetch the packages in $@ from the system's own apt sources and unpack them into $VENV/system, without root.
apt_unpack() {
    local dir=$VENV/system/apt deb
    local private=(-qq -o Dir::State::lists="$dir/lists" -o Dir::Cache="$dir/cache" -o Debug::NoLocking=1)
    say "no root: unpacking $* below $VENV/system"
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    (cd "$dir" && apt-get "${private[@]}" update && apt-get "${private[@]}" download "$@") || return 1
    for deb in "$dir"/*.deb; do dpkg -x "$deb" "$VENV/system" || return 1; done
    rm -rf "$dir"
}

make_venv() {
    local missing
    missing=$(missing_packages)
    # shellcheck disable=SC2086  # a list of words
    if [ -n "$missing" ] && command -v apt-get >/dev/null && apt_install $missing; then missing=$(missing_packages); fi
    if [ -z "$missing" ]; then
        "$PYTHON" -m venv --clear "$VENV"
    else
        make_venv_without_root "$missing"
    fi
}

make_venv_without_root() {
    local missing=$1 command wheel packages=()
    command="sudo apt-get install -y ${missing% }"
    command -v apt-get >/dev/null || command="your package manager (what Debian calls ${missing% })"
    has_compiler || die "there is no C++ compiler (g++ or clang++) on PATH; install one with $command"
    command -v apt-get >/dev/null || die "$PYTHON lacks parts; install them with $command"
    "$PYTHON" -m venv --clear --without-pip "$VENV"
    has_pip_source "$PYTHON" || packages+=(python3-pip-whl)
    has_headers "$PYTHON" || packages+=("libpython$(python_version)-dev")
    apt_unpack "${packages[@]}" || die "$PYTHON lacks parts and they could not be fetched; install them with $command"
    if has_pip_source "$PYTHON"; then
        "$VENV/bin/python" -m ensurepip -q
    else
        wheel=$(echo "$VENV"/system/usr/share/python-wheels/pip-*.whl)
        "$VENV/bin/python" "$wheel/pip" install -q pip
    fi
}

# Headers that apt_unpack brought: tell the compiler, plain CMake (the kernel tests) and scikit-build-core, which passes
# CMake the place where the headers would have been.
use_private_headers() {
    local include
    for include in "$VENV"/system/usr/include/python3.*; do
        [ -e "$include/Python.h" ] || continue
        export CPLUS_INCLUDE_PATH="$include:$VENV/system/usr/include${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH}"
        export CMAKE_ARGS="-DPython_INCLUDE_DIR=$include ${CMAKE_ARGS:-}"
        export CMAKE_INCLUDE_PATH="$include${CMAKE_INCLUDE_PATH:+:$CMAKE_INCLUDE_PATH}"
    done
}

fingerprint() {
    (cd "$ROOT" && find llmq cpp pyproject.toml constraints.txt -type f ! -name '*.pyc' ! -name '*.so' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
}

# Make, or bring up to date, the environment. $1: extras, e.g. demo,test.
llmq_setup() {
    local wanted=$1 have print extra
    if [ -d "$VENV" ] && ! [ -f "$VENV/pyvenv.cfg" ]; then
        die "$VENV exists and is no Python environment; move it away, or choose another folder with LLMQ_VENV"
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || ! is_fit "$VENV/bin/python"; then
        find_python
        say "making $VENV with $PYTHON ($("$PYTHON" -V))"
        make_venv
    fi
    use_private_headers
    print=$(fingerprint)
    have=$(sed -n 2p "$STAMP" 2>/dev/null || true)
    for extra in ${have//,/ }; do
        case ",$wanted," in *",$extra,"*) ;; *) wanted+=,$extra ;; esac
    done
    if [ "$(sed -n 1p "$STAMP" 2>/dev/null)" = "$print" ] && [ ${#have} = ${#wanted} ]; then
        link_kernels
        return
    fi
    has_compiler || die "there is no C++ compiler (g++ or clang++) on PATH; install one, e.g. sudo apt-get install -y g++"
    rm -f "$STAMP"
    say "installing llmq[$wanted] (the first time downloads torch and transformers, and compiles the kernels)"
    "$VENV/bin/python" -m pip install --progress-bar off -c "$ROOT/constraints.txt" "${ROOT}[$wanted]" |
        { grep --line-buffered -E '^(Collecting|Processing|Building|Installing|ERROR)' || true; }
    (cd "$VENV" && bin/python -c 'import llmq._core') || die "llmq was installed, but its compiled module does not load"
    printf '%s\n%s\n' "$print" "$wanted" >"$STAMP"
    link_kernels
}

# Python started in the repository imports ./llmq, not the installed copy: show it the compiled module too.
# A module that somebody built there by hand is left alone.
link_kernels() {
    local module link
    for link in "$ROOT"/llmq/_core*.so; do
        if [ -L "$link" ]; then rm "$link"; fi
    done
    for module in "$VENV"/lib/python3*/site-packages/llmq/_core*.so; do
        link=$ROOT/llmq/${module##*/}
        [ -e "$link" ] || ln -s "$module" "$link"
    done
}
