"""A SLURM cluster of one machine: the commands that submitit calls, as scripts on the PATH."""

import os
from pathlib import Path

import pytest

SCRIPTS = {
    # An array of jobs, each a process that runs the script again as long as it is queued again.
    "sbatch": """
        last=$(sed -nE 's/^#SBATCH --array=0-([0-9]+)%.*/\\1/p' "$1")
        id=$((100 + $(ls "$SLURM_PRETENDED" | grep -c '[.]sh$')))
        cp "$1" "$SLURM_PRETENDED/$id.sh"
        for index in $([ "$last" ] && seq 0 "$last" || echo none); do
            name=$id; [ "$index" = none ] || name=${id}_$index
            echo PENDING > "$SLURM_PRETENDED/$name.state"
            setsid pretended_job "$name" "$id" "$index" < /dev/null > /dev/null 2>&1 &
        done
        echo "Submitted batch job $id"
    """,
    "pretended_job": """
        export SLURM_JOB_ID=$2 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=localhost
        export SLURM_NTASKS=$(sed -nE 's/^#SBATCH --ntasks-per-node=([0-9]+).*/\\1/p' "$SLURM_PRETENDED/$2.sh")
        export PRETENDED_NAME=$1
        [ "$3" = none ] || export SLURM_ARRAY_JOB_ID=$2 SLURM_ARRAY_TASK_ID=$3
        while
            echo RUNNING > "$SLURM_PRETENDED/$1.state"
            bash "$SLURM_PRETENDED/$2.sh"
            [ -e "$SLURM_PRETENDED/$1.requeue" ]
        do rm "$SLURM_PRETENDED/$1.requeue"; echo "$1" >> "$SLURM_PRETENDED/requeued"; done
        echo COMPLETED > "$SLURM_PRETENDED/$1.state"
    """,
    "srun": """
        while [[ $1 == --* ]]; do
            case $1 in
                --output) out=$2; shift 2;;
                --error) err=$2; shift 2;;
                *) shift;;
            esac
        done
        named() { local path=${1//%A_%a/$PRETENDED_NAME}; path=${path//%j/$PRETENDED_NAME}; echo "${path//%t/$2}"; }
        pids=()
        for ((task = 0; task < SLURM_NTASKS; task++)); do
            SLURM_PROCID=$task SLURM_LOCALID=$task "$@" >> "$(named "$out" $task)" 2>> "$(named "$err" $task)" &
            pids+=($!)
        done
        echo "${pids[@]}" > "$SLURM_PRETENDED/$PRETENDED_NAME.pids"
        wait "${pids[@]}"
    """,
    "scontrol": 'touch "$SLURM_PRETENDED/$2.requeue"',
    "scancel": 'kill -TERM $(cat "$SLURM_PRETENDED/$1.pids")',
    "sacct": """
        echo "JobID|State|NodeList"
        for file in "$SLURM_PRETENDED"/*.state; do
            name=${file##*/}
            echo "${name%.state}|$(cat "$file")|here"
        done
    """,
}


class PretendedSlurm:
    """Its jobs, by their names: 100_0, 100_1, ... of an array, 101 of the command after that."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "slurm"
        self.folder.mkdir()
        commands = folder / "commands"
        commands.mkdir()
        for name, script in SCRIPTS.items():
            (commands / name).write_text(f"#!/bin/bash\n{script}")
            (commands / name).chmod(0o755)
        patch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("SLURM_PRETENDED", str(self.folder))

    def send(self, job: str, signum: int) -> None:
        """A signal to all processes of a job, as `scancel --signal` and the end of its time do."""
        for pid in (self.folder / f"{job}.pids").read_text().split():
            os.kill(int(pid), signum)

    def state(self, job: str) -> str:
        path = self.folder / f"{job}.state"
        return path.read_text().strip() if path.exists() else ""

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []
