"""Ctrl-C before a run has begun is one line, whatever was being imported."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlopt.cli
from rlopt.cli import main
from tests.cli.command_line import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

SLOW = """
import os, signal, time
print("importing", flush=True)
try:
    time.sleep(30)
except BaseException:  # as a C extension does that turns every error into another one, or none
    pass
{after}
"""


@pytest.mark.parametrize("after", ["", "raise RuntimeError('init failed')"])
def test_an_interrupt_that_an_import_swallows_or_turns_into_another_error(tmp_path: Path, after: str) -> None:
    """The environment's module is imported once the command has begun."""
    (tmp_path / "slow.py").write_text(SLOW.format(after=after) + "import tests.cli.nowhere\n" * (not after))
    words = ["train", "env=slow:Pendulum-v1", "total_steps=10", f"run_dir={tmp_path / 'run'}"]
    code, said = interrupted(words, tmp_path, "importing")
    assert (code, said) in [(130, "interrupted\n"), (-signal.SIGINT, "interrupted\n")]


def interrupted(words: list[str], cwd: Path, when: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "rlopt", *words], cwd=cwd, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None and child.stderr is not None
        while when not in child.stdout.readline():
            pass
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        said = child.stderr.read()
        return child.wait(30), said


def test_a_swallowed_interrupt_stops_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlopt.training import setup

    begin = setup.begin

    def swallowing(*arguments, **keywords):  # type: ignore[no-untyped-def]
        trainer = begin(*arguments, **keywords)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return trainer

    monkeypatch.setattr(setup, "begin", swallowing)
    words = ["env=Pendulum-v1", "agent.fused=false", "total_steps=100", f"run_dir={tmp_path / 'run'}"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["train", *words]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted; what was saved last is intact" in capsys.readouterr().err
    assert rlopt.cli._noted == [signal.SIGINT]
    assert main(["list", "buffers"]) == 0, "the next command begins anew"


def test_the_first_imports_are_left_at_once(tmp_path: Path) -> None:
    """A module that takes long stands for argparse, which is imported before anything has begun."""
    code = (
        "import sys; from rlopt.interrupts import leave_at_once; leave_at_once(); print('importing', flush=True)\n"
        "import time\n"
        "try:\n    time.sleep(30)\nexcept BaseException:\n    pass\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert (child.returncode, said) == (130, "interrupted\n")
