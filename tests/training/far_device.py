"""A device that is not the CPU, for machines that have no other: ``far``.

Inside ``FarDevice()`` tensors on ``device="far"`` exist, compute (with the CPU's own kernels, so to the bit as the CPU
does), and keep a GPU's manners: they mix with no CPU tensor of more than one number, have no memory that NumPy could
see, and whoever reads their values waits, as does a copy to the device that is not ``non_blocking``. The ledger says
where that happened:

    with FarDevice() as far:
        loop = make_loop(config(device="far"))
        far.waits.clear()
        loop.advance()
    assert sum(far.waits.values()) == 2

Recorded graphs work as CUDA's do: with ``far.graphs(monkeypatch)`` the calls of ``torch.cuda`` that record and replay a
graph repeat the recorded operations at the recorded addresses with the recorded Python numbers. A wait, or a copy from
the CPU, inside a recording is an error there too.

Generators draw the CPU's numbers. The mode belongs to a thread, as all of torch's do; ``far.here()`` brings it to
another.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
NAME = "far"
REAL_GENERATOR = torch.Generator
FAR_GENERATORS: dict[int, torch.Generator] = {}
"""By address, which is all of a generator that an operation's handler sees."""
COPIES = {aten.copy_.default, aten._to_copy.default}
"""What may have arguments on both sides."""
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
COUNTED = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.equal.default, aten.is_nonzero.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
"""Operations whose result, or its size, the host must see."""


