"""Train against the worst simulator parameters, then look at the return over all of them.

    python examples/robust_pendulum.py

Mass and length of the pendulum may be off by half; the policy is not told. `adversary="uniform"` is domain
randomisation, `"nominal"` plain SAC.
"""

from pathlib import Path

import numpy as np

from rlopt.analysis.parameter_grid import draw_parameter_grid
from rlopt.training import begin, train_config
from rlopt.training.grid_evaluation import evaluate_grid

BOX = {"m": (0.5, 1.5), "l": (0.5, 1.5)}


def main(steps: int = 24_000, adversary: str = "worst", out: str = "runs/robust_pendulum") -> float:
    config = train_config(
        {
            "total_steps": steps,
            "num_envs": 8,
            "run_dir": out,
            "env": {"id": "Pendulum-v1", "backend": "torch"},
            "agent": {
                "name": "drpg_deep",
                "box": BOX,
                "adversary": adversary,
                "adversary_every": 1_500,
                "learning_rate": 1e-3,
                "warmup_steps": 1_000,
                "network": {"hidden": [64, 64]},
            },
        }
    )
    trainer = begin(config)
    try:
        trainer.run()
        found = evaluate_grid(trainer.loop.policy(), "Pendulum-v1", BOX, count=10, episodes=10)
    finally:
        trainer.close()
    axes = {name: np.linspace(low, high, 10) for name, (low, high) in BOX.items()}
    draw_parameter_grid({adversary: found.means}, axes, Path(out) / "grid.png", nominal={"m": 1.0, "l": 1.0})
    print(f"worst {found.worst:.1f}, mean {found.mean:.1f} over the box; see {out}/grid.png")
    return found.worst


if __name__ == "__main__":
    main()
