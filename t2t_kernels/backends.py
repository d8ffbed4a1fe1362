"""The four backends: what each can run, why it cannot, and which one serves a call.

An operation is served by the backend that the caller names, else by :func:`use_backend`, else by the
environment's ``T2T_BACKEND``, else by the first of :func:`preference` that can run it. A named
backend never falls back: it runs or raises :class:`BackendUnavailable` with the reason.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from t2t_kernels.errors import BackendUnavailable, unknown_name
from t2t_kernels.shadowing import why_shadowed
from t2t_kernels.transforms import active_transform

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Per device type, the order of trial if no backend is named.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
# Operations for which CUDA C++ comes before Triton in half types. This follows from predicted times;
# nothing has been measured on a GPU.
PREDICTED_FIRST = ("cuda", "triton", "reference")
PREDICTED = (
    "soft_split_linear",
    "performer_attention",
    "token_attention",
    "performer_layer",
    "transformer_layer",
)

# Triton's interpreter runs its kernels on CPU tensors, for tests and debugging.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_DTYPES = (torch.float16, torch.bfloat16)

WhyNotMap = Callable[[Mapping[str, int]], str | None]


@dataclass(frozen=True)
class Operation:
    """A public function: the backends, besides the reference, that have a kernel for it, the
    operations that its reference is composed of, each of which is served by its own best backend,
    and per backend the sizes and dtypes that its kernel takes, where it does not take all.
    ``why_not_map`` says in words what a kernel does not take of a map and its split, from the sizes
    ``channels``, ``kernel_size``, ``stride`` and ``outputs``, any of which may be missing."""

    name: str
    kernels: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    sizes: Mapping[str, Mapping[str, range]] = field(default_factory=dict)
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    why_not_map: Mapping[str, WhyNotMap] = field(default_factory=dict)

    def takes(self, backend: str, dtype: torch.dtype, **sizes: int) -> bool:
        """Whether the kernel of ``backend`` takes this dtype and these sizes."""
        return self.why_not(backend, dtype, sizes) is None

    def why_not(self, backend: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
        """What the kernel of ``backend`` does not take; None if it takes the call."""
        for name, taken in self.sizes.get(backend, {}).items():
            if name in sizes and sizes[name] not in taken:
                kind = f"{name} = {taken[0]}" if len(taken) == 1 else f"{name} up to {taken[-1]}"
                return f"its kernel takes {kind}, got {sizes[name]}"
        if backend in self.why_not_map and (reason := self.why_not_map[backend](sizes)) is not None:
            return f"its kernel takes {reason}"
        dtypes = self.dtypes.get(backend, KERNEL_DTYPES)
        if dtype not in dtypes:
            names = [str(taken).removeprefix("torch.") for taken in dtypes]
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            return f"its kernel takes {listed}, got {str(dtype).removeprefix('torch.')}"
        return None


OPERATIONS: dict[str, Operation] = {}


def register_operation(
    name: str,
    kernels: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
    sizes: Mapping[str, Mapping[str, range]] | None = None,
    dtypes: Mapping[str, tuple[torch.dtype, ...]] | None = None,
    why_not_map: Mapping[str, WhyNotMap] | None = None,
) -> Operation:
    OPERATIONS[name] = Operation(name, kernels, parts, sizes or {}, dtypes or {}, why_not_map or {})
    return OPERATIONS[name]


def _load_cpu() -> str | None:
    try:
        importlib.import_module("t2t_kernels._C")  # registers the C++ operators
    except ImportError as error:
        return (
            why_shadowed()
            or f"t2t_kernels._C is not built ({error}); build it with `pip install .`"
        )
    return None


def _load_cuda() -> str | None:
    library = Path(__file__).with_name("_cuda.so")
    if not library.exists():
        return why_shadowed() or (
            "t2t_kernels/_cuda.so is not built; build it with `T2T_WITH_CUDA=1 pip install .` where "
            "nvcc and a CUDA build of torch are installed"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if _LOAD_ERRORS["cpu"] is not None:
        return f"its build information is missing: {_LOAD_ERRORS['cpu']}"
    if not importlib.import_module("t2t_kernels._C").build_info()["cuda_architectures"]:
        return "the last build left it out; build it with `T2T_WITH_CUDA=1 pip install .`"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def _load_triton() -> str | None:
    if not INTERPRETED:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is a CPU build"
        # Triton takes half a second and 80 MB to import.
        if torch.cuda.device_count() == 0:
            return "no CUDA device; TRITON_INTERPRET=1 runs it on the CPU, slowly"
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return "the package triton is not installed; `pip install triton`"
    except Exception as error:  # a broken installation must not take the other backends with it
        return f"triton does not import: {type(error).__name__}: {error}"
    return None


# Why a backend cannot run at all in this process; None where it can.
_LOAD_ERRORS: dict[str, str | None] = {"cpu": _load_cpu(), "triton": _load_triton()}
_LOAD_ERRORS["cuda"] = _load_cuda()

DEVICE_TYPES: dict[str, set[str]] = {
    "cpu": {"cpu"},
    "triton": {"cuda", "cpu"} if INTERPRETED else {"cuda"},
    "cuda": {"cuda"},
}

# What _cuda.so was built for; the description of the build travels in _C.
CUDA_ARCHITECTURES: str = (
    importlib.import_module("t2t_kernels._C").build_info()["cuda_architectures"]
    if _LOAD_ERRORS["cpu"] is None
    else ""
)

# The use_backend blocks that are open now, in any thread; the last one rules.
_overrides: list[str] = []
_environment: str | None = os.environ.get("T2T_BACKEND") or None


def why_unavailable(
    backend: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> str | None:
    """The reason why ``backend`` cannot run on ``device`` in ``dtype``; None where it can."""
    if backend == "reference":
        return None
    if _LOAD_ERRORS[backend] is not None:
        return _LOAD_ERRORS[backend]
    if device is not None and device.type not in DEVICE_TYPES[backend]:
        kinds = " or ".join(sorted(DEVICE_TYPES[backend]))
        hint = "; TRITON_INTERPRET=1 runs it on the CPU, slowly" if backend == "triton" else ""
        return f"it runs on {kinds} tensors, got {device.type}{hint}"
    if device is not None and device.type == "cuda":
        reason = _why_not_on_gpu(backend, device)
        if reason is not None:
            return reason
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, float16 and bfloat16, got {dtype}"
    return None


def why_not_here(backend: str) -> str | None:
    """The reason why ``backend`` runs on no device of this machine; None if it runs on one."""
    if _LOAD_ERRORS.get(backend) is not None:
        return _LOAD_ERRORS[backend]
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not devices and backend != "reference" and "cpu" not in DEVICE_TYPES[backend]:
        return "no CUDA device"
    reasons = [why_unavailable(backend, device) for device in (torch.device("cpu"), *devices)]
    return None if None in reasons else reasons[-1]


def _why_not_on_gpu(backend: str, device: torch.device) -> str | None:
    # torch.compile folds the properties of a device into a constant.
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        return "it needs compute capability 8.0 or newer, {}.{} is the device's".format(*capability)
    if backend == "cuda" and not covers(CUDA_ARCHITECTURES, capability):
        return "it was built for {}, not for compute capability {}.{}; rebuild it here".format(
            CUDA_ARCHITECTURES, *capability
        )
    return None


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures``, as in TORCH_CUDA_ARCH_LIST, runs on a device.

    Machine code runs on its own major version from its minor version on, code with the suffix "a"
    on its own version only, and the PTX of an architecture without it on everything newer.
    """
    for name in filter(None, architectures.replace(" ", ";").split(";")):
        version, _, ptx = name.partition("+")
        own = tuple(int(part) for part in version.rstrip("a").split("."))
        exact = version.endswith("a")
        if capability == own or (not exact and own[0] == capability[0] and own <= capability):
            return True
        if ptx and not exact and own <= capability:
            return True
    return False


