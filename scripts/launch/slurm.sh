#!/usr/bin/env bash
# sbatch --nodes 2 scripts/launch/slurm.sh recipe.yaml [--output DIR] ...
# Type it at the top of the clone, after `bash scripts/install.sh train`. One task a GPU. A rank that fails ends the
# job; SLURM's SIGTERM 3 minutes before the time limit saves and stops, as `scancel --signal=TERM JOB` does (plain
# scancel kills soon after its own); the next sbatch of the same recipe goes on from there.
#SBATCH --job-name=hybridzoo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# above the usual services, and another one for each job of a host
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# some versions of srun do not take the number from sbatch
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" .venv/bin/python scripts/launch/train.py "$@" --resume
