#!/bin/bash
# One study on many GPUs of a Slurm cluster. Each task of the array is a worker with one GPU; they share the study's
# total, and know of each other only through the storage. More tasks may join at any time, and any may be cancelled.
#
# The storage must be reachable from every node: PostgreSQL, or `serve` on a machine that stays, as a job if need be:
#
#   sbatch --job-name=serve --wrap "python tune.py serve --study llama70 --listen 0.0.0.0"
#   sbatch --array=0-7 docs/slurm.sh llama70 grpc://$(squeue -h -n serve -o %N):13000
#
# Further words are options of tune.py: sbatch docs/slurm.sh STUDY STORAGE --trials 100

#SBATCH --job-name=atp-tune
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@90
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append

# --requeue: a task that was preempted, or whose node failed, is requeued and resumes the study.
# --signal: 90 seconds before its time is up the worker is told to stop; the trial that ran is queued again.

set -u
study=$1 storage=$2
shift 2

srun python tune.py --study "$study" --storage "$storage" "$@"
code=$?

# 130: stopped by the signal, so the study is not done. After scancel and preemption this line is not reached.
if [ "$code" -eq 130 ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
