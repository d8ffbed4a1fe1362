"""The command line: what each command prints, and its exit status."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import t2tvit
from t2tvit.cli import complain, main, parse
from t2tvit.errors import InputError, OneRankError
from t2tvit.models import T2TBackbone
from t2tvit.training import distributed
from tests.support.training.tiny import TINY, metrics_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder of three classes that differ in colour."""
    root = tmp_path_factory.mktemp("flowers")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for channel, name in enumerate(("daisy", "poppy", "violet")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run on that folder."""
    output = tmp_path_factory.mktemp("runs") / "flowers"
    options = ("--data", f"imagefolder:{folder}", "--num-classes", "none", "--epochs", "12")
    plain = ("--auto-augment", "none", "--mixup", "0", "--cutmix", "0", "--random-erasing", "0")
    rate = ("--lr", "3e-3", "--min-lr", "1e-4", "--drop-path", "0", "--ema-decay", "none")
    assert main(["train", *TINY, *options, *plain, *rate, "--output", str(output)]) == 0
    return output


def succeed(capsys, *arguments) -> str:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


# Help


@pytest.mark.parametrize(
    "command",
    ["train", "eval", "predict", "bench", "visualize", "export", "convert", "models"],
)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: t2tvit {command}")
    if command == "train":
        for text in ("--weight-decay N", "(default: 0.03)", "{bfloat16,float16,none}", "examples:"):
            assert text in out
    if command not in ("convert", "models"):
        assert "--fused-kernels" in out


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "t2tvit", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"t2tvit {t2tvit.__version__}\n")


# Refusals: status 2 and one line

NEED_RUN = ("eval", "--run", "{run}")
REFUSALS = {
    "no-command": ((), "the following arguments are required: COMMAND"),
    "unknown-command": (("trian",), "invalid choice: 'trian'"),
    "unknown-option": (("train", "--epocs", "3"), "did you mean '--epochs'?"),
    "stray-word": (("train", "digits"), "unexpected argument 'digits'"),
    "unknown-config": (("train", "--config", "digit"), "did you mean 'digits'?"),
    "missing-config": (("train", "--config", "{tmp}/gone.yaml"), "No such file"),
    "wrong-type": (("train", "--epochs", "ten"), "--epochs: got 'ten', expected a whole number"),
    "out-of-bounds": (("train", "--hflip", "2"), "--hflip: got 2.0, expected at least 0"),
    "unknown-choice": (("train", "--amp", "bf16"), "did you mean 'bfloat16'?"),
    "model-args": (("train", "--model-args", "depth"), "got 'depth', expected NAME=VALUE"),
    "unknown-model": (
        ("train", "--model", "t2t_vit_15"),
        "unknown model 't2t_vit_15'; did you mean",
    ),
    "unknown-model-arg": (("train", "--model-args", "deepth=3"), "did you mean 'depth'?"),
    "bad-model-arg": (("train", "--model-args", "num_heads=3"), "num_heads: got 3"),
    "unknown-data": (
        ("train", "--data", "digit"),
        "unknown source 'digit'; did you mean 'digits'?",
    ),
    "missing-folder": (("train", "--data", "imagefolder:{tmp}/gone"), "gone/train does not exist"),
    "missing-cifar": (("train", "--data", "cifar10:{tmp}"), "no CIFAR-10 files in"),
    "too-many-classes": (("train", "--num-classes", "5"), "the data has 10 classes"),
    "unknown-backend": (("train", "--fused-kernels=cudaa"), "did you mean 'cuda'?"),
    "unknown-optimizer": (("train", "--optimizer", "adamv"), "timm has adam, "),
    "bad-optimizer": (
        ("train", "--optimizer", "sgd", "--momentum", "0"),
        "optimizer sgd: Nesterov",
    ),
    "missing-weights": (("train", "--initial-checkpoint", "{tmp}/gone.pth"), "gone.pth"),
    "second-order-optimizer": (
        ("train", "--optimizer", "adahessian"),
        "unknown name 'adahessian'",
    ),
    "optimizer-that-cannot-run": (("train", "--optimizer", "fusedadam"), "optimizer fusedadam: "),
    "unknown-policy": (("train", "--auto-augment", "randm9"), "auto_augment: timm cannot read"),
    "unknown-models-name": (("models", "t2t_vit14"), "did you mean 't2t_vit_14'?"),
    "unknown-timm-name": (("models", "timm:resnt50"), "did you mean 'resnet50'?"),
    "size-not-taken": (("models", "timm:levit_128", "--img-size", "200"), "at 200 × 200"),
    "eval-without-weights": (("eval",), "--checkpoint is required"),
    "empty-run": (("eval", "--run", "{tmp}"), "there is no best.safetensors"),
    "missing-checkpoint": (("eval", "--checkpoint", "{tmp}/a.safetensors"), "does not exist"),
    "truncated-checkpoint": (("eval", "--checkpoint", "{truncated}"), "is damaged"),
    "nameless-checkpoint": (("eval", "--checkpoint", "{bare}"), "give --model or --config"),
    "other-model": ((*NEED_RUN, "--model", "t2t_vit_14"), "itself says that it is t2t_vit_7"),
    "other-channels": ((*NEED_RUN, "--data", "digits"), "digits has 1 channels, the model takes 3"),
    "other-classes": (
        (*NEED_RUN, "--data", "synthetic"),
        "classes that the model was not trained on",
    ),
    "missing-image": (("predict", "--run", "{run}", "{tmp}/gone.png"), "gone.png does not exist"),
    "no-image": (("predict", "--run", "{run}", "{bare}"), "cannot be read"),
    "top-0": (("predict", "--run", "{run}", "--top-k", "0"), "--top-k: got 0"),
    "plot-nowhere": (("predict", "--run", "{run}", "--plot", "{tmp}/no/x.png"), "cannot write"),
    "plot-folder": (("predict", "--run", "{run}", "--plot", "{tmp}"), "is a folder"),
    "plot-format": (("predict", "--run", "{run}", "--plot", "{tmp}/x.doc"), "extension .doc"),
    "no-repetitions": (("bench", "--repetitions", "0"), "--repetitions: got 0"),
    "unknown-rival": (("bench", "--against", "resnet5000"), "unknown model of timm"),
    "bench-nameless-run": (("bench", "--run", "{nameless}"), "does not name its model"),
    "long-run": (("eval", "--run", "o" * 5000), "ile name too long"),
    "long-config": (("train", "--config", "o" * 5000), "ile name too long"),
    "long-resume": (("train", "--resume", "o" * 300), "ile name too long"),
    "long-data": (("train", "--data", "imagefolder:" + "o/" * 3000), "ile name too long"),
    "long-image": (("predict", "--run", "{run}", "o" * 5000), "ile name too long"),
    "deep-model-args": (("train", "--model-args", "depth=" + "[" * 9999), "is not YAML"),
    "model-args-no-date": (("train", "--model-args", "depth=2001-99-99"), "is not YAML"),
    "bench-no-run": (("bench", "--run", "{tmp}"), "does not exist"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_user_errors_are_one_line_and_status_2(name, trained, tmp_path, capsys):
    arguments, message = REFUSALS[name]
    weights = trained / "best.safetensors"
    truncated, bare = tmp_path / "truncated.safetensors", tmp_path / "bare.safetensors"
    truncated.write_bytes(weights.read_bytes()[:-1000])
    save_file(load_file(weights), bare)
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    save_file(load_file(weights), nameless / "best.safetensors")
    places = {
        "nameless": nameless,
        "tmp": tmp_path,
        "run": trained,
        "truncated": truncated,
        "bare": bare,
    }
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[:1] == ["train"]:
        arguments += ["--output", str(tmp_path / "output"), "--device", "cpu"]
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("t2tvit: error: ") and err.count("\n") == 1, err
    assert message in err
    assert not (tmp_path / "output").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here CUDA can run")
@pytest.mark.parametrize(
    "option, message",
    [
        ("--device=cuda", "torch sees no CUDA device"),
        ("--fused-kernels=cuda", "on the cuda backend"),
    ],
)
def test_an_unavailable_backend_is_refused_with_the_reason(option, message, tmp_path, capsys):
    output = tmp_path / "output"
    assert main(["train", *TINY, "--output", str(output), "--epochs", "2", option]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("package", ["timm", "sklearn"])
def test_a_missing_extra_is_named_with_its_remedy(package, tmp_path):
    code = (
        "import sys, warnings; warnings.simplefilter('ignore');"
        f"sys.modules[{package!r}] = None;"
        "from t2tvit.cli import main;"
        f"sys.exit(main(['train', '--output', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line = f"t2tvit: error: this needs the package {package}: pip install 't2tvit[train]'\n"
    assert (done.returncode, done.stderr) == (2, line)


# Commands


def test_models_lists_all_with_their_figures(capsys):
    lines = succeed(capsys, "models").splitlines()
    for line, name in zip(lines[1:], t2tvit.list_models()):
        assert line.split()[0] == name
    row = next(line.split() for line in lines if line.startswith("t2t_vit_14 "))
    kernels = ["cpu", "triton", "cuda"]
    figures = ["21,545,550", "4.78", "4.8", "81.5", "83.3"]
    assert row[1:] == ["performer", "384/14/6", *figures, *kernels]
    assert any(
        re.match("kernels, cpu: (available$|not available: .*pip install)", line) for line in lines
    )


def test_models_accepts_names_wildcards_and_timm_names(capsys):
    options = ("t2t_vit_?", "timm:vit_tiny_patch16_224", "--img-size", "384")
    rows = [line.split() for line in succeed(capsys, "models", *options).splitlines()[1:3]]
    assert [row[0] for row in rows] == ["t2t_vit_7", "timm:vit_tiny_patch16_224"]
    # 577 tokens of width 192: 12 blocks of 12 products of the width squared and two of attention.
    tokens, width = 577, 192
    macs = 12 * tokens * (12 * width**2 + 2 * tokens * width)
    macs += (tokens - 1) * 768 * width + 1000 * width
    assert rows[1][4] == f"{macs / 1e9:.2f}"


def test_eval_repeats_what_training_measured(trained, capsys):
    out = succeed(capsys, "eval", "--run", trained, "--weights", "last")
    last = metrics_of(trained)[-1]
    assert f"top-1 {last['top1']:.2f}%" in out
    assert f"loss {last['eval_loss']:.4f}  9 images" in out
    assert "top-5" not in out  # there are only three classes


def test_eval_maps_classes_by_name(trained, folder, tmp_path, capsys):
    """Held-out data with fewer classes, so that their numbers differ."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in ("poppy", "violet"):
            (tmp_path / split / name).symlink_to(folder / split / name)
    out = succeed(capsys, "eval", "--run", trained, "--data", f"imagefolder:{tmp_path}")
    assert "6 images" in out
    assert "top-1 100.00%" in out


def test_eval_reads_weights_without_a_description(tmp_path, capsys):
    model = t2tvit.create_model("t2t_vit_7", img_size=32, depth=1, num_classes=7)
    torch.save({"state_dict_ema": model.state_dict()}, tmp_path / "w.pth.tar")
    options = ("--model", "t2t_vit_7", "--model-args", "depth=1", "--img-size", "32")
    options += ("--data", "synthetic:16", "--amp", "none", "--workers", "0")
    out = succeed(
        capsys, "eval", "--checkpoint", tmp_path / "w.pth.tar", *options, "--num-classes", "7"
    )
    assert "4 images" in out
    assert main(["eval", "--checkpoint", str(tmp_path / "w.pth.tar"), *options]) == 2
    assert "give --num-classes 7" in capsys.readouterr().err


def test_weights_that_do_not_name_their_classes_need_as_many(folder, tmp_path, capsys):
    torch.manual_seed(0)
    model = t2tvit.create_model("t2t_vit_7", img_size=32, depth=1)
    torch.nn.init.normal_(model.head.weight, std=0.2)  # whose confidence differs by image
    torch.save(model.state_dict(), tmp_path / "w.pth")
    options = ("--model", "t2t_vit_7", "--model-args", "depth=1", "--img-size", "32")
    weights = ("--checkpoint", str(tmp_path / "w.pth"), *options, "--amp", "none")
    assert main(["eval", *weights, "--workers", "0", "--data", f"imagefolder:{folder}"]) == 2
    assert "has 3 classes, the model 1000" in capsys.readouterr().err
    # Their images are prepared by ImageNet's statistics unless others are given.
    image = folder / "val" / "daisy" / "1.png"
    plain = succeed(capsys, "predict", *weights, image)
    statistics = ("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225")
    assert plain == succeed(capsys, "predict", image, *weights, *statistics)
    assert plain != succeed(capsys, "predict", image, *weights, "--mean", "0", "0", "0")
    assert "class " not in plain  # a thousand classes are ImageNet's


def test_predict_names_the_classes_of_files(trained, folder, tmp_path, capsys):
    files = [folder / "val" / name / "1.png" for name in ("violet", "daisy")]
    plot = tmp_path / "plot.png"
    out = succeed(capsys, "predict", "--run", trained, *files, "--top-k", "9", "--plot", plot)
    for line, file in zip(out.splitlines(), files, strict=False):
        path, first, *rest = line.split()
        assert (path, first) == (str(file), file.parent.name)
        assert len(rest) == 5  # the class's share, then two more classes with theirs
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_predict_without_files_draws_from_the_held_out_images(trained, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    out = succeed(capsys, "predict", "--run", trained, "--images", "5", "--plot", plot)
    assert " of 5 right, drawn at random" in out
    with Image.open(plot) as image:
        assert np.asarray(image.convert("RGB")).std() > 20, "the figure is blank"


def test_bench_compares_with_the_reference(trained, capsys):
    out = succeed(
        capsys,
        *("bench", "--run", trained, "--repetitions", "2", "--batch-size", "2"),
        *("--against", "resnet18"),
    )
    lines = out.splitlines()
    head = next(line.split() for line in lines if "resnet18" in line)
    assert head == ["reference", "fused", "fused", "/", "reference", "resnet18"]
    for pass_ in ("training", "inference"):
        assert any(line.startswith(f"{pass_}, images/s") for line in lines)
        mfu = next(line.split()[2:] for line in lines if line.startswith(f"{pass_}, MFU"))
        # Of the reference, ours and the rival.
        assert len(mfu) == 3 and all(0 <= float(share.rstrip("%")) < 200 for share in mfu)
    assert any(line.startswith("saved for backward, MiB/image") for line in lines)
    assert re.match(r"loader of imagefolder:\S+, \d+ workers, alone: [\d,.]+ images/s", lines[-1])
    assert "performer_layer" in out


def test_bench_says_why_a_loader_is_not_measured(trained, capsys):
    options = ("--repetitions", "1", "--batch-size", "2", "--data", "imagefolder:gone")
    out = succeed(capsys, "bench", "--model", "t2t_vit_7", "--img-size", "32", *options)
    assert "loader of imagefolder:gone: not measured: " in out


def test_bench_does_not_time_wrong_results(trained, monkeypatch, capsys):
    forward = T2TBackbone.forward

    def wrong(self, images):
        return forward(self, images) * (1.01 if self.fused_kernels == "auto" else 1)

    monkeypatch.setattr(T2TBackbone, "forward", wrong)
    options = ("--batch-size", "2", "--fused-kernels", "auto")
    assert main(["bench", "--run", str(trained), *options]) == 1
    out, err = capsys.readouterr()
    assert "disagree: relative error 1.0e-02" in err and "not timed" in err
    assert "images/s" not in out


def test_errors_of_one_process_are_reported_by_that_process(monkeypatch, capsys):
    """The first process of a node reports errors that all processes have."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    complain(InputError("all meet this"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OneRankError, match="process 3 of this node has no GPU of its own") as error:
        distributed.start("auto")
    complain(error.value)
    assert capsys.readouterr().err.startswith("t2tvit: error (process 3): device: process 3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    complain(InputError("all meet this"))
    assert "all meet this" in capsys.readouterr().err


# The parser


@pytest.mark.parametrize(
    "line, name, words",
    [
        ("predict --run r --img-size 96 a.png", "files", "a.png"),
        ("predict --run r --img-size 96 128 a.png b.png", "files", "a.png b.png"),
        ("predict --run r x.png --mean 0 0 0 a.png --top-k 3 b.png", "files", "x.png a.png b.png"),
        ("predict --run r --model-args depth=1 a.png", "files", "a.png"),
        ("predict --run r --img-size 96 -", "files", "-"),
        ("predict --run r --img-size 96 -- --odd", "files", "--odd"),
        ("visualize --output o --img-size 96 a.png", "images", "a.png"),
        ("compare --seeds 0 1 t2t_vit_7 --output o", "models", "t2t_vit_7"),
        ("convert --img-size 96 a.pth b.pth", "source", "a.pth"),
    ],
)
def test_words_after_an_option_of_several_values_are_arguments(line, name, words):
    found = getattr(parse(line.split()), name)
    found = found if isinstance(found, list) else [found]
    assert " ".join(str(each) for each in found) == words
