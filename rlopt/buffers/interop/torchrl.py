"""Random reshuffling for TorchRL: RR-C and RR-M as samplers of its replay buffers.

    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from rlopt.buffers.interop.torchrl import PrioritizedReshuffledSampler, ReshuffledSampler

    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(N), sampler=ReshuffledSampler(), batch_size=256)

    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(N), sampler=PrioritizedReshuffledSampler(), priority_key="td_error", batch_size=256
    )
    batch = buffer.sample()
    batch["td_error"] = ...
    buffer.update_tensordict_priority(batch)  # or buffer.update_priority(batch["index"], td_error)

Storages of several dimensions are drawn from as one ring of single entries. TorchRL's compiled trees are not needed.
"""

# mypy: disable-error-code="misc"
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlopt.buffers.samplers import prioritized_reshuffled, reshuffled
from rlopt.state import load_state, save_state
from rlopt.types import RloptError, State
from rlopt.version import install

try:
    from torchrl.data.replay_buffers.samplers import PrioritizedSampler, Sampler
except ImportError as e:
    raise RloptError(f"rlopt.buffers.interop.torchrl needs TorchRL; {install('torchrl')}") from e


class _Bound:
    """Puts one of rlopt's samplers behind TorchRL's contract. It is bound to the storage when it is first needed,
    because a storage may be lazy; what the storage holds by then counts as written then.

    Args:
        inner: rlopt's sampler.
        seed: of its generator; by default drawn, when it is bound, from the generator of the replay buffer, or from
            torch's global one where it has none.
    """

    _rng: torch.Generator | None

    def __init__(
        self,
        inner: reshuffled.ReshuffledSampler | prioritized_reshuffled.PrioritizedReshuffledSampler,
        seed: int | None,
    ) -> None:
        self.inner, self.seed = inner, seed
        self._empty()

    def _empty(self) -> None:
        self.slots = self.size = 0
        self.shape: tuple[int, ...] = ()
        """Of one row of the storage."""

    def _bind(self, slots: int, device: torch.device, seed: int) -> None:
        self.slots, self.device_bound = slots, device
        self.inner.bind(slots, device, seed)

    def _follow(self, storage: Any) -> None:
        """Bind to ``storage``, or hear of what it holds beyond what was told."""
        size = len(storage)
        if size == 0:
            raise RuntimeError("Cannot sample from an empty storage.")
        device = torch.device(getattr(storage, "device", None) or "cpu")
        shape = tuple(storage.shape[1:]) if storage.ndim > 1 else ()
        row = math.prod(shape)
        slots = -(-int(storage.max_size) // row) * row
        if self.slots == 0:
            seed = self.seed
            if seed is None:
                seed = int(torch.randint(2**63 - 1, (), generator=self._rng))
            self._bind(slots, device, seed)
        elif slots != self.slots:
            raise RloptError(f"this sampler's state is of a storage of {self.slots} entries, not of {slots}")
        elif device != self.device_bound:
            state = self.inner.state_dict()
            self._bind(slots, device, 0)
            self.inner.load_state_dict(state)
        self.shape = shape
        if size > self.size:
            self._wrote(torch.arange(self.size, size))

    def _wrote(self, index: Tensor) -> None:
        """Tell the inner sampler of the entries ``index`` (K,), one call for each run of neighbours."""
        if index.numel() == 0:
            return
        cuts = ((index[1:] != index[:-1] + 1).nonzero().flatten() + 1).tolist()
        for run in index.tensor_split(cuts):
            self.inner.wrote(int(run[0]), run.numel(), None)
        self.size = max(self.size, int(index.max()) + 1)

    def _flat(self, index: Any) -> Tensor:
        """Return entries (K,) from TorchRL's indices: a number, (K,), or (K, dimensions of the storage)."""
        given = torch.as_tensor(index)
        if given.dtype.is_floating_point or given.is_complex() or given.dtype == torch.bool:
            raise RloptError(f"indices are whole numbers, not {given.dtype}")
        flat = given.long()
        if self.shape and flat.dim() == 2:
            strides = torch.tensor([math.prod(self.shape[i:]) for i in range(len(self.shape) + 1)], device=flat.device)
            flat = (flat * strides).sum(-1)
        return flat.reshape(-1)

    def add(self, index: Any) -> None:
        self.extend(index)

    def extend(self, index: Any) -> None:
        if self.slots and index is not None:
            flat = self._flat(index).cpu()
            self._wrote(flat[flat >= 0])

    def sample(self, storage: Any, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Return indices of ``batch_size`` entries, and ``priority_weight`` (B,) float32 where the sampler weighs."""
        self._follow(storage)
        index, weight = self.inner.sample(batch_size, self.size)
        found = torch.unravel_index(index, storage.shape) if self.shape else index
        return found, self._info(index, weight)

    def _info(self, index: Tensor, weight: Tensor | None) -> dict[str, Any]:
        return {}

    # Saving

    def state_dict(self) -> State:
        """Return a tree of tensors and plain values; ``slots`` is 0 before the first draw."""
        if self.slots == 0:
            return {"slots": 0}
        shape, device = list(self.shape), str(self.device_bound)
        inner = self.inner.state_dict()
        return {"slots": self.slots, "size": self.size, "shape": shape, "device": device, "inner": inner}

    def load_state_dict(self, state_dict: State) -> None:
        self._empty()
        if state_dict["slots"] == 0:
            return
        device = torch.device(state_dict["device"])
        if device.type == "cuda" and not torch.cuda.is_available():
            device = torch.device("cpu")
        self._bind(int(state_dict["slots"]), device, 0)
        self.size, self.shape = int(state_dict["size"]), tuple(state_dict["shape"])
        self.inner.load_state_dict(state_dict["inner"])

    def dumps(self, path: str | Path) -> None:
        """Write the state into the folder ``path``: safetensors and JSON."""
        save_state(Path(path), self.state_dict())

    def loads(self, path: str | Path) -> None:
        """Read what ``dumps`` wrote."""
        self.load_state_dict(load_state(Path(path)))

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_rng": None, "saved": self.state_dict()}
        del state["inner"]
        return {**state, "options": self._options()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["options"])
        self.load_state_dict(state["saved"])

    def _options(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self._options().items())})"


class ReshuffledSampler(_Bound, Sampler):
    """Draws each entry of the storage once per epoch (RR-C), in a random order that writing never disturbs. See
    ``rlopt.buffers.ReshuffledSampler``.

    TorchRL's ``SamplerWithoutReplacement`` shuffles anew whenever the storage has grown; this one does not. As there,
    ``for batch in buffer`` ends with the minibatch in which an epoch ends (which may hold the next one's first).

    Args:
        seed: see ``_Bound``.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(reshuffled.ReshuffledSampler(), seed)

    def _empty(self) -> None:
        super()._empty()
        self._ran_out = False

    @property
    def ran_out(self) -> bool:
        """Whether an epoch ended in the last minibatch."""
        return self._ran_out

    @ran_out.setter
    def ran_out(self, value: bool) -> None:
        self._ran_out = value

    def sample(self, storage: Any, batch_size: int) -> tuple[Any, dict[str, Any]]:
        self._follow(storage)
        own = self.inner
        assert isinstance(own, reshuffled.ReshuffledSampler)
        under_way, epochs = own.position < own.order.numel(), own.epochs
        drawn = super().sample(storage, batch_size)
        self._ran_out = own.position == own.order.numel() or own.epochs - epochs > (0 if under_way else 1)
        return drawn


class PrioritizedReshuffledSampler(_Bound, PrioritizedSampler):
    """Draws by priority, with entries hidden (RR-M) while they have been drawn more often than they should have been.
    See ``rlopt.buffers.PrioritizedReshuffledSampler``.

    Of TorchRL's ``PrioritizedSampler`` it is one in name, so that ``TensorDictReplayBuffer`` hands it priorities; the
    priority is |δ|, and the exponent and the floor are applied here.

    Args:
        alpha, beta, anneal_draws, epsilon, floor, max_decay: as there; the defaults are the paper's.
        reduction: how TorchRL reduces priorities of several values per entry: max, min, median or mean.
        seed: see ``_Bound``.
    """

    def __init__(
        self,
        alpha: float = 0.6,
        beta: float = 0.0,
        anneal_draws: int | None = None,
        epsilon: float = 0.0,
        floor: float = 0.01,
        max_decay: float = 1.0,
        reduction: str = "max",
        seed: int | None = None,
    ) -> None:
        self.options = {
            "alpha": alpha, "beta": beta, "anneal_draws": anneal_draws, "epsilon": epsilon, "floor": floor,
            "max_decay": max_decay,
        }  # fmt: skip
        self.reduction = reduction
        super().__init__(prioritized_reshuffled.PrioritizedReshuffledSampler(**self.options), seed)  # type: ignore[arg-type]

    def _options(self) -> dict[str, Any]:
        return {**self.options, "reduction": self.reduction, "seed": self.seed}

    @property
    def device(self) -> torch.device:
        return self.device_bound if self.slots else torch.device("cpu")

    @property
    def max_size(self) -> int:
        return self.slots

    @property
    def alpha(self) -> float:
        """Fixed, as the masses in store are powers of it."""
        return float(self.options["alpha"])  # type: ignore[arg-type]

    @alpha.setter
    def alpha(self, value: float) -> None:
        raise RloptError("alpha is fixed: the priorities in store are powers of it; make a new sampler")

    @property
    def beta(self) -> float:
        """The exponent of the importance weights; a scheduler may change it."""
        return float(self._prioritized.beta)

    @beta.setter
    def beta(self, value: float) -> None:
        if self.options["anneal_draws"] is not None:
            raise RloptError("beta already rises by anneal_draws; leave that out to schedule it from outside")
        if not 0 <= value <= 1:
            raise RloptError(f"beta must be within 0 … 1, not {value:g}")
        self._prioritized.beta = float(value)

    @property
    def _prioritized(self) -> prioritized_reshuffled.PrioritizedReshuffledSampler:
        assert isinstance(self.inner, prioritized_reshuffled.PrioritizedReshuffledSampler)
        return self.inner

    def state_dict(self) -> State:
        return {**super().state_dict(), "beta": self.beta}

    def load_state_dict(self, state_dict: State) -> None:
        super().load_state_dict(state_dict)
        self._prioritized.beta = float(state_dict["beta"])

    @property
    def default_priority(self) -> float:
        """The largest |δ| so far: 1 before there is any."""
        inner = self._prioritized
        if self.slots == 0 or inner.alpha == 0:
            return 1.0
        largest: float = float(inner.max_mass) ** (1.0 / inner.alpha) - inner.epsilon
        return largest

    def _info(self, index: Tensor, weight: Tensor | None) -> dict[str, Any]:
        if weight is None:
            weight = torch.ones(index.shape, dtype=torch.float32, device=index.device)
        return {"priority_weight": weight}

    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Take new priorities, one for all or one per entry, of the entries ``index``; negative indices are left
        out."""
        if storage is not None:
            self._follow(storage)
        if self.slots == 0:
            raise RloptError("priorities came before the sampler knew its storage; give them through the replay buffer")
        flat = self._flat(index).to(self.device)
        values = torch.as_tensor(priority, device=self.device).detach().reshape(-1)
        if values.numel() not in (1, flat.numel()):
            raise RloptError(f"{values.numel()} priorities came with {flat.numel()} indices; give one for each, or one")
        values = values.expand(flat.numel())
        kept = flat >= 0
        if flat.numel() and bool(kept.any()):
            self.inner.update_priority(flat[kept], values[kept])

    def mark_update(self, index: Any, *, storage: Any = None) -> None:
        """Do nothing: ``extend`` and ``add`` have told of the write, and a new entry begins with the largest
        priority."""
