#!/bin/bash
# One torchrun per node: sbatch --nodes=4 docs/slurm.sh trainer=ddp optimizer.lr=0.1
# The same command again, after anything, goes on with the run. Needs a folder that all nodes share, or storage=s3.
#SBATCH --job-name=holdfast
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue                # back into the queue if a node fails, or a job of higher priority wants it
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120      # two minutes before the time is up, to this script

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Out of time: have all ranks save and stop, and go on in another turn.
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${RANKS_PER_NODE:-gpu}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$head_node:${RENDEZVOUS_PORT:-29400}" --rdzv-id="$SLURM_JOB_ID" \
    train.py "$@" &

wait $!; status=$?
if [ -n "$again" ]; then
    wait  # a signal ends the first wait at once
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
