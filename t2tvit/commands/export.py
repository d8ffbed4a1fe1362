"""``t2tvit export``: a trained model as a file for other tools, proved to compute the same."""

import argparse
from dataclasses import replace
from pathlib import Path

from t2tvit.commands.options import PREPARED_KEYS, add_keys, add_weights, chosen_weights, given

HELP = "write a trained model for other tools"
EPILOG = """
Each file is read again and run on random images; the largest difference from the model is printed,
and a file that differs by more than rounding is not kept. The soft splits become plain operators,
unless --fused-kernels names kernels for torch-export and aotinductor: then whoever loads the file
must import t2t_kernels first.

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
        "compiler), safetensors (weights that say what they are) (default: onnx)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder of the files"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of weights, images and logits; no bfloat16 in onnx (default: float32)",
    )
    add_keys(parser, PREPARED_KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Export as the parsed arguments say.

    Raises:
        InputError: something the user can fix.
        BackendUnavailable: the kernels asked for cannot run.
        RunError: what was exported does not compute what the model does; it is not kept.
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
