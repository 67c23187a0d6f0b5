"""Which implementation of an op runs.

An op has some of these backends: `reference` (plain PyTorch, the definition), `triton` (CUDA), `persistent` (Triton
too, with one launch in place of hundreds), `fused` (PyTorch's own kernels, on padded operands) and `native` (C++ on
the CPU). A call may name one (`backend="native"`), the environment may force one on every op that has
it (`HDFAST_BACKEND=reference`), and otherwise the table below decides. A backend that is asked for and cannot
run is an error that says how to fix it; nothing falls back silently.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import profiler

from .autograd import without_autocast

BACKENDS = ("reference", "triton", "persistent", "fused", "native")
IN_TRITON = ("triton", "persistent")
FUSED_DTYPES = (torch.float32, torch.bfloat16)

# What runs by default where more than one backend can. An op that is not named runs its reference. On the CPU
# the entry is the faster of native and reference, measured forward + backward by bench/test_ops.py. On CUDA each
# was verified on a real GPU, and an update with all of them is 5.6 times as fast as one with references, both as
# graphs (bench/results/nvidia-h200). gather_windows was verified too, but not timed there by itself. The first run
# on a GPU searches for the fastest by itself.
# fmt: off
CPU_DEFAULT: dict[str, str] = dict.fromkeys((
    "adam_step", "gather_windows", "harmony_loss", "image_deconv", "image_input", "image_loss", "kl_balance",
    "lambda_return", "layer_norm_gru", "layer_norm_silu", "linear", "onehot_linear", "rssm_observe", "sample_index",
    "sample_onehot", "strided_conv", "two_hot_loss", "two_hot_mean",
), "native")
# fmt: on
CUDA_DEFAULT: dict[str, str] = {
    "adam_step": "triton",
    "harmony_loss": "triton",
    "image_deconv": "triton",
    "image_input": "triton",
    "image_loss": "triton",
    "kl_balance": "triton",
    "lambda_return": "triton",
    "layer_norm_gru": "triton",
    "layer_norm_silu": "triton",
    "linear": "fused",
    "onehot_linear": "triton",
    "rssm_observe": "persistent",
    "sample_index": "triton",
    "sample_onehot": "triton",
    "strided_conv": "triton",
    "two_hot_loss": "triton",
    "two_hot_mean": "triton",
}
# What torch.compile sees through by default, where it fuses the definition with what surrounds it.
TRACED = {"harmony_loss"}
_SHIPPED = {"cpu": CPU_DEFAULT, "cuda": CUDA_DEFAULT}
_DEFAULTS = {device: dict(table) for device, table in _SHIPPED.items()}  # of this process; see `use`

BUILD_COMMAND = "pip install -e ."


class BackendError(RuntimeError):
    """A backend was asked for that does not exist or cannot run here; the message names the way out."""


@dataclass
class _Op:
    dtypes: tuple[torch.dtype, ...] | None
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)


_ops: dict[str, _Op] = {}
_outside: dict[tuple[str, str], Callable[..., Any]] = {}  # by op and backend; see `_outside_compile`


def register(
    op: str, *, dtypes: tuple[torch.dtype, ...] | None = FUSED_DTYPES, **implementations: Callable[..., Any]
) -> None:
    """Add implementations of `op`, by backend; several calls for one op add up.

    `dtypes` are those of the deciding tensor that all but the reference take, the same in every call for an op; None
    means all.

    Raises BackendError if there is no such backend, or if the op has other dtypes.
    """
    for name in implementations:
        if name not in BACKENDS:
            raise BackendError(f"{op}: there is no backend {name}; choose one of {', '.join(BACKENDS)}")
    entry = _ops.setdefault(op, _Op(dtypes=dtypes))
    if dtypes != entry.dtypes:
        raise BackendError(f"{op}: registered with dtypes={entry.dtypes}, now with {dtypes}")
    entry.implementations |= implementations


def use(device: str, backends: Mapping[str, str] | None) -> dict[str, str]:
    """Replaces the defaults of a device type ("cpu", "cuda") in this process, and returns the earlier ones.

    backends: by op; an op that is not named runs its reference. None: the table above.

    Raises BackendError if there is no such device type, op or backend.
    """
    _check_device(device)
    backends = _SHIPPED[device] if backends is None else backends
    for op, name in backends.items():
        _check_op(op)
        if name not in _ops[op].implementations:
            raise BackendError(f"{op}: {_lacking(op, name)}")
    before, _DEFAULTS[device] = _DEFAULTS[device], dict(backends)
    return before


def defaults(device: str) -> dict[str, str]:
    """The backend of each op that does not run its reference by default on a device type; see `use`.

    Raises BackendError if there is no such device type.
    """
    _check_device(device)
    return dict(_DEFAULTS[device])


@contextlib.contextmanager
def replaced(op: str, backend: str, implementation: Callable[..., Any]) -> Iterator[None]:
    """Makes `implementation` the backend of `op` inside the block, for tests; torch.compile may keep the earlier one.

    Raises BackendError if there is no such op or backend.
    """
    _check_op(op)
    if backend not in BACKENDS:
        raise BackendError(f"{op}: {_lacking(op, backend)}")
    before = _ops[op].implementations
    _ops[op].implementations = {**before, backend: implementation}
    try:
        yield
    finally:
        _ops[op].implementations = before


def resolve(op: str, backend: str | None, tensor: torch.Tensor) -> Callable[..., Any]:
    """The implementation of `op` for a call whose device and dtype `tensor` decides.

    `backend` is the caller's wish; None leaves it to `HDFAST_BACKEND` (except on the meta device, or where the op
    lacks that backend) and then to the default of the device; torch.compile sees through the ops of `TRACED` then.
    Raises BackendError if that backend is unknown, not implemented for this op, or cannot run on this tensor;
    TypeError for integers, if the op takes floating-point numbers.
    """
    name = resolve_name(op, backend, tensor)
    if name != "reference":
        if torch.compiler.is_compiling():
            return _outside_compile(op, name)
        if torch.jit.is_tracing():
            raise BackendError(
                f'{op}: torch.jit.trace does not see what {name} does; backend="reference" can be traced'
            )
    implementation = without_autocast(_ops[op].implementations[name])
    if name == "reference":
        return implementation
    implementation = recorded(op, implementation)
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return functools.partial(_on, tensor.device, implementation)
    return implementation


def resolve_name(op: str, backend: str | None, tensor: torch.Tensor) -> str:
    """The name of the backend that `resolve` returns, with the same errors."""
    _check_op(op)
    if not tensor.is_floating_point() and _ops[op].dtypes is not None:
        raise TypeError(f"{op}: expected a tensor of floating-point numbers, got {tensor.dtype}")
    forced = os.environ.get("HDFAST_BACKEND") or None
    if forced in BACKENDS and (forced not in _ops[op].implementations or tensor.is_meta):
        forced = None  # the op lacks it, or the tensor is on the meta device, where only shapes are computed
    wish = backend or forced
    if wish is None:
        wish = _default(op, tensor)
        origin = "the default backend "
    else:
        origin = "backend=" if backend else "HDFAST_BACKEND="
    obstacle = _obstacle(op, wish, tensor)
    if obstacle:
        raise BackendError(f"{op}: {origin}{wish} cannot run: {obstacle}")
    return wish


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """What a backend of `op` calls, whether it can run here or not. Raises BackendError if there is none."""
    if backend not in backends_registered(op):
        raise BackendError(f"{op}: {_lacking(op, backend)}")
    return _ops[op].implementations[backend]


def backends_registered(op: str) -> tuple[str, ...]:
    """The backends that `op` has, whether they can run here or not. Raises BackendError if there is no such op."""
    _check_op(op)
    return tuple(name for name in BACKENDS if name in _ops[op].implementations)


def backends_available(op: str, tensor: torch.Tensor) -> tuple[str, ...]:
    """The backends of `op` that can run on a tensor like this one, on this machine, now.

    Raises BackendError if there is no such op.
    """
    _check_op(op)
    return tuple(name for name in BACKENDS if _obstacle(op, name, tensor) is None)


def first_of(backends: Sequence[str], tensor: torch.Tensor | None = None) -> dict[str, str]:
    """By op, the first of these backends that it has and, given a tensor, that can run on one like it.

    An op without any of them is left out.
    """
    have = {op: backends_registered(op) if tensor is None else backends_available(op, tensor) for op in ops()}
    chosen = {op: [backend for backend in backends if backend in own] for op, own in have.items()}
    return {op: names[0] for op, names in chosen.items() if names}


def backends_of(device: torch.device) -> dict[str, str]:
    """The backend that each op runs on by default on a device in float32, with HDFAST_BACKEND applied."""
    probe = torch.empty(0, device=device)
    return {op: resolve_name(op, None, probe) for op in ops()}


def ops() -> tuple[str, ...]:
    """The names of all registered ops."""
    return tuple(sorted(_ops))


def native_built() -> bool:
    """Whether the C++ module of the native backend is built."""
    return importlib.util.find_spec("hdfast_kernels._native") is not None


def triton_installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def recorded(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation`; while a profiler of PyTorch's runs, as the op `hdfast::<name>` of that profiler.

    It counts a kernel for the op in which it was launched and for all that is around that op, and nowhere if there was
    only a range.
    """
    if not profiler._is_profiler_enabled or torch.compiler.is_compiling():
        return implementation

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._profiler._RecordFunctionFast(f"hdfast::{name}"):
            return implementation(*args, **kwargs)

    return call


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """In the block Triton launches on this CUDA device: it takes the current one. For gradients autograd sees to it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _on(device: torch.device, implementation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with launching_on(device):
        return implementation(*args, **kwargs)


def _outside_compile(op: str, name: str) -> Callable[..., Any]:
    """The implementation as torch.compile calls it between two of its graphs, without looking into it.

    Looking, it would break its graph at every step of ours that is not PyTorch's, and compile the rest piece by piece.
    """
    if not _outside:  # for all ops at once: a graph that has been compiled depends on this not changing
        for one, entry in _ops.items():
            for backend, implementation in entry.implementations.items():
                call = functools.partial(_run, implementation)
                _outside[one, backend] = torch.compiler.disable(call, reason="a kernel of hdfast_kernels")
    return _outside[op, name]


def _run(implementation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    tensor = next((one for one in args if isinstance(one, torch.Tensor)), None)
    if tensor is not None and tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return _on(tensor.device, without_autocast(implementation), *args, **kwargs)
    return without_autocast(implementation)(*args, **kwargs)


def _check_device(device: str) -> None:
    if device not in _DEFAULTS:
        raise BackendError(f"there are no backends for {device}, only for {' and '.join(_DEFAULTS)}")


def _check_op(op: str) -> None:
    if op not in _ops:
        raise BackendError(f"{op}: there is no such op; the ops are {', '.join(ops())}")


def _default(op: str, tensor: torch.Tensor) -> str:
    name = _DEFAULTS.get(tensor.device.type, {}).get(op, "reference")
    entry = _ops[op]
    if entry.dtypes is not None and tensor.dtype not in entry.dtypes:
        return "reference"  # float64 and the like: only the definition covers them
    if op in TRACED and torch.compiler.is_compiling():
        return "reference"
    return name


def _lacking(op: str, backend: str) -> str:
    """The message about a backend that `op` does not have."""
    if backend not in BACKENDS:
        return f"there is no such backend; choose one of {', '.join(BACKENDS)}"
    return f"{op} has no {backend} implementation; it has {', '.join(backends_registered(op))}"


def _obstacle(op: str, backend: str, tensor: torch.Tensor) -> str | None:
    """Why `backend` cannot run `op` on `tensor`, with the remedy; None if it can."""
    entry = _ops[op]
    if backend not in entry.implementations:
        return _lacking(op, backend)
    if backend == "reference":
        return None
    if entry.dtypes is not None and tensor.dtype not in entry.dtypes:
        taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in entry.dtypes)
        given = str(tensor.dtype).removeprefix("torch.")
        return f'it takes {taken}, got {given}; convert the input or use backend="reference"'
    device = tensor.device.type
    if backend == "native":
        if device != "cpu":
            return f"the tensor is on {device}, native runs on the CPU; move it or use another backend"
        if not native_built():
            return f"the C++ module hdfast_kernels._native is not built; build it with `{BUILD_COMMAND}`"
        return None
    if backend not in IN_TRITON:
        return None
    if not triton_installed():
        return "triton is not installed; install it with `pip install triton`"
    if device != "cuda" and not (device == "cpu" and triton_interpreted()):
        return f"the tensor is on {device}; move it to a GPU or set TRITON_INTERPRET=1 before Python starts"
    return None
