#!/usr/bin/env bash
# Make the Python environment of this repository if it is not there yet, and print the path of its interpreter.
#
#   python=$(bash jobs/setup.sh [--dev] [--mpi] [--hf] [--web] [--bench])
#
# The first call makes .venv with the versions that requirements/*.txt pin; later calls find it complete and return. Each
# installed part leaves a stamp: extras add up, a changed requirement file installs its part again, and an interrupted
# setup continues where it was. Everything but the path goes to stderr, and pip's own output to .venv/setup.log.
#
# MEGAZH_PYTHON=/path/to/python   use this interpreter as it is: nothing is installed, and missing modules are named.
#                                 megazh itself comes from the repository: export PYTHONPATH=<repository root>.
# MEGAZH_TORCH=REQUIREMENT        install this in place of the pinned torch: a wheel file or a pip requirement. Without
#                                 a GPU, 'torch==2.13.0+cpu' (from whatever index pip is told to use) saves gigabytes.
#                                 Later calls remember it.
set -euo pipefail
trap '' PIPE # a reader of these lines that has gone (|& head) does not end the setup
[[ -e /proc/self/fd/2 ]] || exec 2> /dev/null
exec 3>&1 1>&2 # stdout carries the path and nothing else

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamps=$venv/stamps
log=$venv/setup.log
requirements=$root/requirements

main() {
    local extras=() option
    for option in "$@"; do
        case $option in
            --dev | --mpi | --hf | --web | --bench) extras+=("${option#--}") ;;
            -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
            *) fail 2 "unknown option $option; expected --dev, --mpi, --hf, --web or --bench" ;;
        esac
    done
    if [[ -n ${MEGAZH_PYTHON:-} ]]; then
        use_own_python "${extras[@]}"
        return
    fi
    local parts=(venv torch base deepspeed megazh "${extras[@]}")
    if ! all_done "${parts[@]}"; then
        mkdir -p "$venv" 2> /dev/null && [[ -w $venv ]] ||
            fail 5 "$venv cannot be written by user $(id -un 2> /dev/null || id -u): have the owner of $root run \
jobs/setup.sh, or set MEGAZH_PYTHON"
        exec 9> "$venv/setup.lock"
        flock --nonblock 9 || { say "another setup of $venv is running; waiting for it" && flock 9; }
        : > "$log"
        for part in "${parts[@]}"; do
            part_done "$part" || make_part "$part"
        done
    fi
    echo "$venv/bin/python" >&3
}

say() {
    { echo "setup: $1"; } 2> /dev/null || true # nobody may read it
}

fail() { # CODE MESSAGE; the codes are those of megazh/errors.py
    { echo "error: setup: $2"; } 2> /dev/null || true
    exit "$1"
}

# Content of the stamp of a part that is up to date.
wanted() {
    local files=()
    case $1 in
        venv) echo "$root" && return ;; # a virtual environment does not survive being moved
        torch) wanted_torch && return ;;
        megazh) files=("$root/pyproject.toml") ;;
        dev) files=("$requirements"/dev*.txt "$requirements/hf.txt" "$requirements/triton.txt") ;;
        *) files=("$requirements/$1.txt") ;;
    esac
    cat "${files[@]}" | sha256sum
}

wanted_torch() {
    local before=""
    [[ -f $stamps/torch ]] && before=$(< "$stamps/torch")
    if [[ -n ${MEGAZH_TORCH:-} ]]; then
        echo "own choice: $MEGAZH_TORCH"
    elif [[ $before == "own choice: "* ]]; then
        echo "$before"
    else
        grep '^torch' "$requirements/torch.txt"
    fi
}

part_done() {
    [[ -x $venv/bin/python && -f $stamps/$1 && $(< "$stamps/$1") == "$(wanted "$1")" ]]
}

all_done() {
    local part
    for part in "$@"; do
        part_done "$part" || return 1
    done
}

