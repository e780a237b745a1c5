#!/usr/bin/env bash
# Submit index, pretrain, SFT, LongLoRA and evaluation as a chain of Slurm jobs: bash jobs/submit_all.sh --help
set -euo pipefail
jobs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
python=$(bash "$jobs/setup.sh")
[[ -n ${MEGAZH_PYTHON:-} ]] && export PYTHONPATH=${jobs%/*}${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -P -m megazh slurm submit "$@" # -P: no file of the current folder is taken for a module
