"""From a spec to a kernel that runs: the source file in the cache directory, its import, and its launch.

`load(spec, interpret=False)` gives functions that Triton compiles for the current GPU at their first launch;
`load(spec, interpret=True)` the same functions in Triton's interpreter, on CPU tensors. Both kinds live side by side in
one process: the environment variable TRITON_INTERPRET plays no part. Triton is imported here and nowhere earlier.

Not handled: concurrent interpreted launches. They take turns, since the interpreter patches `triton.language`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import threading
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from river_compile.kernels.files import appearing, in_cache
from river_compile.kernels.triton.spec import DTYPES, KernelSpec, Stage, render

if TYPE_CHECKING:
    from torch import Tensor

_interpreter_turn = threading.Lock()
_kept: dict[tuple[object, ...], Tensor] = {}


def source_file(spec: KernelSpec) -> Path:
    """Writes the source of `spec` unless it is there, and returns its path.

    The file's name holds the hash of its text; a damaged file is rebuilt with a warning.
    """
    source = render(spec)

    def is_whole(path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):  # (whoever cleans up may come between any two looks)
            if path.read_bytes() == source.encode():
                return True
            warnings.warn(f"the generated kernel {path} was damaged and is rebuilt", stacklevel=4)
        return False

    def make(path: Path) -> None:
        with appearing(path) as scratch:
            scratch.write_text(source)

    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return in_cache(f"kernels/{spec.family}_{digest}.py", is_whole, make)


@dataclass(frozen=True)
class Kernel:
    """A loaded spec. Call it with the buffers of the spec, by keyword."""

    spec: KernelSpec
    stages: tuple[Stage, ...]
    functions: dict[str, Any]  # of the stages by name, compiled or interpreted: Triton has no common type for them
    interpret: bool

    def __call__(self, *, rows: int = 1, **tensors: Tensor | None) -> None:
        """Launches every stage; `rows` counts for specs that leave it open. None is a tensor that is not there.

        Workspaces that are not given are allocated.

        Raises:
            ValueError: a buffer is missing, of the wrong dtype or shape, with gaps, on another device, or of no use to
                this kernel.
        """
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        launch = self.launch(rows)
        launch.check(given)
        launch(given)

    def launch(self, rows: int) -> Launch:
        """Returns the launches for so many rows, which do not check what they are given."""
        return Launch(self, rows)


class Launch:
    """All stages of a kernel for a number of rows, with everything that does not depend on the tensors made once."""

    def __init__(self, kernel: Kernel, rows: int) -> None:
        import torch

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
        """Launches on tensors that :meth:`check` lets pass, by name."""
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
            # A GPU overflows to infinity in silence; so does the interpreter here.
            with _interpreter_turn, numpy.errstate(all="ignore"):
                launch(*[given[name] for name in arguments])

    def check(self, given: dict[str, Tensor]) -> None:
        """Checks a call's tensors, as `Kernel` says."""
        kernel, buffers = f"{self._kernel.spec.family} kernel", self._buffers
        missing = sorted(name for name, buffer in buffers.items() if name not in given and not buffer.workspace)
        unknown = sorted(set(given) - set(buffers))
        if missing or unknown:
            raise ValueError(f"{kernel}: missing buffers {missing}, unknown buffers {unknown}")
        for name, tensor in given.items():
            wanted, dtype, shape = buffers[name], dtype_name(tensor), tuple(tensor.shape)
            if dtype != wanted.dtype:
                raise ValueError(f"{kernel}: {name} has dtype {dtype}, its spec says {wanted.dtype}")
            if tensor.is_cuda == self._interpret:
                place = "the CPU" if self._interpret else "a GPU"
                raise ValueError(f"{kernel}: {name} is on {tensor.device}, the kernel runs on {place}")
            if shape != wanted.shape and not wanted.strided:
                raise ValueError(f"{kernel}: {name} has shape {shape}; this call needs {wanted.shape}")
            if not (wanted.strided or tensor.is_contiguous()):
                raise ValueError(f"{kernel}: {name} has strides {tensor.stride()}; make it contiguous")


