"""Everything that rlopt promises on a GPU, measured in under ten minutes on one card.

    python benchmarks/gpu.py

- ``sac``: SAC on HalfCheetah, one environment, one update per step: eager against captured updates.
- ``runs``: R runs of the same side by side in one process (``num_runs``).
- ``environments``: MuJoCo on the GPU (``backend=warp``) by number of worlds, beside the CPU's threads (``native``).
- ``worlds``: SAC with thousands of worlds, where environments, replay and updates are all on the card.
- ``replay``: minibatches drawn from, and rows added to, buffers that lie on the card.

Every part is a process of its own with its own time limit, and reports each measurement when it has it: a part that
fails or runs out of time costs the others nothing. ``--device cpu --quick`` tries the script out with tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_parts import worker
from harness import BLUE, GREEN, GREY, Report, spread, verdict, versions

PARTS = {
    "sac": (100, "SAC on HalfCheetah-v5: one environment, one update per step, batch 256, 2x256"),
    "runs": (130, "R runs of it side by side in one process: steps of all together"),
    "environments": (160, "Environments alone, random actions"),
    "worlds": (100, "SAC with thousands of worlds, everything on the device"),
    "replay": (70, "Replay buffers on the device, minibatches of 256"),
}
"""Seconds that a part may take, and what it is."""
LEANRL, AIM = 725, 2_000
"""Steps per second of SAC: LeanRL's published figure on an H100 (compiled, CUDA graphs), and what is aimed at."""
AGGREGATE, TEN_MINUTES = 20_000, 16 * 1_000_000 / 600
"""Steps per second of 16 runs together: the target, and what 16 x 1M steps in ten minutes need."""
PACKAGES = ("rlopt", "torch", "numpy", "numba", "gymnasium", "mujoco", "mujoco-warp", "warp-lang")


Samples = dict[tuple[tuple[str, str], ...], list[float]]


@dataclass
class Part:
    """What came of one part: measurements by their row's cells, the hardware of each row, and sentences."""

    name: str
    samples: Samples
    where: dict[tuple[tuple[str, str], ...], str]
    notes: list[str]
    gpu: bool = True
    """Whether the targets, which are for a GPU, apply."""

    def median(self, **cells: object) -> dict[tuple[tuple[str, str], ...], float]:
        """The medians of the rows with these cells."""
        wanted = {(key, str(value)) for key, value in cells.items()}
        return {row: statistics.median(v) for row, v in self.samples.items() if wanted <= set(row)}

    def top(self, **cells: object) -> float | None:
        return max(self.median(**cells).values(), default=None)


def run_part(name: str, device: str, quick: bool, limit: float) -> Part:
    """Run one part in a process of its own, and take whatever it has reported when it ends or its time is up."""
    command = [sys.executable, __file__, "--worker", name, "--device", device, "--limit", str(limit)]
    stopped = None
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            [*command, *(["--quick"] if quick else [])], stdout=told, stderr=said, start_new_session=True
        )
        try:
            if process.wait(limit):
                said.seek(0)
                last = (said.read().strip().splitlines() or ["without a word"])[-1]
                stopped = f"{name} ended early with status {process.returncode}: {last}"
        except subprocess.TimeoutExpired:
            stopped = f"{name} was stopped after {limit:g} s; what it had measured by then stands"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        told.seek(0)
        part = collect(name, told)
    part.notes += [stopped] if stopped else []
    part.gpu = device.startswith("cuda")
    return part


def collect(name: str, lines: Iterable[str]) -> Part:
    """A part from its worker's lines; the last may be broken off."""
    part = Part(name, {}, {}, [])
    for line in lines:
        if not line.endswith("\n"):
            break
        message = json.loads(line)
        if "note" in message:
            part.notes.append(message["note"])
        else:
            row = tuple(message["what"].items())
            part.samples.setdefault(row, []).append(message["value"])
            part.where[row] = message["where"]
    return part


def report(part: Part) -> Report:
    """The part's table and sentences; ratios only of what was measured."""
    rows = [
        [*(value for _, value in row), *spread(values), str(len(values)), part.where[row]]
        for row, values in part.samples.items()
    ]
    names = [key for key, _ in next(iter(part.samples), ())]
    unit = "per second" if part.name == "replay" else "steps/s"
    return Report([*names, f"{unit} (median)", "min", "max", "windows", "ran on"], rows, [*ratios(part), *part.notes])


