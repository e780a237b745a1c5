#!/usr/bin/env bash
# Tokenise text into an index (megazh index build), from the folder that holds your data. Without options: the files of
# raw/, with the tokenizer qwen.tiktoken, to data_index/corpus.
#
#   sbatch slurm/index_corpus.sh
#   sbatch -N 2 slurm/index_corpus.sh --input 'raw/*.jsonl.zst' --tokenizer qwen.tiktoken --output data_index/wiki
#
# Each task is an MPI rank (bash jobs/setup.sh --mpi), on one or several nodes that share the folder. Without MPI, as an
# array: each task indexes its part of the files, and a second job merges the parts. The bytes are the same.
#
#   job=$(sbatch --parsable --array=1-8 slurm/index_corpus.sh --input raw --tokenizer tok/ --output data_index/wiki)
#   sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes slurm/index_corpus.sh merge data_index/wiki 8
#
# Submit the same line again to continue an interrupted build.
#
# Lines to look at on your cluster: --partition and --account where it wants them, the type of --gres (sinfo -o %G lists
# what there is: gpu:3090:6, gpu:rtx3090:6), --time, --mem. Modules or a container: slurm/common.sh says how.


##SBATCH --partition=cpu
##SBATCH --account=mylab
#SBATCH --job-name=index
#SBATCH --time=1-00:00:00
#SBATCH --nodes=1
# MPI ranks; in an array or in a merge, one process with as many workers.
#SBATCH --ntasks-per-node=16
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=3G
# Slurm makes no folders, and a job that cannot open its log fails without a word: this one is in the folder from which
# sbatch is called. A requeued job goes on with the same log.
#SBATCH --output=slurm-index-%j.out
#SBATCH --open-mode=append
# A minute before the time limit the build is ended and the job requeued: finished pieces are kept.
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
set -euo pipefail

# Slurm runs a copy of this file; scontrol knows the path of the original.
original=""
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    original=$(scontrol show job "$SLURM_JOB_ID" 2> /dev/null | sed -n 's/^ *Command=//p' || true)
fi
for root in "$(dirname "${BASH_SOURCE[0]}")/.." \
    "${original%%/slurm/index_corpus.sh*}" "${SLURM_SUBMIT_DIR:-$PWD}"; do
    [[ ! -f $root/slurm/common.sh ]] || break
done
if [[ ! -f $root/slurm/common.sh ]]; then
    echo "error: cannot find slurm/common.sh; call sbatch in the folder of the repository" >&2
    exit 2
fi
source "$root/slurm/common.sh"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# The time limit is near: the build ends at once, and its finished pieces are kept.
on_time_limit() {
    trap '' USR1 TERM
    pass_on TERM
    wait "$child" && exit 0
    "${container[@]}" "$python" -P -m megazh.cluster.slurm.requeue
    exit 75
}

run_python() { # ARGUMENTS OF PYTHON...: as the job
    local python
    python=$("${container[@]}" bash "$root/jobs/setup.sh")
    run_job "${container[@]}" "$python" -P "$@"
}

if [[ ${1:-} == merge ]]; then
    if (($# != 3)) || [[ ! $3 =~ ^[1-9][0-9]{0,3}$ ]]; then
        echo "error: expected merge PREFIX PARTS, such as merge data_index/wiki 8" >&2
        exit 2
    fi
    parts=()
    for ((part = 1; part <= $3; part++)); do
        parts+=("$2.part-$part-of-$3")
    done
    run_python -m megazh index merge "${parts[@]}" --output "$2"
fi
(($#)) || set -- --input raw --tokenizer qwen.tiktoken --output data_index/corpus
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    if ((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 != SLURM_ARRAY_TASK_COUNT)); then
        echo "error: --array needs numbers without a gap, such as 1-8; for one part again, give --part 3/8 instead" >&2
        exit 2
    fi
    part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))
    run_python "$root/tools/index_dataset.py" --part "$part/$SLURM_ARRAY_TASK_COUNT" "$@"
elif ((${SLURM_NTASKS:-1} > 1)); then
    python=$("${container[@]}" bash "$root/jobs/setup.sh" --mpi)
    run_job srun --export=ALL --mpi="$mpi" --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        "${container[@]}" "$python" -P "$root/tools/index_dataset.py" "$@"
fi
run_python "$root/tools/index_dataset.py" "$@"
