"""A full disk loses nothing: every file is replaced atomically."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from t2tvit.errors import RunError
from t2tvit.files import WRITING, write_atomically


def test_the_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", "content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "content"


def test_a_device_is_refused():
    with pytest.raises(RunError, match="/dev/full: it is not a regular file"):
        write_atomically(Path("/dev/full"), b"content")


def limited(limit: int, *arguments) -> subprocess.CompletedProcess:
    """Run a command with a limit on the size of files."""
    code = (
        "import resource, sys; from t2tvit.cli import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        f"sys.exit(main({[str(argument) for argument in arguments]!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of the size of files")
class TestAFullDisk:
    """The command prints one line and has status 1, and the previous file is intact."""

    @pytest.fixture
    def source(self, tmp_path):
        pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
        from tests.support.commands import weights

        return weights(tmp_path, depth=1)

    def check(self, done, target: Path, before: bytes) -> None:
        assert done.returncode == 1, done.stderr
        lines = [line for line in done.stderr.splitlines() if "t2tvit: error" in line]
        assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        assert f"cannot write {target}: File too large" in lines[0]
        assert target.read_bytes() == before
        assert not list(target.parent.glob(WRITING)) and not list(target.parent.glob(".export*"))

    @pytest.mark.parametrize("name", ["old.pth", "old.safetensors"])
    def test_convert(self, source, tmp_path, name):
        (tmp_path / name).write_bytes(b"old")
        done = limited(1000, "convert", source, tmp_path / name)
        self.check(done, tmp_path / name, b"old")

    def test_convert_to_a_folder(self, source, tmp_path):
        target = tmp_path / "hub" / "model.safetensors"
        target.parent.mkdir()
        target.write_bytes(b"old")
        self.check(limited(1000, "convert", source, f"local-dir:{target.parent}"), target, b"old")

    @pytest.mark.parametrize("form", ["onnx", "torch-export", "safetensors"])
    def test_export(self, source, tmp_path, form):
        if form == "onnx":
            pytest.importorskip("onnxscript", reason="needs onnxscript")
            pytest.importorskip("onnxruntime", reason="needs onnxruntime")
        suffix = {"torch-export": "export.pt2"}.get(form, form)
        target = tmp_path / "out" / f"t2t_vit_7.{suffix}"
        target.parent.mkdir()
        target.write_bytes(b"old")
        options = ("--checkpoint", source, "--format", form, "--output", target.parent)
        self.check(limited(1000, "export", *options), target, b"old")

    def test_predict(self, source, tmp_path):
        from PIL import Image

        Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
        target = tmp_path / "plot.png"
        target.write_bytes(b"old")
        options = ("--checkpoint", source, "--plot", target)
        self.check(limited(1000, "predict", tmp_path / "image.png", *options), target, b"old")

    def test_visualize(self, source, tmp_path):
        from PIL import Image

        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "image.png")
        target = tmp_path / "out" / "image0.png"
        target.parent.mkdir()
        target.write_bytes(b"old")
        options = ("--checkpoint", source, "--output", target.parent)
        self.check(limited(1000, "visualize", tmp_path / "image.png", *options), target, b"old")


def test_pushed_weights_are_readable_by_others(tmp_path):
    import t2tvit

    model = t2tvit.create_model("t2t_vit_7", depth=1, img_size=32, num_classes=3)
    before = os.umask(0o022)
    try:
        t2tvit.hub.push(model, f"local-dir:{tmp_path}")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"config.json": 0o644, "model.safetensors": 0o644}