def kept_zeros(owner: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns int32 zeros that belong to the memory of `owner`: the same ones at every call, which leaves zeros there.

    Launches on different memory may run at the same time, on several streams or from several graphs, and those on the
    same memory must not, since they write there. What was returned once stays, because captured graphs hold its
    address: a few numbers for every address that a cache has had. A capture that nothing ran before gets zeros of its
    graph's own, which cost it one more launch.
    """
    import torch

    key = (owner.device, owner.data_ptr(), shape)
    found = _kept.get(key)
    if found is None:
        found = torch.zeros(shape, dtype=torch.int32, device=owner.device)
        if not (owner.is_cuda and torch.cuda.is_current_stream_capturing()):
            found = _kept.setdefault(key, found)
    return found


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Returns a context in which a tensor's device is the current one, to which Triton launches."""
    import torch

    here = tensor.get_device()
    return contextlib.nullcontext() if here == torch.cuda.current_device() else torch.cuda.device(here)


def dtype_name(tensor: Tensor) -> str:
    """Returns "bfloat16" for a tensor of torch.bfloat16 and so on."""
    return str(tensor.dtype).removeprefix("torch.")


def load(spec: KernelSpec, *, interpret: bool) -> Kernel:
    """Returns `load_for` the interpreter or this machine's kind of GPU."""
    if interpret:
        return load_for(spec, "interpreter")
    import torch

    return load_for(spec, "hip" if torch.version.hip else "cuda")


@functools.cache
def load_for(spec: KernelSpec, target: str) -> Kernel:
    """Generates, imports and wraps the kernel of `spec` for "cuda", "hip" or the "interpreter".

    The same spec and target give the same object. NVIDIA's instructions are left out for all but "cuda".
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    module: Any = _import(source_file(spec), target)
    stages = spec.stages()
    # The plain functions: the decorator makes interpreted ones under TRITON_INTERPRET.
    functions = {stage.function: getattr(module, stage.function).fn for stage in stages}
    if hasattr(module, "PTX"):
        module.PTX = tl.constexpr(target == "cuda")
    interpret = target == "interpreter"
    if interpret:
        _prepare_for_interpreter(module)
    # One machine code whatever the number of rows: a kernel that leaves it open sums alike for all of them.
    wrap = InterpretedFunction if interpret else functools.partial(JITFunction, do_not_specialize=["rows"])
    return Kernel(spec, stages, {name: wrap(function) for name, function in functions.items()}, interpret)


def compile_for(spec: KernelSpec, backend: str, arch: int | str) -> list[Any]:
    """Compiles every stage for a GPU that need not be there; returns Triton's compiled kernels, in order.

    Pointers count as 16-byte aligned, as torch allocates them. A GPU's code is kept by Triton's own cache. A target is
    "cuda" with a compute capability such as 90, or "hip" with a name such as "gfx942".
    """
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
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(stage.arguments) if name in pointers}
        source = ASTSource(function, dict(zip(function.arg_names, types, strict=True)), {}, aligned)
        compiled.append(triton.compile(source, target=target, options=_options(stage)))
    return compiled


def _options(stage: Stage) -> dict[str, int]:
    # Fused multiply-adds are asked for: Triton 3.9 warns without a choice, and its successor changes the default.
    return {"num_warps": stage.num_warps, "num_stages": stage.num_stages, "enable_fp_fusion": True}


def _import(path: Path, mode: str) -> types.ModuleType:
    # Triton reads the text of a function through `inspect`, which wants a real file and a module of its own.
    # Python would keep bytecode beside the file and trust it later, whatever became of it.
    module = types.ModuleType(f"river_compile.kernels.generated.{path.stem}_{mode}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    return module


def _prepare_for_interpreter(module: Any) -> None:
    import triton.language

    for name, value in list(vars(module).items()):
        if hasattr(value, "arg_names"):  # what a kernel calls is run as it is, in the middle of its interpretation
            setattr(module, name, value.fn)
    module.triton_language = triton.language  # the interpreter patches the language modules it finds among the globals
    module.tl = _interpreter_language()
    module.range = _range


def _range(*limits: Any) -> range:
    """`range` over Triton scalars: the interpreter's own conversion to int fails in Triton 3.6 with numpy 2.4."""
    return range(*(limit.handle.data.item() if hasattr(limit, "handle") else limit for limit in limits))


@functools.cache
def _interpreter_language() -> object:
    """Returns `triton.language` as an interpreted kernel sees it.

    Triton writes a few functions (`tl.sum`, `tl.max`) as kernels of their own, which the interpreter can call only if
    the whole process was started for it. Here they are plain Python on top of what the interpreter does provide.
    `dot` multiplies bfloat16 as float32, which holds the products exactly: the interpreter keeps bfloat16 as bit
    patterns and would multiply those. (Its cast to bfloat16 cuts off where a GPU rounds; tolerances allow for it.)
    """
    import triton.language as tl

    class Language:
        def __getattr__(self, name: str) -> object:
            return getattr(tl, name)  # at every use: the interpreter replaces functions of `tl` while it runs

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
