"""Exporting trained models to other formats, with a check of each file."""

import copy
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from t2tvit.conversion import PREPARATION, described
from t2tvit.errors import InputError, RunError, unknown_name
from t2tvit.files import cannot_write, write_atomically
from t2tvit.models import T2TBackbone, load_checkpoint
from t2tvit.terminal import printable
from t2tvit.training.checkpointing import Weights, weights_file
from t2tvit.training.config import RunConfig
from t2tvit.training.inference import Trained
from t2tvit.training.model import build_model

DTYPES = ("float32", "float16", "bfloat16")
INPUT, OUTPUT = "images", "logits"
BATCHES = (1, 2, 5)
LARGEST_BATCH = 4096
# Allowed relative error of the logits, in roundings of the dtype: other libraries sum in other orders.
ROUNDINGS = 50
SEED = 0
# Patterns in the C++ that AOTInductor generates for a package.
LEAST_CHECK = re.compile(r"((?:_size\[\d+\] <|expected it to be >=)) \d+(\)|,)")
STRIDE_CHECK = re.compile(r"if \((\d+ != (\w+)_stride\[(\d+)\])\)")

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exporting:
    """The model to export in its dtype, its description, and sample images."""

    model: T2TBackbone
    about: Weights
    images: Tensor


def write_onnx(what: Exporting) -> bytes:
    import onnxscript  # noqa: F401  the exporter's error for a missing package is less clear

    # The exporter prints to standard output.
    with redirect_stdout(StringIO()):
        program: Any = torch.onnx.export(  # its type includes the old exporter's None
            what.model,
            (what.images,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}},
            custom_translation_table={torch.ops.aten.im2col.default: soft_split_as_convolution},
        )
    graph = program.model.graph
    for node in (*graph, *graph.inputs, *graph.outputs):
        node.metadata_props.clear()  # source lines and paths of this machine
    program.model.metadata_props["t2tvit"] = json.dumps(description(what.about))
    return program.model_proto.SerializeToString()


def soft_split_as_convolution(x, kernel_size, dilation, padding, stride):
    """im2col, which ONNX lacks, as a depthwise convolution with one-hot kernels.

    It is exact, because every sum has one non-zero term.
    """
    import numpy
    from onnxscript import ir, opset18

    op: Any = opset18  # its types are those of the eager mode
    channels, elements = x.shape[1], kernel_size[0] * kernel_size[1]
    picks = numpy.eye(elements, dtype=numpy.float32).reshape(elements, 1, *kernel_size)
    weight = op.CastLike(op.Constant(value=ir.tensor(numpy.tile(picks, (channels, 1, 1, 1)))), x)
    y = op.Conv(
        x,
        weight,
        group=channels,
        kernel_shape=list(kernel_size),
        dilations=list(dilation),
        pads=[*padding, *padding],
        strides=list(stride),
    )
    return op.Reshape(y, op.Constant(value_ints=[0, channels * elements, -1]))


def read_onnx(what: Exporting, path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.cpu().numpy()})[0])

    return run


