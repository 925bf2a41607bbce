"""Runs that are killed. One process imports rlopt once and forks for every run, which ends by SIGKILL.

As a script: reads lines ``[case, run_dir, step]`` and answers each with the exit code of the run's process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Killer:
    """Trains a case of ``test_resume.py`` in a process that kills itself once it is past a step."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, case: str, run: Path, at: int) -> None:
        if self._process is None:
            words = [sys.executable, "-m", "tests.training.killed_runs"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([case, str(run), at]), file=self._process.stdin, flush=True)
        code = self._process.stdout.readline()
        assert code == f"{-signal.SIGKILL}\n", (run.parent / "killed.log").read_text()[-2000:]

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)  # end of its input


def train_and_kill(case: str, run: Path, at: int) -> None:
    from rlopt.training import Callback, begin
    from tests.training.test_resume import config, run_to_end

    class Kill(Callback):
        def on_step(self, trainer, progress):
            if trainer.loop.step >= at:
                os.kill(os.getpid(), signal.SIGKILL)

    run_to_end(begin(config(case, run), callbacks=[Kill()]))


def main() -> None:
    import torch

    import tests.training.test_resume  # noqa: F401 (so that no child needs to)
    from rlopt.runs.run_folder import RunFolder
    from tests.training.conftest import no_curve

    torch.set_num_threads(1)
    RunFolder.draw_curve = no_curve
    for line in sys.stdin:
        case, run, at = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(Path(run).parent / "killed.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                train_and_kill(case, Path(run), at)
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
