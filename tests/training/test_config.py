"""The configuration: packaged files, precedence, and invalid values."""

import pytest

import t2tvit
from t2tvit.errors import InputError
from t2tvit.training.config import RunConfig, packaged_names, read_yaml, resolve

# Learning rate and weight decay that are published for each backbone.
SMALL, MIDDLE, LARGE = (1e-3, 0.03), (5e-4, 0.05), (5e-4, 0.065)
PUBLISHED = {
    "t2t_vit_7": SMALL,
    "t2t_vit_10": SMALL,
    "t2t_vit_12": SMALL,
    "t2t_vit_14": MIDDLE,
    "t2t_vit_t_14": MIDDLE,
    "t2t_vit_19": LARGE,
    "t2t_vit_24": LARGE,
    "t2t_vit_t_19": LARGE,
    "t2t_vit_t_24": LARGE,
    "t2t_vit_14_resnext": MIDDLE,
    "t2t_vit_14_wide": MIDDLE,
    "t2t_vit_14_se": MIDDLE,
    "t2t_vit_16_ghost": MIDDLE,
    "t2t_vit_dense": MIDDLE,
}


@pytest.mark.parametrize("name", t2tvit.list_models())
def test_every_published_model_has_its_imagenet_recipe(name):
    config = resolve(f"imagenet/{name}", {})
    assert config.model == name
    assert (config.lr, config.weight_decay) == PUBLISHED[name]
    assert (config.epochs, config.cooldown_epochs, config.warmup_epochs) == (300, 10, 10)
    assert (config.warmup_lr, config.min_lr, config.batch_size) == (1e-6, 1e-5, 512)
    assert (config.mixup, config.cutmix, config.mixup_switch, config.smoothing) == (
        0.8,
        1,
        0.5,
        0.1,
    )
    assert (config.crop_scale, config.hflip, config.random_erasing) == ((0.08, 1), 0.5, 0.25)
    assert config.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (config.optimizer, config.drop_path, config.ema_decay) == ("adamw", 0.1, 0.99996)
    assert (config.img_size, config.crop_pct, config.interpolation) == (224, 0.9, "bicubic")


def test_a_run_has_as_many_epochs_as_asked():
    assert resolve(None, {"epochs": "3"}).cooldown_epochs == 0
    for name in packaged_names():
        expected = 10 if name.startswith("imagenet/") and name != "imagenet/finetune_384" else 0
        assert resolve(name, {}).cooldown_epochs == expected


def test_fine_tuning_and_transfer_are_as_published():
    config = resolve("imagenet/finetune_384", {})
    assert (config.img_size, config.crop_pct, config.auto_augment) == (
        384,
        1.0,
        "rand-m9-mstd0.5-inc1",
    )
    for name in ("cifar10", "cifar100"):
        config = resolve(f"transfer/{name}", {})
        assert (config.data, config.optimizer, config.momentum) == (name, "momentum", 0.9)
        assert (config.lr, config.backbone_lr_scale, config.weight_decay) == (0.05, 0.01, 5e-4)
        assert (config.batch_size, config.epochs, config.cooldown_epochs) == (64, 60, 0)
        assert (config.img_size, config.crop_padding, config.hflip) == (224, 28, 0.5)
        assert (config.drop_path, config.auto_augment, config.mixup) == (0.1, None, 0)


def test_no_packaged_file_is_left_untested():
    expected = {"digits", "imagenet/base", *(f"imagenet/{name}" for name in t2tvit.list_models())}
    expected |= {"imagenet/finetune_384", "transfer/cifar10", "transfer/cifar100"}
    expected |= {"finetune/small"}
    assert set(packaged_names()) == expected


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_files_resolve_and_survive_their_own_yaml(name, tmp_path):
    config = resolve(name, {})
    path = tmp_path / "copy.yaml"
    path.write_text(config.to_yaml())
    assert resolve(path, {}) == config


