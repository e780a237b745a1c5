#!/usr/bin/env bash
# Everything that must pass: lint, types and tests. Starts from a bare clone; needs no GPU.
#
#   bash jobs/run_tests.sh                       ruff, mypy and all tests
#   bash jobs/run_tests.sh --quick               ruff, mypy and the tests that start no run, in under three minutes
#   bash jobs/run_tests.sh --quick tests/index   the same, with these arguments for pytest
#   bash jobs/run_tests.sh tests/index -k mpi    only pytest, with these arguments
#
# --quick leaves out tests with the markers ranks, slow, mpi and slurm (see pyproject.toml).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PATH=$PATH:/usr/sbin:/sbin # Debian's folder of slurmctld, which is not in an ordinary user's PATH

quick=()
if [[ ${1:-} == --quick ]]; then
    quick=(-m "not ranks and not slow and not mpi and not slurm")
    shift
fi

# Debian packages that tests need; without them those tests are skipped.
packages=()
((${#quick[@]})) || command -v slurmctld > /dev/null || packages+=(slurm-wlm)
if ! ((${#quick[@]})); then # hosts of a network of their own, reached by ssh and pdsh
    command -v sshd > /dev/null || packages+=(openssh-server)
    command -v ssh > /dev/null || packages+=(openssh-client)
    command -v pdsh > /dev/null || packages+=(pdsh)
    command -v ip > /dev/null || packages+=(iproute2)
fi
if [[ -z ${MEGAZH_PYTHON:-} && ! -x .venv/bin/python ]]; then
    python3 -c 'import ensurepip' 2> /dev/null || packages+=(python3-venv)
fi
install_packages() {
    local root=()
    if [[ $(id -u) != 0 ]]; then
        sudo -n true 2> /dev/null || return
        root=(sudo -n)
    fi
    echo "installing ${packages[*]}" >&2
    "${root[@]}" apt-get -qq update > /dev/null &&
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get -qq install -y --no-install-recommends "${packages[@]}" > /dev/null
}
if ((${#packages[@]})); then
    { command -v apt-get > /dev/null && install_packages; } ||
        echo "warning: cannot install ${packages[*]} (needs apt-get, and root or passwordless sudo); tests that need" \
            "it will be skipped" >&2
fi

python=$(bash jobs/setup.sh --dev --mpi) || exit
[[ -n ${MEGAZH_PYTHON:-} ]] && export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
scratch=$(mktemp -d) || exit
trap 'rm -rf "$scratch"' EXIT
# Private, so that neither a stale build nor a lock of another run gets in the way.
export TORCH_EXTENSIONS_DIR=$scratch/extensions

if (($# && ! ${#quick[@]})); then
    "$python" -m pytest "$@"
    exit
fi
failed=()
"$python" -m ruff check . || failed+=("ruff check")
"$python" -m ruff format --check . || failed+=("ruff format --check")
"$python" -m mypy > "$scratch/mypy.log" 2>&1 & # on another core, while the tests run
mypy=$!
"$python" -m pytest "${quick[@]}" "$@" || failed+=("pytest")
wait "$mypy" || failed+=("mypy")
cat "$scratch/mypy.log"
((${#failed[@]})) || exit 0
printf 'FAILED: %s\n' "${failed[@]}"
exit 1
