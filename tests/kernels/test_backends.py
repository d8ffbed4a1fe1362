"""Choosing, refusing and explaining backends."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from t2t_kernels import BackendUnavailable, backends, soft_split, use_backend
from t2t_kernels.backends import (
    BACKENDS,
    Backend,
    Kernel,
    Operation,
    choose,
    covers,
    explain,
    why_not_here,
)

CPU = torch.device("cpu")


def served(x, **kwargs):
    """The backend of a soft split, from the operator that autograd recorded."""
    y = soft_split(x.requires_grad_(), 3, 2, 1, **kwargs)
    return type(y.grad_fn).__name__


def test_auto_takes_the_compiled_kernel():
    assert "t2t_cpu" in served(torch.randn(1, 2, 5, 5))


def test_use_backend_and_its_nesting():
    x = torch.randn(1, 2, 5, 5)
    with use_backend("reference"):
        assert "t2t" not in served(x)
        with use_backend("cpu"):
            assert "t2t_cpu" in served(x)
        assert "t2t_cpu" in served(x, backend="cpu"), "an argument wins over the context"
        assert "t2t" not in served(x)
    assert "t2t_cpu" in served(x)


def test_use_backend_ends_with_an_error_inside():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.requested(None) is None


def test_use_backend_in_overlapping_blocks():
    """As two threads may open and close them."""
    first, second = use_backend("cpu"), use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.requested(None) == "reference"
    second.__exit__(None, None, None)
    assert backends.requested(None) is None


def test_use_backend_inside_a_compiled_function():
    def step(x):
        with use_backend("reference"):
            return soft_split(x, 3, 2, 1) * 2

    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), step(x))


def test_float64_uses_the_reference_and_named_kernels_refuse_it():
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    assert "t2t" not in served(x)
    with pytest.raises(BackendUnavailable, match="float64"):
        soft_split(x, 3, 2, 1, backend="cpu")


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cuda", Backend("cuda", lambda: "it is not built"))
    with pytest.raises(BackendUnavailable, match="soft_split on the cuda backend: it is not built"):
        soft_split(torch.randn(1, 2, 5, 5), 3, 2, 1, backend="cuda")
    operation = Operation("imaginary", kernels={"triton": Kernel()})
    with pytest.raises(BackendUnavailable, match="no cpu kernel"):
        choose(operation, CPU, torch.float32, "cpu")


def test_unknown_name_suggests_the_nearest():
    for call in (
        lambda: soft_split(torch.randn(1, 2, 5, 5), 3, 2, 1, backend="tritn"),
        lambda: use_backend("tritn").__enter__(),
    ):
        with pytest.raises(ValueError, match="did you mean 'triton'"):
            call()


def test_explain_names_every_operation_and_a_reason(monkeypatch):
    composed = Operation("composed", parts=("soft_split",))
    monkeypatch.setitem(backends.OPERATIONS, "composed", composed)
    choices = {choice.operation: choice for choice in explain("cpu")}
    assert set(choices) == set(backends.OPERATIONS)
    assert choices["soft_split"].backend == "cpu"
    assert "composed of" in choices["composed"].reason
    refused = {choice.operation: choice for choice in explain("cpu", "cpu")}
    assert refused["composed"].backend is None
    assert "no cpu kernel" in refused["composed"].reason


LARGE = {"E": 256, "m": 128, "M": 256}
MODELS = {"E": 64, "m": 32, "M": 64}


def test_takes_agrees_with_the_choice_for_a_call(gpu):
    """Every size and dtype is checked, and sizes that a kernel does not name are not limited."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for operation in backends.OPERATIONS.values():
        for backend, dtype in itertools.product(operation.kernels, dtypes):
            device = CPU if backend == "cpu" else torch.device("cuda")
            for changed in ({}, {"E": 63}, {"E": 65}, {"m": 31}, {"M": 128}, LARGE):
                sizes = MODELS | changed
                if operation.takes(backend, dtype, **sizes):
                    assert choose(operation, device, dtype, backend, sizes) == backend
                else:
                    with pytest.raises(BackendUnavailable):
                        choose(operation, device, dtype, backend, sizes)
    performer = backends.OPERATIONS["performer_layer"]
    assert performer.takes("cuda", torch.float16, **MODELS)
    assert not performer.takes("cuda", torch.float32, **MODELS)
    for size in MODELS:
        assert not performer.takes("cuda", torch.float16, **MODELS | {size: MODELS[size] - 1})
        assert not performer.takes("cuda", torch.float16, **MODELS | {size: MODELS[size] + 1})
        assert performer.takes("triton", torch.float32, **MODELS | {size: 128})
        assert not performer.takes("triton", torch.float32, **MODELS | {size: 129})


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU on which Triton and CUDA C++ appear to run."""
    for name in ("triton", "cuda"):
        injected = Backend(
            name,
            devices=("cuda",),
            why_not_on_gpu=lambda device: None,
            namespace=f"t2t_{name}",
        )
        monkeypatch.setitem(BACKENDS, name, injected)


def test_explain_names_the_backend_of_calls_of_these_sizes(gpu):
    calls = [("performer_layer", LARGE), ("soft_split_linear", {})]
    choices = {choice.operation: choice for choice in explain("cuda", calls=calls)}
    # The layer is composed; its parts are explained, at its sizes.
    assert {name: choice.backend for name, choice in choices.items()} == {
        "performer_layer": "reference",
        "soft_split_linear": "triton",
        "performer_attention": "reference",
    }
    assert "triton: its kernel takes E up to 128, got 256" in choices["performer_layer"].reason
    for name, choice in choices.items():
        served = choose(backends.OPERATIONS[name], torch.device("cuda"), torch.float32, None, LARGE)
        assert choice.backend == served
    small = [("transformer_layer", {"E": 64, "M": 64}), ("soft_split_linear", {})]
    assert [choice.backend for choice in explain("cuda", calls=small)] == ["triton", "triton"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(backends.OPERATIONS))
def test_cuda_comes_first_in_half_types_if_predicted_times_say_so(gpu, name, dtype):
    predicted = name in {
        "soft_split_linear",
        "performer_attention",
        "token_attention",
        "performer_layer",
        "transformer_layer",
    }
    for dtype_of_call, first in ((dtype, predicted), (torch.float32, False)):
        (choice,) = explain("cuda", dtype=dtype_of_call, calls=[(name, MODELS)])
        assert choice.backend == ("cuda" if first else "triton")
        assert ("first by predicted times (bench/results/predicted)" in choice.reason) == first
        assert ("not measured" in choice.reason) != first
        operation = backends.OPERATIONS[name]
        served = choose(operation, torch.device("cuda"), dtype_of_call, None, MODELS)
        assert served == choice.backend


def test_other_sizes_in_half_types_fall_to_triton_with_the_reason(gpu):
    calls = [("performer_layer", {"E": 96, "m": 48, "M": 96})]
    (choice,) = explain("cuda", dtype=torch.bfloat16, calls=calls)
    assert choice.backend == "triton"
    assert choice.reason.startswith("cuda: its kernel takes E = 64, got 96; ")
    assert "order by predicted times" in choice.reason


def test_explain_gives_the_limits_of_a_named_backend(gpu):
    (choice,) = explain("cuda", "cuda", calls=[("token_attention", {"E": 96})])
    assert choice.backend is None and "takes E = 64, got 96" in choice.reason
    layer = [("performer_layer", {"E": 64, "m": 16, "M": 64})]
    (choice,) = explain("cuda", "cuda", torch.bfloat16, layer)
    assert choice.backend is None and "takes m = 32, got 16" in choice.reason
    layer = [("performer_layer", MODELS)]
    (choice,) = explain("cuda", "cuda", torch.float32, layer)
    assert choice.backend is None
    assert "takes float16 and bfloat16, got float32" in choice.reason
    (choice,) = explain("cuda", "cuda", torch.bfloat16, layer)
    assert choice == backends.Choice("performer_layer", "cuda", "named")
    # Plain PyTorch throughout: no other operation is called.
    (choice,) = explain("cuda", "reference", calls=[("performer_layer", LARGE)])
    assert choice.backend == "reference"


def test_explain_distinguishes_calls_of_an_operation(gpu):
    """A kernel may not support the channels of the image, but those of the next layer's map."""
    calls = [("performer_layer", MODELS | {"channels": channels}) for channels in (5, 64)]
    calls = [(name, sizes | {"kernel_size": 7}) for name, sizes in calls]
    choices = explain("cuda", dtype=torch.bfloat16, calls=calls)
    assert [choice.backend for choice in choices] == ["triton", "cuda"]
    assert "5 channels" in choices[0].reason
    assert explain("cuda", dtype=torch.bfloat16, calls=calls[1:] * 2) == choices[1:]


