#!/usr/bin/env bash
# Pretrain on one Slurm node with six GPUs, from the folder that holds your data:
#
#   sbatch slurm/pretrain_6x3090.sh
#
# Its own options go in front, options of jobs/run_pretrain.sh behind; both win over those below. On a node without GPUs:
#
#   sbatch --gres=none --time=1:00:00 slurm/pretrain_6x3090.sh --device cpu -c demo
#
# What a cluster wants besides (partition, account) goes on the sbatch line, too. Submitted again, the run goes on from
# its last checkpoint.

#SBATCH --job-name=pretrain
#SBATCH --nodes=1
# One task: it starts a rank for each GPU itself.
#SBATCH --ntasks=1
#SBATCH --gres=gpu:6
#SBATCH --cpus-per-task=12
#SBATCH --mem=96G
#SBATCH --time=2-00:00:00
# In the folder that sbatch is called from: Slurm makes no folders, and a job without a log just fails.
#SBATCH --output=slurm-%x-%j.out
# Two minutes before the time is up the ranks are told to save and to end.
#SBATCH --signal=B:TERM@120
set -euo pipefail

# Slurm runs a copy of this file; where the original lies it tells.
original=$(scontrol show job "${SLURM_JOB_ID:-}" 2> /dev/null | sed -n 's/^ *Command=//p' || true)
for root in "${original%/slurm/pretrain_6x3090.sh*}" "${SLURM_SUBMIT_DIR:-$PWD}" ""; do
    [[ -n $root && -f $root/jobs/run_pretrain.sh ]] && break
done
if [[ -z $root ]]; then
    echo "error: cannot find jobs/run_pretrain.sh; call sbatch in the folder of the repository" >&2
    exit 2
fi
exec bash "$root/jobs/run_pretrain.sh" -t ds_pp -c qwen0.5b_6x3090 "$@"
