"""Models on the Hugging Face Hub, or in a folder, in timm's format.

An address is ``hf-hub:USER/NAME`` (optionally with ``@REVISION``) or ``local-dir:FOLDER``. It contains
``config.json`` and ``model.safetensors``, so ``timm.create_model(address, pretrained=True)`` also
works once ``t2tvit`` is imported. huggingface_hub is only needed for the Hub.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from t2tvit.errors import InputError, RunError
from t2tvit.files import read_text, write_atomically
from t2tvit.models.backbone import T2TBackbone
from t2tvit.models.checkpoint import load_checkpoint
from t2tvit.models.described import check_described
from t2tvit.models.registry import BASELINES, MODELS, create_model

HUB, LOCAL = "hf-hub:", "local-dir:"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
# Entries of pretrained_cfg that follow from the model's arguments.
DECIDED = ("architecture", "input_size", "num_classes")
# Entries of timm's pretrained_cfg about the origin of the weights.
ORIGINS = (
    *("file", "source", "url", "hf_hub_id", "hf_hub_filename", "hf_hub_revision"),
    *("state_dict", "custom_load"),
)


def is_address(text: str) -> bool:
    """Whether ``text`` is an address of this module rather than a file."""
    return text.startswith((HUB, LOCAL))


def push(model: T2TBackbone, address: str, *, class_names: Sequence[str] | None = None) -> None:
    """Write a model's weights and configuration to ``address``.

    A missing repository on the Hub is created; huggingface_hub provides the credentials.

    Args:
        model: A model of :func:`t2tvit.create_model`; its ``pretrained_cfg`` describes the
            preprocessing of images.
        address: ``hf-hub:USER/NAME`` or ``local-dir:FOLDER``.
        class_names: Names of the logits, in order.

    Raises:
        InputError: The address is invalid, the model's arguments cannot be written as JSON, or
            ``class_names`` does not have one name per class.
        RunError: The Hub cannot be reached or rejects the request.
    """
    if class_names is not None and len(class_names) != model.num_classes:
        raise InputError(
            f"class_names: got {len(class_names)}, expected {model.num_classes}, one per class"
        )
    config = _config(model, class_names)
    kind, place = _split(address)
    if kind == LOCAL:
        _write(model, config, Path(place))
        return
    from huggingface_hub import HfApi

    repository, _, revision = place.partition("@")
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder, _network(address):
        _write(model, config, Path(folder))
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, revision=revision or None)


def load(address: str, **options) -> T2TBackbone:
    """The model at ``address`` with its weights.

    Args:
        address: ``hf-hub:USER/NAME`` or ``local-dir:FOLDER``.
        options: Arguments of :func:`t2tvit.create_model` to change: another ``num_classes`` gives a
            new head, another ``img_size`` resized position embeddings.

    Raises:
        InputError: There is no such model at the address.
        RunError: The Hub cannot be reached or rejects the request.
    """
    stored = read(address)
    model = create_model(stored.name, **{**stored.args, **options})
    grid = model.tokens_to_token.grid_size(*stored.size)
    load_checkpoint(model, stored.weights, grid_size=grid)
    model.pretrained_cfg.update(stored.pretrained_cfg)
    if model.num_classes == stored.args["num_classes"] and stored.class_names is not None:
        model.pretrained_cfg["label_names"] = stored.class_names
    return model


@dataclass(frozen=True)
class Stored:
    """The model at an address.

    Attributes:
        weights: The file of the weights.
        name: The name of the model.
        args: The arguments of :func:`t2tvit.create_model` that build it.
        size: (height, width) of the images.
        pretrained_cfg: timm's description of the preprocessing, without entries in ``args``.
        class_names: Names of the logits, in order; None if unknown.
    """

    weights: Path
    name: str
    args: dict
    size: tuple[int, int]
    pretrained_cfg: dict
    class_names: list[str] | None


def read(address: str) -> Stored:
    """Read and check ``config.json`` at ``address``; weights on the Hub are downloaded.

    Raises:
        InputError: There is no such model at the address.
        RunError: The Hub cannot be reached or rejects the request.
    """
    folder = fetch(address)
    try:
        config = json.loads(read_text(folder / CONFIG_FILE))
        name, cfg = config["architecture"], config["pretrained_cfg"]
        height, width = cfg["input_size"][1:]
        args = {"img_size": [height, width], "in_chans": cfg["input_size"][0]}
        args |= config.get("model_args", {}) | {"num_classes": config["num_classes"]}
        space = (folder / WEIGHTS_FILE).stat().st_size
        cfg = {key: value for key, value in cfg.items() if key not in (*DECIDED, *ORIGINS)}
        names = config.get("label_names")
        if isinstance(names, Mapping):  # timm writes the names of some datasets as a mapping
            names = None
        if names is not None and not _are_names(names, config["num_classes"]):
            raise ValueError("label_names does not have one name per class")
        for key in ("mean", "std"):
            if not _are_numbers(cfg.get(key, ())):
                raise ValueError(f"{key} is not a list of numbers")
    except FileNotFoundError as error:
        raise InputError(f"{address}: there is no {Path(error.filename).name}") from None
    except OSError as error:
        raise InputError(f"{address}: cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{address}: {CONFIG_FILE} does not have timm's format: {repr(error)[:200]}"
        ) from None
    check_described(name, args, space, f"{address}: {CONFIG_FILE}")
    if name not in MODELS | BASELINES:
        raise InputError(f"{address}: {CONFIG_FILE}: {name} is not a model of this package")
    return Stored(folder / WEIGHTS_FILE, name, args, (height, width), cfg, names)


def _are_names(value: object, count: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(name, str) for name in value)
    )


def _are_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(each, (int, float)) for each in value
    )


def fetch(address: str) -> Path:
    """The folder of ``address``; a Hub repository is downloaded to the cache."""
    kind, place = _split(address)
    if kind == LOCAL:
        if not Path(place).is_dir():
            raise InputError(f"{address}: there is no such folder")
        return Path(place)
    from huggingface_hub import snapshot_download

    repository, _, revision = place.partition("@")
    files = [CONFIG_FILE, WEIGHTS_FILE]
    with _network(address):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))


@contextlib.contextmanager
def _network(address: str) -> Iterator[None]:
    try:
        yield
    # The exceptions depend on the network library, which differs between releases of huggingface_hub.
    except Exception as error:
        raise RunError(f"{address}: {type(error).__name__}: {error}") from error


def _split(address: str) -> tuple[str, str]:
    for kind in (HUB, LOCAL):
        if address.startswith(kind) and len(address) > len(kind):
            return kind, address.removeprefix(kind)
    raise InputError(f"address: got {address!r}, expected {HUB}USER/NAME or {LOCAL}FOLDER")


def _config(model: T2TBackbone, class_names: Sequence[str] | None) -> Mapping[str, object]:
    args = model.create_args | {"num_classes": model.num_classes}
    try:
        json.dumps(args)
    except TypeError as error:
        raise InputError(
            f"model: its arguments {args} cannot be written as JSON: {error}"
        ) from None
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in ORIGINS}
    cfg.pop("label_names", None)
    labels = {} if class_names is None else {"label_names": list(class_names)}
    return {
        "architecture": cfg.pop("architecture"),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": "token",
        **labels,
        "model_args": args,
        "pretrained_cfg": cfg | {"num_classes": model.num_classes},
    }


def _write(model: T2TBackbone, config: Mapping[str, object], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{LOCAL}{folder}: {error.strerror}") from None
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, save(tensors))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_atomically(folder / CONFIG_FILE, text + "\n")