make_part() {
    local part=$1 want
    want=$(wanted "$part")
    rm -f "$stamps/$part"
    case $part in
        venv) make_venv ;;
        # First and on its own: it is by far the largest, and its own dependencies must keep to the pins.
        torch) pip_install "${want#own choice: }" --constraint "$requirements/base.txt" "${want#own choice: }" ;;
        # Built without its compiled operators, and for the CPU: with GPUs its build asks for a CUDA toolkit, although it
        # compiles nothing.
        deepspeed)
            DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip_install DeepSpeed --no-build-isolation --requirement \
                "$requirements/deepspeed.txt"
            ;;
        # Built by the pinned setuptools of the environment, so that nothing unpinned comes in.
        megazh) pip_install megazh --no-deps --no-build-isolation --editable "$root" ;;
        dev)
            pip_install "requirements/dev.txt" --requirement "$requirements/dev.txt" \
                --requirement "$requirements/dev-peers.txt" --requirement "$requirements/hf.txt"
            pip_install "requirements/dev-no-deps.txt" --no-deps --requirement "$requirements/dev-no-deps.txt"
            # For its interpreter. CUDA builds of torch bring the Triton that they were built for.
            "$venv/bin/python" -c 'import triton' 2> /dev/null ||
                pip_install triton --no-deps --requirement "$requirements/triton.txt"
            # Beside the newer one, which it must not replace; the tests that need it put its folder first.
            rm -rf "$venv/transformers-4.46"
            pip_install "transformers 4.46" --no-deps --target "$venv/transformers-4.46" --requirement \
                "$requirements/dev-transformers-4.46.txt"
            ;;
        *) pip_install "requirements/$part.txt" --requirement "$requirements/$part.txt" ;;
    esac
    mkdir -p "$stamps"
    echo "$want" > "$stamps/.$part" # written last and atomically: without a stamp, the part is not done
    mv "$stamps/.$part" "$stamps/$part"
}

make_venv() {
    local name found="" without_venv=""
    for name in python3.13 python3.12 python3.11 python3; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || continue
        if "$name" -c 'import ensurepip, venv' 2> /dev/null; then
            found=$name
            break
        fi
        without_venv=${without_venv:-$name}
    done
    if [[ -z $found && -n $without_venv ]]; then
        fail 5 "$without_venv lacks the venv module; install it (Debian, Ubuntu: apt-get install ${without_venv}-venv)"
    elif [[ -z $found ]]; then
        fail 5 "no Python 3.11 or newer; install one (Debian 12: apt-get install python3-venv), or set MEGAZH_PYTHON"
    fi
    say "making $venv with $(type -P "$found") (pip's output: $log)"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name setup.lock ! -name setup.log -exec rm -rf {} +
    "$found" -m venv "$venv" >> "$log" 2>&1 || fail 5 "$found cannot make $venv: see $log"
}

pip_install() { # WHAT PIP-ARGUMENTS...
    local what=$1 why
    shift
    say "installing $what"
    "$venv/bin/python" -m pip install --no-input --disable-pip-version-check "$@" >> "$log" 2>&1 9>&- && return
    why=$(grep '^ERROR: ' "$log" | tail -n 1 || true)
    fail 5 "pip cannot install $what${why:+ (${why#ERROR: })}: see $log"
}

use_own_python() {
    local own extra missing
    local modules=(numpy numba pyarrow orjson pydantic yaml tqdm xxhash tokenizers tiktoken sentencepiece safetensors
        matplotlib tensorboard psutil torch deepspeed)
    for extra in "$@"; do
        case $extra in
            dev) modules+=(fastokens pytest pytest_timeout hypothesis ruff mypy megatron.core triton) ;;
            mpi) modules+=(mpi4py) ;;
            hf) modules+=(transformers accelerate) ;;
            web) modules+=(gradio) ;;
            bench) modules+=(fastokens gigatoken datasets) ;;
        esac
    done
    own=$(type -P "$MEGAZH_PYTHON") || true
    [[ -f $own ]] || fail 2 "MEGAZH_PYTHON=$MEGAZH_PYTHON: no such program; give a Python interpreter, or unset it"
    [[ $own == /* ]] || own=$PWD/$own
    # From / so that no folder of this repository passes for a module.
    missing=$(
        cd / && "$own" - "${modules[@]}" 2> /dev/null << 'PYTHON'
import sys

if sys.version_info < (3, 11):
    print("Python 3.11 or newer (it is %d.%d)" % sys.version_info[:2])
    sys.exit()

import importlib.util


def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # a package around it is missing, or does not work
        return False


print(" ".join(name for name in sys.argv[1:] if not found(name)))
PYTHON
    ) || fail 2 "MEGAZH_PYTHON=$MEGAZH_PYTHON: does not run as a Python interpreter"
    if [[ -n $missing ]]; then
        fail 2 "MEGAZH_PYTHON=$MEGAZH_PYTHON lacks $missing; install that there (versions: requirements/*.txt), or \
unset MEGAZH_PYTHON to have .venv made"
    fi
    echo "$own" >&3
}

main "$@"
