"""``rlopt train --multirun``: each job is the run that it would be alone; all are ranked in the end."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import rlopt
from rlopt.cli.compose import compose, resume_request, split

_OF_ONE_RUN = ("seed=", "run_dir=", "resume=")
"""Words in which seeds of one setting differ."""


def run_all(arguments: argparse.Namespace) -> int:
    """Run each job in a process of its own, so that it equals the same run alone, whatever the others do."""
    jobs = split(arguments.overrides)
    for job in jobs:  # a mistake in the last job is told before the first one has run for hours
        if resume_request(job) is None:
            compose(job, arguments.config_dir)
    flags = [part for folder in arguments.config_dir for part in ("--config-dir", folder)]
    flags += [
        flag
        for flag in ("--print-config", "--options", "--trust", "--without-lost-rows")
        if getattr(arguments, flag[2:].replace("-", "_"))
    ]
    environment = child_environment()
    codes: list[int] = []
    folders: dict[int, tuple[Path, float]] = {}
    with tempfile.TemporaryDirectory() as notes:
        for i, job in enumerate(jobs):
            print(f"job {i + 1} of {len(jobs)}: {shell(job)}", flush=True)
            note, begin = Path(notes, str(i)), time.monotonic()
            command = [sys.executable, "-m", "rlopt", "train", *flags, f"--folder-to={note}", *job]
            code, stop = _wait(subprocess.Popen(command, env=environment))
            codes.append(code)
            if note.is_file():
                folders[i] = Path(note.read_text(encoding="utf-8")), time.monotonic() - begin
            if stop or code >= 128:  # a signal: the user wants all of it to end
                break
    print(f"\n{len(jobs)} jobs:")
    ends = ["done" if code == 0 else f"ended with code {code}" for code in codes]
    ends += ["not started"] * (len(jobs) - len(codes))
    shared = Counter(word for job in jobs for word in job)
    for job, ended in zip(jobs, ends, strict=True):
        print(f"  {ended:<18} {shell([word for word in job if shared[word] < len(jobs)] or job)}")
    if folders:
        from rlopt.analysis.ranking import rank_runs

        own = [tuple(w for w in job if shared[w] < len(jobs) and not w.startswith(_OF_ONE_RUN)) for job in jobs]
        runs = {folder: (own[i], seconds, ends[i]) for i, (folder, seconds) in folders.items()}
        print("\n".join(rank_runs(runs)))
    return max(codes, default=0)


def _wait(child: subprocess.Popen[bytes]) -> tuple[int, bool]:
    """Return the exit code of a child, and whether a signal came meanwhile: it gets Ctrl-C by itself and SIGTERM from
    here, and is given the time to save; one that was at its last step ends as if nothing had been."""
    stops: list[int] = []

    def terminate(signum: int, frame: FrameType | None) -> None:
        stops.append(signum)
        child.terminate()

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        while True:
            try:
                code = child.wait()
                return 128 - code if code < 0 else code, bool(stops)
            except KeyboardInterrupt:
                stops.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)


def shell(words: Sequence[str]) -> str:
    """Return ``words`` as one would type them: ``shlex.join`` writes a ' inside a word as '"'"'."""
    return " ".join(
        f'"{word}"' if "'" in word and not set('"$`\\!') & set(word) else shlex.quote(word) for word in words
    )


def child_environment() -> dict[str, str]:
    """Return this process's environment, in which the child finds the same rlopt."""
    root = str(Path(next(iter(rlopt.__path__))).resolve().parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
