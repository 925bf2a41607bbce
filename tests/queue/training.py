"""A stand-in for ``rlopt train`` that the queue's tests start, jobs files, and the command."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

TRAIN = '''
"""Behaves like rlopt train: a run folder, an evaluation every 10 steps, a checkpoint when asked to stop."""
import fcntl, json, os, signal, sys, time
from pathlib import Path
given = dict(a.split("=", 1) for a in sys.argv[1:])
folder = Path(given.get("resume") or given["run_dir"])
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / ".lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
with open(folder / "commands", "a") as f:
    f.write(" ".join(sys.argv[1:]) + " OMP=" + os.environ["OMP_NUM_THREADS"] + "\\n")
(folder / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if "resume" not in given:
    config = {"seed": int(given["seed"]), "total_steps": int(given["total_steps"])}
    (folder / "evaluations.csv").write_text("step,episode,return,length\\n")
    (folder / "config.yaml").write_text(json.dumps(config))
total = int(given.get("total_steps") or json.loads((folder / "config.yaml").read_text())["total_steps"])
step = int((folder / "checkpoints").read_text()) if (folder / "checkpoints").exists() else 0
kind = folder.parent.name
if kind == "breaks":
    sys.exit("this one breaks")
stop = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda n, _: stop.append(n))
(folder / "pid").write_text(str(os.getpid()))
while step < total and not stop:
    while kind == "waits" and not stop:
        (folder / "waiting").touch()
        time.sleep(0.02)
    if kind == "slow":
        time.sleep(0.1)
    step += 10
    with open(folder / "evaluations.csv", "a") as f:
        f.write(f"{step},0,{step / 2},9\\n")
    if kind in ("slow", "dies_once"):
        (folder / "checkpoints").write_text(str(step))
    if kind == "dies_once" and step == 10 or kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
if stop and kind == "slow":
    time.sleep(1.0)
    print("saved")
(folder / "checkpoints").write_text(str(step))
if step >= total:
    (folder / "policy").mkdir(exist_ok=True)
sys.exit(128 + stop[0] if stop and step < total else 0)
'''


def jobs_file(tmp_path: Path, *jobs: dict[str, Any], **defaults: Any) -> Path:
    path = tmp_path / "jobs.yaml"
    path.write_text(yaml.safe_dump({"defaults": {"overrides": ["total_steps=20"], **defaults}, "jobs": list(jobs)}))
    return path


def command(jobs: Path, root: Path, *more: str) -> list[str]:
    """The words of ``rlopt`` for a queue of stand-ins."""
    script = root.parent / "train.py"
    script.write_text(TRAIN)
    return ["queue", str(jobs), "--root", str(root), "--script", str(script), *more]


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
