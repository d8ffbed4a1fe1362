"""The schema of a run: keys, defaults, bounds and help, for YAML files and the command line.

The keys are grouped into one dataclass per component of the trainer; properties derive values from
them.

Precedence, lowest first: the defaults here, the YAML file's ``base``, the YAML file, the command
line.
"""

import contextlib
import itertools
import math
import re
import types
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from t2tvit.errors import InputError, unknown_name
from t2tvit.files import read_text

PACKAGED = Path(__file__).resolve().parent.parent / "configs"
MOST_VALUES = 100_000  # in a YAML file
WARMUP_SHARE = 5  # one fifth of the epochs, if the warm-up would be longer than the run
BACKEND_CHOICES = ("auto", "reference", "cpu", "triton", "cuda")
# Modes of torch.compile in which a replay reuses the memory of the gradients (pytorch/pytorch#169545).
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
# The policies that timm supports. It ignores sections without a number, so it would ignore a typo.
NUMBER = r"\d+(\.\d*)?"
POLICY = re.compile(
    rf"rand(-([mn]\d{{1,3}}|p{NUMBER}|mstd{NUMBER}|mmax\d{{1,3}}|inc[01]|t\w*))*"
    rf"|augmix(-([mwd]\d{{1,2}}|a{NUMBER}|b[01]|mstd{NUMBER}))*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{NUMBER})*"
)
ADAPTIVE = ("ada", "lamb")  # in the names of optimisers that adapt to the gradient's size
# Arguments of create_model that are not allowed in model_args, and the option that sets them.
ELSEWHERE = {
    "img_size": "--img-size",
    "num_classes": "--num-classes",
    "in_chans": "the data",
    "drop_path_rate": "--drop-path",
    "fused_kernels": "--fused-kernels",
}


def key(
    default: object,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    bounds: tuple[float, float | None] | None = None,
    metavar: str | None = None,
    bare: object = None,
):
    """A key of the schema: its default, its help, and restrictions of its value.

    ``bounds`` are the smallest and the largest allowed number; None means no upper bound. ``bare`` is
    the value of the option if it is given without an argument.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "bounds": bounds,
        "metavar": metavar,
        "bare": bare,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Part:
    """The keys of one component of the trainer."""

    def check(self) -> None:
        """Raise an InputError if the values of this part's keys do not fit together."""


@dataclass(frozen=True)
class DataConfig(Part):
    """The source of the images and their preprocessing."""

    data: str = key(
        "digits",
        "training data: digits (1,797 real handwritten digits, built in; digits:01234 for some "
        "classes), cifar10[:PATH] or cifar100[:PATH] (local files, python or binary version; PATH defaults to ./data), "
        "imagefolder:PATH (PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg), webdataset:PATH (a "
        "folder of tar shards, or a pattern of their names with {split}), timm:NAME[:PATH] "
        "(a dataset of timm with random access, such as timm:hfds/OWNER/NAME), "
        "synthetic[:IMAGES] (random images and labels)",
        metavar="SOURCE",
    )
    img_size: int | tuple[int, int] = key(
        224, "side of the square input, or height and width, in pixels", bounds=(16, 16384)
    )
    workers: int = key(
        4, "loader processes per rank; 0: load in the main process", bounds=(0, 1024)
    )
    max_unreadable: int = key(
        10,
        "how many training images may be missing or damaged before the run ends; each is logged and "
        "replaced by the next image. Held-out images must all be readable",
        bounds=(0, None),
    )
    interpolation: str = key(
        "bicubic", "interpolation for resizing", choices=("nearest", "bilinear", "bicubic")
    )
    crop_pct: float = key(
        0.9, "evaluation: side of the centre crop, relative to the resized image", bounds=(0.05, 1)
    )
    mean: tuple[float, ...] | None = key(
        None, "mean per channel, of values in [0, 1]; none: that of the data", bounds=(0, 1)
    )
    std: tuple[float, ...] | None = key(
        None,
        "standard deviation per channel, of values in [0, 1]; none: that of the data",
        bounds=(0.001, None),
    )

    @property
    def size(self) -> tuple[int, int]:
        """Input (height, width) in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    def statistics(
        self, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel: the configured ones, else ``mean`` and ``std``.

        Raises:
            InputError: The configured ones have another number of channels.
        """
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != len(mean):
                raise InputError(
                    f"{name}: got {len(value)} numbers, expected {len(mean)}, one per channel"
                )
        return self.mean or mean, self.std or std


