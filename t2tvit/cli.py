"""The command line: ``t2tvit COMMAND``.

A command imports the trainer when it runs, so that ``--help`` and ``models`` need no extra package.
"""

import argparse
import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from t2t_kernels import BackendUnavailable
from t2tvit import __version__
from t2tvit.errors import InputError, RunError, SaidElsewhere, unknown_name
from t2tvit.terminal import printable, standard_output
from t2tvit.training.config import KEYS
from t2tvit.training.options import add_options

# Import names of what the extras of the package bring.
EXTRAS = {
    "train": (
        *("matplotlib", "PIL", "safetensors", "sklearn", "timm", "torchvision", "tqdm"),
        *("webdataset", "yaml"),
    ),
    "export": ("huggingface_hub", "onnx", "onnxruntime", "onnxscript"),
}
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130

MODEL_KEYS = ("model", "model_args", "num_classes", "fused_kernels")
INFERENCE_KEYS = (
    *("data", "img_size", "workers", "interpolation", "crop_pct", "mean", "std"),
    *(*MODEL_KEYS, "batch_size", "amp", "device"),
)
EXPORT_KEYS = (
    *("img_size", "interpolation", "crop_pct", "mean", "std"),
    *(*MODEL_KEYS, "device"),
)
VISUALIZE_KEYS = EXPORT_KEYS
CONVERT_KEYS = (
    *("img_size", "interpolation", "crop_pct", "mean", "std"),
    *("model", "model_args", "num_classes"),
)
COMPARED_KEYS = ("model", "model_args", "seed", "initial_checkpoint")
BENCH_KEYS = ("data", "img_size", "workers", *MODEL_KEYS, "batch_size", "amp", "seed", "device")

CONFIG_HELP = (
    "a YAML file, or a packaged config: digits, finetune/small, imagenet/MODEL, imagenet/finetune_384, "
    "transfer/cifar10, transfer/cifar100"
)
TRAIN_EPILOG = """
examples:
  t2tvit train --output runs/digits
  t2tvit train --output runs/digits --resume auto --epochs 60
  t2tvit train --config imagenet/t2t_vit_14 --data imagefolder:PATH --output runs/t2t_vit_14
  torchrun --nproc_per_node=8 -m t2tvit train --config imagenet/t2t_vit_14 --output runs/t2t_vit_14
  t2tvit train --output runs/digits --compile --accumulate 2 --profile
  t2tvit train --config transfer/cifar10 --data cifar10:PATH --initial-checkpoint FILE --output DIR
"""
EVAL_EPILOG = """
examples:
  t2tvit eval --run runs/digits
  torchrun --nproc_per_node=8 -m t2tvit eval --run-dir runs/t2t_vit_14
  t2tvit eval --checkpoint 81.5_T2T_ViT_14.pth.tar --model t2t_vit_14 --data imagefolder:PATH
"""
PREDICT_EPILOG = """
Held-out images are named by their path (imagefolder), by SHARD/KEY (webdataset) or by their index. The
plot is written in the format of its extension and shows the first --images images.

examples:
  t2tvit predict --run runs/digits --plot predictions.png
  t2tvit predict --run runs/flowers photo.jpg folder --top-k 3
  find folder -name '*.jpg' | t2tvit predict --run runs/flowers --json - > predictions.jsonl
"""
BENCH_EPILOG = """
examples:
  t2tvit bench --config digits
  t2tvit bench --model t2t_vit_14 --data synthetic --batch-size 32 --amp bfloat16 \\
      --against vit_small_patch16_224 deit_small_patch16_224 resnet50
"""
COMPARE_EPILOG = """
All models have the same data, epochs, batches, optimiser and seeds; a comparison's file names the
models, each with its model, model_args and drop_path. To resume a stopped comparison, give its command
again.

examples:
  t2tvit compare --output runs/compare
  t2tvit compare t2t_vit_7 vit_s_16 timm:resnet18 --data cifar10 --img-size 32 --output runs/cifar10
  t2tvit compare --config mine.yaml --seeds 0 1 2 3 4 --epochs 100 --output runs/mine
"""
VISUALIZE_EPILOG = """
Writes index.html with PNGs beside it: feature maps of every layer with dead and exploding channels
marked and counted (layers.json has the numbers), tokens of the soft splits, attention of the class
token by head and as rollout, and for Performer layers how close their random features are to softmax.
--model takes one of ours or timm:NAME; without weights it is newly initialised.

examples:
  t2tvit visualize --run runs/digits --output pictures
  t2tvit visualize photo.jpg --checkpoint t2t_vit_14.safetensors --output pictures
  t2tvit visualize photo.jpg --model timm:resnet50 --pretrained --output pictures
"""
EXPORT_EPILOG = """
Each file is read again and run on random images; the largest difference from the model is printed,
and a file that differs by more than rounding is not kept. The soft splits become plain operators,
unless --fused-kernels names kernels for torch-export and aotinductor: then whoever loads the file
must import t2t_kernels first.

examples:
  t2tvit export --run runs/digits --output exported
  t2tvit export --run runs/digits --output exported --format aotinductor --dtype bfloat16
  t2tvit export --checkpoint 81.5_T2T_ViT_14.pth.tar --model t2t_vit_14 --output exported
"""
CONVERT_EPILOG = """
Weights of our own say what they are; those of published form need --model, and their image size and
number of classes are read off them. The Hub is reached through huggingface_hub and its credentials.

examples:
  t2tvit convert 81.5_T2T_ViT_14.pth.tar t2t_vit_14.safetensors --model t2t_vit_14
  t2tvit convert runs/digits/best.safetensors digits.pth.tar
  t2tvit convert runs/digits/best.safetensors hf-hub:USER/digits
  t2tvit convert hf-hub:USER/digits digits.safetensors
"""
MODELS_EPILOG = """
examples:
  t2tvit models
  t2tvit models 't2t_vit_t_*' timm:resnet50 --img-size 384
"""


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word == "none"
    return True


