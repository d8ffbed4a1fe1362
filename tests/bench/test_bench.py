"""The code of the benchmarks, without checking times."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import checks, kernel_rows, minimum_cost, model_rows, rivals, workloads
from bench.kernel_rows import LAYERS, Row
from bench.resources import bisect, extrapolated, peak_memory
from t2t_kernels.measure import interleave, percentiles, saved_bytes
from t2t_kernels.soft_split_linear import reference as soft_split_linear_reference
from tests.support.sabotage import sabotaged

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


# Rows


def test_every_operation_and_kernel_of_this_machine_has_rows():
    rows = kernel_rows.rows(compiled=True)
    assert len({row.name for row in rows}) == len(rows)
    assert {row.op for row in rows} == {*kernel_rows.OPERATIONS, *kernel_rows.MODULES}
    for op, operation in kernel_rows.OPERATIONS.items():
        measured = {row.backend for row in rows if row.op == op}
        here = {
            k for k in operation.kernels if not kernel_rows.why_unavailable(k, kernel_rows.DEVICE)
        }
        assert {"reference", *here} == measured - set(rivals.RIVALS)
    for row in rows:
        assert row.size in row.name and row.direction in kernel_rows.PASSES


def test_rivals_have_rows_of_their_own():
    names = {row.name for row in kernel_rows.rows(batch=2, compiled=True)}
    for name in (
        "performer_layer-L1-B2-bf16-full-compile",
        "performer_layer-L1-B2-bf16-full-compile-max-autotune",
        "performer_layer-L1-B2-fp32-full-convolution",
        "soft_split_linear-L1-B2-bf16-full-convolution-channels-last",
        "performer_module-224-B2-bf16-full-autocast",
        "transformer_layer-L2-B2-fp32-backward-sdpa-math",
    ):
        assert name in names
    # Compiling takes minutes: only who asks for it gets it.
    assert not any("compile" in row.name for row in kernel_rows.rows())
    assert {row.backend for row in model_rows.rows(1, True, False)} == {
        *("reference", "fused", "reference-compile", "fused-compile", "eager", "eager-compile")
    }


# What a call needs


def references(*directions):
    rows = kernel_rows.rows(batch=1)
    rows = [row for row in rows if row.backend == "reference" and row.direction in directions]
    # The second layer's 784² scores have the formula of the first one's 3136².
    return [row for row in rows if not (rivals.softmax(row.op) and row.size != "L2")]


@pytest.mark.parametrize("row", references("forward", "full"), ids=lambda row: row.name)
def test_operations_are_those_that_torch_counts(row):
    ready = workloads.workload(row)
    with FlopCounterMode(display=False) as counter:
        y = ready.forward()
        if row.direction == "full":
            workloads.gradients(ready, y, torch.ones_like(y))
    counted = counter.get_total_flops()
    has_norm = row.op == "soft_split_linear" or row.op.endswith(("_layer", "_module"))
    if row.direction == "full" and row.size in ("L1", "224") and has_norm:
        # The gradient of the first layer's normalised tokens, which G makes unnecessary.
        layer = LAYERS["L1"]
        counted -= 2 * layer.tokens * layer.width * 3 * kernel_rows.EMBED
    assert minimum_cost.cost(row).flops == counted


@pytest.mark.parametrize("row", references("forward", "full"), ids=lambda row: row.name)
def test_bytes_are_those_of_inputs_and_outputs(row):
    row = replace(row, dtype="bf16")
    ready = workloads.workload(replace(row, direction="full"))
    y = ready.forward()
    learned = sum(leaf.nbytes for leaf in ready.leaves)
    shapes = {leaf.shape for leaf in ready.leaves}
    image = 0 if torch.Size(ready.shape) in shapes else 2 * math.prod(ready.shape)
    features = {"performer_module": 2}.get(row.op, int(row.op.startswith("performer")))
    features *= 4 * kernel_rows.FEATURES * kernel_rows.EMBED
    forward = image + learned + y.nbytes + features
    # Soft split's backward reads the gradient of its result, and nothing else.
    into = 0 if row.op == "soft_split" else image + learned + features
    both = forward + into + y.nbytes + learned
    assert minimum_cost.cost(row).bytes == (forward if row.direction == "forward" else both)


def test_flops_per_image_are_the_published_multiply_adds():
    from t2tvit.models import MODELS
    from t2tvit.speed import flops_per_image

    row = model_rows.ModelRow("t2t_vit_7", 1, "fp32", "training", "reference")
    model, image = model_rows.build(row), model_rows.batch_of(row)[0]
    forward, both = (flops_per_image(model, image, training) for training in (False, True))
    assert forward / 2e9 == pytest.approx(MODELS["t2t_vit_7"].gmacs, abs=0.05)
    assert 2.9 < both / forward < 3


# Parity


@pytest.mark.parametrize("where", ["result", "gradient 0"])
def test_a_sabotaged_kernel_is_refused(where, monkeypatch):
    row = Row("soft_split", "L3", 1, "fp32", "full", "cpu")
    checks.check(row, checks.results(row))
    monkeypatch.setattr(workloads, "soft_split", sabotaged(workloads.soft_split, where))
    with pytest.raises(checks.ParityError, match=f"{row.name}: {where} has an error of"):
        checks.check(row, checks.results(row))


def test_non_finite_results_are_refused():
    row = Row("soft_split", "L3", 1, "fp32", "full", "cpu")
    exact = torch.ones(3, 4, dtype=torch.float64)
    checks.assert_as_accurate(row, [exact.float()], [exact.float()], [exact])
    with pytest.raises(checks.ParityError, match="not timed"):
        checks.assert_as_accurate(row, [exact.float() * math.nan], [exact.float()], [exact])


def test_the_checked_tensors_make_attention_matter():
    """With keys so large that eps dominates, there would be no gradient to compare."""
    row = Row("performer_layer", "L2", 1, "fp32", "full", "reference")
    result, *gradients = checks.expected(row)[1]
    assert min(gradient.norm() for gradient in gradients) > 1e-2 * result.norm()


# Rivals


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_the_convolution_form_is_the_same_function(norm, channels_last):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 9, 8), torch.randn(7, 45), torch.randn(7)
    norms = [torch.randn(45), torch.randn(45)] if norm else [None, None]
    tensors = [None if t is None else t.double() for t in (x, weight, bias, *norms)]
    options = dict(kernel_size=3, stride=2, padding=1, eps=1e-5, backend="reference")
    form = rivals.convolution_form_channels_last if channels_last else rivals.convolution_form
    expected = soft_split_linear_reference.soft_split_linear(*tensors, **options)
    # Its scalars are float32 whatever the map's dtype.
    torch.testing.assert_close(form(*tensors, **options), expected, rtol=1e-5, atol=1e-5)


def test_a_named_attention_is_the_one_that_runs(monkeypatch):
    row = Row("transformer_layer", "L2", 1, "fp32", "forward", "sdpa-math")
    allowed = []
    original = F.scaled_dot_product_attention

    def spy(*tensors, **options):
        allowed.append(torch.backends.cuda.flash_sdp_enabled())
        return original(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    workloads.step(row)()
    workloads.step(replace(row, backend="sdpa-flash"))()
    workloads.step(replace(row, backend="reference"))()
    assert allowed == [False, True]


@pytest.mark.parametrize("backend", ["compile", "convolution", "convolution-channels-last"])
def test_a_compiled_rival_is_traced_once(backend, monkeypatch):
    """There is one graph for all calls, with PyTorch's attention and, for some rivals, a convolution."""
    graphs = []

    def keep(module, inputs):
        graphs.append({node.target for node in module.graph.nodes})
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    step = workloads.step(Row("transformer_layer", "L1", 1, "fp32", "full", backend))
    for _ in range(3):
        step()
    assert len(graphs) == 1
    assert F.scaled_dot_product_attention in graphs[0]
    assert (torch.conv2d in graphs[0]) == (backend != "compile")
    assert (F.unfold in graphs[0]) == (backend == "compile")