@dataclass(frozen=True)
class AugmentationConfig(Part):
    """Random changes of training images and targets."""

    crop_scale: tuple[float, float] = key(
        (0.08, 1.0), "area of a random crop, minimum and maximum", bounds=(0, 1)
    )
    crop_ratio: tuple[float, float] = key(
        (0.75, 1.3333),
        "width / height of a random crop, minimum and maximum",
        bounds=(0.1, None),
    )
    crop_padding: int | None = key(
        None,
        "instead of a crop of random area: resize to the input size, pad by this many pixels, crop "
        "at random; none: off",
        bounds=(1, 16384),
    )
    repeated_augmentation: int = key(
        1,
        "how often an image occurs in an update, each time with new augmentation; an epoch of N "
        "repetitions covers 1/N of the images",
        bounds=(1, 1000),
    )
    hflip: float = key(0.5, "probability of a horizontal flip", bounds=(0, 1))
    color_jitter: float = key(
        0.0, "strength of brightness, contrast and saturation jitter", bounds=(0, None)
    )
    auto_augment: str | None = key(
        None,
        "a policy of timm, such as rand-m9-mstd0.5-inc1; none: off",
        metavar="POLICY",
    )
    random_erasing: float = key(
        0.0, "probability of replacing a rectangle with noise", bounds=(0, 1)
    )
    mixup: float = key(0.0, "alpha of mixup; 0: off", bounds=(0, None))
    cutmix: float = key(0.0, "alpha of cutmix; 0: off", bounds=(0, None))
    mixup_switch: float = key(0.5, "probability of cutmix if mixup is on too", bounds=(0, 1))
    smoothing: float = key(0.1, "label smoothing", bounds=(0, 0.99))

    def check(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            least, most = getattr(self, name)
            if least > most:
                raise InputError(f"{name}: got {least:g} {most:g}, expected the minimum first")

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on; both need an even number of images."""
        return bool(self.mixup or self.cutmix)


@dataclass(frozen=True)
class ModelConfig(Part):
    """The model, its initial weights and its kernels."""

    model: str = key("t2t_vit_7", "a name that `t2tvit models` lists, or timm:NAME", metavar="NAME")
    model_args: dict = key({}, "further arguments of create_model, such as embed_dim=128 depth=4")
    num_classes: int | None = key(
        None, "outputs of the head; none: the classes of the data", bounds=(1, 1_000_000)
    )
    drop_path: float = key(0.1, "stochastic depth rate", bounds=(0, 0.99))
    initial_checkpoint: str | None = key(
        None,
        "weights to start from, .safetensors or .pth(.tar); position embeddings are resized, and a "
        "head for other classes is newly initialised",
        metavar="FILE",
    )
    fused_kernels: str = key(
        "auto",
        "backend of the tokens-to-token module; auto: the first one that is available. A named "
        "backend that cannot run is an error",
        choices=BACKEND_CHOICES,
        bare="auto",
    )

    def check(self) -> None:
        for name, setter in ELSEWHERE.items():
            if name in self.model_args:
                raise InputError(f"model_args: {name} is set by {setter}; remove it here")


@dataclass(frozen=True)
class OptimizerConfig(Part):
    """An update: optimiser, learning rates, batch, precision, and non-finite losses."""

    optimizer: str = key(
        "adamw",
        "a name of timm's factory, such as adamw, lamb, sgd (Nesterov) or momentum (plain SGD)",
        metavar="NAME",
    )
    lr: float = key(1e-3, "peak learning rate, for the global batch", bounds=(0, None))
    auto_lr: bool = key(
        False,
        "scale all learning rates by batch_size / lr_batch_size, or by its square root for "
        "optimisers that adapt to the gradient's size (ada..., lamb)",
    )
    lr_batch_size: int = key(
        512, "the global batch that the learning rates are meant for", bounds=(1, None)
    )
    backbone_lr_scale: float = key(
        1.0,
        "learning rate of everything except the head, relative to lr: small for pretrained weights, "
        "0 for a frozen backbone",
        bounds=(0, None),
    )
    layer_decay: float | None = key(
        None,
        "learning rate of each layer, relative to that of the next one towards the head; none: off",
        bounds=(0.01, 1),
    )
    weight_decay: float = key(
        0.03, "not applied to biases, 1-D parameters and the class token", bounds=(0, None)
    )
    momentum: float = key(0.9, "momentum of SGD and similar optimisers", bounds=(0, 1))
    batch_size: int = key(
        512,
        "images per update over all ranks, so a recipe is the same on any number of GPUs (rounded "
        "down, with a warning, if their number does not divide it)",
        bounds=(1, None),
    )
    clip_grad: float | None = key(None, "maximum gradient norm; none: off", bounds=(1e-6, None))
    amp: str = key(
        "bfloat16",
        "autocast dtype; float16 scales the loss",
        choices=("bfloat16", "float16", "none"),
    )
    max_skipped: int = key(
        20,
        "how many updates in a row are skipped because the loss or gradient is not finite, before "
        "the run ends and saves the batch",
        bounds=(0, None),
    )

    def check(self) -> None:
        if self.layer_decay is not None and self.backbone_lr_scale != 1:
            raise InputError(
                f"layer_decay: got {self.layer_decay:g} together with backbone_lr_scale "
                f"{self.backbone_lr_scale:g}; use one of them"
            )

    @property
    def lr_factor(self) -> float:
        """The factor of every learning rate; 1 without ``auto_lr``."""
        if not self.auto_lr:
            return 1.0
        ratio = self.batch_size / self.lr_batch_size
        is_adaptive = any(part in self.optimizer for part in ADAPTIVE)
        return ratio**0.5 if is_adaptive else ratio

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``amp``."""
        return torch.float32 if self.amp == "none" else getattr(torch, self.amp)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The autocast context of ``amp``."""
        if self.amp == "none":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


@dataclass(frozen=True)
class SpeedConfig(Part):
    """Options that save time or memory without changing the result, and profiling."""

    accumulate: int = key(
        1,
        "number of pieces into which a process's share of a batch is split to save memory; their "
        "gradients are added up",
        bounds=(1, None),
    )
    compile: str = key(
        "none",
        "torch.compile the whole model in this mode; reduce-overhead replays CUDA graphs and helps "
        "if the GPU waits for the host",
        choices=("none", "default", "reduce-overhead", "max-autotune"),
        bare="default",
    )
    channels_last: bool = key(False, "channels-last memory format of images and weights")
    grad_checkpointing: bool = key(
        False, "recompute the blocks in the backward pass, to save memory"
    )
    profile: int = key(
        0,
        "number of updates to profile, from the sixth on; writes a trace and a summary; 0: off",
        bounds=(0, None),
        bare=10,
    )

    def check(self) -> None:
        if self.accumulate > 1 and self.compile in CUDA_GRAPHS:
            raise InputError(
                f"accumulate: got {self.accumulate} with compile {self.compile}, whose CUDA graphs "
                "overwrite earlier gradients; use --compile default, or --accumulate 1"
            )


@dataclass(frozen=True)
class ScheduleConfig(Part):
    """The learning rate over the epochs."""

    epochs: int = key(
        300,
        "epochs of the cosine schedule, including warm-up; cooldown_epochs are added to them "
        "(10 in imagenet/MODEL)",
        bounds=(1, None),
    )
    warmup_epochs: int = key(10, "epochs of linear warm-up", bounds=(0, None))
    warmup_lr: float = key(1e-6, "learning rate at the first update", bounds=(0, None))
    min_lr: float = key(1e-5, "learning rate at the end", bounds=(0, None))
    cooldown_epochs: int = key(
        0, "additional epochs at min_lr, after those of --epochs", bounds=(0, None)
    )


@dataclass(frozen=True)
class AverageConfig(Part):
    """The average of the weights."""

    ema_decay: float | None = key(
        0.99996,
        "decay of the averaged weights, which are evaluated and saved; none: no average",
        bounds=(0, 1),
    )
    ema_warmup_power: float = key(
        0.8,
        "the decay grows as 1 - (1 + update)^-power up to ema_decay, so that the average of a short "
        "run does not contain its random initial weights",
        bounds=(0.1, 1),
    )


@dataclass(frozen=True)
class OutputConfig(Part):
    """Saved states, reports, seed and device of a run."""

    checkpoint_minutes: float = key(
        10.0,
        "minutes between training states, which are also written after each epoch; 0: after every "
        "update",
        bounds=(0, None),
    )
    keep_checkpoints: int = key(
        2,
        "how many training states to keep; if one is damaged, an older one is used",
        bounds=(1, None),
    )
    tensorboard: bool = key(False, "also write the metrics for TensorBoard")
    wandb: str | None = key(
        None,
        "also send the metrics to this project of Weights & Biases (pip install wandb; "
        "WANDB_MODE=offline keeps them local); none: off",
        metavar="PROJECT",
    )
    seed: int = key(0, "seed of weights, order, augmentation and dropout", bounds=(0, 2**32 - 1))
    device: str = key("auto", "auto: CUDA if available", choices=("auto", "cpu", "cuda"))


# The parts of a RunConfig by their titles in --help, in the order of the keys.
PARTS: dict[str, type[Part]] = {
    "data": DataConfig,
    "augmentation": AugmentationConfig,
    "model": ModelConfig,
    "optimisation": OptimizerConfig,
    "speed": SpeedConfig,
    "schedule": ScheduleConfig,
    "averaging": AverageConfig,
    "run": OutputConfig,
}


# A dataclass lists the fields of its last base first.
@dataclass(frozen=True)
class RunConfig(
    OutputConfig,
    AverageConfig,
    ScheduleConfig,
    SpeedConfig,
    OptimizerConfig,
    ModelConfig,
    AugmentationConfig,
    DataConfig,
):
    """The complete configuration of a run. Every key is also a command-line option.

    It inherits from every part, so a function that needs one part, such as an
    :class:`OptimizerConfig`, accepts a RunConfig.
    """

    def __post_init__(self):
        if self.lr < self.min_lr:
            raise InputError(
                f"lr: got {self.lr:g}, expected at least min_lr = {self.min_lr:g}; lower min_lr too"
            )
        if self.mixes and self.batch_size % 2:
            raise InputError(
                f"batch_size: got {self.batch_size}, mixup and cutmix need an even number; change "
                "it, or set both to 0"
            )
        for part in PARTS.values():
            part.check(self)

    def create_args(self, num_classes: int, channels: int) -> dict:
        """The arguments of ``create_model``; the data's ``num_classes`` are used if no key sets them."""
        return {
            "img_size": list(self.size),
            "num_classes": self.num_classes or num_classes,
            "in_chans": channels,
            "drop_path_rate": self.drop_path,
        } | self.model_args

    def batch_per_process(self, processes: int) -> int:
        """Images of one process per update: its share of ``batch_size``, rounded down.

        With mixup or cutmix, it is rounded down to an even number.

        Raises:
            InputError: The share is zero.
        """
        images = self.batch_size // processes
        if self.mixes:
            images -= images % 2
        if images == 0:
            raise InputError(
                f"batch_size: got {self.batch_size}, too few for {processes} processes; raise it"
            )
        return images

    def fitted(self, images: int) -> tuple["RunConfig", list[str]]:
        """The configuration adapted to the number of training images, and a log line per change.

        A batch has at most all images, and the warm-up is shorter than the run.
        """
        config, lines = self, []
        if self.batch_size > images:
            batch = images - images % 2 if self.mixes else images
            lines.append(
                f"batch     {batch} instead of {self.batch_size}: there are only {images} training "
                "images; a lower --batch-size gives more updates"
            )
            config = replace(config, batch_size=max(batch, 1))
        if self.warmup_epochs >= self.epochs:
            warmup = self.epochs // WARMUP_SHARE
            lines.append(
                f"warm-up   {warmup} instead of {self.warmup_epochs} epochs: the run has only "
                f"{self.epochs}"
            )
            config = replace(config, warmup_epochs=warmup)
        return config, lines

    def to_yaml(self) -> str:
        """A YAML document that :func:`resolve` reads back."""
        import yaml

        plain = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        return yaml.safe_dump(plain, sort_keys=False)


KEYS = {item.name: item for item in fields(RunConfig)}
HINTS = typing.get_type_hints(RunConfig)
GROUPS = {item.name: title for title, part in PARTS.items() for item in fields(part)}


def resolve(source: str | Path | None, overrides: dict[str, object]) -> RunConfig:
    """The configuration of a YAML file or packaged name (None: the defaults) with overrides.

    Raises:
        InputError: A file or key is unknown, or a value has the wrong type or is out of bounds.
    """
    values = read_yaml(source) if source is not None else {}
    return from_dict(values, overrides, str(source))


def from_dict(values: dict, overrides: dict | None = None, origin: str = "stored") -> RunConfig:
    """The configuration of ``values`` with command-line ``overrides``, each checked."""
    overrides = overrides or {}
    for name in values:
        if name not in KEYS:
            raise InputError(f"config {origin}: {unknown_name('key', str(name), KEYS)}")
    checked: dict[str, Any] = {
        name: convert(name, value, f"config {origin}: {name}")
        for name, value in values.items()
        if name not in overrides
    }
    for name, value in overrides.items():
        checked[name] = convert(name, value, "--" + name.replace("_", "-"))
    return RunConfig(**checked)


def packaged_names() -> list[str]:
    """Names that ``--config`` accepts besides a path."""
    return sorted(
        path.relative_to(PACKAGED).with_suffix("").as_posix() for path in PACKAGED.rglob("*.yaml")
    )


def read_yaml(source: str | Path, including: tuple[Path, ...] = ()) -> dict[str, object]:
    """The keys of a YAML file or packaged config, including those of its ``base``."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = PACKAGED / f"{source}.yaml"
        if not path.is_file():
            raise InputError(unknown_name("config", str(source), packaged_names()))
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
        raise InputError(
            f"config {path}: it is its own base, directly or indirectly; remove the cycle"
        )
    if Path(base).suffix in (".yaml", ".yml"):
        base = path.parent / base
    return read_yaml(base, (*including, path)) | values


def load_yaml(text: str) -> object:
    """``yaml.safe_load``, but a duplicate key is an error, as the YAML standard says.

    Raises:
        ValueError: The text is not YAML, nested too deeply, or too large with its aliases expanded.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in seen:
                    problem = f"the key {name!r} appears twice"
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
            raise ValueError(f"with aliases expanded it has more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (AttributeError, KeyError) as error:  # from PyYAML, for a tag that does not fit its text
        raise ValueError(f"a value does not fit its tag ({error})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _expanded(node, known: dict[int, float]) -> float:
    """The number of values in a YAML node; an alias counts wherever it is used."""
    if id(node) not in known:
        known[id(node)] = math.inf  # for an alias of a node that contains it
        inside = node.value if isinstance(node.value, list) else ()
        parts = itertools.chain(*(each if isinstance(each, tuple) else (each,) for each in inside))
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def convert(name: str, value: object, source: str) -> Any:
    """``value`` from YAML or the command line, converted to the schema's type for ``name``.

    Raises:
        InputError: It has the wrong type or is out of bounds. The message begins with ``source``.
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
    if rules["bounds"] is not None and converted is not None:
        check_bounds(converted, rules["bounds"], source)
    return converted


def check_bounds(value: object, bounds: tuple[float, float | None], source: str) -> None:
    """Raise an InputError unless a number, or each number of a tuple, is within ``bounds``."""
    least, most = bounds
    for number in value if isinstance(value, tuple) else (value,):
        if number < least or (most is not None and number > most):
            expected = f"at least {least:.10g}"
            if most is not None:
                expected += f" and at most {most:.10g}"
            raise InputError(f"{source}: got {number}, expected {expected}")


def _as(kind, value):
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind is float or kind is int:
        # YAML 1.1 reads 1e-3 as a string, so accept text that is a number.
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError
        number = kind(value)
        if (isinstance(value, float) and number != value) or not math.isfinite(number):
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
