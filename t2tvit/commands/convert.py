"""``t2tvit convert``: converts weights between formats and locations."""

import argparse
from dataclasses import replace
from pathlib import Path

from t2tvit import hub
from t2tvit.commands.options import PREPARATION_KEYS, add_keys, given
from t2tvit.errors import InputError
from t2tvit.terminal import printable

HELP = "convert weights between our format, the published one, folders and the Hub"
EPILOG = """
Our weights describe their model. Published weights need --model; their image size and number of
classes are derived from the tensors. Access to the Hub uses huggingface_hub and its credentials.

examples:
  t2tvit convert 81.5_T2T_ViT_14.pth.tar t2t_vit_14.safetensors --model t2t_vit_14
  t2tvit convert runs/digits/best.safetensors digits.pth.tar
  t2tvit convert runs/digits/best.safetensors hf-hub:USER/digits
  t2tvit convert hf-hub:USER/digits digits.safetensors
"""
KEYS = (*PREPARATION_KEYS, "model", "model_args", "num_classes")


def add_options(parser: argparse.ArgumentParser) -> None:
    places = "hf-hub:USER/NAME or local-dir:FOLDER, in timm's format"
    parser.add_argument(
        "source", metavar="SOURCE", help=f"a file in our or the published format, or {places}"
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help=f"a file, .safetensors (ours) or .pth or .pth.tar (published format), or {places}",
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="the class names, one per line; a 1000-class checkpoint without class names is assumed to be "
        "ImageNet",
    )
    add_keys(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Run the conversion of the parsed arguments.

    Raises:
        InputError: Invalid input.
        RunError: The target cannot be written.
    """
    from t2tvit.class_names import read_names
    from t2tvit.conversion import OURS, PUBLISHED, read, write

    target = arguments.target
    if not hub.is_address(target) and not target.endswith((OURS, *PUBLISHED)):
        raise InputError(
            f"TARGET: got {target}, expected a file {OURS} (ours) or {', '.join(PUBLISHED)} "
            f"(published format), {hub.HUB}USER/NAME or {hub.LOCAL}FOLDER"
        )
    model, about = read(arguments.source, given(arguments))
    if arguments.class_names is not None:
        about = replace(about, class_names=read_names(arguments.class_names, model.num_classes))
    write(model, about, target)
    height, width = model.img_size
    what = f"{about.model}, {model.num_classes} classes, {height}×{width}"
    print(printable(f"{arguments.source} → {target}: {what}"))
