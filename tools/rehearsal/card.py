"""A card that is not there: tensors on "cuda" whose memory is the host's, and the parts of `torch.cuda` that use it.

What a kernel would do, the CPU does on the same memory: generated kernels in Triton's interpreter, graphs of Inductor's
operator by operator. As on a card, operators refuse tensors of both devices, and a capture runs nothing, keeps what a
replay repeats, and refuses what would make the host wait. Time is a count of what ran. Not handled: compilers and
drivers, streams that run side by side, gradients, several devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import subprocess
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch._inductor import compile_fx as inductor
from torch.autograd import DeviceType
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from river_compile.kernels.files import atomic_write, cached_file
from river_compile.kernels.native.build import find_compiler, torch_flags
from river_compile.kernels.triton import loader
from river_compile.kernels.triton.linear import LinearSpec
from river_compile.kernels.triton.spec import DEFAULT_DEVICE, KernelSpec, Stage
from river_compile.kernels.triton.tiles import interpreter_tile
from tools.kernels.devices import known

SECONDS = 5e-6  # of everything that runs, by this card's clock
MEMORY = 80 * 10**9  # bytes
NAME = "a rehearsal's card"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_MIXES = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl_")  # take indices of the host's
_turn = threading.Lock()  # of kernels: what rounds is the whole interpreter's
_numbers = itertools.count()  # of streams
_WIDEST = {bool: torch.bool, int: torch.int64, float: torch.float64}
_kept: list[object] = []  # what lives as long as the process
_real_load_for = loader.load_for


class CaptureError(RuntimeError):
    """Something that no capture allows."""


class Clock:
    """The card's time in seconds; one for the process."""

    now = 0.0

    @classmethod
    def run(cls, name: str, work: Callable[[], object]) -> Any:
        cls.now += SECONDS
        return work()


class Stream(torch.Stream):
    """A stream: everything runs in the order in which it is asked for, so there is nothing to wait for."""

    def __new__(cls, device: object = None, priority: int = 0) -> Stream:
        return super().__new__(cls, stream_id=next(_numbers), device_index=0, device_type=int(DeviceType.CUDA))

    def __init__(self, device: object = None, priority: int = 0) -> None:
        pass

    def synchronize(self) -> None:
        _refuse("a stream's end is waited for")

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class Event:
    """A moment of the card's clock."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._timing, self._at = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        self._at = Clock.now

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _refuse("an event is waited for")

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing) or self._at is None or end._at is None:
            raise RuntimeError("both events must be recorded, with enable_timing=True")
        return 1e3 * (end._at - self._at)


class Graph:
    """A captured graph: calls in order."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._calls: list[tuple[str, Callable[[], object]]] = []

    def capture_begin(
        self, pool: object = None, capture_error_mode: str = "global", check_input_liveness: bool = False
    ) -> None:
        _refuse("a capture begins inside of another")
        _here.graph = self

    def capture_end(self) -> None:
        _here.graph = None

    def keep(self, name: str, work: Callable[[], object]) -> None:
        self._calls.append((name, work))

    def replay(self) -> None:
        _refuse("a graph is replayed")
        for name, work in self._calls:
            Clock.run(name, work)

    def reset(self) -> None:
        self._calls.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 0)


class _Here(threading.local):
    """What is of a thread: its capture, and its stream."""

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.stream = _default_stream()
        self.given: dict[str, Any] = {}  # to the earlier stages of a kernel


@functools.cache
def _default_stream() -> Stream:
    return Stream()


_here = _Here()


def _refuse(what: str) -> None:
    if _here.graph is not None:
        raise CaptureError(f"operation not permitted when stream is capturing: {what}")


class _StreamContext:
    def __init__(self, stream: Stream | None) -> None:
        self._stream, self._before = stream, _here.stream

    def __enter__(self) -> None:
        self._before, _here.stream = _here.stream, self._stream or _here.stream

    def __exit__(self, *error: object) -> None:
        _here.stream = self._before


def _run(name: str, work: Callable[[], object]) -> None:
    """Run work on the card's memory, or has a capture keep it."""
    if _here.graph is None:
        Clock.run(name, work)
    else:
        _here.graph.keep(name, work)


