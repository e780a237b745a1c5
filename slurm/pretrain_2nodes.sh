#!/usr/bin/env bash
# Pretrain on two Slurm nodes with six GPUs each, or on any number of nodes, from the folder that holds your data, which
# the nodes share:
#
#   sbatch slurm/pretrain_2nodes.sh
#   sbatch -N 3 slurm/pretrain_2nodes.sh -c mine.yaml steps=1000
#
# Options of sbatch go before the file name, options of jobs/run_pretrain.sh behind it; both override those below. On
# nodes without GPUs:
#
#   sbatch --gres=none --time=1:00:00 slurm/pretrain_2nodes.sh --device cpu -c demo
#
# Submit the same line again to resume the run from its last checkpoint.
#
# Lines to look at on your cluster: --partition and --account where it wants them, the type of --gres (sinfo -o %G lists
# what there is: gpu:3090:6, gpu:rtx3090:6), --time, --mem. Modules or a container: slurm/common.sh says how.

##SBATCH --partition=gpu
##SBATCH --account=mylab
#SBATCH --job-name=pretrain
#SBATCH --time=2-00:00:00
#SBATCH --nodes=2
# One task per GPU.
#SBATCH --ntasks-per-node=6
#SBATCH --gres=gpu:6
#SBATCH --cpus-per-task=2
#SBATCH --mem=96G
# Slurm makes no folders, and a job that cannot open its log fails without a word: this one is in the folder from which
# sbatch is called. A requeued job goes on with the same log.
#SBATCH --output=slurm-pretrain-%j.out
#SBATCH --open-mode=append
# Ten minutes before the time limit the run saves, ends, and the job is requeued (docs/cluster.md). A job with a shorter
# limit is signalled at once: give --signal=B:USR1@60 with it.
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
set -euo pipefail

# Slurm runs a copy of this file; scontrol knows the path of the original.
original=""
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    original=$(scontrol show job "$SLURM_JOB_ID" 2> /dev/null | sed -n 's/^ *Command=//p' || true)
fi
for root in "$(dirname "${BASH_SOURCE[0]}")/.." \
    "${original%%/slurm/pretrain_2nodes.sh*}" "${SLURM_SUBMIT_DIR:-$PWD}"; do
    [[ ! -f $root/slurm/common.sh ]] || break
done
if [[ ! -f $root/slurm/common.sh ]]; then
    echo "error: cannot find slurm/common.sh; call sbatch in the folder of the repository" >&2
    exit 2
fi
source "$root/slurm/common.sh"
# All GPUs of the job are used. Where the stages and micro-batches of the recipe do not fit them, others are taken.
run_job "${container[@]}" bash "$root/jobs/run_pretrain.sh" -t ds_pp -c qwen0.5b_6x3090 --allow-relayout "$@"
