"""Checks that a training state belongs to a run, and that the data has not changed."""

from dataclasses import asdict
from pathlib import Path

from t2tvit.data.sources import Split
from t2tvit.errors import InputError
from t2tvit.training.checkpointing.file_names import LAST_FILE, RUN_FILE
from t2tvit.training.checkpointing.states import IMAGES, check, is_text
from t2tvit.training.config import RunConfig, from_dict

# A resumed run may change these keys; a change of any other key would make it another run.
MAY_CHANGE = {
    *("data", "epochs", "workers", "device", "fused_kernels"),
    *("checkpoint_minutes", "keep_checkpoints", "max_skipped", "max_unreadable"),
    *("accumulate", "compile", "channels_last", "grad_checkpointing", "profile"),
    *("tensorboard", "wandb"),
}
# These may change too if the command line sets them: they help against non-finite losses.
REMEDIES = {"lr", "clip_grad", "amp"}
SPLITS = {"train": "training", "val": "held-out"}
DIGITS = 12  # of a digest in messages


def described(splits: tuple[Split, Split]) -> dict[str, dict]:
    """The number and the digest of the training (``train``) and held-out (``val``) images."""
    return {
        name: {"images": len(split.images), "digest": split.images.digest()}
        for name, split in zip(SPLITS, splits, strict=True)
    }


def difference(
    new: RunConfig, old: RunConfig, may_change: set[str] = MAY_CHANGE
) -> tuple[str, object, object] | None:
    """The first key that makes ``new`` and ``old`` different runs, and its two values.

    The path of the data may change, but not its kind of source.
    """
    for key, before in asdict(old).items():
        now = getattr(new, key)
        same_source = key == "data" and now.partition(":")[0] == before.partition(":")[0]
        if now != before and not (key in may_change and (key != "data" or same_source)):
            return key, now, before
    return None


def is_identity(value: object) -> bool:
    """Whether ``value``, read from a file, has the form of :meth:`.Checkpointer.identity`."""
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        return False
    try:
        check(value, {"class_names": [is_text], "images": IMAGES}, RUN_FILE)
    except ValueError:
        return False
    return True


def check_owner(path: Path, state: dict, owner: dict | None) -> None:
    """Check that a training state belongs to ``owner``, its folder's :meth:`.Checkpointer.identity`.

    States of the earlier format do not describe their ``images``; for them, the rest is compared.

    Raises:
        InputError: It belongs to another run.
    """
    if owner is None:
        return
    ours, theirs = from_dict(owner["config"]), from_dict(state["config"])
    found = difference(theirs, ours, MAY_CHANGE | REMEDIES)
    if found is None and state["class_names"] != owner["class_names"]:
        found = ("classes", *unlike(state["class_names"], owner["class_names"]))
    if found is None and "images" in state:
        found = unlike_images(state["images"], owner["images"])
    if found is not None:
        key, now, before = found
        raise InputError(
            f"--resume: {path} is the state of another run: {key}: got {now}, but {RUN_FILE} in its "
            f"folder has {before}; move the state to a folder of its own to resume it"
        )


def check_data(
    class_names: list[str],
    images: dict[str, dict],
    path: Path,
    state: dict,
    before: dict | None,
) -> None:
    """Check that the data is that of the training ``state`` in the file ``path``.

    Args:
        class_names: The current class names, in order.
        images: The current :func:`described` images.
        before: The earlier :func:`described` images; None if unknown.

    Raises:
        InputError: Images or classes differ.
    """
    found = None if before is None else unlike_images(images, before)
    if class_names != state["class_names"]:
        found = ("classes", *unlike(class_names, state["class_names"]))
    if found is not None:
        key, now, old = found
        weights = path.parent / LAST_FILE
        raise InputError(
            f"data: {key}: got {now}, but the run to resume has {old}; restore the data, or start "
            "a new run on it from the weights: --output NEW --init "
            f"{weights if weights.exists() else 'FILE'}"
        )


def unlike_images(new: dict[str, dict], old: dict[str, dict]) -> tuple[str, str, str] | None:
    """The first difference of two :func:`described` datasets and both values; None if equal."""
    for name, words in SPLITS.items():
        counts = new[name]["images"], old[name]["images"]
        if counts[0] != counts[1]:
            return f"number of {words} images", f"{counts[0]:,}", f"{counts[1]:,}"
        digests = new[name]["digest"], old[name]["digest"]
        if digests[0] != digests[1]:
            what = f"digest of names, sizes and labels of the {words} images"
            return what, digests[0][:DIGITS], digests[1][:DIGITS]
    return None


def unlike(new: list[str], old: list[str]) -> tuple[str, str]:
    """How two lists of class names differ: in their lengths, or in the first different class."""
    if len(new) != len(old):
        return f"{len(new)} classes", f"{len(old)}"
    index = next(i for i, pair in enumerate(zip(new, old)) if pair[0] != pair[1])
    return f"{new[index]!r} as class {index}", f"{old[index]!r}"