def _operator(op: Any, *arguments: Any, **named: Any) -> Any:
    """What every operator without a kernel for the card does: the CPU's, on the same memory.

    In a capture its results are memory of the right shapes, and a replay runs it.
    """
    returns = op._schema.returns
    if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):  # a view: no memory is touched
        return op.redispatch(_CPU, *arguments, **named)
    # A number that stands for a tensor of no dimensions arrives as the number.
    arguments = tuple(
        torch.tensor(value, dtype=_WIDEST[type(value)])
        if type(value) in _WIDEST and str(parameter.type) == "Tensor"
        else value
        for value, parameter in zip(arguments, op._schema.arguments, strict=False)
    )
    generators: list[tuple[torch.Generator, torch.Generator]] = []  # the card's, and the host's that draws
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the CPU's tensor: it, and the card's

    def on_host(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_cuda and value.dim() and not op.name().startswith(_MIXES):
                raise RuntimeError(f"Expected all tensors to be on the same device, but {op} got one of the host's")
            tensor = torch.ops.rehearsal.host(value) if value.is_cuda else value
            if not value.numel() and op._overloadname.endswith("out"):  # (may be what is to be resized)
                tensor = torch.empty_like(tensor)
            seen[id(tensor)] = tensor, value
            return tensor
        if isinstance(value, torch.Generator):
            generators.append((value, torch.Generator().set_state(value.get_state())))
            return generators[-1][1]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    given, options = tree_map(on_host, (arguments, named))
    run = _ONLY_ON_CARDS.get(op.name(), op)
    if _here.graph is None:
        found = Clock.run(op.name(), lambda: run(*given, **options))
        for generator, used in generators:
            generator.set_state(used.get_state())
        for tensor, value in seen.values():
            if tensor.shape != value.shape:
                torch.ops.rehearsal.host(_resized(value, tensor)).copy_(tensor)
        return tree_map_only(Tensor, lambda t: seen[id(t)][1] if id(t) in seen else _moved(t), found)
    if any(str(r.type) not in ("Tensor", "List[Tensor]") for r in returns):
        _refuse(f"{op} returns a value to the host")
    metas = {key: _like(tensor, "meta") for key, (tensor, _) in seen.items()}

    def on_meta(value: Any) -> Any:
        return torch.device("meta") if isinstance(value, torch.device) else metas.get(id(value), value)

    shaped, settings = tree_map(on_meta, (given, options))
    found = run(*shaped, **settings)
    resized = [_resized(seen[key][1], meta) for key, meta in metas.items() if seen[key][0].shape != meta.shape]
    if resized:  # which is all that happens immediately
        return _operator(op, *arguments, **named)
    own = {id(meta): seen[key][1] for key, meta in metas.items()}
    result = tree_map_only(Tensor, lambda t: own[id(t)] if id(t) in own else _like(t, "cuda"), found)
    targets = [torch.ops.rehearsal.host(t) for t in tree_leaves(result) if not any(t is o for o in own.values())]
    inputs = set(seen)  # (a graph keeps no tensor of its caller's alive, only memory)

    def replay() -> None:
        made = [t for t in tree_leaves(run(*given, **options)) if id(t) not in inputs]
        for target, tensor in zip(targets, made, strict=True):
            target.copy_(tensor)

    _here.graph.keep(op.name(), replay)
    return result


def _histc(x: Tensor, bins: int = 100, low: float = 0, high: float = 0) -> Tensor:
    return torch.histc(x.float(), bins, low, high).to(x.dtype)


_ONLY_ON_CARDS = {"aten::histc": _histc}  # operators that a CPU has not for integers


def _like(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _resized(tensor: Tensor, like: Tensor) -> Tensor:
    return torch.ops.aten.resize_.default.redispatch(_CPU, tensor, like.shape)


def _moved(tensor: Tensor) -> Tensor:
    """Return the same values in memory of the card."""
    moved = _like(tensor, "cuda")
    torch.ops.rehearsal.host(moved).copy_(tensor)
    return moved


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy within the card, to it or from it; a capture takes what waits for nothing."""
    for tensor in (target, source):
        if not (tensor.is_cuda or (non_blocking and tensor.is_pinned())):
            _refuse("a copy to or from memory that is not pinned, or that the host waits for")
    into, of = (torch.ops.rehearsal.host(t) if t.is_cuda else t for t in (target, source))
    name = "copy" if target.is_cuda and source.is_cuda else "Memcpy"
    _run(name, lambda: into.copy_(of))
    return target


class _Launched:
    """A kernel that is launched as Triton launches a compiled one, stage by stage; the last stage runs all of it.

    It runs with the interpreter's own tile, whose time goes by operations: a card's takes minutes.
    """

    def __init__(self, stage: Stage, last: bool, whole: loader.Launch, name: str) -> None:
        self._stage, self._last, self._whole, self._name = stage, last, whole, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **options: Any) -> None:
        given = dict(zip(self._stage.arguments, arguments, strict=True))
        if not all(value.is_cuda for value in given.values() if isinstance(value, Tensor)):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        _here.given |= given
        if not self._last:
            return
        given, _here.given = _here.given, {}
        wanted = self._whole._buffers  # (other tiles have other workspaces, which the launch makes)
        seen = {n: torch.ops.rehearsal.host(t) for n, t in given.items() if n in wanted and not wanted[n].workspace}

        def work() -> None:
            with _turn, _rounded():
                self._whole(dict(seen))

        _run(self._name, work)


def _rounded() -> contextlib.AbstractContextManager[object]:
    """Inside, the interpreter rounds to bfloat16 as a card does; by itself it cuts off."""
    from triton.runtime import interpreter

    builder, tl = interpreter.interpreter_builder, interpreter.tl
    cast = builder.cast_impl

    def cast_impl(source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            bits = numpy.ascontiguousarray(source.data).view(numpy.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            data = numpy.where(numpy.isnan(source.data), bits, nearest).astype(numpy.uint32).view(numpy.float32)
            source = interpreter.TensorHandle(data, source.dtype)
        return cast(source, to)

    return mock.patch.object(builder, "cast_impl", cast_impl)


@functools.cache
def _load_for(spec: KernelSpec, target: str) -> loader.Kernel:
    kernel = _real_load_for(spec, target)
    if target != "interpreter":
        quick = spec
        if isinstance(spec, LinearSpec):  # (rows of experts come sorted into the blocks of the tile that was asked for)
            tile = interpreter_tile(spec).tile
            tile = dataclasses.replace(tile, block_m=spec.tile.block_m) if spec.experts else tile
            quick = dataclasses.replace(spec, tile=tile)
        kernel = _Kernel(spec, kernel.stages, kernel.functions, False, _real_load_for(quick, "interpreter"))
    return kernel


@dataclasses.dataclass(frozen=True)
class _Kernel(loader.Kernel):
    """A kernel that Triton would compile, and what runs in its place."""

    interpreted: loader.Kernel

    def launch(self, rows: int) -> loader.Launch:
        whole, last = self.interpreted.launch(rows), self.stages[-1]
        functions = {s.function: _Launched(s, s is last, whole, self.spec.family) for s in self.stages}
        return loader.Launch(loader.Kernel(self.spec, self.stages, functions, False), rows)


class _Uncompiled:
    """What Inductor's compiler returns: the graph, whose operators run one by one."""

    def __init__(self, graph: torch.fx.GraphModule, examples: object, **settings: Any) -> None:
        self._graph, self._boxed_call = graph, True

    def __call__(self, inputs: list[Any]) -> Any:
        return self._graph(*inputs)

    current_callable = __call__


def _synchronize(device: object = None) -> None:
    _refuse("the host waits for the device")


def _library() -> str:
    """Return the path of the compiled half, in the cache folder."""
    source = Path(__file__).with_name("card.cpp")
    command = [find_compiler().command, "-O1", "-std=c++20", "-fPIC", "-shared", "-w"]
    command += [str(source), *torch_flags(), "-lc10"]
    made_from = "\0".join([*command, torch.__version__, source.read_text()])
    digest = hashlib.sha256(made_from.encode()).hexdigest()[:16]

    def make(path: Path) -> None:
        with atomic_write(path) as scratch:
            subprocess.run([*command, "-o", str(scratch)], check=True)

    return str(cached_file(f"rehearsal/card_{digest}.so", Path.exists, make))


def install() -> None:
    """Give this process the card. There is no way back: torch remembers that there is one.

    Raises:
        RuntimeError: torch was built for a card.
    """
    if torch.backends.cuda.is_built():
        raise RuntimeError("a rehearsal needs a torch without CUDA: this one would look for a card")
    torch.ops.load_library(_library())
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_operator, "CUDA")
    aten.impl("copy_", _copy, "CUDA")
    aten.impl("record_stream", lambda tensor, stream: None, "CUDA")
    aten.impl("_fused_sdp_choice", lambda *arguments, **named: 0, "CUDA")  # (the plain one: of torch's own operators)
    _kept.extend((everything, aten))
    sheet = known(DEFAULT_DEVICE)
    properties = types.SimpleNamespace(
        name=NAME, major=sheet.arch // 10, minor=sheet.arch % 10, multi_processor_count=sheet.processors,
        total_memory=MEMORY, warp_size=sheet.warp, regs_per_multiprocessor=sheet.registers, gcnArchName="",
        max_threads_per_multi_processor=sheet.warp * sheet.warps, shared_memory_per_block_optin=sheet.shared,
    )  # fmt: skip
    bytes_ = torch.ops.rehearsal.allocated
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "mem_get_info": lambda device=None: (MEMORY - bytes_(), MEMORY),
        "memory_allocated": lambda device=None: bytes_(),
        "memory_reserved": lambda device=None: bytes_(),
        "max_memory_allocated": lambda device=None: bytes_(),
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": None,
        "synchronize": _synchronize,
        "Stream": Stream,
        "Event": Event,
        "stream": _StreamContext,
        "current_stream": lambda device=None: _here.stream,
        "default_stream": lambda device=None: _default_stream(),
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: _here.graph is not None,
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, stand_in)
    torch._C._cuda_clearCublasWorkspaces = torch._C._host_emptyCache = lambda: None
    torch.version.cuda = "12.8"
    loader.load_for = _load_for
    inductor._compile_fx_inner = _Uncompiled
    inductor._recursive_joint_graph_passes = lambda graph, *rest, **named: graph  # (which would time products)
