#!/bin/bash
# One torchrun per node: sbatch --nodes=4 docs/slurm.sh trainer=ddp optimizer.lr=0.1
# The same command again, after anything, goes on with the run. Needs a folder that all nodes share; without trainer=fsdp,
# storage=s3 will do.
#SBATCH --job-name=holdfast
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue                # back into the queue if a node fails, or a job of higher priority wants it
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120      # two minutes before the time is up, to this script

if [ -n "$SLURM_CPUS_PER_TASK" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # which srun does not take over by itself
fi
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Out of time: have all ranks save and stop, and go on in another turn.
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${RANKS_PER_NODE:-gpu}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$head_node:${RENDEZVOUS_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" --rdzv-id="$SLURM_JOB_ID" \
    train.py "$@" &

wait $!; status=$?
wait  # a signal ends the first wait at once
# A preempted job that has saved and ended before its grace is over counts as done for Slurm.
if [ -n "$again" ] || scontrol show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