def test_command_line_beats_file_beats_base_beats_default(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 0.1\nepochs: 20\nweight_decay: 0.5\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nlr: 0.2\nepochs: 30\n")
    config = resolve(tmp_path / "own.yaml", {"lr": "0.3"})
    assert (config.lr, config.epochs, config.weight_decay) == (0.3, 30, 0.5)
    assert config.batch_size == RunConfig().batch_size


@pytest.mark.parametrize(
    "text, name, expected",
    [
        ("lr: 1e-2", "lr", 0.01),  # text to YAML 1.1
        ("lr: 1", "lr", 1.0),
        ("epochs: 20.0", "epochs", 20),
        ("img_size: 48", "img_size", 48),
        ("img_size: [32, 64]", "img_size", (32, 64)),
        ("ema_decay: null", "ema_decay", None),
        ("clip_grad: none", "clip_grad", None),
        ("amp: none", "amp", "none"),
        ("mean: [0.5]", "mean", (0.5,)),
        ("model_args: {depth: 3}", "model_args", {"depth": 3}),
        ("auto_lr: true", "auto_lr", True),
    ],
)
def test_values_are_read_by_the_schema_s_type(tmp_path, text, name, expected):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    value = getattr(resolve(path, {}), name)
    assert value == expected
    assert type(value) is type(expected)


def bomb(level: str, first: str) -> str:
    """A short list with 8¹² values if each alias is expanded."""
    levels = [level.replace("*", f"*a{number}") for number in range(12)]
    levels = [f"&a{number} {text}" for number, text in enumerate((first, *levels))]
    return f"[{', '.join(levels)}]"


@pytest.mark.parametrize(
    "text, message",
    [
        (f"mean: {bomb('[*, *, *, *, *, *, *, *]', '[0, 0]')}", "more than 100,000 values"),
        (
            f"model_args: {bomb('{<<: [*, *, *, *, *, *, *, *]}', '{a: 1}')}",
            "more than 100,000 values",
        ),
        ("model_args: &a {b: *a}", "more than 100,000 values"),
        (f"model_args: {'[' * 100_000}", "nested too deeply"),
        ("\n".join(" " * depth + "a:" for depth in range(3000)), "nested too deeply"),
        ("epochs: 2001-99-99", "is not YAML: month must be"),
        ("epochs: !!timestamp soon", "does not fit its tag"),
        ("epochs: !!bool perhaps", "does not fit its tag"),
        ("epochs: !!int many", "is not YAML: invalid literal"),
        (f"epochs: {'9' * 6000}", "is not YAML: Exceeds the limit"),
        (f"epochs: {'9' * 400}", "epochs: got 9999"),
        (f"lr: {'9' * 400}", "lr: got 9999"),
        ("epochs: !!python/object/apply:os.getcwd []", "is not YAML: could not determine"),
        (
            "num_classes: 1000000000000",
            "num_classes: got 1000000000000, expected .* at most 1000000",
        ),
        ("img_size: [32, 1000000]", "img_size: got 1000000, expected .* at most 16384"),
        ("workers: 1000000", "workers: got 1000000"),
        ("auto_augment: augmix-w100000000", "timm cannot read the policy"),
        ("auto_augment: rand-n1000000000", "timm cannot read the policy"),
        ('base: "a\\0b.yaml"', "null byte"),
    ],
    ids=lambda text: text[:20],
)
def test_a_small_file_cannot_use_all_time_or_memory(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        resolve(path, {})
    assert len(str(caught.value)) < 600


def test_aliases_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("mean: &a [0.5, 0.5, 0.5]\nstd: *a\n")
    assert resolve(path, {}).std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("epoch: 3", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("lr: fast", "lr: got 'fast', expected a number"),
        ("lr: true", "lr: got True, expected a number"),
        ("lr: .nan", "lr: got nan, expected a number"),
        ("auto_lr: 1", "auto_lr: got 1, expected true or false"),
        (
            "layer_decay: 0.9\nbackbone_lr_scale: 0.1",
            "layer_decay: got 0.9 together with backbone_lr",
        ),
        ("mixup: 0.8\nbatch_size: 7", "batch_size: got 7, mixup and cutmix need an even number"),
        ("epochs: 1.5", "epochs: got 1.5, expected a whole number"),
        ("epochs: 0", "epochs: got 0, expected at least 1"),
        ("epochs: [3, 4]", r"epochs: got \[3, 4\], expected a whole number"),
        ("hflip: 2", "hflip: got 2.0, expected at least 0 and at most 1"),
        ("img_size: big", "img_size: got 'big', expected a whole number or 2 numbers"),
        ("img_size: [32, 32, 3]", "img_size: got .* expected a whole number or 2 numbers"),
        ("img_size: 8", "img_size: got 8, expected at least 16"),
        ("amp: bf16", "unknown value 'bf16'; did you mean 'bfloat16'?"),
        ("model: 14", "model: got 14, expected text"),
        ("model_args: 3", "model_args: got 3, expected names with values"),
        ("clip_grad: much", "clip_grad: got 'much', expected a number or none"),
        ("crop_scale: [1.0, 0.5]", "crop_scale: got 1 0.5, expected the minimum first"),
        ("lr: 1.0e-7", "lr: got 1e-07, expected at least min_lr"),
        ("- lr", "expected keys and values, got list"),
        ("lr: [1", "is not YAML"),
        ("base: imagenet/t2t_vit_15", "unknown config 'imagenet/t2t_vit_15'; did you mean"),
        ("base: config.yaml", "it is its own base"),
        ("base: gone.yaml", "gone.yaml: No such file"),
        ("base: [a, b]", r"base: got \['a', 'b'\], expected text"),
        ("lr: 0.1\nlr: 0.2", "the key 'lr' appears twice"),
        ("model_args: {depth: 1, depth: 2}", "the key 'depth' appears twice"),
        ("3: 4", "unknown key '3'"),
        ("seed: 4294967296", "seed: got 4294967296, .* at most 4294967295"),
        ("model_args: {num_classes: 3}", "num_classes is set by --num-classes"),
        ("model_args: {in_chans: 1}", "in_chans is set by the data"),
    ],
)
def test_bad_files_are_refused_with_the_place_and_the_remedy(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        resolve(path, {})


def test_an_unknown_packaged_name_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown config 'digit'; did you mean 'digits'?"):
        read_yaml("digit")


def test_an_override_that_does_not_fit_names_its_option():
    with pytest.raises(InputError, match="--batch-size: got 'many', expected a whole number"):
        resolve("digits", {"batch_size": "many"})


@pytest.mark.parametrize(
    "policy",
    [
        *("rand-x", "rand-m9-mstd", "rand9", "augmix-m", "augmix-n2"),
        *("original-m5", "v1", "", "rand-m9-"),
    ],
)
def test_a_mistyped_policy_is_refused(policy):
    with pytest.raises(InputError, match="auto_augment: timm cannot read the policy"):
        resolve(None, {"auto_augment": policy})


@pytest.mark.parametrize(
    "policy",
    [
        *("rand", "rand-m9-mstd0.5-inc1", "rand-m9-n3-p0.5-mmax9-tweights", "augmix-m5-w4-d2"),
        *("v0r", "original-mstd0.5", "3a"),
    ],
)
def test_timm_s_policies_are_read(policy):
    assert resolve(None, {"auto_augment": policy}).auto_augment == policy


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_and_accumulation_exclude_each_other(mode):
    with pytest.raises(InputError, match=f"got 2 with compile {mode}.*--compile default"):
        resolve(None, {"compile": mode, "accumulate": "2"})
    assert resolve(None, {"compile": mode}).compile == mode
    assert resolve(None, {"compile": "default", "accumulate": "2"}).accumulate == 2
