"""Training and evaluation steps, compared with their definitions."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from t2tvit.errors import NonFiniteLoss
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.evaluation import evaluate
from t2tvit.training.log import opening_lines
from t2tvit.training.model import speed_up
from t2tvit.training.optimizer import build_optimizer, build_scheduler
from t2tvit.training.pipeline import Normalize, open_data, open_splits
from t2tvit.training.randomness import seed_everything
from t2tvit.training.trainer import Trainer
from tests.support.training.equality import assert_equal

WORLD = World(0, 1, torch.device("cpu"))
CONFIG = RunConfig(
    data="synthetic:36",
    num_classes=6,
    img_size=16,
    workers=0,
    batch_size=8,
    amp="none",
    drop_path=0.0,
    ema_decay=None,
    epochs=4,
    warmup_epochs=0,
    smoothing=0.0,
    optimizer="momentum",
    momentum=0.0,
    weight_decay=0.0,
)


class Linear(nn.Module):
    """The smallest model with the interface that the trainer needs."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.head = nn.Linear(3 * 16 * 16, num_classes)

    def forward(self, images):
        return self.head(images.flatten(1))


def trainer_of(config, model):
    """Its data are those of ``config``."""
    return Trainer(config, WORLD, open_data(config, WORLD, open_splits(config)), model)


def test_an_epoch_is_what_a_plain_loop_computes():
    seed_everything(0)
    data = open_data(CONFIG, WORLD, open_splits(CONFIG))
    model = Linear(6)
    plain = Linear(6)
    plain.load_state_dict(model.state_dict())
    trainer = Trainer(CONFIG, WORLD, data, model)
    assert trainer.epochs == 4 + CONFIG.cooldown_epochs

    seed_everything(1)
    metrics = trainer.train_epoch()
    seed_everything(1)
    data.train.sampler.set_epoch(0)
    losses, updates, total = [], 0, 4 * len(data.train)
    for images, labels, *_ in data.train:
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * updates / total))).item()
        rate = CONFIG.min_lr + (CONFIG.lr - CONFIG.min_lr) * cosine
        loss = F.cross_entropy(plain(data.normalize(images)), labels)
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                parameter -= rate * gradient
        losses.append(loss.item())
        updates += 1
    assert trainer.updates == updates == 4
    assert metrics["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["lr"] == pytest.approx(rate, rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], value, msg=lambda text: f"{name}: {text}"
        )


def test_clipping_bounds_the_update():
    config = replace(CONFIG, clip_grad=1e-3, batch_size=36, lr=1.0)
    model = Linear(6)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    trainer_of(config, model).train_epoch()
    after = torch.nn.utils.parameters_to_vector(model.parameters())
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_average_warms_up_towards_its_decay():
    config = replace(CONFIG, ema_decay=0.9, ema_warmup_power=1.0, batch_size=36, lr=0.1)
    model = Linear(6)
    trainer = trainer_of(config, model)
    start = model.head.bias.detach().clone()
    trainer.train_epoch()
    # The first update's decay is 0: the random start has no part in the average.
    torch.testing.assert_close(trainer.ema.module.head.bias, model.head.bias)
    assert not torch.equal(model.head.bias, start)
    first = model.head.bias.detach().clone()
    trainer.step = 0
    trainer.train_epoch()
    torch.testing.assert_close(trainer.ema.module.head.bias, (first + model.head.bias) / 2)


def poisoned(config, *steps):
    """A trainer whose loss is not finite at ``steps``."""
    seed_everything(0)
    model = Linear(6)
    trainer = trainer_of(config, model)
    calls = []

    def poison(module, inputs, output):
        calls.append(1)
        return output * torch.inf if len(calls) in steps else output

    model.register_forward_hook(poison)
    return trainer