def is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class FarTensor(Tensor):
    """The handle of a tensor that lies far away; ``near`` is where its numbers are."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        made: FarTensor = Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} met a tensor on {NAME} outside FarDevice()")

    def __repr__(self) -> str:
        return f"Far({self.near})"


class FarDevice:
    """See the module. ``waits`` counts waits by place in rlopt, ``uploads`` copies from the CPU."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.recording: list[Callable[[], None]] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> FarDevice:
        _register()
        torch.Generator = _Generator
        self._stack.enter_context(self.here())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        torch.Generator = REAL_GENERATOR
        self._stack.close()

    @contextmanager
    def here(self) -> Iterator[None]:
        """In this thread."""
        with _Calls(self), _Operations(self):
            yield

    def wait(self, what: Any) -> None:
        self._note(self.waits, f"{what} waits for the device")

    def _upload(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._note(self.uploads, f"{func} copies from the CPU")
        if not _non_blocking(func, args, kwargs):
            self.wait(func)

    def _note(self, ledger: Counter[str], what: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"{what} while a graph is recorded")
        frame: FrameType | None = sys._getframe()
        while frame is not None and "/rlopt/" not in frame.f_code.co_filename:
            frame = frame.f_back
        code = None if frame is None else frame.f_code
        place = "elsewhere" if code is None else f"{code.co_filename.rpartition('/rlopt/')[2]}:{code.co_name}"
        ledger[place] += 1

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation: with the CPU's kernel on what lies behind the handles."""
        given = list(_leaves((args, kwargs)))
        tensors = [x for x in given if isinstance(x, Tensor)]
        handles = {id(t.near): t for t in tensors if isinstance(t, FarTensor)}
        device = kwargs.get("device")
        target_far = bool(handles) if device is None else is_far(device)
        for generator in given:
            if isinstance(generator, REAL_GENERATOR) and (generator._cdata in FAR_GENERATORS) != target_far:
                raise RuntimeError(f"{func}: its generator lies on another device")
        if not (handles or target_far):
            return func(*args, **kwargs)
        if handles:
            self._manners(func, args, kwargs, tensors, target_far)
        elif func in COPIES:
            self._upload(func, args, kwargs)
        near_kwargs = {**kwargs, "device": "cpu"} if device is not None else kwargs
        near_args, near_kwargs = _map(lambda x: x.near if isinstance(x, FarTensor) else x, (args, near_kwargs))
        result = func(*near_args, **near_kwargs)
        if self.recording is not None:
            self.recording.append(_again(func, near_args, near_kwargs, result))
        if not target_far:
            return result
        if func is aten.copy_.default:
            return args[0]

        def back(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return handles[id(x)] if id(x) in handles else FarTensor(x)

        return _map(back, result)

    def _manners(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], target_far: bool) -> None:
        near = [t for t in tensors if not isinstance(t, FarTensor) and t.dim() > 0]
        if func in COPIES:
            if not target_far or not isinstance(args[0], FarTensor):
                if _non_blocking(func, args, kwargs):
                    raise RuntimeError(f"{func}: a copy to the CPU that is not waited for may be read too early")
                self.wait(func)
            elif near:
                self._upload(func, args, kwargs)
        elif near and func in INDEXED and isinstance(args[0], FarTensor):
            self.wait(func)  # an index may lie on the CPU
        elif near:
            raise RuntimeError(f"{func}: tensors on two devices; {[tuple(t.shape) for t in near]} lie on the CPU")
        if func in COUNTED or (func in INDEXED and any(t.dtype == torch.bool for t in tensors[1:])):
            self.wait(func)

    def graphs(self, monkeypatch: Any) -> None:
        """Let ``torch.cuda`` record and replay what happens here."""
        far = self

        class Stream:
            def __init__(self, *args: Any) -> None: ...
            def wait_stream(self, other: Stream) -> None: ...

        class Graph:
            def __init__(self) -> None:
                self.operations: list[Callable[[], None]] = []

            def register_generator_state(self, generator: torch.Generator) -> None: ...

            def replay(self) -> None:
                with _disable_current_modes():
                    for operation in self.operations:
                        operation()

        @contextmanager
        def stream(stream: Stream) -> Iterator[None]:
            yield

        @contextmanager
        def graph(graph: Graph, **options: Any) -> Iterator[None]:
            far.recording = graph.operations
            try:
                yield
            finally:
                far.recording = None

        for name, stand_in in {
            "Stream": Stream, "current_stream": Stream, "stream": stream, "CUDAGraph": Graph, "graph": graph,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)


class _Operations(TorchDispatchMode):
    def __init__(self, far: FarDevice) -> None:
        super().__init__()
        self.far = far

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and each operation would pay for saying so."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.far.run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What never becomes an operation, or only without the modes."""

    def __init__(self, far: FarDevice) -> None:
        super().__init__()
        self.far = far

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and is_far(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": None}).to(NAME)
        first = args[0] if args else None
        if isinstance(first, FarTensor):
            if func == Tensor.data.__set__:
                first.near = args[1].near
            elif func is Tensor.numpy and kwargs.get("force"):
                return first.detach().cpu().numpy()
            elif func in (Tensor.numpy, Tensor.__array__, Tensor.data_ptr):
                raise TypeError(f"can't convert a tensor on {NAME} to numpy; use Tensor.cpu() first")
            elif func is Tensor.tolist:
                self.far.wait(func)
                return first.near.tolist()
            elif func is Tensor.__deepcopy__:
                copied = first.detach().clone()
                if isinstance(first, nn.Parameter):
                    copied = nn.Parameter(copied, first.requires_grad)
                args[1][id(first)] = copied
                return copied
        return func(*args, **kwargs)


def _leaves(tree: Any) -> Iterator[Any]:
    """Yield what nested tuples, lists and dicts hold (torch's own trees cost more than an operation)."""
    if isinstance(tree, tuple | list | dict):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(child)
    else:
        yield tree


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _map(function, child) for name, child in tree.items()}
    if isinstance(tree, tuple | list):
        children = [_map(function, child) for child in tree]
        return children if isinstance(tree, list) else tuple(children)
    return function(tree)


def _non_blocking(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] and args[2]))


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> Callable[[], None]:
    """The operation once more, its results where they were."""
    outs = [x for x in _leaves(result) if isinstance(x, Tensor)]

    def operation() -> None:
        again = [x for x in _leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
        for out, new in zip(outs, again, strict=True):
            if out.data_ptr() != new.data_ptr():  # else a view, or changed in place
                out.copy_(new)

    return operation


class FarGenerator(REAL_GENERATOR):
    device = torch.device("meta")  # set by ``_register``


class _IsGenerator(type):
    def __instancecheck__(cls, thing: Any) -> bool:
        return isinstance(thing, REAL_GENERATOR)


class _Generator(metaclass=_IsGenerator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        if not is_far(device):
            return REAL_GENERATOR(device)
        made = FarGenerator()
        FAR_GENERATORS[made._cdata] = made
        return made


def _register() -> None:
    """Once in a process, and before its first backward pass: then autograd makes a queue for the device."""
    if getattr(torch, NAME, None) is None:
        backend_registration._setup_privateuseone_for_python_backend(NAME)
        FarGenerator.device = torch.device(NAME, 0)