def program_of(what: Exporting) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    program = torch.export.export(what.model, (what.images,), dynamic_shapes={"x": {0: batch}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def write_program(what: Exporting) -> bytes:
    content = BytesIO()
    torch.export.save(program_of(what), content)
    return content.getvalue()


def read_program(what: Exporting, path: Path) -> Runner:
    return torch.export.load(path).module()


def write_package(what: Exporting) -> bytes:
    from torch._inductor import aoti_compile_and_package

    content = BytesIO()
    with torch.no_grad(), checked_inputs():
        aoti_compile_and_package(program_of(what), package_path=content)
    return content.getvalue()


@contextmanager
def checked_inputs() -> Iterator[None]:
    """A context in which AOTInductor generates packages that refuse unsuitable images.

    AOTInductor generates checks of dtype, shape, strides and device, but runs them only if an
    environment variable is set when the package is loaded. Here they always run. They also accept a
    batch of one image, and ignore strides of dimensions of size 1.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    generate = CppWrapperCpu.generate_input_output_runtime_checks

    def generate_checks(self):
        written = len(self.prefix._lines)
        generate(self)
        for index, line in enumerate(self.prefix._lines[written:], written):
            if isinstance(line, str):
                line = line.replace("!_check_aoti_runtime_check_inputs_env()", "false")
                line = STRIDE_CHECK.sub(r"if (\2_size[\3] != 1 && \1)", line)
                self.prefix._lines[index] = LEAST_CHECK.sub(r"\1 1\2", line)

    with patch.object(CppWrapperCpu, "generate_input_output_runtime_checks", generate_checks):
        yield


def read_package(what: Exporting, path: Path) -> Runner:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def write_weights(what: Exporting) -> bytes:
    return weights_file(what.model, what.about)


def read_weights(what: Exporting, path: Path) -> Runner:
    model = build_model(what.about.model, what.about.create_args, "reference")
    load_checkpoint(model, path)
    return model.to(what.images).eval()


@dataclass(frozen=True)
class Format:
    """A file format: its suffix, and functions that write and run it.

    The content is created in memory: PyTorch's writers abort the process if the disk is full.
    """

    suffix: str
    write: Callable[[Exporting], bytes]
    read: Callable[[Exporting, Path], Runner]
    dtypes: tuple[str, ...] = DTYPES
    takes_kernels: bool = False


FORMATS = {
    # onnxruntime's CPU provider has no bfloat16 products, so bfloat16 cannot be checked.
    "onnx": Format(".onnx", write_onnx, read_onnx, dtypes=("float32", "float16")),
    "torch-export": Format(".export.pt2", write_program, read_program, takes_kernels=True),
    "aotinductor": Format(".aoti.pt2", write_package, read_package, takes_kernels=True),
    "safetensors": Format(".safetensors", write_weights, read_weights),
}


def check_format(name: str, dtype: str, kernels: str) -> None:
    if name not in FORMATS:
        raise InputError(f"--format: {unknown_name('format', name, FORMATS)}")
    if dtype not in FORMATS[name].dtypes:
        known = " or ".join(FORMATS[name].dtypes)
        raise InputError(f"--dtype: got {dtype}, but format {name} supports only {known}")
    if kernels != "reference" and not FORMATS[name].takes_kernels:
        raise InputError(
            f"--fused-kernels: format {name} supports only plain operators; remove the option"
        )


def prepared(trained: Trained, path: Path, about: Weights | None, dtype: str) -> Exporting:
    """The model of ``path`` at the configured image size and in ``dtype``.

    Args:
        trained: The model; its size and dtype are changed in place.
        path: The file it was loaded from, for messages.
        about: The weights' own description, if any.
        dtype: One of DTYPES.

    Raises:
        InputError: The model is not one of this package.
    """
    config = trained.config
    if not isinstance(trained.model, T2TBackbone):
        raise InputError(
            f"{path} has weights of {config.model}; only models of this package can be exported"
        )
    resize(trained.model, config.size)
    about = about or describe_weights(trained, config)
    size = {"img_size": list(config.size)}
    chosen = {key: getattr(config, key) for key in PREPARATION}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    about = replace(
        about, create_args=about.create_args | size, config=about.config | chosen | size
    )
    return prepare(trained.model, about, getattr(torch, dtype))


def describe_weights(trained: Trained, config: RunConfig) -> Weights:
    """The description of weights that have none."""
    about, cfg = described(trained.model), trained.model.pretrained_cfg
    mean, std = config.statistics(cfg["mean"], cfg["std"])
    chosen = {"crop_pct": config.crop_pct, "interpolation": config.interpolation}
    return replace(about, config=about.config | chosen | {"mean": list(mean), "std": list(std)})


def resize(model: T2TBackbone, size: tuple[int, int]) -> None:
    """Resize the position embeddings permanently to images of ``size``."""
    positions = model.positions(*size).detach()
    model.pos_embed = nn.Parameter(positions, requires_grad=False)
    model.img_size, model.grid_size = size, model.tokens_to_token.grid_size(*size)


def prepare(model: T2TBackbone, about: Weights, dtype: torch.dtype) -> Exporting:
    model = model.to(dtype).eval().requires_grad_(False)
    channels, size = about.create_args["in_chans"], about.create_args["img_size"]
    like = model.norm.weight
    # Two images, because torch.export would treat a batch size of one as a constant.
    images = torch.zeros(2, channels, *size, dtype=dtype, device=like.device)
    return Exporting(model, about, images)


def export(what: Exporting, formats: list[str], folder: Path) -> None:
    """Write each format, reload and compare it, and keep it if the results agree."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}") from None
    for name in formats:
        target = folder / (what.about.model + FORMATS[name].suffix)
        content = FORMATS[name].write(what)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
                written = Path(scratch) / target.name
                written.write_bytes(content)
                verdict = verify(what, FORMATS[name].read(what, written), name)
                written.replace(target)
        except OSError as error:
            raise cannot_write(target, error) from None
        size = len(content) / 2**20
        print(f"{printable(str(target))}  {size:.1f} MiB  {verdict}", flush=True)
    about = folder / f"{what.about.model}.json"
    write_atomically(
        about, json.dumps(description(what.about), indent=2, ensure_ascii=False) + "\n"
    )
    print(f"{printable(str(about))}  preprocessing of images, and class names")


@torch.no_grad()
def verify(what: Exporting, run: Runner, name: str) -> str:
    """Compare with the model on random images; returns a line with the difference.

    Raises:
        RunError: The error relative to float64 is more than :data:`ROUNDINGS` roundings.
    """
    generator = torch.Generator().manual_seed(SEED)
    exact_model = in_float64(what.model)
    ours, plain, exact = [], [], []
    for count in BATCHES:
        images = torch.randn(count, *what.images.shape[1:], generator=generator).to(what.images)
        ours.append(run(images).double().cpu())
        plain.append(what.model(images).double().cpu())
        exact.append(exact_model(images.double()).cpu())
    ours, plain, exact = torch.cat(ours), torch.cat(plain), torch.cat(exact)
    error = ((ours - exact).norm() / exact.norm()).item()
    limit = ROUNDINGS * torch.finfo(what.images.dtype).eps
    if not error <= limit:
        raise RunError(
            f"format {name}: relative error {error:.1e} of the logits on random images, expected "
            f"at most {limit:.1e}; the file is removed"
        )
    check_other_inputs(what, run, name, limit)
    return (
        f"{str(what.images.dtype).removeprefix('torch.')}, largest difference from the model "
        f"{(ours - plain).abs().max():.1e} of logits up to {plain.abs().max():.1e} on {len(ours)} "
        f"random images; relative error against float64 {error:.1e}, allowed {limit:.1e}"
    )


def check_other_inputs(what: Exporting, run: Runner, name: str, limit: float) -> None:
    """Raise a RunError if images of another memory format, size or dtype give wrong logits.

    A file may refuse such images, or give the same logits as the model.
    """
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(2, *what.images.shape[1:], generator=generator).to(what.images)
    taller = torch.cat([images, images], dim=2)
    variants = {
        "NHWC memory, permuted": images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "every other image of a batch": images.repeat_interleave(2, 0)[::2],
        "columns in reverse memory order": images.mT.contiguous().mT,
        "another size": taller,
        "the sides exchanged": images.mT,
        "float64": images.double(),
        "uint8": (images * 50).to(torch.uint8),
    }
    exact_model = in_float64(what.model)
    for kind, variant in variants.items():
        try:
            with no_standard_error():  # AOTInductor also prints its errors there
                logits = run(variant).double().cpu()
        # Each format raises its own exception to refuse images.
        except Exception:
            continue
        exact = exact_model(variant.double()).cpu()
        error = ((logits - exact).norm() / exact.norm()).item()
        if logits.shape != exact.shape or not error <= limit:
            raise RunError(
                f"format {name}: images in another form ({kind}) give a relative error of {error:.1e} "
                f"instead of a refusal, expected at most {limit:.1e}; the file is removed"
            )


@contextmanager
def no_standard_error() -> Iterator[None]:
    """A context without output on standard error, including that of C++ libraries."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def in_float64(model: T2TBackbone) -> nn.Module:
    exact = copy.deepcopy(model).double()
    exact.set_fused_kernels("reference")
    return exact


def description(about: Weights) -> dict:
    """The description of preprocessing, shapes and class names."""
    config = about.config
    height, width = about.create_args["img_size"]
    resized = [math.floor(side / config["crop_pct"]) for side in (height, width)]
    return {
        "model": about.model,
        "input": {
            "name": INPUT,
            "shape": ["batch", about.create_args["in_chans"], height, width],
            "layout": "NCHW, contiguous; an AOTInductor package refuses other strides",
            "other_sizes_and_dtypes": "refused; float16 files take float16 images, and so on",
        },
        "output": {"name": OUTPUT, "shape": ["batch", about.create_args["num_classes"]]},
        "preprocessing": {
            "channels": "grey" if about.create_args["in_chans"] == 1 else "RGB, in this order",
            "resize": resizing(*resized),
            "resize_to": resized,
            "resize_interpolation": config["interpolation"],
            "resize_antialias": True,
            "resize_rounding": "to 8-bit values, as Pillow does",
            "crop": f"the central {height} × {width} pixels; an offset of half a pixel is rounded to "
            "the nearest even one",
            "center_crop_share": config["crop_pct"],
            "scale": "values in [0, 1], then (value - mean) / std per channel",
            "mean": config["mean"],
            "std": config["std"],
        },
        "class_names": about.class_names,
    }


def resizing(height: int, width: int) -> str:
    """How timm's evaluation transform resizes an image before the crop."""
    if height == width:
        return (
            f"shorter side to {height} pixels, the longer one in proportion, rounded down; a shorter "
            "side of this length is left as it is"
        )
    return (
        f"in proportion, so that the image just covers {height} × {width} pixels; both sides are "
        "rounded to the nearest pixel"
    )