def test_a_compiled_rival_is_compiled_and_right():
    row = Row("soft_split", "L3", 1, "fp32", "full", "compile")
    torch._dynamo.utils.counters.clear()
    checks.check(row, checks.results(row))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# Measures


def test_saved_bytes_counts_storages_once_and_parameters_not_at_all():
    weight = torch.randn(8, 4, requires_grad=True)
    x = torch.randn(16, 8, requires_grad=True)
    # exp saves its result once, the product saves x and, apart, the weight.
    saved = saved_bytes(lambda: (x.view(16, 8) @ weight).exp(), [weight])
    assert saved == 4 * (16 * 8 + 16 * 4)


def test_interleave_takes_turns():
    order = []
    functions = {name: (lambda name=name: order.append(name)) for name in "ab"}
    steps = []
    taken = interleave(functions, 3, CPU, seconds=0.0, after_each=lambda: steps.append(len(steps)))
    assert order[-6:] == ["a", "b"] * 3
    assert {len(values) for values in taken.values()} == {3}
    assert len(steps) == 6
    median, low, high = percentiles([3.0, 1.0, 2.0])
    assert low < median == 2.0 < high


def fill(row: Row):
    """A step that allocates 32 MiB per image and frees them."""
    return lambda: torch.ones(row.batch, 2**23).sum()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux records the peak of a process")
