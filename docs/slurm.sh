#!/bin/bash
# Trains on several nodes of a Slurm cluster, one torchrun a node and one process a GPU, from one Milvus server:
#
#     OUT_DIR=out/my_run sbatch docs/slurm.sh config/my_run.py --retrieval_milvus_uri=http://milvus:19530 --parallel=fsdp
#
# Edit the lines of #SBATCH. The repository, out_dir and the config's files are on a file system that all nodes share;
# retrieval_cache_dir and retrieval_matches_dir are on each node's own disk. Submitted again, it goes on where it was.
#SBATCH --job-name=nanoretro
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=nanoretro-%j.log

set -euo pipefail
RUN=("$@")
: "${OUT_DIR:?set it to a folder of this run alone}"
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it from sbatch
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# 5 minutes before the time is up each process gets SIGTERM; the run saves a checkpoint, for which torchrun waits, and ends.
srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=0 --shutdown-timeout=240 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$HEAD:29500" \
    train.py "${RUN[@]}" --out_dir="$OUT_DIR" \
    $(test -e "$OUT_DIR/checkpoints/latest" && echo --init_from=resume)
