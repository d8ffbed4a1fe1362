"""The command line: ``t2tvit COMMAND``.

Each command is a module in :mod:`t2tvit.commands`. This module parses the command line and turns errors
into messages and exit statuses.
"""

import argparse
import contextlib
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

from t2t_kernels import BackendUnavailable
from t2tvit import __version__
from t2tvit.commands import COMMANDS
from t2tvit.errors import InputError, RunError, SaidElsewhere, unknown_name
from t2tvit.terminal import printable, standard_output

# Import names of the packages in each extra.
EXTRAS = {
    "train": (
        *("matplotlib", "PIL", "safetensors", "sklearn", "timm", "torchvision", "tqdm"),
        *("webdataset", "yaml"),
    ),
    "export": ("huggingface_hub", "onnx", "onnxruntime", "onnxscript"),
}
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word == "none"
    return True


# Metavar of options with several values → whether a word is such a value.
SEVERAL: dict[object, Callable[[str], bool]] = {
    "N": is_number,
    "NAME=VALUE": lambda word: "=" in word,
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self.separate(args), namespace)

    def words(self) -> argparse.Action | None:
        """The positional argument with any number of words; argparse fills it from one place only."""
        return next((each for each in self._get_positional_actions() if each.nargs == "*"), None)

    def separate(self, args: Sequence[str] | None) -> Sequence[str] | None:
        """``args`` with words moved before an option of several values if they are not its values:
        ``--img-size 96 cat.png`` means ``cat.png --img-size 96``."""
        if args is None or not self._get_positional_actions():
            return args
        result: list[str] = []
        option = 0
        is_value: Callable[[str], bool] | None = None
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
    """Run a command and return the exit status: 0 for success, 1 for failure, 2 for invalid input or
    an unavailable backend."""
    try:
        with standard_output(), quiet_libraries():
            arguments = parse(argv)
            arguments.execute(arguments)
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
        return FAILED  # the reader of the output has ended
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
    """A context without PyTorch's warnings about more workers than CPUs, and nvcc without a GPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def complain(error: Exception) -> None:
    """Print an error in one line. Only the first process of a node prints an error of all ranks."""
    rank = os.environ.get("RANK", "0")
    of_one_rank = getattr(error, "of_one_rank", False)
    if sys.stderr is None or (os.environ.get("LOCAL_RANK", "0") != "0" and not of_one_rank):
        return
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    where = f" (process {rank})" if rank != "0" or (of_one_rank and not is_alone) else ""
    with contextlib.suppress(OSError):  # standard error is closed
        line = printable(" ".join(str(error).split()))
        print(f"t2tvit: error{where}: {line}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line. The error for an unknown option suggests the nearest known one."""
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
    """The parser of all :data:`~t2tvit.commands.COMMANDS`.

    The parsed namespace has the command's function in ``execute`` and its parser in ``parser``.
    """
    parser = Parser(
        prog="t2tvit",
        description="Tokens-to-Token Vision Transformers on fused kernels.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"t2tvit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f"t2tvit.commands.{name}")
        added = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_options(added)
        added.set_defaults(execute=command.run, parser=added)
    return parser
