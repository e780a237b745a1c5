#!/usr/bin/env bash
# Pretrain on one Slurm node with six GPUs, from the folder that holds your data:
#
#   sbatch slurm/pretrain_6x3090.sh
#
# Options of sbatch go before the file name, options of jobs/run_pretrain.sh behind it; both override those below. On a
# node without GPUs:
#
#   sbatch --gres=none --time=1:00:00 slurm/pretrain_6x3090.sh --device cpu -c demo
#
# Options that your cluster needs (partition, account) go on the sbatch line, too. Submit the same line again to resume
# the run from its last checkpoint.

#SBATCH --job-name=pretrain
#SBATCH --nodes=1
# One task, which starts one rank per GPU itself.
#SBATCH --ntasks=1
#SBATCH --gres=gpu:6
#SBATCH --cpus-per-task=12
#SBATCH --mem=96G
#SBATCH --time=2-00:00:00
# In the folder from which sbatch is called: Slurm makes no folders, and a job that cannot open its log fails.
#SBATCH --output=slurm-%x-%j.out
# Ten minutes before the time limit the ranks are signalled to save and end, with exit code 75. A job with a shorter
# limit is signalled at once: give --signal=B:USR1@60 with it.
#SBATCH --signal=B:USR1@600
set -euo pipefail

# Slurm runs a copy of this file; scontrol knows the path of the original.
original=$(scontrol show job "${SLURM_JOB_ID:-}" 2> /dev/null | sed -n 's/^ *Command=//p' || true)
for root in "${original%/slurm/pretrain_6x3090.sh*}" "${SLURM_SUBMIT_DIR:-$PWD}" ""; do
    [[ -n $root && -f $root/jobs/run_pretrain.sh ]] && break
done
if [[ -z $root ]]; then
    echo "error: cannot find jobs/run_pretrain.sh; call sbatch in the folder of the repository" >&2
    exit 2
fi
exec bash "$root/jobs/run_pretrain.sh" -t ds_pp -c qwen0.5b_6x3090 "$@"
