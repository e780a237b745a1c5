#!/usr/bin/env bash
# Pretrain a model: bash jobs/run_pretrain.sh --help
set -euo pipefail
jobs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
python=$(bash "$jobs/setup.sh")
[[ -n ${MEGAZH_PYTHON:-} ]] && export PYTHONPATH=${jobs%/*}${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -P -m megazh pretrain "$@" # -P: no file of the current folder is taken for a module
