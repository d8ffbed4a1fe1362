"""The four backends: what each can run, why it cannot, and which one serves a call.

An operation is served by the backend that the caller names, else by :func:`use_backend`, else by the
environment's ``T2T_BACKEND``, else by the first of :func:`preference` that can run it. A named
backend never falls back: it runs or raises :class:`BackendUnavailable` with the reason.

Importing this module loads nothing. A backend loads its library when a call first considers it.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from t2t_kernels.arguments import constant_in_graphs
from t2t_kernels.errors import BackendUnavailable, unknown_name
from t2t_kernels.shadowing import why_shadowed
from t2t_kernels.transforms import active_transform

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_DTYPES = (torch.float16, torch.bfloat16)


# Triton's interpreter runs its kernels on CPU tensors, for tests and debugging.
def _interpreter_is_on() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


INTERPRETED = _interpreter_is_on()


def _why_too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "it needs compute capability 8.0 or newer, the device has {}.{}".format(*capability)
    return None


# Tools that execute kernels without their device replace two properties of a backend here, by its
# name: the outcome of loading it, and the types of devices whose tensors it takes.
_LOAD_ERRORS: dict[str, str | None] = {}
DEVICE_TYPES: dict[str, Collection[str]] = {}


@dataclass(eq=False)
class Backend:
    """One implementation of the operations, and what it needs to run.

    Args:
        name: as in ``backend=``.
        load: registers its operators with torch; returns why it cannot, or None. Called once, at the
            first need.
        devices: types of the devices whose tensors it takes; None for any.
        dtypes: that its kernels take; None for any.
        why_not_on_gpu: why it does not run on a GPU, or None; called with CUDA devices only.
        namespace: of its operators in ``torch.ops``; None if it has none.
    """

    name: str
    load: Callable[[], str | None] = lambda: None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = KERNEL_DTYPES
    why_not_on_gpu: Callable[[torch.device], str | None] = _why_too_old
    namespace: str | None = None

    @property
    def device_types(self) -> Collection[str] | None:
        """Types of the devices whose tensors it takes in this process; None for any."""
        return DEVICE_TYPES.get(self.name, self.devices)

    @property
    def load_error(self) -> str | None:
        """Why it cannot run in this process, found out once by loading it; None if it is loaded."""
        if self.name in _LOAD_ERRORS:  # get() would load the backend
            return _LOAD_ERRORS[self.name]
        return self._outcome

    @functools.cached_property
    def _outcome(self) -> str | None:
        return self.load()

    def reset(self) -> None:
        """Forget the outcome of loading: the next call tries again, for instance after a build.

        What has been loaded stays loaded, and compiled graphs keep the backend they were traced with.
        """
        importlib.invalidate_caches()
        self.__dict__.pop("_outcome", None)

    def why_not(
        self, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> str | None:
        """The reason why it cannot run on ``device`` in ``dtype``; None if it can."""
        if self.load_error is not None:
            return self.load_error
        if device is not None and self.device_types is not None:
            if device.type not in self.device_types:
                hint = _INTERPRETER_HINT if self.name == "triton" else ""
                return (
                    f"it runs on {' or '.join(self.device_types)} tensors, got {device.type}{hint}"
                )
            if device.type == "cuda" and (reason := self.why_not_on_gpu(device)) is not None:
                return reason
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"its kernels take {_listed(self.dtypes)}, got {_short(dtype)}"
        return None


_INTERPRETER_HINT = "; TRITON_INTERPRET=1 runs it on the CPU, slowly"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *names, last = map(_short, dtypes)
    return f"{', '.join(names)} and {last}" if names else last


def _load_cpu() -> str | None:
    try:
        importlib.import_module("t2t_kernels._C")
    except ImportError as error:
        return (
            why_shadowed()
            or f"t2t_kernels._C is not built ({error}); build it with `pip install .`"
        )
    return None


def _load_triton() -> str | None:
    if INTERPRETED != _interpreter_is_on():
        return "TRITON_INTERPRET has changed since t2t_kernels was imported; set it before"
    if not INTERPRETED:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is a CPU build"
        # Triton takes half a second and 80 MB to import.
        if torch.cuda.device_count() == 0:
            return f"no CUDA device{_INTERPRETER_HINT}"
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return "the package triton is not installed; `pip install triton`"
    except Exception as error:  # a broken installation must not take the other backends with it
        return f"triton does not import: {type(error).__name__}: {error}"
    for operation in OPERATIONS.values():
        if "triton" in operation.kernels:
            importlib.import_module(f"t2t_kernels.{operation.name}.triton")
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
    if BACKENDS["cpu"].load_error is not None:
        return f"its build information is missing: {BACKENDS['cpu'].load_error}"
    if not _cuda_architectures():
        return "the last build left it out; build it with `T2T_WITH_CUDA=1 pip install .`"
    if torch.cuda.device_count() == 0:
        return "no CUDA device"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


@functools.cache
def _cuda_architectures() -> str:
    """What _cuda.so was built for; _C knows it, which is built at the same time."""
    return importlib.import_module("t2t_kernels._C").build_info()["cuda_architectures"]


def _why_cuda_not_on_gpu(device: torch.device) -> str | None:
    architectures, capability = _cuda_architectures(), torch.cuda.get_device_capability(device)
    reason = _why_too_old(device)
    if reason is None and not covers(architectures, capability):
        return "it was built for {}, not for compute capability {}.{}; rebuild it here".format(
            architectures, *capability
        )
    return reason


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


# By name. Another Backend can be put in the place of one, for instance by a test.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", dtypes=None),
        Backend("cpu", _load_cpu, ("cpu",), namespace="t2t_cpu"),
        Backend(
            "triton",
            _load_triton,
            ("cpu", "cuda") if INTERPRETED else ("cuda",),
            namespace="t2t_triton",
        ),
        Backend(
            "cuda",
            _load_cuda,
            ("cuda",),
            why_not_on_gpu=_why_cuda_not_on_gpu,
            namespace="t2t_cuda",
        ),
    )
}


# Loading a library cannot be traced; the answer is the same whenever a graph runs.
@constant_in_graphs
def why_unavailable(
    backend: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> str | None:
    """The reason why ``backend`` cannot run on ``device`` in ``dtype``; None if it can."""
    return BACKENDS[backend].why_not(device, dtype)


def why_not_here(backend: str) -> str | None:
    """The reason why ``backend`` runs on no device of this machine; None if it runs on one."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reasons = [why_unavailable(backend, device) for device in (torch.device("cpu"), *devices)]
    return None if None in reasons else reasons[-1]