def ratios(part: Part) -> list[str]:
    found: list[str] = []
    if part.name == "sac":
        plain = {"precision": "float32", "loop": "plain"}
        eager, captured = part.top(update="eager", **plain), part.top(update="captured", **plain)
        if eager and captured:
            found.append(verdict("captured / eager, float32", captured / eager))
        fastest = part.top(update="captured")
        if captured and fastest and part.gpu:
            found.append(verdict("captured, plain loop, float32 / LeanRL's published 725", captured / LEANRL, 1.0))
            found.append(verdict("captured, fastest setting / LeanRL's published 725", fastest / LEANRL, 1.0))
            found.append(verdict("captured, fastest setting / the 2,000 aimed at", fastest / AIM, 1.0))
    elif part.name == "runs":
        fastest = part.top(runs=16)
        if fastest and part.gpu:
            found.append(verdict("16 runs together / 20,000 steps/s", fastest / AGGREGATE, 1.0))
            found.append(
                verdict("16 runs together / what 16 x 1M steps in ten minutes need", fastest / TEN_MINUTES, 1.0)
            )
    elif part.name == "environments":
        for env_id in dict.fromkeys(dict(row)["environment"] for row in part.samples):
            native = part.top(environment=env_id, backend="native")
            warp = {int(dict(r)["worlds"]): v for r, v in part.median(environment=env_id, backend="warp").items()}
            if native is None or not warp:
                continue
            above = [worlds for worlds, speed in sorted(warp.items()) if speed >= native]
            among = f"{min(warp):,} to {max(warp):,} worlds"
            found.append(
                f"{env_id}: warp passes the fastest native number ({native:,.0f} steps/s) at {above[0]:,} worlds"
                if above
                else f"{env_id}: warp stays below the fastest native number ({native:,.0f} steps/s) from {among}"
            )
            found.append(verdict(f"{env_id}: fastest warp / fastest native", max(warp.values()) / native))
    return found


def save(out: Path, parts: Sequence[Part], command: str, spent: float) -> None:
    """One table a part, a README with all of them, and a picture; parts without a measurement leave only notes."""
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for part in parts:
        made = report(part)
        if made.rows:
            made.write_csv(out / f"{part.name}.csv")
        sections.append(f"## `{part.name}`\n\n{PARTS[part.name][1]}.\n\n{made.text}\n")
    about = f"On one machine, in {spent:.0f} s. Medians of windows; every row says what it ran on.\n\n    {command}"
    (out / "README.md").write_text(
        f"# On a GPU\n\n{about}\n\n{versions(*PACKAGES)}.\n\n" + "\n".join(sections) + "\n![charts](chart.png)\n",
        encoding="utf-8",
    )
    draw(out / "chart.png", parts)


def draw(path: Path, parts: Sequence[Part]) -> None:
    """A panel for each part that measured something."""
    from matplotlib.figure import Figure

    shown = [replace(part, samples=drawn(part)) for part in parts if part.samples]
    if not shown:
        return
    heights = [1.6 if part.name == "environments" else 0.26 * len(part.samples) + 0.6 for part in shown]
    figure = Figure(figsize=(9, sum(heights) + 0.8 * len(shown)), layout="constrained")
    for part, axes in zip(shown, figure.subplots(len(shown), height_ratios=heights, squeeze=False)[:, 0], strict=True):
        axes.set_title(PARTS[part.name][1], loc="left", fontsize=9)
        if part.name == "environments":
            draw_worlds(axes, part)
            continue
        names = [
            ", ".join(f"{key} {value}" if value.isdigit() else value for key, value in row) for row in part.samples
        ]
        bars = axes.barh(names, [statistics.median(v) for v in part.samples.values()], color=BLUE)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.set_xlabel("per second" if part.name == "replay" else "environment steps per second", fontsize=8)
    figure.savefig(path, dpi=150)


def drawn(part: Part) -> Samples:
    """What a picture shows of a part: of buffers only the draws, because additions are on another scale."""
    return {row: v for row, v in part.samples.items() if dict(row).get("measure", "draws/s") == "draws/s"}


def draw_worlds(axes: Any, part: Part) -> None:
    """Steps per second against the number of worlds, both logarithmic, a line for each backend and environment."""
    for i, env_id in enumerate(dict.fromkeys(dict(row)["environment"] for row in part.samples)):
        for backend, colour in (("native", GREY), ("warp", GREEN)):
            found = part.median(environment=env_id, backend=backend)
            line = sorted((int(dict(row)["worlds"]), speed) for row, speed in found.items())
            if line:
                axes.plot(*zip(*line, strict=True), "so^v"[i % 4] + "-", color=colour, label=f"{env_id}, {backend}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("worlds", fontsize=8)
    axes.set_ylabel("environment steps/s", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 …, or cpu to try the script out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, not how fast")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these")
    parser.add_argument("--out", type=Path, help="folder for tables and picture (results/gpu; with cpu: none)")
    parser.add_argument("--worker", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        worker(args.worker, args.device, args.quick, args.limit)
        return
    import torch

    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use here; --device cpu --quick tries the script out")
    out = args.out or (Path("results/gpu") if on_gpu else None)
    begin, parts = time.perf_counter(), []
    for name in args.parts:
        parts.append(run_part(name, args.device, args.quick, PARTS[name][0]))
        made = report(parts[-1])
        print(f"{name}: {PARTS[name][1]}\n\n{made.text}\n", flush=True)
        if out:  # after every part, so that an end from outside leaves what is known
            words = ["--device", args.device] if args.device != "cuda" else []
            words += ["--quick"] if args.quick else []
            words += ["--parts", *args.parts] if args.parts != list(PARTS) else []
            save(out, parts, " ".join(["python benchmarks/gpu.py", *words]), time.perf_counter() - begin)


if __name__ == "__main__":
    main()
