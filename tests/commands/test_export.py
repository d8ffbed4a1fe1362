"""Exported files, run by other libraries."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)

import t2tvit
from t2tvit import exporting
from t2tvit.training.checkpointing import read_about
from tests.support.commands import CLASS_NAMES, CONFIG, model, run, weights


@pytest.fixture
def onnxruntime():
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"needs {package}")
    return pytest.importorskip("onnxruntime", reason="needs onnxruntime")


@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
def test_onnx(onnxruntime, tokens_type, tmp_path, capsys):
    import onnx

    options = dict(tokens_type=tokens_type, depth=1)
    source = weights(tmp_path, **options)
    out = run(capsys, "export", "--checkpoint", source, "--output", tmp_path / "out")
    path = tmp_path / "out" / "t2t_vit_7.onnx"
    assert f"{path}  " in out and "largest difference from the model" in out
    graph = onnx.load(path).graph
    # Plain operators, and the soft splits as convolutions.
    assert {node.domain for node in graph.node} == {""}
    assert [node.op_type for node in graph.node].count("Conv") == 3
    sizes = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, 32, 48]
    assert str(tmp_path).encode() not in path.read_bytes()
    assert b".py" not in path.read_bytes(), "source lines of this machine"

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    made = model(**options)
    for batch in (1, 7):
        images = torch.randn(batch, 3, 32, 48)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = made(images).numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    about = json.loads((tmp_path / "out" / "t2t_vit_7.json").read_text())
    assert about["class_names"] == CLASS_NAMES
    assert about["preprocessing"]["mean"] == CONFIG["mean"]
    assert about == json.loads(session.get_modelmeta().custom_metadata_map["t2tvit"])


def test_onnx_in_half_precision(onnxruntime, tmp_path, capsys):
    options = ("--dtype", "float16", "--output", tmp_path, "--img-size", "48")
    out = run(capsys, "export", "--checkpoint", weights(tmp_path, depth=1), *options)
    assert "float16, largest difference" in out
    session = onnxruntime.InferenceSession(tmp_path / "t2t_vit_7.onnx")
    (image,) = session.get_inputs()
    # Another size than the weights', with resized positions.
    assert (image.type, image.shape) == ("tensor(float16)", ["batch", 3, 48, 48])


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_programs(kernels, tmp_path, capsys):
    """torch.export's, with plain operators or fused kernels; and weights with a description."""
    formats = ("--format", "torch-export", "--dtype", "bfloat16", "--fused-kernels", kernels)
    source = weights(tmp_path, depth=1)
    run(capsys, "export", "--checkpoint", source, *formats, "--output", tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "t2t_vit_7.export.pt2")
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    fused = {name for name in operators if name.startswith("t2t_")}
    assert bool(fused) == (kernels == "cpu"), operators
    images = torch.randn(3, 3, 32, 48, dtype=torch.bfloat16)
    made = model(fused_kernels=kernels, depth=1).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), made(images))


def test_weights(tmp_path, capsys):
    source = weights(tmp_path)
    options = ("--format", "safetensors", "--dtype", "float16", "--output", tmp_path / "out")
    run(capsys, "export", "--checkpoint", source, *options)
    again = tmp_path / "out" / "t2t_vit_7.safetensors"
    assert again.stat().st_size < 0.6 * source.stat().st_size
    about = read_about(again)
    assert (about.class_names, about.config["mean"]) == (CLASS_NAMES, CONFIG["mean"])
    made = model()
    t2tvit.load_checkpoint(made, again)
    for key, tensor in model().state_dict().items():
        assert torch.equal(made.state_dict()[key], tensor.half().float()), key