def test_peak_memory_is_that_of_a_fresh_process():
    row = Row("soft_split", "L3", 4, "fp32", "full", "reference")
    assert peak_memory(fill, row, CPU) / 2**20 == pytest.approx(4 * 32, abs=16)


def test_the_largest_batch_is_found():
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= 203

    assert bisect(fits, 64) == 200 and len(tried) < 12
    assert bisect(lambda batch: False, 64) == 0
    # 100 at rest and 50 an image: 1000 are reached with 18 images.
    assert extrapolated(4, 300, 500, 1000) == 16
    assert extrapolated(4, 300, 500, 90) == 0
    with pytest.raises(ValueError, match="no slope"):
        extrapolated(4, 300, 300, 1000)


# A run


def run_bench(tmp_path, chosen, *options, **environment):
    out = tmp_path / "run.json"
    # Not as a worker of this run: pytest-benchmark measures nothing in one.
    outer = ("TRITON_INTERPRET", "PYTEST_XDIST_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider"]
        + ["-k", chosen, f"--benchmark-json={out}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=inherited | environment,
    )
    return done, json.loads(out.read_text()) if out.exists() else None


@pytest.fixture(scope="module")
def sabotaged_run(tmp_path_factory):
    """A run of one module and one operation whose kernel is wrong."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "sabotage.py").write_text(
        "from bench import workloads\n"
        "from tests.support.sabotage import sabotaged\n"
        "workloads.soft_split = sabotaged(workloads.soft_split, 'result')\n"
    )
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    chosen = "soft_split-L3 and fp32-full or performer_module and bf16-full and not autocast"
    options = ("--batch=2", "-p", "sabotage")
    return *run_bench(folder, chosen, *options, PYTHONPATH=path), folder / "run.json"


def test_a_wrong_kernel_fails_without_affecting_other_rows(sabotaged_run):
    done, run, _ = sabotaged_run
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = {row["name"] for row in run["t2t"]["failed"]}
    assert wrong and all(name.startswith("soft_split-L3-B2-fp32-full-") for name in wrong)
    assert "ParityError" in run["t2t"]["failed"][0]["reason"]
    timed = {row["param"] for row in run["benchmarks"]}
    assert "soft_split-L3-B2-fp32-full-reference" in timed and not timed & wrong


def test_a_row_has_its_figures(sabotaged_run):
    for row in sabotaged_run[1]["benchmarks"]:
        info = row["extra_info"]
        assert {"op", "backend", "device", "dtype", "shape", "pass"} <= set(info)
        assert len({"saved_mib_per_image", "peak_mib"} & set(info)) == 1
        assert info["speedup_vs_reference"] > 0
        low, high = info["seconds_percentiles_20_80"]
        # pytest-benchmark's own statistics are of the same runs, taken in turns.
        assert low <= info["median_seconds"] <= high
        assert info["median_seconds"] == pytest.approx(row["stats"]["median"])
        assert info["tflops"] >= 0 and info["gb_per_second"] > 0
        assert info["ceiling_tflops"] > 0 and info["ceiling_gb_per_second"] > 0
        if info["op"] == "performer_module":
            batches, mib = zip(*info["memory_mib_by_batch"], strict=True)
            assert batches == (1, 2) and 0 < mib[0] < mib[1]


def test_a_bad_option_is_refused(tmp_path):
    done, run = run_bench(tmp_path, "soft_split-L3", "--batch=0")
    assert done.returncode == 4 and "--batch: got 0" in done.stderr and run is None