# How options of several values show them, and what is one of them.
SEVERAL = {"N": is_number, "NAME=VALUE": lambda word: "=" in word}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that the caller prints."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self.separate(args), namespace)

    def words(self) -> argparse.Action | None:
        """The argument that takes any number of words; argparse fills it from one place only."""
        return next((each for each in self._get_positional_actions() if each.nargs == "*"), None)

    def separate(self, args: Sequence[str] | None) -> list[str] | None:
        """``args`` with the words that follow an option of several values, but are none of them,
        before the option: ``--img-size 96 cat.png`` means ``cat.png --img-size 96``."""
        if args is None or not self._get_positional_actions():
            return args
        result, option, is_value = [], 0, None
        for number, word in enumerate(args):
            if word == "--":
                return result + list(args[number:])
            action = self._option_string_actions.get(word)
            if action is not None or word.startswith("--"):
                option = len(result)
                is_value = SEVERAL.get(getattr(action, "metavar", None))
                is_several = getattr(action, "nargs", None) == "+" and is_value is not None
                is_value = is_value if is_several else None
            elif is_value is not None and len(result) > option + 1 and not is_value(word):
                result.insert(option, word)
                option, is_value = option + 1, lambda word: False
                continue
            result.append(word)
        return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0: done, 1: failed, 2: invalid input or unavailable
    backend."""
    try:
        with standard_output(), quiet_libraries():
            arguments = parse(argv)
            arguments.command(arguments)
    except (InputError, BackendUnavailable) as error:
        complain(error)
        return USER_ERROR
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        complain(InputError(f"this needs the package {package}: pip install 't2tvit[{extra}]'"))
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED  # the reader of our output has gone
    except OSError as error:
        if error.filename is None:
            raise
        complain(InputError(f"{error.filename}: {error.strerror}"))
        return USER_ERROR
    except SaidElsewhere as error:
        return error.status
    except RunError as error:
        complain(error)
        return FAILED
    return 0


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, PyTorch does not warn of more workers than CPUs, or of nvcc without a GPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def complain(error: Exception) -> None:
    """One line on standard error; what every process meets, only the first of each node says."""
    rank = os.environ.get("RANK", "0")
    of_one_rank = getattr(error, "of_one_rank", False)
    if sys.stderr is None or os.environ.get("LOCAL_RANK", "0") != "0" and not of_one_rank:
        return
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    where = f" (process {rank})" if rank != "0" or of_one_rank and not is_alone else ""
    with contextlib.suppress(OSError):  # nothing more can be said
        line = printable(" ".join(str(error).split()))
        print(f"t2tvit: error{where}: {line}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; an unknown option is answered with the nearest known one."""
    argv = sys.argv[1:] if argv is None else argv
    arguments, unknown = build_parser().parse_known_args(argv)
    words = arguments.parser.words()
    for text in unknown:
        command = arguments.parser.prog
        if words is not None and not text.startswith("-"):
            value = text if words.type is None else words.type(text)
            setattr(arguments, words.dest, [*getattr(arguments, words.dest), value])
            continue
        if not text.startswith("--"):
            raise InputError(f"{command}: unexpected argument {text!r}")
        known = re.findall(r"--[a-z0-9-]+", arguments.parser.format_usage())
        raise InputError(unknown_name(f"option of {command}", text.partition("=")[0], known))
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="t2tvit",
        description="Tokens-to-Token Vision Transformers on fused kernels.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"t2tvit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, function: Callable, help: str, epilog: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(command=function, parser=command)
        return command

    command = add("train", train, "train a model, on one device or under torchrun", TRAIN_EPILOG)
    command.add_argument(
        "--config",
        metavar="NAME",
        help=f"{CONFIG_HELP}; options override it; the default is digits if the data is digits, else "
        "the defaults below, which also fill what a config leaves out",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the only folder written to: weights (best and last), training state, metrics, curves",
    )
    command.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: resume the run in --output, or start it; PATH: resume that run or training state",
    )
    add_options(command, KEYS)

    command = add("eval", evaluate, "measure trained weights on held-out images", EVAL_EPILOG)
    add_trained(command)
    add_options(command, INFERENCE_KEYS)

    command = add(
        "predict", predict, "classify images, or a sample of held-out ones", PREDICT_EPILOG
    )
    command.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files, folders of them, or - for a list on standard input, one a line",
    )
    command.add_argument(
        "--top-k", type=int, default=5, metavar="N", help="classes to name (default: 5)"
    )
    command.add_argument(
        "--json", action="store_true", help="one JSON object a line instead of a table"
    )
    command.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="the classes, one a line, for weights that do not name them; a 1000-class checkpoint "
        "without class names is assumed to be ImageNet",
    )
    command.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the images with the predicted classes; .png without another extension",
    )
    command.add_argument(
        "--images",
        type=int,
        default=40,
        metavar="N",
        help="how many to draw, and without IMAGE how many held-out ones to take (default: 40)",
    )
    add_trained(command)
    add_options(command, INFERENCE_KEYS)

    command = add(
        "compare", compare, "train several models alike and compare what they reach", COMPARE_EPILOG
    )
    command.add_argument(
        "models",
        nargs="*",
        metavar="NAME",
        help="models that `t2tvit models` lists, or timm:NAME, as they are; or give --config",
    )
    command.add_argument(
        "--config",
        metavar="NAME",
        help="a YAML file of a training configuration with models and seeds, or the packaged "
        "digits, the default without NAME",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the only folder written to: a folder for each run, the table, plots and CSV",
    )
    command.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="of each model's runs (default: 0 1 2)"
    )
    add_options(command, [name for name in KEYS if name not in COMPARED_KEYS])

    command = add("bench", bench, "compare speed and memory with plain PyTorch", BENCH_EPILOG)
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--config", metavar="NAME", help=f"{CONFIG_HELP}; without it and --model, digits"
    )
    source.add_argument("--run", type=Path, metavar="DIR", help="the model of a training run")
    command.add_argument(
        "--repetitions", type=int, default=10, metavar="N", help="of each measurement (default: 10)"
    )
    command.add_argument(
        "--against",
        nargs="+",
        default=(),
        metavar="NAME",
        help="models of timm to measure beside it",
    )
    add_options(command, BENCH_KEYS)

    command = add(
        "visualize", visualize, "show what a model's layers make of images", VISUALIZE_EPILOG
    )
    command.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files, folders of them, or - for a list on standard input, of which the first "
        "16 are shown (default: four held-out images of --run; without --run the two photographs "
        "that scikit-learn ships)",
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder of page and pictures"
    )
    command.add_argument(
        "--channels", type=int, default=64, metavar="N", help="to show of a layer (default: 64)"
    )
    command.add_argument(
        "--pretrained", action="store_true", help="of timm:NAME: with timm's weights, downloaded"
    )
    add_trained(command, required=False)
    add_options(command, VISUALIZE_KEYS)

    command = add("export", export, "write a trained model for other tools", EXPORT_EPILOG)
    add_trained(command)
    command.add_argument(
        "--format",
        nargs="+",
        default=["onnx"],
        metavar="FORMAT",
        help="onnx (batch of any size, plain operators), torch-export (a program for "
        "torch.export.load), aotinductor (compiled for this kind of machine, needs a C++ "
        "compiler), safetensors (weights that say what they are) (default: onnx)",
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder of the files"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of weights, images and logits; no bfloat16 in onnx (default: float32)",
    )
    add_options(command, EXPORT_KEYS)

    command = add(
        "convert", convert, "bring weights from one place and form to another", CONVERT_EPILOG
    )
    places = "hf-hub:USER/NAME or local-dir:FOLDER, in the form of timm"
    command.add_argument(
        "source", metavar="SOURCE", help=f"a file, ours or of published form, or {places}"
    )
    command.add_argument(
        "target",
        metavar="TARGET",
        help=f"a file, .safetensors (ours) or .pth or .pth.tar (published form), or {places}",
    )
    command.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="the classes, one a line; a 1000-class checkpoint without class names is assumed to be "
        "ImageNet",
    )
    add_options(command, CONVERT_KEYS)

    command = add(
        "models", models, "list models with what they cost and reached", MODELS_EPILOG
    )
    command.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="which, also with wildcards; timm:NAME is one of timm (default: all of ours)",
    )
    command.add_argument(
        "--img-size",
        type=int,
        default=224,
        metavar="N",
        help="side of the images to count multiply-adds for (default: 224)",
    )
    return parser