@pytest.mark.slow
def test_a_compiled_package(tmp_path, capsys):
    """The slowest test here: it compiles C++."""
    source = weights(tmp_path, depth=1, embed_dim=16)
    options = ("--format", "aotinductor", "--output", tmp_path / "out")
    run(capsys, "export", "--checkpoint", source, *options)
    package = torch._inductor.aoti_load_package(str(tmp_path / "out" / "t2t_vit_7.aoti.pt2"))
    images = torch.randn(4, 3, 32, 48)
    with torch.no_grad():
        expected = model(depth=1, embed_dim=16)(images)
    torch.testing.assert_close(package(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(package(images[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    permuted = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for others in (permuted, images.double(), images.mT, images[:, :1], torch.randn(1, 3, 64, 64)):
        with pytest.raises(RuntimeError, match="unmatched (stride|dtype|dim)"):
            package(others)


def test_a_file_with_wrong_results_is_removed(tmp_path, monkeypatch, capsys):
    read = exporting.FORMATS["safetensors"].read

    def wrong(what, path):
        return lambda images: read(what, path)(images) * 1.0001

    broken = exporting.Format(".safetensors", exporting.write_weights, wrong)
    monkeypatch.setitem(exporting.FORMATS, "safetensors", broken)
    options = ("--format", "safetensors", "--output", tmp_path / "out")
    line = run(capsys, "export", "--checkpoint", weights(tmp_path), *options, status=1)
    assert "relative error 1.0e-04 of the logits" in line and "file is removed" in line
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    options = ("--checkpoint", weights(tmp_path), "--output", tmp_path / "out")
    line = run(capsys, "export", *options, status=2)
    assert line.endswith("this needs the package onnxscript: pip install 't2tvit[export]'\n")


def test_options_that_exclude_each_other(tmp_path, capsys):
    source = ("--checkpoint", weights(tmp_path), "--output", tmp_path / "out")
    for options, message in (
        (("--format", "onx"), "unknown format 'onx'; did you mean 'onnx'?"),
        (("--dtype", "bfloat16"), "format onnx supports only float32 or float16"),
        (("--fused-kernels", "cpu"), "--fused-kernels: format onnx supports only plain operators"),
        (("--dtype", "half"), "invalid choice: 'half'"),
    ):
        assert message in run(capsys, "export", *source, *options, status=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(32, 48), (40, 40)])
@pytest.mark.parametrize("pixels", [(90, 61), (61, 90), (50, 50), (41, 300)])
def test_the_json_describes_the_preprocessing(size, pixels, tmp_path, capsys):
    """Preprocessing by its description, with Pillow only, agrees with the package."""
    from PIL import Image

    options = ("--format", "safetensors", "--output", tmp_path / "out", "--img-size", *size)
    run(capsys, "export", "--checkpoint", weights(tmp_path, depth=1), *options)
    about = json.loads((tmp_path / "out" / "t2t_vit_7.json").read_text(encoding="utf-8"))
    said = about["preprocessing"]
    source = image = Image.effect_noise(pixels, 80).convert("RGB")
    (height, width), (target_height, target_width) = image.size[::-1], said["resize_to"]
    if said["resize"].startswith("shorter side"):
        short, long = sorted((height, width))
        scaled = (target_height, int(target_height * long / short))
        new_height, new_width = scaled if height <= width else scaled[::-1]
    else:
        assert said["resize"].startswith("in proportion, so that the image just covers")
        ratio = min(height / target_height, width / target_width)
        new_height, new_width = round(height / ratio), round(width / ratio)
    resampling = Image.Resampling[said["resize_interpolation"].upper()]
    image = image.resize((new_width, new_height), resampling)
    batch, channels, height, width = about["input"]["shape"]
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    image = image.crop((left, top, left + width, top + height))
    prepared = (np.asarray(image, dtype=np.float32) / 255 - said["mean"]) / said["std"]
    loaded = t2tvit.load(tmp_path / "out" / "t2t_vit_7.safetensors")
    np.testing.assert_allclose(
        loaded.transform(source), prepared.transpose(2, 0, 1), rtol=1e-5, atol=1e-5
    )
    assert said["crop"].startswith(f"the central {height} × {width} pixels")


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution"])
def test_onnx_export_of_a_fused_model(onnxruntime, dynamo, tokens_type, tmp_path):
    made = model(depth=1, tokens_type=tokens_type, fused_kernels="auto")
    images, path = torch.randn(1, 3, 32, 48), tmp_path / "a.onnx"
    torch.onnx.export(made, (images,), str(path), dynamo=dynamo)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = made(images).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_a_file_that_misreads_images_is_removed(tmp_path, monkeypatch, capsys):
    read = exporting.FORMATS["safetensors"].read

    def misreading(what, path):
        """Reads as if memory were always contiguous."""
        runner = read(what, path)
        return lambda images: runner(
            images.contiguous()
            if images.is_contiguous()
            else torch.as_strided(images, images.shape, (4608, 1536, 48, 1))
        )

    broken = exporting.Format(".safetensors", exporting.write_weights, misreading)
    monkeypatch.setitem(exporting.FORMATS, "safetensors", broken)
    options = ("--format", "safetensors", "--output", tmp_path / "out")
    line = run(capsys, "export", "--checkpoint", weights(tmp_path), *options, status=1)
    assert "images in another form (NHWC memory, permuted)" in line and "file is removed" in line
    assert not list((tmp_path / "out").iterdir())
