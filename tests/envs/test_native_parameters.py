"""Masses and friction of the native MuJoCo tasks, row by row, against Gymnasium with an edited model."""

import gymnasium
import numpy as np
import pytest
import torch

from rlopt.envs import make_env
from rlopt.types import RloptError

mujoco = pytest.importorskip("mujoco")
pytest.importorskip("mujoco.batch")

MASSES, FRICTION = [3.6, 0.5, 2.0], [1.0, 0.3, 2.9]


def actions(steps: int, rows: int) -> torch.Tensor:
    return torch.rand((steps, rows, 3), generator=torch.Generator().manual_seed(1)) * 2 - 1


def native(rows: int, autoreset: bool = True):
    env = make_env("Hopper-v5", rows, seed=0, backend="native", autoreset=autoreset)
    env.reset(seeds=list(range(rows)))
    return env


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_equal_gymnasium_with_an_edited_model(rows: int) -> None:
    env = make_env("Hopper-v5", rows, seed=0, backend="native", autoreset=False)
    env.reset()
    env.set_parameters(mass_torso=torch.tensor(MASSES[:rows]), friction_floor=torch.tensor(FRICTION[:rows]))
    obs = env.reset(seeds=list(range(rows)))
    singles = []
    for i in range(rows):
        single = gymnasium.make("Hopper-v5")
        model = single.unwrapped.model
        model.body("torso").mass = np.float64(np.float32(MASSES[i]))
        model.geom("floor").friction[0] = np.float64(np.float32(FRICTION[i]))
        mujoco.mj_setConst(model, mujoco.MjData(model))
        first, _ = single.reset(seed=i)
        np.testing.assert_array_equal(obs[i].numpy(), first.astype(np.float32))
        singles.append(single)
    ended = [False] * rows
    for action in actions(60, rows):
        step = env.step(action)
        for i, single in enumerate(singles):
            if not ended[i]:
                observed, reward, terminated, truncated, _ = single.step(action[i].numpy())
                np.testing.assert_array_equal(step.next_obs[i].numpy(), observed.astype(np.float32))
                assert step.reward[i].item() == np.float32(reward)
                ended[i] = terminated or truncated
    assert any(ended)


def test_parameters_change_what_happens_and_come_back() -> None:
    def last(mass: float) -> torch.Tensor:
        env.set_parameters(mass_torso=mass)
        env.reset(seeds=[0, 1, 2])
        for action in actions(5, 3):
            step = env.step(action)
        return step.next_obs

    env = native(3, autoreset=False)
    nominal = float(env.parameters["mass_torso"][0])
    assert nominal == pytest.approx(3.6651914)
    before, heavy, after = last(nominal), last(9.0), last(nominal)
    assert torch.equal(before, after) and not torch.allclose(before, heavy, atol=1e-3)


def test_rows_whose_values_stay_go_on_undisturbed() -> None:
    one, other = native(3), native(3)
    for env in (one, other):
        env.set_parameters(mass_torso=torch.tensor([2.0, 3.0, 4.0]))
    for k, action in enumerate(actions(40, 3)):
        if k == 20:
            one.set_parameters(mass_torso=torch.tensor([2.0, 3.0, 1.0]), friction_floor=torch.tensor([1.0, 1.0, 0.2]))
        a, b = one.step(action), other.step(action)
        assert torch.equal(a.next_obs[:2], b.next_obs[:2])
    assert not torch.equal(a.next_obs[2], b.next_obs[2])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_saved_environment_continues_with_its_parameters(rows: int) -> None:
    one = native(rows)
    one.set_parameters(mass_thigh=1.5, friction_foot_geom=torch.full((rows,), 0.4))
    for action in actions(10, rows):
        one.step(action)
    other = native(rows)
    other.load_state_dict(one.state_dict())
    assert other.parameters["mass_thigh"].tolist() == [1.5] * rows
    for action in actions(40, rows):
        assert torch.equal(one.step(action).obs, other.step(action).obs)


def test_mistakes_are_named() -> None:
    env = native(2)
    with pytest.raises(RloptError, match="did you mean mass_torso"):
        env.set_parameters(mas_torso=1.0)
    with pytest.raises(RloptError, match=r"shape \(3,\)"):
        env.set_parameters(mass_torso=torch.ones(3))
    ant = make_env("Ant-v5", 2, backend="native")
    with pytest.raises(RloptError, match="contact forces"):
        ant.set_parameters(mass_torso=1.0)