def _why_not(
    operation: Operation,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
) -> str | None:
    if backend != "reference" and backend not in operation.kernels:
        have = ", ".join(("reference", *operation.kernels))
        return f"no {backend} kernel for it yet (there is: {have})"
    return why_unavailable(backend, device, dtype) or (
        None if backend == "reference" else operation.why_not(backend, dtype, sizes)
    )


def preference(
    operation: str, device_type: str, dtype: torch.dtype
) -> tuple[tuple[str, ...], str | None]:
    """The order of trial if no backend is named, and what it follows from (on CUDA only)."""
    if device_type != "cuda":
        return PREFERENCE.get(device_type, ("reference",)), None
    if operation in PREDICTED and dtype in HALF_DTYPES:
        return PREDICTED_FIRST, "by predicted times (bench/results/predicted)"
    return PREFERENCE["cuda"], "by default, not measured"


def choose(
    operation: Operation,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    sizes: Mapping[str, int] | None = None,
    tensors: Iterable[Tensor | None] = (),
) -> str:
    """The backend that serves a call of ``operation``.

    Args:
        sizes: the sizes that have limits.
        tensors: the call's tensors; under a function transform only the reference serves them.

    Raises:
        ValueError: the name is not one of :data:`BACKENDS`.
        BackendUnavailable: the named backend cannot run this call.
    """
    named, sizes = requested(backend), sizes or {}
    if named != "reference" and (transform := active_transform(tensors)) is not None:
        if named is None:
            return "reference"
        raise BackendUnavailable(
            f"cannot run {operation.name} on the {named} backend: its kernels do not support "
            f'{transform}; use backend="reference" (for a model fused_kernels="reference")'
        )
    if named is None:
        return next(
            candidate
            for candidate in preference(operation.name, device.type, dtype)[0]
            if _why_not(operation, candidate, device, dtype, sizes) is None
        )
    reason = _why_not(operation, named, device, dtype, sizes)
    if reason is not None:
        raise BackendUnavailable(f"cannot run {operation.name} on the {named} backend: {reason}")
    return named