@pytest.mark.parametrize("operation", ["soft_split_linear", "performer_layer", "transformer_layer"])
def test_triton_takes_what_fits_a_grid(operation, gpu):
    """Its backward has stride² and kernel_size² × blocks of channels in a grid's second dimension."""

    def chosen(**sizes):
        (choice,) = explain("cuda", "triton", calls=[(operation, sizes)])
        return choice.backend, choice.reason

    assert chosen(stride=255, kernel_size=255, channels=32) == ("triton", "named")
    assert "strides up to 255, got 256" in chosen(stride=256, kernel_size=256, channels=3)[1]
    assert "up to 65535, got 130050" in chosen(stride=2, kernel_size=255, channels=33)[1]


def test_a_backend_is_loaded_once_until_it_is_reset(monkeypatch):
    reasons = iter(["it is not built", None])
    monkeypatch.setitem(BACKENDS, "cuda", Backend("cuda", lambda: next(reasons), ("cpu",)))
    for _ in range(2):
        assert why_not_here("cuda") == "it is not built"
        with pytest.raises(BackendUnavailable, match="it is not built"):
            soft_split(torch.randn(1, 2, 5, 5), 3, 2, 1, backend="cuda")
    BACKENDS["cuda"].reset()
    assert why_not_here("cuda") is None
    assert choose(backends.OPERATIONS["soft_split"], CPU, torch.float32, "cuda") == "cuda"


