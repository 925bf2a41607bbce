"""The example runs, and its robust policies are worth more in the worst case than the nominal one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path


def test_the_example_shows_what_robustness_buys(capsys):
    path = Path(__file__).parents[2] / "examples" / "robust_mdp.py"
    spec = importlib.util.spec_from_file_location("robust_mdp", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    text = capsys.readouterr().out
    exposed = [float(x) for x in re.findall(r"([\d.]+) in its worst case\n", text)]
    robust = [float(x) for x in re.findall(r"robust policy:  ([\d.]+)", text)]
    assert len(exposed) == len(robust) == 2
    assert all(r < e - 1.0 for r, e in zip(robust, exposed, strict=True))
    assert "run 0.20  repair 0.80" in text  # one budget for both actions: the best policy randomises
