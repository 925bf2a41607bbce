"""Programs that stand in for Slurm's on the PATH: one machine, every job at once, nothing but what the queue uses."""

from __future__ import annotations

import os
from pathlib import Path

PROGRAMS = {
    "sbatch": """
n=$(( $(cat "$F/count" 2>/dev/null || echo 100) + 1 )); echo $n > "$F/count"
cp "$1" "$F/$n.sh"
SLURM_JOB_ID=$n setsid "$F/run" </dev/null >/dev/null 2>&1 &
echo "Submitted batch job $n"
""",
    "run": """
bash "$F/$SLURM_JOB_ID.sh"
if [ -e "$F/$SLURM_JOB_ID.again" ]; then rm "$F/$SLURM_JOB_ID.again"; exec "$F/run"; fi
touch "$F/$SLURM_JOB_ID.ended"
""",
    "srun": """
while [ "${1#--}" != "$1" ]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
echo $$ > "$F/$SLURM_JOB_ID.pid"
exec "$@"
""",
    "scontrol": """
touch "$F/$2.again"
""",
    "squeue": """
if [ -e "$F/$3.sh" ] && [ ! -e "$F/$3.ended" ]; then echo "$3 somewhere"; fi
""",
    "sacct": """
echo "JobID|State|NodeList"
for f in "$F"/*.sh; do
  n=$(basename "$f" .sh); if [ -e "$F/$n.ended" ]; then s=NODE_FAIL; else s=RUNNING; fi; echo "$n|$s|here"
done
""",
    "scancel": """
case $1 in --signal=TERM) kill -TERM "$(cat "$F/$2.pid")";; esac
""",
}


def install(folder: Path) -> dict[str, str]:
    """Write the programs, and return the variables with which they are found."""
    folder.mkdir()
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\nF='{folder}'\n{text.lstrip()}")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
