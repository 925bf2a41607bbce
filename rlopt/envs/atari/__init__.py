"""``backend=atari``: Atari games on ale-py's own vector environment, behind the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlopt.envs.atari.protocols import PROTOCOLS, RAW, Protocol, is_atari, protocol_of, refusal
from rlopt.types import RloptError

if TYPE_CHECKING:
    from rlopt.envs.atari.env import AtariGames
    from rlopt.envs.factory import EnvRequest

__all__ = ["PROTOCOLS", "RAW", "Protocol", "build", "is_atari", "protocol_of", "refusal"]


def build(request: EnvRequest) -> AtariGames:
    """Return the backend ``atari``.

    Raises:
        RloptError: ale-py is missing or too old, or the request is for no Atari game or for what a protocol decides.
    """
    factory = request.factory
    if (why := refusal(factory.spec, factory.kwargs, bool(factory.wrappers), bool(factory.facts))) is not None:
        raise RloptError(f"{why} (backend=atari)")
    from rlopt.envs.atari.env import AtariGames

    protocol = protocol_of(factory.spec, request.protocol)
    game = str(factory.spec.kwargs["game"])
    return AtariGames(
        game,
        request.num_envs,
        protocol,
        evaluation=request.evaluation,
        **dict(factory.kwargs),
        **request.common,
    )