def add_trained(command: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that say which trained weights to use."""
    source = command.add_mutually_exclusive_group(required=required)
    source.add_argument(
        "--run",
        "--run-dir",  # torchrun takes --run for an abbreviation of its own
        type=Path,
        metavar="DIR",
        help="the output of a training run",
    )
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights, .safetensors or .pth(.tar), or local-dir:FOLDER or hf-hub:USER/NAME",
    )
    command.add_argument(
        "--weights",
        choices=("best", "last"),
        default="best",
        help="of --run: from the best epoch or the last (default: best)",
    )
    command.add_argument(
        "--config",
        metavar="NAME",
        help=f"{CONFIG_HELP}; for weights that do not say themselves what they are",
    )


def train(arguments: argparse.Namespace) -> None:
    from t2tvit.training.run import train

    train(arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    from t2tvit.training.inference import evaluate_command

    evaluate_command(arguments)


def predict(arguments: argparse.Namespace) -> None:
    from t2tvit.laboratory.predict import predict_command

    predict_command(arguments)


def compare(arguments: argparse.Namespace) -> None:
    from t2tvit.laboratory.compare import compare_command

    compare_command(arguments)


def bench(arguments: argparse.Namespace) -> None:
    from t2tvit.training.bench import bench_command

    bench_command(arguments)


def visualize(arguments: argparse.Namespace) -> None:
    from t2tvit.laboratory.visualize.command import visualize_command

    visualize_command(arguments)


def export(arguments: argparse.Namespace) -> None:
    from t2tvit.laboratory.export import export_command

    export_command(arguments)


def convert(arguments: argparse.Namespace) -> None:
    from t2tvit.laboratory.convert import convert_command

    convert_command(arguments)


def models(arguments: argparse.Namespace) -> None:
    from t2tvit.laboratory.survey import models_command

    models_command(arguments)
