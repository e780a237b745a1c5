# What the files for sbatch share; they source it. Nothing to change here: what belongs to your cluster goes to the file
# slurm/site.sh, which is sourced first where it is there, and which git ignores:
#
#   module load cuda/12.8                               # modules
#   export MEGAZH_PYTHON=/shared/venv/bin/python        # your own environment in place of .venv (jobs/setup.sh)
#   container=(apptainer exec --nv /shared/megazh.sif)  # words to put before the command; without srun in the image, give
#                                                       # --launcher local (one node)
#   mpi=pmix                                            # srun --mpi=... of index_corpus.sh (default: pmi2, for MPICH)
#   export MEGAZH_REQUEUE=0                             # requeues in a row without progress (default: 3; 0: none)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
container=()
mpi=pmi2
if [[ -f $root/slurm/site.sh ]]; then
    set +eu # scripts of modules rarely stand them
    source "$root/slurm/site.sh"
    set -eu
fi
export MEGAZH_REQUEUE=${MEGAZH_REQUEUE:-3}

# run_job COMMAND...: run the command of the job, and exit with its exit code. In a Slurm job it runs in the background,
# so that the signals that Slurm sends to this shell alone (--signal=B:...) reach it at once.
run_job() {
    [[ -n ${SLURM_JOB_ID:-} ]] || exec "$@"
    local child="" signalled=1 code=0 name
    trap 'signalled=1; on_time_limit' USR1
    for name in TERM HUP INT; do
        trap "signalled=1; pass_on $name" "$name"
    done
    set -m # by default, what runs in the background ignores SIGINT
    "$@" &
    child=$!
    set +m # which would report the end of the command
    while ((signalled)); do # a signal ends `wait` before the command ends
        signalled=0
        wait "$child" && code=0 || code=$?
    done
    exit "$code"
}

on_time_limit() {
    pass_on USR1
}

pass_on() { # SIGNAL: to the command of the job
    [[ -n $child ]] || exit 75 # temporary failure: megazh/errors.py
    kill -s "$1" -- "$child" 2> /dev/null || true
}