@pytest.mark.parametrize("amp", ["none", "float16"])
def test_a_loss_that_is_not_finite_skips_its_update_and_is_reported(amp, capsys):
    config = replace(CONFIG, amp=amp, ema_decay=0.5)
    trainer = poisoned(config, 1, 2, 3)
    before = trainer.model.head.weight.detach().clone()
    metrics = trainer.train_epoch()
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    sampler = trainer.data.train.sampler
    sampler.set_epoch(0)
    order = list(sampler)
    for step, line in enumerate(lines):
        assert f"not finite at step {step + 1} of epoch 1 (rank 0: loss nan" in line
        indices = " ".join(map(str, order[8 * step : 8 * step + 8]))
        assert f"training images {indices})" in line
    assert len(lines) == metrics["skipped_updates"] == 3
    assert (trainer.updates, trainer.images, trainer.skipped_in_a_row) == (4, 8, 0)
    # One update was made, by the schedule's fourth learning rate.
    assert not torch.equal(trainer.model.head.weight, before)
    assert trainer.model.head.weight.isfinite().all() and metrics["train_loss"] < 10


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(6), nn.InstanceNorm1d(6, track_running_stats=True)]
)
def test_a_skipped_update_leaves_every_buffer(layer):
    """With a layer that keeps non-finite values; batch norm is the most common one."""

    class Network(Linear):
        def __init__(self):
            super().__init__(6)
            self.norm = layer

        def forward(self, images):
            outputs = self.head(images.flatten(1)) * (torch.nan if self.fails else 1)
            if isinstance(self.norm, nn.BatchNorm1d):
                return self.norm(outputs)
            scales = torch.tensor([1.0, 2.0])
            return self.norm(outputs[..., None].expand(-1, -1, 2) * scales)[..., 0]

    trainer = trainer_of(CONFIG, Network())
    trainer.model.fails = False
    trainer.train_epoch()
    trainer.epochs_done, trainer.step, trainer.model.fails = 1, 0, True
    before = {name: value.clone() for name, value in trainer.model.named_buffers()}
    with pytest.raises(NonFiniteLoss):
        trainer.train_epoch()
    for name, value in trainer.model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_an_image_whose_logits_are_not_finite_is_wrong_and_the_loss_says_so():
    labels = torch.zeros(3, dtype=torch.long)  # what argmax finds among NaN
    batches = [(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), labels)]

    class Broken(nn.Module):
        num_classes = 6

        def forward(self, images):
            logits = torch.eye(6)[labels]
            logits[1:] = torch.nan
            return logits

    normalize = Normalize((0.5,) * 3, (0.2,) * 3, WORLD.device)
    metrics = evaluate(Broken(), batches, normalize, CONFIG, WORLD)
    assert metrics["eval_loss"] != metrics["eval_loss"]
    assert metrics["top1"] == metrics["top5"] == pytest.approx(100 / 3)


def test_a_gradient_that_is_not_finite_skips_its_update():
    trainer = poisoned(replace(CONFIG, clip_grad=1.0))
    before = trainer.model.head.weight.detach().clone()
    trainer.model.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteLoss, match=r"the gradient is not finite at .* \(rank 0: loss \d"):
        trainer.train_epoch()
    assert torch.equal(trainer.model.head.weight, before)


def test_too_many_skipped_updates_in_a_row_end_the_run_with_their_batch():
    config = replace(CONFIG, max_skipped=1)
    trainer = poisoned(config, 1, 3, 4)
    match = "not finite at step 4 of epoch 1, 2 times in a row .*Lower --lr"
    with pytest.raises(NonFiniteLoss, match=match) as caught:
        trainer.train_epoch()
    batch = caught.value.batch
    data = trainer.data
    again = torch.stack([data.train.dataset[index][0] for index in batch["names"]])
    assert torch.equal(batch["images"], data.augment(again))


@pytest.mark.parametrize("classes", [3, 6])
def test_evaluation_is_the_mean_over_all_images(classes):
    """Also over an incomplete last batch; top-5 only where it means something."""
    torch.manual_seed(0)
    batches = [
        (
            torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8),
            torch.randint(classes, (size,)),
        )
        for size in (8, 8, 3)
    ]
    model = Linear(classes)
    normalize = Normalize((0.5,) * 3, (0.2,) * 3, WORLD.device)
    metrics = evaluate(model, batches, normalize, CONFIG, WORLD)
    labels = torch.cat([labels for _, labels in batches])
    with torch.no_grad():
        logits = model(normalize(torch.cat([images for images, _ in batches])))
    assert metrics["eval_images"] == 19
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    order = logits.argsort(dim=1, descending=True)
    right = (order == labels[:, None]).double()
    assert metrics["top1"] == pytest.approx(100 * right[:, 0].mean().item())
    if classes < 5:
        assert "top5" not in metrics
    else:
        assert metrics["top5"] == pytest.approx(100 * right[:, :5].sum(dim=1).mean().item())


def test_biases_norms_and_the_class_token_are_not_decayed():
    import t2tvit

    model = t2tvit.create_model("t2t_vit_7", img_size=32, depth=1)
    config = replace(CONFIG, optimizer="adamw", weight_decay=0.05)
    decay = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(model, config).param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay, name
        else:
            exempt = parameter.dim() == 1 or name == "cls_token"
            assert decay[id(parameter)] == (0 if exempt else 0.05), name


def rates_of(config, updates=0):
    """The learning rate of each parameter of a small model after ``updates``."""
    import t2tvit

    model = t2tvit.create_model("t2t_vit_7", img_size=32, depth=2)
    optimizer = build_optimizer(model, config)
    scheduler, _ = build_scheduler(optimizer, config, 1)
    scheduler.step_update(updates)
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert rates.keys() == {id(each) for each in trained.values()}
    return {name: rates[id(each)] for name, each in trained.items()}


@pytest.mark.parametrize("updates", [0, 1])
def test_the_backbone_learns_at_its_share_of_the_head_s_rate(updates):
    config = replace(CONFIG, lr=0.05, min_lr=0.0, weight_decay=0.1, backbone_lr_scale=0.01)
    rates = rates_of(config, updates)
    peak = rates["head.weight"]
    assert 0 < peak <= 0.05 and (peak == 0.05) == (updates == 0)
    for name, rate in rates.items():
        assert rate == pytest.approx(peak * (1 if name.startswith("head.") else 0.01)), name


