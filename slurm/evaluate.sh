#!/usr/bin/env bash
# Evaluate a model on one GPU (megazh eval), from the folder that holds your runs. Without options: the passkey questions
# to runs/longlora_qwen0.5b_6x3090.
#
#   sbatch slurm/evaluate.sh
#   sbatch slurm/evaluate.sh passkey runs/sft_qwen0.5b_6x3090 --lengths 1024 2048 --json passkey.json
#   sbatch slurm/evaluate.sh position-loss runs/longlora_qwen0.5b_6x3090 data_index/books --json losses.json
#
# Options of sbatch go before the file name, those of megazh eval behind it; both override those below. On a node without
# GPUs:
#
#   sbatch --gres=none slurm/evaluate.sh passkey runs/demo-long --lengths 256 512 1024 --device cpu
#
# Lines to look at on your cluster: --partition and --account where it wants them, the type of --gres (sinfo -o %G lists
# what there is: gpu:3090:6, gpu:rtx3090:6), --time, --mem. Modules or a container: slurm/common.sh says how.

##SBATCH --partition=gpu
##SBATCH --account=mylab
#SBATCH --job-name=evaluate
#SBATCH --time=8:00:00
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=2
#SBATCH --mem=32G
# Slurm makes no folders, and a job that cannot open its log fails without a word: this one is in the folder from which
# sbatch is called. A requeued job goes on with the same log.
#SBATCH --output=slurm-evaluate-%j.out
#SBATCH --open-mode=append
# A job whose node fails begins anew.
#SBATCH --requeue
set -euo pipefail

# Slurm runs a copy of this file; scontrol knows the path of the original.
original=""
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    original=$(scontrol show job "$SLURM_JOB_ID" 2> /dev/null | sed -n 's/^ *Command=//p' || true)
fi
for root in "$(dirname "${BASH_SOURCE[0]}")/.." \
    "${original%%/slurm/evaluate.sh*}" "${SLURM_SUBMIT_DIR:-$PWD}"; do
    [[ ! -f $root/slurm/common.sh ]] || break
done
if [[ ! -f $root/slurm/common.sh ]]; then
    echo "error: cannot find slurm/common.sh; call sbatch in the folder of the repository" >&2
    exit 2
fi
source "$root/slurm/common.sh"
python=$("${container[@]}" bash "$root/jobs/setup.sh")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
(($#)) || set -- passkey runs/longlora_qwen0.5b_6x3090 --json runs/longlora_qwen0.5b_6x3090/passkey.json
run_job "${container[@]}" "$python" -P -m megazh eval "$@"