def test_a_tool_can_stand_in_for_a_device(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cuda", Backend("cuda", lambda: "no CUDA device", ("cuda",)))
    assert why_not_here("cuda") == "no CUDA device"
    monkeypatch.setitem(backends._LOAD_ERRORS, "cuda", None)
    monkeypatch.setitem(backends.DEVICE_TYPES, "cuda", {"cpu"})
    assert why_not_here("cuda") is None
    assert choose(backends.OPERATIONS["soft_split"], CPU, torch.float32, "cuda") == "cuda"


def run(code: str, **environment: str) -> str:
    """What ``code`` prints in a fresh process that does not interpret Triton."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "T2T_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=inherited | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def test_import_loads_nothing():
    """No library and no module of Triton or of the compiler, no exit hook, no CUDA context."""
    code = (
        "import atexit, sys, torch\n"
        "def mapped(): return {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "before, hooks = mapped(), atexit._ncallbacks()\n"
        "import t2t_kernels\n"
        "assert atexit._ncallbacks() == hooks\n"
        "assert not torch.cuda.is_initialized()\n"
        "modules = {'triton', 'torch._dynamo', 't2t_kernels._C', 't2t_kernels._triton'}\n"
        "assert not modules & set(sys.modules), modules & set(sys.modules)\n"
        "print(*(path for path in mapped() - before if '/lib-dynload/' not in path))\n"
        "t2t_kernels.soft_split(torch.randn(1, 2, 5, 5), 3, 2, 1, backend='cpu')\n"
        "print(*mapped() - before)"
    )
    imported, called = run(code).split("\n", 1)
    assert imported == "" and "t2t_kernels/_C" in called


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        "t.soft_split(x, 3, 2, 1, backend='cpu')",
        "torch.ops.t2t_cpu.soft_split(x, 3, 2, 1)",
        "torch.compile(lambda x: t.soft_split(x, 3, 2, 1), fullgraph=True)(x)",
        "torch.export.export(Split(), (x,)).module()(x)",
    ],
    ids=["function", "operator", "compile", "export"],
)
def test_the_first_call_loads_its_backend(call):
    code = (
        "import torch, t2t_kernels as t\n"
        "class Split(torch.nn.Module):\n"
        "    def forward(self, x): return t.soft_split(x, 3, 2, 1, backend='cpu')\n"
        f"x = torch.randn(1, 2, 5, 5, requires_grad=True); y = {call}\n"
        "torch.testing.assert_close(y, t.soft_split(x, 3, 2, 1, backend='reference'))\n"
        "y.sum().backward(); print(x.grad.shape == x.shape)"
    )
    assert run(code) == "True"


def test_a_program_loads_the_backend_that_it_was_exported_with(tmp_path):
    class Split(torch.nn.Module):
        def forward(self, x):
            return soft_split(x, 3, 2, 1, backend="cpu")

    x = torch.arange(50.0).view(1, 2, 5, 5)
    torch.export.save(torch.export.export(Split(), (x,)), tmp_path / "split.pt2")
    code = (
        f"import torch, t2t_kernels; program = torch.export.load({str(tmp_path / 'split.pt2')!r})\n"
        "print(program.module()(torch.arange(50.0).view(1, 2, 5, 5)).sum().item())"
    )
    assert float(run(code)) == soft_split(x, 3, 2, 1).sum().item()


def test_a_forked_process_loads_its_own_backend():
    code = (
        "import os, torch, t2t_kernels as t; x = torch.randn(1, 2, 5, 5)\n"
        "child = os.fork()\n"
        "y = t.soft_split(x, 3, 2, 1, backend='cpu')\n"
        "if child == 0: os._exit(7 if y.shape == (1, 9, 18) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert run(code) == "7"


def test_an_operator_that_cannot_run_says_why():
    # In a process of its own: other tests register the host build in this one.
    code = (
        "import torch, t2t_kernels as t\n"
        "try: torch.ops.t2t_cuda.soft_split(torch.randn(1, 2, 5, 5).double(), 3, 2, 1)\n"
        "except t.BackendUnavailable as error: print(error)"
    )
    assert "t2t_cuda::soft_split on the cuda backend: " in run(code)


def test_the_interpreter_cannot_be_switched_on_after_import():
    code = (
        "import os, torch, t2t_kernels as t; os.environ['TRITON_INTERPRET'] = '1'\n"
        "try: t.soft_split(torch.randn(1, 2, 5, 5), 3, 2, 1, backend='triton')\n"
        "except t.BackendUnavailable as error: print(error)"
    )
    assert "TRITON_INTERPRET has changed since t2t_kernels was imported" in run(code)


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_the_interpreter_is_on_if_triton_says_so(value):
    pytest.importorskip("triton")
    code = (
        "from t2t_kernels.backends import BACKENDS, INTERPRETED\n"
        "from triton import knobs; print(INTERPRETED, knobs.runtime.interpret)\n"
        "print(*BACKENDS['triton'].device_types)"
    )
    assert run(code, TRITON_INTERPRET=value) == "True True\ncpu cuda"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["t2t_kernels", "torch.utils.flop_counter"])
def test_flops_are_counted_whichever_is_imported_first(first):
    code = (
        f"import {first}, torch, t2t_kernels; from torch.utils.flop_counter import FlopCounterMode\n"
        "q = torch.randn(2, 5, 8)\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    t2t_kernels.token_attention(q, q, q, scale=1.0, backend='cpu')\n"
        "print(counter.get_total_flops())"
    )
    assert run(code) == str(4 * 2 * 5 * 5 * 8)


def test_environment():
    code = (
        "import torch, t2t_kernels as t; x = torch.randn(1, 2, 5, 5, requires_grad=True);"
        "print(type(t.soft_split(x, 3, 2, 1).grad_fn).__name__)"
    )

    def run(name):
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "T2T_BACKEND": name},
        )

    reference = run("reference")
    assert reference.returncode == 0, reference.stderr
    assert reference.stdout.strip() == "TransposeBackward0"
    wrong = run("refrence")
    assert wrong.returncode != 0
    assert "T2T_BACKEND: unknown backend 'refrence'; did you mean 'reference'?" in wrong.stderr


def test_info_runs_and_names_every_backend():
    done = subprocess.run(
        [sys.executable, "-m", "t2t_kernels.info"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in (*backends.BACKENDS, *backends.OPERATIONS, torch.__version__.split("+")[0]):
        assert word in done.stdout
    orders = done.stdout.partition("order of backends on CUDA\n")[2].splitlines()
    orders = {tuple(line.split()[:2]): line for line in orders}
    assert len(orders) == 2 * len(backends.OPERATIONS)
    half = orders["performer_layer", "bfloat16"]
    assert "cuda, triton, reference: by predicted times" in half
    full = orders["performer_layer", "float32"]
    assert "triton, cuda, reference: by default, not measured" in full


@pytest.mark.parametrize("module", ["t2t_kernels.info", "t2tvit models t2t_vit_7"])
def test_a_machine_without_a_gpu_is_named_as_the_reason(module):
    done = subprocess.run(
        [sys.executable, "-m", *module.split()],
        capture_output=True,
        text=True,
        # A CUDA_HOME without a device makes torch.utils.cpp_extension complain when it is imported.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": "/usr/local/cuda"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing needs the user's attention"
    lines = done.stdout.replace("kernels, ", "").replace(":", " ").splitlines()
    (cuda,) = (line for line in lines if line.strip().startswith("cuda ") and "available" in line)
    reason = BACKENDS["cuda"].load_error
    assert "not available" in cuda
    if reason is None or reason == "no CUDA device":
        assert cuda.endswith("not available  no CUDA device")


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0;9.0a+PTX", (12, 0), False),
        ("8.0+PTX", (12, 0), True),
        ("8.0 12.0+PTX", (12, 1), True),
        ("12.0+PTX", (10, 0), False),
    ],
)
def test_which_devices_a_build_covers(architectures, capability, expected):
    assert covers(architectures, capability) is expected
