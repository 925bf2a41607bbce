"""Films of evaluations: the first episode is drawn as it was counted, and what makes no film is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rlopt.envs import VectorEnv, make_env
from rlopt.loops import evaluation as evaluation_module
from rlopt.policy import save_policy
from rlopt.training import video
from rlopt.training.evaluate import evaluate_path
from rlopt.types import Episode, RloptError
from tests.training.evaluated import Lengths, endless, policy_for


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gymnasium.register("Lengths-v0", entry_point=Lengths)
    yield
    del gymnasium.registry["Lengths-v0"]


def test_a_film_of_the_first_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pygame")
    pytest.importorskip("imageio_ffmpeg")
    imageio = pytest.importorskip("imageio")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = {"id": "CartPole-v1", "kwargs": {"max_episode_steps": 9}}
    save_policy(policy_for("CartPole-v1"), tmp_path / "p", {"env": env, "seed": 2})
    found = evaluate_path(tmp_path / "p", 2, video=tmp_path / "new" / "film.mp4")
    frames = imageio.get_reader(tmp_path / "new" / "film.mp4").count_frames()
    assert frames == found.episodes[0].length + 1
    assert found.episodes == evaluate_path(tmp_path / "p", 2).episodes
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["film.mp4"]


def test_video_without_its_packages_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_policy(policy_for("Lengths-v0"), tmp_path)
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(RloptError, match=r'pip install -c constraints.txt -e "\.\[video\]"'):
        evaluate_path(tmp_path, 1, video=tmp_path / "film.mp4")


def test_an_environment_without_pictures_says_so(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    save_policy(policy_for("Lengths-v0"), tmp_path / "p")
    with pytest.raises(RloptError, match="Lengths-v0"):
        evaluate_path(tmp_path / "p", 1, video=tmp_path / "film.mp4")
    assert not list(tmp_path.glob("*film*"))


class Drawn(gymnasium.Env[Any, Any]):
    """Draws the frames that it is given, one after the other."""

    observation_space, action_space = spaces.Box(-1.0, 1.0, (1,)), spaces.Box(-1.0, 1.0, (1,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, shapes: Any, dtype: str = "uint8", render_mode: str | None = None) -> None:
        self.frames = [np.zeros(shape, dtype) for shape in shapes]
        self.render_mode, self.shown = render_mode, -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self) -> Any:
        self.shown = min(self.shown + 1, len(self.frames) - 1)
        return self.frames[self.shown]


@pytest.mark.parametrize(
    ("shapes", "dtype", "words"),
    [
        ([(3, 64, 64)], "uint8", r"draws frames of uint8 \(3, 64, 64\); a film needs uint8 \(height, width, 3\)$"),
        ([(64, 64, 3)], "float64", r"draws frames of float64 \(64, 64, 3\); a film needs uint8"),
        ([(64, 64)], "uint8", r"gives no pictures \(render_mode rgb_array\); leave video out$"),
        (
            [(64, 64, 3), (32, 64, 3)],
            "uint8",
            r"frames of \(64, 64, 3\), then of \(32, 64, 3\); a film needs all of one",
        ),
    ],
)
def test_frames_that_make_no_film_are_one_clear_line(
    shapes: Any, dtype: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setitem(gymnasium.registry, "Drawn-v0", gymnasium.registry["Pendulum-v1"])  # so that it is put back
    kwargs = {"shapes": shapes, "dtype": dtype}
    gymnasium.register("Drawn-v0", entry_point=Drawn, kwargs=kwargs, max_episode_steps=5)  # type: ignore[arg-type]
    save_policy(policy_for("Drawn-v0"), tmp_path / "p")
    with pytest.raises(RloptError, match=words):
        evaluate_path(tmp_path / "p", 1, video=tmp_path / "film.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_film_without_an_end_is_cut_off_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[int] = []

    @contextmanager
    def writer(file: str, **_: Any) -> Iterator[Any]:
        Path(file).touch()
        yield SimpleNamespace(append_data=frames.append)

    def frame(env: VectorEnv) -> int:
        assert len(frames) <= 50, "the film goes on"
        return 1

    monkeypatch.setattr(evaluation_module, "NO_LIMIT", 50)
    monkeypatch.setattr(video, "check_video", lambda path: writer)
    monkeypatch.setattr(video, "_frame", frame)
    save_policy(endless(make_env("CliffWalking-v1", 1, autoreset=False)), tmp_path / "p")
    assert evaluate_path(tmp_path / "p", 1, video=tmp_path / "film.mp4").episodes == [Episode(-50.0, 50)]
    assert len(frames) == 51
