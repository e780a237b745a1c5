#!/usr/bin/env bash
# Fine-tune a model: bash jobs/run_finetune.sh --help
set -euo pipefail
# Where stdout or stderr is closed (>&-), or the reader of a pipe has gone, the run goes on.
trap '' PIPE
[[ -e /proc/self/fd/1 ]] || exec > /dev/null
[[ -e /proc/self/fd/2 ]] || exec 2> /dev/null
trap 'exit 75' TERM USR1 # a scheduler's signals during the setup; the exit code asks for another start (megazh/errors.py)
jobs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
python=$(bash "$jobs/setup.sh")
[[ -n ${MEGAZH_PYTHON:-} ]] && export PYTHONPATH=${jobs%/*}${PYTHONPATH:+:$PYTHONPATH}
MEGAZH_BEGUN=$(date +%s.%N) # the time of the setup is no part of the run's start
export MEGAZH_BEGUN
exec "$python" -P -m megazh finetune "$@" # -P: no file of the current folder is taken for a module
