"""T2T layers whose submodules have hooks, are wrapped or replaced call these submodules."""

import copy
import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from t2tvit.models import T2TModule, plain

KINDS = ["performer", "transformer"]
over_kinds = pytest.mark.parametrize("kind", KINDS)
NAMES = {
    "performer": ["norm1", "kqv", "proj", "norm2", "mlp.0", "mlp.1", "mlp.2"],
    "transformer": ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"],
}
over_submodules = pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind in KINDS for name in NAMES[kind]]
)
over_linears = pytest.mark.parametrize(
    "kind, name",
    [
        (kind, name)
        for kind in KINDS
        for name in NAMES[kind]
        if "norm" not in name and name != "mlp.1"
    ],
)


@pytest.fixture(autouse=True)
def every_warning():
    plain._warn_once.cache_clear()


def new(kind, backend="auto"):
    torch.manual_seed(0)
    module = T2TModule(kind, embed_dim=24, token_dim=16)
    module.set_fused_kernels(backend)
    return module.eval()


def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32)


def replace(module, name, new):
    """Replace the submodule ``name`` of the first layer by ``new``."""
    parent, _, last = f"attention1.{name}".rpartition(".")
    parent = module.get_submodule(parent)
    if isinstance(parent, (nn.ModuleDict, nn.Sequential)):
        parent._modules[last] = new
    else:
        setattr(parent, last, new)