@dataclass(frozen=True)
class Kernel:
    """The limits of one backend's kernel for one operation.

    Args:
        dtypes: The supported dtypes.
        sizes: The supported values of each size that has a limit, by its name. A size that a call
            does not give is not checked.
        why_not_map: Returns what the kernel does not support about a map and its split, or None, from
            the sizes ``channels``, ``kernel_size``, ``stride`` and ``outputs``; any may be missing.
    """

    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    sizes: Mapping[str, range] = field(default_factory=dict)
    why_not_map: Callable[[Mapping[str, int]], str | None] | None = None

    def why_not(self, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
        """The reason why the kernel does not support a call; None if it does."""
        for name, taken in self.sizes.items():
            if name in sizes and sizes[name] not in taken:
                kind = f"{name} = {taken[0]}" if len(taken) == 1 else f"{name} up to {taken[-1]}"
                return f"its kernel takes {kind}, got {sizes[name]}"
        if self.why_not_map is not None and (reason := self.why_not_map(sizes)) is not None:
            return f"its kernel takes {reason}"
        if dtype not in self.dtypes:
            return f"its kernel takes {_listed(self.dtypes)}, got {_short(dtype)}"
        return None


@dataclass(frozen=True)
class Operation:
    """A public function.

    Args:
        name: The name of the function, and of its operator in each backend's namespace.
        kernels: The limits of its kernel, by backend. The reference has no limits and no entry.
        parts: The operations that its reference calls, with the same sizes. A backend is chosen for
            each of them.
        cuda_first: The dtypes in which CUDA C++ comes before Triton, based on predicted times;
            nothing has been measured on a GPU.
    """

    name: str
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    cuda_first: tuple[torch.dtype, ...] = ()

    def takes(self, backend: str, dtype: torch.dtype, **sizes: int) -> bool:
        """Whether the kernel of ``backend`` supports this dtype and these sizes."""
        return self.why_not(backend, dtype, sizes) is None

    def why_not(self, backend: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
        """The reason why the kernel of ``backend`` does not support a call; None if it does."""
        if backend == "reference":
            return None
        if backend not in self.kernels:
            have = ", ".join(("reference", *self.kernels))
            return f"no {backend} kernel for it yet (there is: {have})"
        return self.kernels[backend].why_not(dtype, sizes)


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    OPERATIONS[operation.name] = operation
    return operation


# The names of the open use_backend blocks of all threads; the last one applies.
_overrides: list[str] = []
_environment: str | None = os.environ.get("T2T_BACKEND") or None


def _why_not(
    operation: Operation,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
) -> str | None:
    # A backend that cannot run at all is reported before the limits of its kernel.
    if backend in operation.kernels and (reason := why_unavailable(backend, device, dtype)):
        return reason
    return operation.why_not(backend, dtype, sizes)


def preference(
    operation: Operation, device_type: str, dtype: torch.dtype
) -> tuple[tuple[str, ...], str | None]:
    """The order of trial if no backend is named, and what it follows from (on CUDA only)."""
    if device_type != "cuda":
        return (("cpu", "reference") if device_type == "cpu" else ("reference",)), None
    if dtype in operation.cuda_first:
        return ("cuda", "triton", "reference"), "by predicted times (bench/results/predicted)"
    return ("triton", "cuda", "reference"), "by default, not measured"


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
            for candidate in preference(operation, device.type, dtype)[0]
            if _why_not(operation, candidate, device, dtype, sizes) is None
        )
    reason = _why_not(operation, named, device, dtype, sizes)
    if reason is not None:
        raise BackendUnavailable(f"cannot run {operation.name} on the {named} backend: {reason}")
    return named


def requested(backend: str | None) -> str | None:
    """The backend named by the argument, :func:`use_backend` or ``T2T_BACKEND``, if any."""
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
    calls: Iterable[tuple[str, Mapping[str, int]]] | None = None,
) -> list[Choice]:
    """For every call, the backend that would serve it on ``device`` and the reason.

    Args:
        device, backend, dtype: As in the calls.
        calls: The name of an operation and the sizes of the call, for example
            ``("performer_attention", {"E": 64, "m": 32})``. None explains every operation, for sizes
            that every backend supports.

    Returns:
        A choice per call; if the reference serves it, also the choices of its parts. Equal choices
        are listed once. Calls of one operation can have different choices.
    """
    device, named = torch.device(device), requested(backend)
    waiting = [(name, {}) for name in OPERATIONS] if calls is None else list(calls)
    choices = []
    while waiting:
        name, sizes = waiting.pop(0)
        choice = _explain_one(OPERATIONS[name], device, named, dtype, sizes)
        choices.append(choice)
        if choice.backend == "reference" and named is None:
            waiting += [(part, sizes) for part in OPERATIONS[name].parts]
    return list(dict.fromkeys(choices))


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
    order, evidence = preference(operation, device.type, dtype)
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
