"""``t2tvit export``: writes a trained model for other tools and checks the result."""

import argparse
from dataclasses import replace
from pathlib import Path

from t2tvit.commands.options import PREPARED_KEYS, add_keys, add_weights, chosen_weights, given

HELP = "write a trained model for other tools"
EPILOG = """
Each file is reloaded and run on random images. The largest difference from the model is printed, and
a file that differs by more than rounding is removed. Soft splits become plain operators, unless
--fused-kernels names kernels (torch-export and aotinductor only): then t2t_kernels must be imported
before the file is loaded.

examples:
  t2tvit export --run runs/digits --output exported
  t2tvit export --run runs/digits --output exported --format aotinductor --dtype bfloat16
  t2tvit export --checkpoint 81.5_T2T_ViT_14.pth.tar --model t2t_vit_14 --output exported
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_weights(parser)
    parser.add_argument(
        "--format",
        nargs="+",
        default=["onnx"],
        metavar="FORMAT",
        help="onnx (batch of any size, plain operators), torch-export (a program for "
        "torch.export.load), aotinductor (compiled for this kind of machine, needs a C++ "
        "compiler), safetensors (weights with a description of their model) (default: onnx)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder for the files"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="dtype of weights, images and logits; onnx does not support bfloat16 (default: float32)",
    )
    add_keys(parser, PREPARED_KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Run the export of the parsed arguments.

    Raises:
        InputError: Invalid input.
        BackendUnavailable: The named kernels cannot run.
        RunError: The exported file gives other results than the model; it is removed.
    """
    from t2tvit.exporting import check_format, export, prepared
    from t2tvit.training import distributed
    from t2tvit.training.inference import load_trained

    kernels = given(arguments).get("fused_kernels", "reference")
    for name in arguments.format:
        check_format(name, arguments.dtype, kernels)
    path, config, about = chosen_weights(arguments)
    config = replace(config, fused_kernels=kernels, amp="none")
    with distributed.joined(config.device) as world:
        trained = load_trained(path, config, about, world)
        export(prepared(trained, path, about, arguments.dtype), arguments.format, arguments.output)
