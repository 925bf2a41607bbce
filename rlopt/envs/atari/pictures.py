"""Pictures of a game in colour, which the vector environment does not give."""

from __future__ import annotations

from typing import Any

import ale_py
from ale_py import roms

from rlopt.envs.arrays import Array


class Follower:
    """An emulator that plays what a row of the vector environment has played, from the same seed.

    Args:
        game: ale-py's name of it.
        seed: of the row.
        sticky: probability of repeating an action.
        noops: frames without action that began its game.
        actions: the emulator's action for each of the row's.
        skip: frames of a step.
    """

    def __init__(self, game: str, seed: int, sticky: float, noops: int, actions: list[Any], skip: int) -> None:
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.seed, self.played, self.actions, self.skip = seed, 0, actions, skip
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", sticky)
        self.ale.setInt("random_seed", seed)
        rom = roms.get_rom_path(game)
        assert rom is not None
        self.ale.loadROM(rom)
        self.ale.reset_game()
        for _ in range(noops):
            self.ale.act(ale_py.Action.NOOP)

    def picture(self, played: bytearray) -> Array:
        """Return the screen (210, 160, 3) uint8 after the row's actions since its seed, in its first game."""
        for action in played[self.played :]:
            for _ in range(self.skip):
                if not self.ale.game_over():
                    self.ale.act(self.actions[action])
        self.played = len(played)
        return self.ale.getScreenRGB()
