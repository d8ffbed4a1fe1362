"""``t2tvit eval``: loss and accuracy of trained weights."""

import argparse
import time
from dataclasses import asdict

from t2tvit.commands.options import INFERENCE_KEYS, add_keys, add_weights, chosen_weights
from t2tvit.errors import InputError

HELP = "measure trained weights on held-out images"
EPILOG = """
examples:
  t2tvit eval --run runs/digits
  torchrun --nproc_per_node=8 -m t2tvit eval --run-dir runs/t2t_vit_14
  t2tvit eval --checkpoint 81.5_T2T_ViT_14.pth.tar --model t2t_vit_14 --data imagefolder:PATH
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_weights(parser)
    add_keys(parser, INFERENCE_KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Run the evaluation of the parsed arguments.

    Raises:
        InputError: Invalid input.
        BackendUnavailable: The named backend cannot run.
    """
    from t2tvit.data.images import describe_skipped
    from t2tvit.training import distributed
    from t2tvit.training.evaluation import evaluate
    from t2tvit.training.inference import held_out, load_trained
    from t2tvit.training.pipeline import Normalize, eval_loader

    device, failure = vars(arguments).get("device", "auto"), None
    try:
        path, config, about = chosen_weights(arguments)
        device = config.device
    except InputError as error:
        failure = error
    with distributed.joined(device, failure) as world:
        world.check_same({"weights": str(path)} | asdict(config))
        trained = load_trained(path, config, about, world)
        split, label_map = held_out(trained)
        if split.skipped:
            world.say(f"{config.data}: {describe_skipped(split.skipped)}")
        loader = eval_loader(split, config, world, label_map)
        normalize = Normalize(*config.statistics(split.mean, split.std), world.device)
        started = time.perf_counter()
        metrics = evaluate(trained.model, loader, normalize, config, world)
        rate = metrics["eval_images"] / (time.perf_counter() - started)
    top5 = f"  top-5 {metrics['top5']:.2f}%" if "top5" in metrics else ""
    world.say(
        f"{path} on {config.data}: top-1 {metrics['top1']:.2f}%{top5}  loss "
        f"{metrics['eval_loss']:.4f}  {metrics['eval_images']:,} images  {rate:,.0f} images/s",
    )