def test_layers_learn_the_slower_the_further_from_the_head():
    rates = rates_of(replace(CONFIG, lr=0.1, min_lr=0.0, layer_decay=0.5))
    layers = ("head", "blocks.1.attn.qkv", "blocks.0.norm1", "tokens_to_token.project")
    for depth, name in enumerate(layers):
        assert rates[f"{name}.weight"] == pytest.approx(0.1 * 0.5**depth)
    assert rates["cls_token"] == rates["tokens_to_token.project.weight"] == min(rates.values())


@pytest.mark.parametrize("optimizer, factor", [("momentum", 4.0), ("adamw", 2.0), ("lamb", 2.0)])
def test_auto_lr_scales_every_rate_with_the_batch(optimizer, factor):
    config = replace(CONFIG, optimizer=optimizer, lr_batch_size=512, batch_size=2048)
    assert config.lr_factor == 1
    config = replace(config, auto_lr=True, lr=0.1, min_lr=0.01, warmup_lr=0.001, warmup_epochs=1)
    assert config.lr_factor == factor
    for updates, rate in ((0, 0.001), (config.epochs, 0.01)):
        assert rates_of(config, updates)["head.bias"] == pytest.approx(factor * rate)


def test_the_log_says_what_batch_and_rate_an_update_has():
    config = replace(CONFIG, auto_lr=True, lr=0.1, lr_batch_size=16)

    def log(size):
        world = World(0, size, WORLD.device)
        data = open_data(config, world, open_splits(config))
        # A trainer would join the other processes.
        trainer = SimpleNamespace(config=config, world=world, data=data, model=Linear(6), epochs=4)
        return "\n".join(opening_lines(trainer))

    assert "global batch 8 (8 per process), momentum, lr 0.05" in log(1)
    assert "lr 0.1 for batches of 16, scaled by 0.5 to 8" in log(1)
    assert "global batch 8 (4 per process)" in log(2) and "warning" not in log(2)
    assert "warning   3 processes cannot divide a batch of 8: each update uses 6" in log(3)


def trained_by(config, model):
    """The trainer after an epoch of ``model`` from given generators, and the metrics."""
    seed_everything(0)
    trainer = trainer_of(config, model)
    speed_up(model, config)
    seed_everything(1)
    return trainer, trainer.train_epoch()


def assert_same_training(config, changes, build):
    """Weights and loss agree to the precision of float32 sums."""
    first, metrics = trained_by(config, build())
    second, others = trained_by(replace(config, **changes), build())
    assert others["train_loss"] == pytest.approx(metrics["train_loss"], rel=1e-5)
    start = build().state_dict()
    for name, value in first.model.state_dict().items():
        moved = (value - start[name]).norm()
        error = (second.model.state_dict()[name] - value).norm()
        assert error <= 1e-4 * moved, f"{name}: {error:.1e} of a way of {moved:.1e}"


def tiny(**options):
    import t2tvit

    torch.manual_seed(0)
    return t2tvit.create_model(
        "t2t_vit_t_14", img_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=6, **options
    )


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Uneven pieces, mixup and cutmix and random erasing over the whole, clipping of the sum."""
    config = replace(CONFIG, lr=0.1, mixup=0.8, cutmix=1.0, random_erasing=0.5, clip_grad=0.5)
    assert_same_training(config, {"accumulate": 3}, tiny)


def test_checkpointing_and_channels_last_change_nothing():
    config = replace(CONFIG, lr=0.1)
    changes = {"grad_checkpointing": True, "channels_last": True}
    assert_same_training(config, changes, lambda: tiny(drop_path_rate=0.3))


def test_only_the_last_piece_s_gradients_are_shared_between_ranks():
    shared = []

    class Network(nn.Module):
        @contextmanager
        def no_sync(self):
            shared.append(False)
            yield

        def forward(self, images):
            return trainer.model(images)

    trainer = trainer_of(replace(CONFIG, accumulate=4), Linear(6))
    trainer.network, trainer.world = Network(), World(0, 2, WORLD.device)
    trainer.accumulate(torch.randn(8, 3, 16, 16), torch.randint(6, (8,)))
    assert len(shared) == 3


def test_a_trainer_continues_from_the_state_of_another():
    """Bit-identical, with an average and momentum to restore."""
    config = replace(CONFIG, ema_decay=0.9, optimizer="adamw", lr=0.01)
    first, second = trainer_of(config, Linear(6)), trainer_of(config, Linear(6))
    first.train_epoch()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for trainer in (first, second):
        seed_everything(1)
        trainer.step = 0
        trainer.train_epoch()
    assert first.updates == second.updates == 8
    assert_equal(first.state_dict(), second.state_dict())
    assert not torch.equal(first.model.head.weight, first.ema.module.head.weight)