def requested(backend: str | None) -> str | None:
    """The backend asked for by argument, by :func:`use_backend` or by ``T2T_BACKEND``, if any."""
    override = _overrides[-1] if _overrides else None
    for source, name in (
        ("backend", backend),
        ("backend", override),
        ("T2T_BACKEND", _environment),
    ):
        if name is not None:
            if name not in BACKENDS:
                raise ValueError(f"{source}: {unknown_name('backend', name, BACKENDS)}")
            return name
    return None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation in the ``with`` block by one backend, in every thread of the process.

    A ``backend`` argument given to an operation wins over it.

    Raises:
        ValueError: the name is not one of :data:`BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: {unknown_name('backend', name, BACKENDS)}")
    _overrides.append(name)
    try:
        yield
    finally:
        # Its own entry: a block of another thread may have been opened since.
        del _overrides[len(_overrides) - 1 - _overrides[::-1].index(name)]


@dataclass(frozen=True)
class Choice:
    """Which backend serves an operation (None: the named one cannot run it) and why."""

    operation: str
    backend: str | None
    reason: str


def explain(
    device: torch.device | str,
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    sizes: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Choice]:
    """For every operation, the backend that would serve it on ``device`` and the reason.

    Args:
        device, backend, dtype: as those of a call.
        sizes: by operation the sizes of its calls, ``{"performer_layer": {"E": 64, "m": 32, "M": 64}}``.
            Only these operations are explained, and those that they are composed of here. None
            explains all of them, for sizes that every backend takes.
    """
    device, named = torch.device(device), requested(backend)
    if sizes is None:
        sizes = {name: {} for name in OPERATIONS}
    choices: dict[str, Choice] = {}
    waiting = list(sizes.items())
    while waiting:
        name, own = waiting.pop(0)
        choice = _explain_one(OPERATIONS[name], device, named, dtype, own)
        choices.setdefault(name, choice)
        if choice.backend == "reference" and named is None:
            waiting += [(part, own) for part in OPERATIONS[name].parts]
    return list(choices.values())


def _explain_one(
    operation: Operation,
    device: torch.device,
    named: str | None,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
) -> Choice:
    if named is not None:
        reason = _why_not(operation, named, device, dtype, sizes)
        return Choice(operation.name, None if reason else named, reason or "named")
    chosen = choose(operation, device, dtype, None, sizes)
    order, evidence = preference(operation.name, device.type, dtype)
    reasons = [
        f"{other}: {_why_not(operation, other, device, dtype, sizes)}"
        for other in order[: order.index(chosen)]
    ]
    if chosen == "reference" and operation.parts:
        reasons.append("composed of " + " and ".join(operation.parts))
    if evidence is None:
        reasons = reasons or [f"first choice on {device.type}"]
    else:
        reasons.append(f"{'tried in this order' if reasons else 'first'} {evidence}")
    return Choice(operation.name, chosen, "; ".join(reasons))
