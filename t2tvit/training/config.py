"""The one schema of a run: keys, defaults, bounds, help; YAML and the command line fill it.

Precedence, weakest first: the defaults here, the YAML file's ``base``, the YAML file, the command
line.
"""

import itertools
import math
import re
import types
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from t2tvit.errors import InputError, unknown_name
from t2tvit.files import read_text

PACKAGED = Path(__file__).resolve().parent.parent / "configs"
MOST_VALUES = 100_000  # in a YAML file
WARMUP_SHARE = 5  # of the epochs, where the warm-up would be longer than the run
BACKEND_CHOICES = ("auto", "reference", "cpu", "triton", "cuda")
# Modes of torch.compile in which a replay reuses the memory of the gradients (pytorch/pytorch#169545).
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
# The policies that timm reads; it ignores a section without a number, and so a mistyped one.
NUMBER = r"\d+(\.\d*)?"
POLICY = re.compile(
    rf"rand(-([mn]\d{{1,3}}|p{NUMBER}|mstd{NUMBER}|mmax\d{{1,3}}|inc[01]|t\w*))*"
    rf"|augmix(-([mwd]\d{{1,2}}|a{NUMBER}|b[01]|mstd{NUMBER}))*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{NUMBER})*"
)
# Arguments of create_model that model_args may not hold, and what sets them.
ELSEWHERE = {
    "img_size": "--img-size",
    "num_classes": "--num-classes",
    "in_chans": "the data",
    "drop_path_rate": "--drop-path",
    "fused_kernels": "--fused-kernels",
}


