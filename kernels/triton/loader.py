"""From a spec to a kernel that runs: its source file in the cache folder, its import, and its launch.

CUDA (and ROCm) tensors run compiled kernels, CPU tensors the same kernels in Triton's interpreter, for tests; both work
in one process, whatever TRITON_INTERPRET is. Triton is imported only here, on the first load.
Not handled: concurrent interpreted launches. They alternate, since the interpreter patches `triton.language`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import threading
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from river_compile.kernels.files import atomic_write, cached_file
from river_compile.kernels.messages import with_id
from river_compile.kernels.triton.spec import DEFAULT_DEVICE, DTYPES, KernelSpec, Stage, render

_MAX_LAUNCHES = 4096  # prompts of all lengths must not fill the memory
_launches: dict[tuple[object, ...], Launch] = {}
_interpreter_turn = threading.Lock()
_kept: dict[tuple[object, ...], Tensor] = {}


def source_file(spec: KernelSpec) -> Path:
    """Return the path of a spec's source, written if needed; a damaged file is rebuilt with a warning."""
    source = render(spec)

    def is_whole(path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):  # another process may delete it at any time
            if path.read_bytes() == source.encode():
                return True
            warnings.warn(with_id("RC103", f"The generated kernel {path} was damaged and is rebuilt"), stacklevel=4)
        return False

    def make(path: Path) -> None:
        with atomic_write(path) as scratch:
            scratch.write_text(source)

    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return cached_file(f"kernels/{spec.family}_{digest}.py", is_whole, make)


@dataclass(frozen=True)
class Kernel:
    """A loaded spec. Call it with the buffers of the spec, by keyword."""

    spec: KernelSpec
    stages: tuple[Stage, ...]
    functions: dict[str, Any]  # of the stages by name; Triton has no common type for compiled and interpreted ones
    interpret: bool

    def __call__(self, *, rows: int = 1, **tensors: Tensor | None) -> None:
        """Launch every stage and allocates missing workspaces; raise ValueError as `Launch.check`."""
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        launch = self.launch(rows)
        launch.check(given)
        launch(given)

    def launch(self, rows: int) -> Launch:
        """Return the unchecked launches for a number of rows."""
        return Launch(self, rows)


class Launch:
    """All stages of a kernel for a number of rows, with everything prepared that does not depend on the tensors."""

    def __init__(self, kernel: Kernel, rows: int) -> None:
        self._kernel, self._interpret = kernel, kernel.interpret
        self._buffers = kernel.spec.buffers(rows)
        spaces = {name: buffer for name, buffer in self._buffers.items() if buffer.workspace}
        self._spaces = [(name, b.shape, getattr(torch, b.dtype), b.kept_for) for name, b in spaces.items()]
        self._rows = {"rows": rows}
        self._stages = [
            (kernel.functions[stage.function][stage.grid(rows)], stage.arguments, _options(stage))
            for stage in kernel.stages
        ]

    def __call__(self, given: dict[str, Any]) -> None:
        """Launch on tensors by name, which :meth:`check` accepts."""
        like = next(iter(given.values()))
        for name, shape, dtype, kept_for in self._spaces:
            if name not in given:
                given[name] = kept_zeros(given[kept_for], shape) if kept_for else like.new_empty(shape, dtype=dtype)
        given |= self._rows
        if self._interpret:
            self._run_interpreted(given)
            return
        with _on_device_of(like):
            for launch, arguments, options in self._stages:
                launch(*[given[name] for name in arguments], **options)

    def _run_interpreted(self, given: dict[str, Any]) -> None:
        import numpy

        for launch, arguments, _ in self._stages:
            # A GPU overflows to infinity without a warning.
            with _interpreter_turn, numpy.errstate(all="ignore"):
                launch(*[given[name] for name in arguments])

    def check(self, given: dict[str, Tensor]) -> None:
        """Raise ValueError for a missing or unknown buffer, and for a wrong dtype, shape, device or stride."""
        kernel, buffers = f"{self._kernel.spec.family} kernel", self._buffers
        missing = sorted(name for name, buffer in buffers.items() if name not in given and not buffer.workspace)
        unknown = sorted(set(given) - set(buffers))
        if missing or unknown:
            raise ValueError(f"{kernel}: missing buffers {missing}, unknown buffers {unknown}")
        for name, tensor in given.items():
            expected, dtype, shape = buffers[name], dtype_name(tensor), tuple(tensor.shape)
            if dtype != expected.dtype:
                raise ValueError(f"{kernel}: {name} has dtype {dtype}, its spec says {expected.dtype}")
            if tensor.is_cuda == self._interpret:
                place = "the CPU" if self._interpret else "a GPU"
                raise ValueError(f"{kernel}: {name} is on {tensor.device}, the kernel runs on {place}")
            if shape != expected.shape and not expected.strided:
                raise ValueError(f"{kernel}: {name} has shape {shape}; this call needs {expected.shape}")
            if not (expected.strided or tensor.is_contiguous()):
                raise ValueError(f"{kernel}: {name} has strides {tensor.stride()}; make it contiguous")