class LowRankAdapter(nn.Module):
    """Wraps a linear module like PEFT: weight and bias are those of the base layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@over_kinds
def test_plain_modules_are_fused_without_a_warning(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = new(kind)(images())
    assert new(kind).attention1._why_not_fused() is None
    torch.testing.assert_close(fused, new(kind, "reference")(images()))


@over_kinds
@pytest.mark.parametrize("train", [False, True])
def test_submodules_compute_the_same(kind, train):
    """The composition, including dropout, equals the plain PyTorch layer."""
    layer = new(kind, "reference").attention1.train(train)
    torch.manual_seed(2)
    expected = layer(images(), backend="reference")
    torch.manual_seed(2)
    torch.testing.assert_close(layer._call_submodules(images(), "reference"), expected)


@over_submodules
def test_forward_hook_fires(kind, name):
    module, seen = new(kind), []
    expected = module(images())
    handle = module.attention1.get_submodule(name).register_forward_hook(
        lambda *_: seen.append(name)
    )
    with pytest.warns(UserWarning, match=f"instead of its fused kernel: {name} has hooks"):
        torch.testing.assert_close(module(images()), expected)
    assert seen == [name]
    handle.remove()
    assert module.attention1._why_not_fused() is None
    assert torch.equal(module(images()), expected)


@over_submodules
def test_other_hooks_fire(kind, name):
    module, seen = new(kind).train(), []
    submodule = module.attention1.get_submodule(name)
    submodule.register_forward_pre_hook(lambda *_: seen.append("forward"))
    submodule.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    submodule.register_full_backward_hook(lambda *_: seen.append("backward"))
    with pytest.warns(UserWarning, match=name):
        module(images()).sum().backward()
    assert seen == ["forward", "backward pre", "backward"]


@over_kinds
def test_hook_on_all_modules_fires(kind):
    module, seen = new(kind), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with pytest.warns(UserWarning, match="global module hooks"):
            module(images())
    finally:
        handle.remove()
    called = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.LayerNorm, nn.GELU))]
    assert {id(m) for m in called} <= {id(m) for m in seen}


def test_warns_once_per_reason():
    module = new("performer")
    module.attention1.proj.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            module(images())
    assert len([w for w in caught if "proj has hooks" in str(w.message)]) == 1


@over_linears
def test_adapter_acts_and_learns(kind, name):
    module = new(kind)
    before = module(images())
    adapter = LowRankAdapter(module.attention1.get_submodule(name))
    replace(module, name, adapter)
    with pytest.warns(UserWarning, match=f"{name} is a LowRankAdapter"):
        after = module(images())
    assert (after - before).abs().max() > 1e-4
    after.sum().backward()
    assert adapter.up.weight.grad.abs().max() > 0


def test_adapter_of_the_projection():
    module = new("performer")
    before = module(images())
    module.project = LowRankAdapter(module.project)
    with pytest.warns(UserWarning, match="project is a LowRankAdapter"):
        after = module(images())
    after.sum().backward()
    assert (after - before).abs().max() > 1e-4
    assert module.project.up.weight.grad.abs().max() > 0


def prune(linear):
    torch.nn.utils.prune.random_unstructured(linear, "weight", 0.5)


HOOK_BASED = {
    "prune": prune,
    "weight-norm": lambda linear: torch.nn.utils.weight_norm(linear),
    "spectral-norm": lambda linear: torch.nn.utils.spectral_norm(linear),
}
PARAMETRISED = {
    "weight-norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral-norm": torch.nn.utils.parametrizations.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
}


def effective_weights(module, name):
    """The weights that the submodule used in three updates."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.02)
    weights, losses = [], []
    for _ in range(3):
        optimizer.zero_grad()
        loss = module(images().to(module.project.weight.dtype)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights.append(module.attention1.get_submodule(name).weight.detach().clone())
    return losses, weights


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:a T2T layer")
@pytest.mark.parametrize("change", HOOK_BASED)
@over_linears
def test_weights_computed_by_hooks_are_fresh(kind, name, change):
    # In float64, as roundings grow over the updates.
    fused, plain_module = new(kind).double(), new(kind, "reference").double()
    for module in (fused, plain_module):
        torch.manual_seed(3)
        HOOK_BASED[change](module.attention1.get_submodule(name))
    losses, weights = effective_weights(fused, name)
    expected_losses, expected_weights = effective_weights(plain_module, name)
    assert losses == pytest.approx(expected_losses)
    assert not torch.equal(weights[0], weights[2])
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("change", PARAMETRISED)
@over_linears
def test_parametrised_weights_are_fused(kind, name, change):
    module = new(kind)
    torch.manual_seed(3)
    PARAMETRISED[change](module.attention1.get_submodule(name))
    assert module.attention1._why_not_fused() is None
    losses, weights = effective_weights(module, name)
    assert not torch.equal(weights[0], weights[2])


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight


@over_linears
def test_a_parametrisation_runs_once_per_forward(kind, name):
    module, counted = new(kind), Counted()
    linear = module.attention1.get_submodule(name)
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", counted)
    counted.calls = 0
    module(images())
    assert counted.calls == 1


@pytest.mark.parametrize(
    "name, other, reason",
    [
        ("norm1", nn.Identity(), "is a Identity"),
        ("norm1", nn.RMSNorm(147), "is a RMSNorm"),
        ("norm1", nn.LayerNorm(147, eps=1e-2), "has eps 0.01"),
        ("norm2", nn.LayerNorm(16, elementwise_affine=False), "has no weight or no bias"),
        ("norm2", nn.LayerNorm(16, bias=False), "has no weight or no bias"),
        ("mlp.1", nn.ReLU(), "is a ReLU"),
        ("mlp.1", nn.GELU(approximate="tanh"), "is approximate"),
        ("mlp", nn.Sequential(nn.Linear(16, 16), nn.GELU()), "has 2 modules"),
        ("mlp", nn.Linear(16, 16), "is a Linear"),
        ("kqv", nn.Linear(147, 48, bias=False), "has no bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_replaced_submodules_have_effect(name, other, reason):
    module = new("performer")
    before = module(images())
    replace(module, name, copy.deepcopy(other))
    with pytest.warns(UserWarning, match=reason):
        after = module(images())
    assert not torch.equal(before, after)
    assert torch.equal(after, module(images()))


def test_added_bias_has_effect():
    module = new("transformer")
    linear = module.attention1.attn["qkv"]
    linear.bias = nn.Parameter(torch.ones(linear.out_features))
    before = new("transformer")(images())
    with pytest.warns(UserWarning, match="attn.qkv has a bias"):
        assert not torch.equal(module(images()), before)


def test_own_forward_is_called():
    module = new("performer")
    linear = module.attention1.proj
    linear.forward = lambda x: 0 * x
    with pytest.warns(UserWarning, match="proj has a forward of its own"):
        assert not torch.equal(module(images()), new("performer")(images()))


@pytest.mark.filterwarnings("ignore")  # torch's own, of deprecation
@over_kinds
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_quantised_modules(kind, backend):
    module = new(kind, backend)
    expected = module(images())
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    got = quantised(images())
    assert (got - expected).norm() < 0.05 * expected.norm()


@over_kinds
def test_compiles_as_one_graph(kind):
    module = new(kind)
    module.attention1.norm2.register_forward_hook(lambda module, args, y: 2 * y)
    expected = module(images())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected)


@over_kinds
def test_flop_counter_counts(kind):
    counts = []
    for backend in ("auto", "reference"):
        module = new(kind, backend)
        with FlopCounterMode(display=False) as counter, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