def key(
    group: str,
    default: object,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    metavar: str | None = None,
    bare: object = None,
):
    """A key of the schema: its default, help, and what values it takes beyond its type.

    ``bare`` is what its option means without a value.
    """
    metadata = {
        "group": group,
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "metavar": metavar,
        "bare": bare,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """All that decides what a run computes. Every key is also a command-line option."""

    data: str = key(
        "data",
        "digits",
        "what to train on: digits (1,797 real handwritten digits, built in; digits:01234 for some of "
        "them), cifar10[:PATH] or cifar100[:PATH] (local files, python or binary version; PATH defaults to ./data), "
        "imagefolder:PATH (PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg), webdataset:PATH (a "
        "folder of tar shards, or their names with {split} in them, streamed), timm:NAME[:PATH] "
        "(a data set of timm with random access, such as timm:hfds/OWNER/NAME), "
        "synthetic[:IMAGES] (random images and labels)",
        metavar="SOURCE",
    )
    img_size: int | tuple[int, int] = key(
        "data", 224, "side of the square input, or height and width, in pixels", minimum=16, maximum=16384
    )
    workers: int = key("data", 4, "loader processes per rank; 0 loads in the main one", minimum=0, maximum=1024)
    max_unreadable: int = key(
        "data",
        10,
        "training images that may be missing or damaged before the run ends; each is named, and "
        "the next image replaces it. Held-out images must all be readable",
        minimum=0,
    )
    interpolation: str = key(
        "data", "bicubic", "how images are resized", choices=("nearest", "bilinear", "bicubic")
    )
    crop_pct: float = key(
        "data", 0.9, "evaluation: share of the resized image that is kept", minimum=0.05, maximum=1
    )
    mean: tuple[float, ...] | None = key(
        "data", None, "per channel, of values in [0, 1]; none: the data's own", minimum=0, maximum=1
    )
    std: tuple[float, ...] | None = key(
        "data", None, "per channel, of values in [0, 1]; none: the data's own", minimum=0.001
    )

    crop_scale: tuple[float, float] = key(
        "augmentation", (0.08, 1.0), "area of a random crop, least and most", minimum=0, maximum=1
    )
    crop_ratio: tuple[float, float] = key(
        "augmentation",
        (0.75, 1.3333),
        "width / height of a random crop, least and most",
        minimum=0.1,
    )
    crop_padding: int | None = key(
        "augmentation",
        None,
        "instead of a crop of random area: resize to the input, pad by so many pixels, crop at "
        "random; none: off",
        minimum=1,
        maximum=16384,
    )
    repeated_augmentation: int = key(
        "augmentation",
        1,
        "how often an image stands in the batches of an update, each time augmented anew; an epoch "
        "then sees that part of the images",
        minimum=1,
        maximum=1000,
    )
    hflip: float = key("augmentation", 0.5, "probability of mirroring", minimum=0, maximum=1)
    color_jitter: float = key(
        "augmentation", 0.0, "strength of brightness, contrast and saturation jitter", minimum=0
    )
    auto_augment: str | None = key(
        "augmentation",
        None,
        "a policy of timm, such as rand-m9-mstd0.5-inc1; none: no policy",
        metavar="POLICY",
    )
    random_erasing: float = key(
        "augmentation", 0.0, "probability of erasing a rectangle (noise)", minimum=0, maximum=1
    )
    mixup: float = key("augmentation", 0.0, "Beta parameter of mixup; 0: off", minimum=0)
    cutmix: float = key("augmentation", 0.0, "Beta parameter of cutmix; 0: off", minimum=0)
    mixup_switch: float = key(
        "augmentation", 0.5, "with both on, the share of cutmix", minimum=0, maximum=1
    )
    smoothing: float = key("augmentation", 0.1, "label smoothing", minimum=0, maximum=0.99)

    model: str = key("model", "t2t_vit_7", "a name that `t2tvit models` lists, or timm:NAME", metavar="NAME")
    model_args: dict = key(
        "model", {}, "further arguments of create_model, such as embed_dim=128 depth=4"
    )
    num_classes: int | None = key(
        "model", None, "outputs of the head; none: the data's", minimum=1, maximum=1_000_000
    )
    drop_path: float = key("model", 0.1, "rate of stochastic depth", minimum=0, maximum=0.99)
    initial_checkpoint: str | None = key(
        "model",
        None,
        "weights to start from, .safetensors or .pth(.tar); positions are resized, a head of other "
        "classes starts afresh",
        metavar="FILE",
    )
    fused_kernels: str = key(
        "model",
        "auto",
        "who computes the tokens-to-token module; auto takes the first backend that can, any other "
        "name is used or refused with the reason",
        choices=BACKEND_CHOICES,
        bare="auto",
    )

    optimizer: str = key(
        "optimisation",
        "adamw",
        "a name of timm's factory, such as adamw, lamb, sgd (Nesterov) or momentum (plain SGD)",
        metavar="NAME",
    )
    lr: float = key("optimisation", 1e-3, "peak learning rate, for the global batch", minimum=0)
    auto_lr: bool = key(
        "optimisation",
        False,
        "scale every learning rate with the global batch: by batch_size / lr_batch_size, or its "
        "square root for optimisers that adapt to the gradient's size (ada..., lamb)",
    )
    lr_batch_size: int = key(
        "optimisation", 512, "the global batch that the learning rates are meant for", minimum=1
    )
    backbone_lr_scale: float = key(
        "optimisation",
        1.0,
        "learning rate of all but the head, as a share of lr: small for weights to be kept, 0 "
        "for a frozen backbone",
        minimum=0,
    )
    layer_decay: float | None = key(
        "optimisation",
        None,
        "learning rate of each layer over that of the next one towards the head; none: off",
        minimum=0.01,
        maximum=1,
    )
    weight_decay: float = key(
        "optimisation", 0.03, "not applied to biases, 1-D parameters and the class token", minimum=0
    )
    momentum: float = key("optimisation", 0.9, "of SGD and the like", minimum=0, maximum=1)
    batch_size: int = key(
        "optimisation",
        512,
        "images per update over all ranks together: the recipe stays the same on any GPU count "
        "(rounded down, with a warning, where their number does not divide it)",
        minimum=1,
    )
    clip_grad: float | None = key(
        "optimisation", None, "largest gradient norm; none: off", minimum=1e-6
    )
    amp: str = key(
        "optimisation",
        "bfloat16",
        "autocast dtype; float16 scales the loss",
        choices=("bfloat16", "float16", "none"),
    )

    max_skipped: int = key(
        "optimisation",
        20,
        "updates in a row that are skipped for a loss or gradient that is not finite, before the "
        "run ends and keeps the batch",
        minimum=0,
    )

    accumulate: int = key(
        "speed",
        1,
        "pieces in which a process's images of an update go through the model, one after the other "
        "to save memory; their gradients add up to those of the whole",
        minimum=1,
    )
    compile: str = key(
        "speed",
        "none",
        "torch.compile of the whole model, by this mode; reduce-overhead replays CUDA graphs and "
        "helps where the GPU waits for the host",
        choices=("none", "default", "reduce-overhead", "max-autotune"),
        bare="default",
    )
    channels_last: bool = key("speed", False, "channels-last memory format of images and weights")
    grad_checkpointing: bool = key(
        "speed", False, "compute the blocks again in the backward pass, to save memory"
    )
    profile: int = key(
        "speed",
        0,
        "updates to profile, from the sixth on; writes a trace and a summary; 0: off",
        minimum=0,
        bare=10,
    )

    epochs: int = key(
        "schedule",
        300,
        "epochs of the cosine schedule, warm-up included: all that the run trains, unless "
        "cooldown_epochs adds some (imagenet/MODEL adds 10)",
        minimum=1,
    )
    warmup_epochs: int = key("schedule", 10, "epochs of linear warm-up", minimum=0)
    warmup_lr: float = key("schedule", 1e-6, "learning rate at the first update", minimum=0)
    min_lr: float = key("schedule", 1e-5, "learning rate at the end", minimum=0)
    cooldown_epochs: int = key(
        "schedule", 0, "further epochs at min_lr, after those of --epochs", minimum=0
    )

    ema_decay: float | None = key(
        "averaging",
        0.99996,
        "decay of the averaged weights, which are the ones evaluated and kept; none: no average",
        minimum=0,
        maximum=1,
    )
    ema_warmup_power: float = key(
        "averaging",
        0.8,
        "the decay grows as 1 - (1 + update)^-power up to ema_decay, so that short runs do not "
        "evaluate their random start",
        minimum=0.1,
        maximum=1,
    )

    checkpoint_minutes: float = key(
        "run",
        10.0,
        "the training state is written after each epoch, and when this long has passed since; "
        "0: after every update",
        minimum=0,
    )
    keep_checkpoints: int = key(
        "run", 2, "training states to keep; a damaged one gives way to the one before", minimum=1
    )
    tensorboard: bool = key("run", False, "also write the metrics for TensorBoard")
    wandb: str | None = key(
        "run",
        None,
        "also send the metrics to this project of Weights & Biases (pip install wandb; "
        "WANDB_MODE=offline keeps them here); none: off",
        metavar="PROJECT",
    )
    seed: int = key(
        "run", 0, "of weights, order, augmentation and dropout", minimum=0, maximum=2**32 - 1
    )
    device: str = key(
        "run", "auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda")
    )

    def __post_init__(self):
        if self.lr < self.min_lr:
            raise InputError(
                f"lr: got {self.lr:g}, expected at least min_lr = {self.min_lr:g}; lower min_lr too"
            )
        for name in ("crop_scale", "crop_ratio"):
            least, most = getattr(self, name)
            if least > most:
                raise InputError(f"{name}: got {least:g} {most:g}, expected least before most")
        if self.layer_decay is not None and self.backbone_lr_scale != 1:
            raise InputError(
                f"layer_decay: got {self.layer_decay:g} beside backbone_lr_scale "
                f"{self.backbone_lr_scale:g}; use one of them"
            )
        if self.accumulate > 1 and self.compile in CUDA_GRAPHS:
            raise InputError(
                f"accumulate: got {self.accumulate} with compile {self.compile}, whose CUDA graphs "
                "overwrite the gradients of the piece before; use --compile default, or --accumulate 1"
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise InputError(
                f"batch_size: got {self.batch_size}, mixup and cutmix need an even number; change "
                "it or set both to 0"
            )
        for name, setter in ELSEWHERE.items():
            if name in self.model_args:
                raise InputError(f"model_args: {name} is set by {setter}; leave it out here")


KEYS = {item.name: item for item in fields(RunConfig)}
HINTS = typing.get_type_hints(RunConfig)


def resolve(config: str | Path | None, overrides: dict[str, object]) -> RunConfig:
    """The configuration of a YAML file or packaged name (None: the defaults) with overrides.

    Raises:
        InputError: an unknown file or key, a value of the wrong type or out of bounds.
    """
    values = read_yaml(config) if config is not None else {}
    return from_dict(values, overrides, str(config))


def from_dict(values: dict, overrides: dict | None = None, origin: str = "stored") -> RunConfig:
    """The configuration of ``values`` with command-line ``overrides``, each checked."""
    overrides = overrides or {}
    for name in values:
        if name not in KEYS:
            raise InputError(f"config {origin}: {unknown_name('key', str(name), KEYS)}")
    checked = {
        name: convert(name, value, f"config {origin}: {name}")
        for name, value in values.items()
        if name not in overrides
    }
    for name, value in overrides.items():
        checked[name] = convert(name, value, "--" + name.replace("_", "-"))
    return RunConfig(**checked)


def fitted(config: RunConfig, images: int) -> tuple[RunConfig, list[str]]:
    """``config`` for so few training images or epochs, with a line for each key that changes."""
    lines = []
    if config.batch_size > images:
        batch = images - images % 2 if config.mixup or config.cutmix else images
        lines.append(
            f"batch     {batch} instead of {config.batch_size}: there are only {images} training "
            "images; a lower --batch-size gives more updates"
        )
        config = replace(config, batch_size=max(batch, 1))
    if config.warmup_epochs >= config.epochs:
        warmup = config.epochs // WARMUP_SHARE
        lines.append(
            f"warm-up   {warmup} instead of {config.warmup_epochs} epochs: the run has only "
            f"{config.epochs}"
        )
        config = replace(config, warmup_epochs=warmup)
    return config, lines


def packaged_names() -> list[str]:
    """Names that ``--config`` takes besides a path."""
    return sorted(
        path.relative_to(PACKAGED).with_suffix("").as_posix() for path in PACKAGED.rglob("*.yaml")
    )


def read_yaml(config: str | Path, including: tuple[Path, ...] = ()) -> dict[str, object]:
    """The keys of a YAML file, or packaged config, over those of its ``base``."""
    path = Path(config)
    if path.suffix not in (".yaml", ".yml"):
        path = PACKAGED / f"{config}.yaml"
        if not path.is_file():
            raise InputError(unknown_name("config", str(config), packaged_names()))
    try:
        values = load_yaml(read_text(path))
    except OSError as error:
        raise InputError(
            f"config {path}: {error.strerror}; give a YAML file or one of "
            f"{', '.join(packaged_names())}"
        ) from None
    except ValueError as error:
        raise InputError(f"config {path} is not YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f"config {path}: expected keys and values, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise InputError(f"config {path}: base: got {base!r}, expected text")
    if path in including:
        raise InputError(f"config {path}: its base leads back to itself")
    if Path(base).suffix in (".yaml", ".yml"):
        base = path.parent / base
    return read_yaml(base, (*including, path)) | values


def load_yaml(text: str) -> object:
    """``yaml.safe_load``, but a key that is there twice is an error, as YAML has it.

    Raises:
        ValueError: the text is not YAML, nested too deeply, or too large with its aliases expanded.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in seen:
                    problem = f"the key {name!r} stands twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > MOST_VALUES:
            raise ValueError(f"with its aliases it has more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (AttributeError, KeyError) as error:  # PyYAML's of a tag that does not fit its text
        raise ValueError(f"a value does not fit its tag ({error})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _expanded(node, known: dict[int, float]) -> float:
    """The values in a YAML node, those of an alias counted wherever it is used."""
    if id(node) not in known:
        known[id(node)] = math.inf  # an alias of what contains it
        inside = node.value if isinstance(node.value, list) else ()
        parts = itertools.chain(*(each if isinstance(each, tuple) else (each,) for each in inside))
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def write_yaml(config: RunConfig) -> str:
    """The configuration as a YAML document that :func:`resolve` reads back."""
    import yaml

    plain = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False)


def convert(name: str, value: object, source: str) -> object:
    """``value``, from YAML or from the command line, as the schema's type for ``name``.

    Raises:
        InputError: it is of the wrong type or out of bounds; ``source`` says where it stands.
    """
    hint, rules = HINTS[name], KEYS[name].metadata
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in kinds and value in (None, "none", ["none"]):
        return None
    for kind in kinds:
        try:
            converted = _as(kind, value)
            break
        except (OverflowError, TypeError, ValueError):
            continue
    else:
        expected = " or ".join(_describe(kind) for kind in kinds)
        raise InputError(f"{source}: got {value!r:.200}, expected {expected}")
    if name == "auto_augment" and not POLICY.fullmatch(converted):
        raise InputError(
            f"auto_augment: timm cannot read the policy {converted!r}; expected one such as "
            "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original"
        )
    if rules["choices"] is not None and converted not in rules["choices"]:
        raise InputError(f"{source}: {unknown_name('value', converted, rules['choices'])}")
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, int | float) and not rules["minimum"] <= number <= rules["maximum"]:
            bounds = f"at least {rules['minimum']:.10g}"
            if rules["maximum"] < math.inf:
                bounds += f" and at most {rules['maximum']:.10g}"
            raise InputError(f"{source}: got {number}, expected {bounds}")
    return converted


def _as(kind, value):
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind is float or kind is int:
        # YAML 1.1 reads 1e-3 as a string, so text that is a number counts as one.
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError
        number = kind(value)
        if isinstance(value, float) and number != value or not math.isfinite(number):
            raise ValueError
        return number
    if kind is str or kind is dict:
        if not isinstance(value, kind):
            raise TypeError
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        members = typing.get_args(kind)
        if members[-1] is Ellipsis:
            members = members[:1] * len(value)
        return tuple(_as(member, item) for member, item in zip(members, value, strict=True))
    raise TypeError


def _describe(kind) -> str:
    if typing.get_origin(kind) is tuple:
        members = typing.get_args(kind)
        if members[-1] is Ellipsis:
            return "a list of numbers"
        return f"{len(members)} numbers"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(kind, "names with values" if kind is dict else "none")