def kept_zeros(owner: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return int32 zeros that belong to the memory of `owner`: the same tensor at every call."""
    # Launches on different memory may run concurrently, on several streams or from several graphs; those on the same
    # memory must not, since they write there. Tensors are never freed, because captured graphs hold their addresses. In
    # a capture without an earlier run the zeros belong to its graph, at the cost of one more launch.
    key = (owner.device, owner.data_ptr(), shape)
    found = _kept.get(key)
    if found is None:
        found = torch.zeros(shape, dtype=torch.int32, device=owner.device)
        if not (owner.is_cuda and torch.cuda.is_current_stream_capturing()):
            found = _kept.setdefault(key, found)
    return found


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make a tensor's device the current one, to which Triton launches."""
    here = tensor.get_device()
    return contextlib.nullcontext() if here == torch.cuda.current_device() else torch.cuda.device(here)


def dtype_name(tensor: Tensor) -> str:
    """Return "bfloat16" for a tensor of torch.bfloat16 and so on."""
    return str(tensor.dtype).removeprefix("torch.")


def load(spec: KernelSpec, *, interpret: bool) -> Kernel:
    """Return `load_for` the interpreter or this machine's kind of GPU."""
    if interpret:
        return load_for(spec, "interpreter")
    return load_for(spec, "hip" if torch.version.hip else "cuda")


@functools.cache
def load_for(spec: KernelSpec, target: str) -> Kernel:
    """Return the kernel of `spec` for "cuda", "hip" or the "interpreter"; the same object for equal arguments."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    module: Any = _import(source_file(spec), target)
    stages = spec.stages()
    # The undecorated functions: the decorator interprets them if TRITON_INTERPRET is set.
    functions = {stage.function: getattr(module, stage.function).fn for stage in stages}
    if hasattr(module, "PTX"):  # NVIDIA's instructions
        module.PTX = tl.constexpr(target == "cuda")
    interpret = target == "interpreter"
    if interpret:
        _prepare_for_interpreter(module)
    # One machine code for any number of rows, so that a row's bits do not depend on it.
    wrap = InterpretedFunction if interpret else functools.partial(JITFunction, do_not_specialize=["rows"])
    return Kernel(spec, stages, {name: wrap(function) for name, function in functions.items()}, interpret)


def compile_for(spec: KernelSpec, backend: str, arch: int | str) -> list[Any]:
    """Compile every stage for "cuda" (arch 90) or "hip" (arch "gfx942"), without a GPU; return Triton's kernels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    kernel = load_for(spec, backend)
    pointers = {name: f"*{DTYPES[buffer.dtype][0]}" for name, buffer in spec.buffers(1).items()}
    compiled = []
    for stage in kernel.stages:
        function = kernel.functions[stage.function]
        types = [pointers.get(name, "i32") for name in stage.arguments]
        # torch allocates at multiples of 16 bytes.
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(stage.arguments) if name in pointers}
        source = ASTSource(function, dict(zip(function.arg_names, types, strict=True)), {}, aligned)
        compiled.append(triton.compile(source, target=target, options=_options(stage)))
    return compiled


