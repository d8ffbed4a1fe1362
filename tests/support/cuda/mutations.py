"""Copies of the CUDA source with slips, each of which a test must find."""

import contextlib
import ctypes
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

from tests.support.cuda.build import CUDA_SOURCES, build_host_library

NAMESPACE = "t2t_mutated"


@contextlib.contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """Set the number of multiprocessors of host builds, on which numbers of blocks depend."""
    with mock.patch.dict(os.environ, SIMT_MULTIPROCESSORS=str(count)):
        yield


def build_mutated(
    host_cache: Path,
    folder: Path,
    sources: Sequence[str],
    slips: Sequence[tuple[str, str, str]],
    operators: Sequence[str],
    options: Sequence[str] = (),
    namespace: str = NAMESPACE,
) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Build a copy of ``sources`` that holds all slips, one of which can be chosen: compiled once.

    Args:
        host_cache: where libraries are kept.
        folder: an empty one, for the copy.
        sources: names of files in ``csrc/cuda``.
        slips: (file, what it says, what a slip would make of it). A statement is dropped if the slip
            is empty, an expression replaced.
        operators: those that the source registers.
        options: of the compiler.
        namespace: where in ``torch.ops`` they appear.

    Returns:
        A function that chooses a slip by its index, −1 for none, and one that ends the namespace.
    """
    shutil.copytree(CUDA_SOURCES, folder, dirs_exist_ok=True)
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    for i, (file, original, slip) in enumerate(slips):
        assert texts[file].count(original) == 1, f"{original!r} is not in {file} exactly once"
        choice = f"(mutation == {i} ? ({slip}) : ({original}))"
        texts[file] = texts[file].replace(
            original, choice if slip else f"if (mutation != {i}) {original}"
        )
    for source in sources:
        texts[source] = texts[source].replace(
            "LIBRARY_IMPL(t2t_cuda,", f"LIBRARY_IMPL({namespace},"
        )
    declaration = (
        'extern "C" { inline __attribute__((visibility("default"))) int mutation = -1; }\n'
    )
    texts["vec.cuh"] = texts["vec.cuh"].replace("namespace t2t {", declaration + "namespace t2t {")
    for file, text in texts.items():
        (folder / file).write_text(text)

    library = build_host_library(host_cache, [folder / source for source in sources], options)
    torch.ops.load_library(library)
    declared = torch.library.Library(namespace, "DEF")
    for operator in operators:
        schema = str(getattr(torch.ops.t2t_cuda, operator).default._schema)
        declared.define(schema.removeprefix("t2t_cuda::"))
    chosen = ctypes.c_int.in_dll(ctypes.CDLL(library), "mutation")

    def choose(index: int) -> None:
        chosen.value = index

    return choose, declared._destroy


def differs(
    results: Callable[..., Iterable[torch.Tensor]], *arguments, namespace: str = NAMESPACE
) -> bool:
    """Whether the chosen slip changes ``results(operators, *arguments)`` or makes it fail."""
    mutated = results(getattr(torch.ops, namespace), *arguments)
    try:
        return not all(map(torch.equal, mutated, _plain(results, arguments)))
    except RuntimeError as error:
        return "launch failure" in str(error)


@functools.cache
def _plain(results: Callable[..., Iterable[torch.Tensor]], arguments: tuple) -> list[torch.Tensor]:
    return list(results(torch.ops.t2t_cuda, *arguments))