def _options(stage: Stage) -> dict[str, int]:
    # Explicit fused multiply-adds: Triton 3.9 warns without a choice, and the next version changes the default.
    return {"num_warps": stage.num_warps, "num_stages": stage.num_stages, "enable_fp_fusion": True}


def _import(path: Path, mode: str) -> types.ModuleType:
    # Triton reads the text of a function through `inspect`, which needs a file and a separate module.
    # Python's own import would write bytecode next to the file and trust it after the file has changed.
    module = types.ModuleType(f"river_compile.kernels.generated.{path.stem}_{mode}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    return module


def _prepare_for_interpreter(module: Any) -> None:
    import triton.language

    for name, value in list(vars(module).items()):
        if hasattr(value, "arg_names"):  # functions that a kernel calls run as plain Python
            setattr(module, name, value.fn)
    module.triton_language = triton.language  # the interpreter patches the language modules among the globals
    module.tl = _interpreter_language()
    module.range = _range


def _range(*limits: Any) -> range:
    """`range` over Triton scalars: the interpreter's own conversion to int fails in Triton 3.6 with numpy 2.4."""
    return range(*(limit.handle.data.item() if hasattr(limit, "handle") else limit for limit in limits))


@functools.cache
def _interpreter_language() -> object:
    """Return `triton.language` as an interpreted kernel sees it."""
    # Triton implements a few functions (`tl.sum`, `tl.max`) as kernels, which the interpreter calls only if the whole
    # process runs under TRITON_INTERPRET. Here they are plain Python. `dot` multiplies bfloat16 as float32, which is
    # exact: the interpreter would multiply the bit patterns. (Its cast to bfloat16 truncates, a GPU rounds; tolerances
    # allow for it.)
    import triton.language as tl

    class Language:
        def __getattr__(self, name: str) -> object:
            return getattr(tl, name)  # not cached: the interpreter replaces functions of `tl` while it runs

        @staticmethod
        def sum(value: Any, axis: int) -> Any:
            return tl.reduce(value, axis, tl.standard._sum_combine)

        @staticmethod
        def max(value: Any, axis: int) -> Any:
            return tl.reduce(value, axis, tl.standard._elementwise_max)

        @staticmethod
        def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
            return tl.full(shape, 0, dtype)

        @staticmethod
        def range(*limits: Any, **options: Any) -> range:
            return _range(*limits)

        @staticmethod
        def dot(a: Any, b: Any, acc: Any, **options: Any) -> Any:
            if a.dtype == tl.bfloat16:
                a, b = a.to(tl.float32), b.to(tl.float32)
            return tl.dot(a, b, acc, **options)

    return Language()


def forget_launches() -> None:
    _launches.clear()


def find_launch(
    how: tuple[object, ...], given: dict[str, Tensor], rows: int, describe: Callable[[], KernelSpec]
) -> Launch:
    """Return the launch for a call; describes, tiles and checks only the first of each kind. Raises ValueError."""
    # `how`: the kernel's name and what `describe` depends on besides the tensors. A tuning file that is written later
    # applies to the next process.
    key = (how, *[(name, t.shape, t.stride(), t.dtype, t.device) for name, t in given.items()])
    found = _launches.get(key)
    if found is None:
        interpret = not next(iter(given.values())).is_cuda
        found = load(describe(), interpret=interpret).launch(rows)
        found.check(given)
        if len(_launches) >= _MAX_LAUNCHES:
            forget_launches()
        _launches[key] = found
    return found


def drop_none(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@functools.cache
def device_name(index: int) -> str:
    """Names a GPU of this machine: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return architecture.split(":")[0] or f"sm_{properties.major}{properties.minor}"


def device_of(tensor: torch.Tensor) -> str:
    """Names the device whose tiles a tensor's kernels get; a CPU tensor's attention is split as on the default GPU."""
    return device_name(tensor.device.index or 0) if tensor.is_cuda else DEFAULT_DEVICE
