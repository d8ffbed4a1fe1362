"""A page with PNGs that shows what the layers of any model compute for images."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image
from torch import Tensor, nn

from t2t_kernels import output_size
from t2t_kernels import soft_split as split_tokens
from t2tvit.class_names import readable
from t2tvit.errors import InputError
from t2tvit.figures import shortened
from t2tvit.files import write_atomically
from t2tvit.models import T2TModule
from t2tvit.models.t2t_module import SPLITS, TokenConvolution
from t2tvit.terminal import printable
from t2tvit.visualization import draw
from t2tvit.visualization.page import Page
from t2tvit.visualization.performer import Study, study
from t2tvit.visualization.record import DEAD, EXPLODING, Layer, Recorded, record

TOP_K = 5


def visualize(
    model: nn.Module,
    images: Tensor,
    pictures: Sequence[tuple[str, Image.Image]],
    page: Page,
    *,
    class_names: Sequence[str] | None = None,
    channels: int = 64,
) -> None:
    """Fill and write ``page``, its PNGs and ``layers.json``: what a model computes for images.

    Args:
        model: Any model in evaluation mode. T2T layers and attention are shown if it has them.
        images: The model's input (B, C, H, W).
        pictures: Their names and pictures.
        page: An empty page. Its folder is created if missing, and files of the same names are
            overwritten.
        class_names: Names of the model's outputs; numbers are shown without them.
        channels: The maximum number of channels to show per layer.

    Raises:
        InputError: The folder cannot be written to, or the model has no layers that can be shown.
    """
    recorded = record(model, images)
    if not recorded.layers:
        raise InputError("the model has no layers whose output is a map or tokens of the image")
    page.make_folder()
    show_images(page, recorded, pictures, class_names)
    facts: dict[str, Any] = {"title": page.title, "layers": show_layers(page, recorded.layers)}
    show_token_maps(page, recorded, pictures, model)
    show_attention(page, recorded, pictures)
    facts["performer"] = show_t2t_attention(page, recorded, pictures)
    show_features(page, recorded.layers, pictures, channels)
    index = page.write()
    write_atomically(page.folder / "layers.json", json.dumps(facts, indent=1) + "\n")
    dead = sum(len(layer["dead"]) for layer in facts["layers"])
    exploding = sum(len(layer["exploding"]) for layer in facts["layers"])
    counts = f"{len(recorded.layers)} layers, {dead} dead and {exploding} exploding channels"
    print(printable(f"{index}: {page.title}; {counts}"))


def show_images(page: Page, recorded: Recorded, pictures, class_names) -> None:
    page.heading("Images")
    files = []
    shares = recorded.logits.softmax(1) if recorded.logits.dim() == 2 else None
    for index, (name, picture) in enumerate(pictures):
        file = f"image{index}.png"
        enlarged = max(1, 224 // max(picture.size))
        size = (picture.width * enlarged, picture.height * enlarged)
        page.save(file, picture.resize(size, Image.Resampling.NEAREST))
        caption = name
        if shares is not None and shares.shape[1] > 1:
            values, numbers = shares[index].topk(min(TOP_K, shares.shape[1]))
            ranked = (
                f"{readable(class_names[number]) if class_names else f'class {number}'} {value:.1%}"
                for number, value in zip(numbers.tolist(), values.tolist())
            )
            caption += ": predicted " + ", ".join(ranked)
        files.append((file, caption))
    page.pictures(*files)


def show_layers(page: Page, layers: Sequence[Layer]) -> list[dict]:
    page.heading("Layers")
    page.legend(
        f"in every image at most {DEAD:g} times the layer's largest value",
        f"in some image not finite, or {EXPLODING:g} times the median channel's largest value",
    )
    facts: list[dict[str, Any]] = []
    for layer in layers:
        _, count, height, width = layer.maps.shape
        facts.append(
            {
                "layer": layer.name,
                "channels": count,
                "map": [height, width],
                "dead": layer.dead,
                "exploding": layer.exploding,
                "largest": finite(layer.peaks.max().item()),
                "median": finite(layer.peaks.median().item()),
            }
        )
    page.table(
        ("layer", "map", "channels", "dead", "exploding", "largest |x|", "of the median channel"),
        (
            (
                fact["layer"],
                "×".join(str(side) for side in fact["map"]),
                fact["channels"],
                len(fact["dead"]),
                len(fact["exploding"]),
                *(
                    "not finite" if fact[key] is None else f"{fact[key]:.3g}"
                    for key in ("largest", "median")
                ),
            )
            for fact in facts
        ),
    )
    return facts


def finite(value: float) -> float | None:
    """``value``, or None if it is not finite, which JSON does not support."""
    return value if math.isfinite(value) else None


def show_features(page: Page, layers: Sequence[Layer], pictures, channels: int) -> None:
    page.heading("Feature maps")
    page.text(
        "Each channel is scaled to its own range, dark to bright. Frames mark dead and exploding "
        "channels. If a layer has too many channels, some of the dead and exploding ones are shown, and "
        "the others are evenly spaced."
    )
    for number, layer in enumerate(layers):
        dead, exploding = layer.dead, layer.exploding
        shown = choose(layer.maps.shape[1], channels, dead, exploding)
        for index, (name, _) in enumerate(pictures):
            file = f"layer{number:02}-image{index}.png"
            page.save(file, draw.feature_grid(layer.maps[index], shown, dead, exploding))
            listed = f", {len(dead)} dead {some(dead)}" if dead else ""
            listed += f", {len(exploding)} exploding {some(exploding)}" if exploding else ""
            count = layer.maps.shape[1]
            of = f"{len(shown)} of {count} channels"
            of += f" {some(shown)}" if len(shown) < count else ""
            page.folded(f"{layer.name}, {name}: {of}{listed}", file, opened=number < 3)


def some(numbers: Sequence[int], most: int = 8) -> str:
    return "(" + ", ".join(map(str, numbers[:most])) + (", …)" if len(numbers) > most else ")")


def choose(count: int, wanted: int, dead: Sequence[int], exploding: Sequence[int]) -> list[int]:
    """Channels to show: some dead and exploding ones, the others evenly spaced."""
    wanted = min(count, wanted)
    marked = [*exploding[: wanted // 4], *dead[: wanted // 4]]
    others = [index for index in range(count) if index not in set(marked)]
    left = wanted - len(marked)
    spaced = [others[index * len(others) // left] for index in range(min(left, len(others)))]
    return sorted({*marked, *spaced})


def show_token_maps(page: Page, recorded: Recorded, pictures, model: nn.Module) -> None:
    """Show the soft splits: norm of the tokens, and principal components before and after."""
    names = [name for name, module in model.named_modules() if isinstance(module, T2TModule)]
    if not any(names):
        return
    page.heading("Soft splits")
    page.text(
        "Each row is a soft split with its grid of tokens. The columns are the length (L2 norm) of "
        "the tokens, their first three principal components as red, green and blue, and the "
        "principal components of the layer's output."
    )
    maps = {layer.name: layer.maps for layer in recorded.layers}
    name = next(filter(None, names))
    inputs = [x.cpu() for layer, _, x in recorded.t2t if layer.startswith(name)]
    outputs = [maps[f"{name}.{part}"] for part in ("attention1", "attention2", "project")]
    inputs.append(outputs[1])
    for index, (picture_name, _) in enumerate(pictures):
        cells = []
        for x, made, split in zip(inputs, outputs, SPLITS):
            grid = output_size(*x.shape[2:], **split)
            tokens = split_tokens(x[index : index + 1], **split, backend="reference")[0]
            after = made[index].flatten(1).t()
            length = draw.colored(tokens.norm(dim=1).reshape(grid))
            cells += [length, draw.components(tokens, grid), draw.components(after, grid)]
        file = f"tokens-image{index}.png"
        grids = ["×".join(map(str, x.shape[2:])) for x in outputs]
        rows = [f"soft split {number}, {grid}" for number, grid in enumerate(grids, 1)]
        heads = ("length of the tokens", "tokens of the split", "output of the layer")
        page.save(file, draw.mosaic(cells, 3, 224, heads=heads, rows=rows))
        page.pictures((file, f"{picture_name}: the three soft splits"))


def show_attention(page: Page, recorded: Recorded, pictures) -> None:
    attended = recorded.attended
    if not attended.names and not attended.unknown:
        return
    page.heading("Attention of the class token")
    if attended.unknown:
        page.text(f"Not shown, because their kind is unknown: {', '.join(attended.unknown)}.")
    if attended.rollout is None:
        return
    page.text(
        "Left: attention rollout, the product over all layers of the mean attention of the heads, "
        "with the skip connections. Right: one row per layer and one column per head, both "
        "numbered from 0. For a model without a class token, the mean over all tokens is shown."
    )
    most = max(heads.shape[1] for heads in attended.heads)
    for index, (name, picture) in enumerate(pictures):
        rollout, heads = f"rollout-image{index}.png", f"heads-image{index}.png"
        laid = draw.overlay(picture, attended.rollout[index])
        page.save(rollout, draw.mosaic([laid], 1, 320))
        cells = []
        for layer in attended.heads:
            row = [draw.colored(head) for head in layer[index]]
            cells += row + [255 + 0 * row[0]] * (most - len(row))
        side = max(24, min(64, 720 // most))
        columns = [f"head {number}" for number in range(most)]
        rows = [shortened(layer, 40) for layer in attended.names]
        table = draw.mosaic(cells, most, side, heads=columns, rows=rows)
        page.save(heads, table)
        page.pictures((rollout, f"{name}: rollout"), (heads, f"{name}: heads of each layer"))


def show_t2t_attention(page: Page, recorded: Recorded, pictures) -> list[dict]:
    facts: list[dict] = []
    for name, layer, x in recorded.t2t:
        if isinstance(layer, TokenConvolution):
            continue
        if not facts:
            page.heading("Attention in the T2T module")
        grid = output_size(*x.shape[2:], **layer.split)
        found = study(layer, x, grid)
        facts.append({"layer": name} | show_study(page, name, found, pictures, len(facts)))
        if found.approximations:
            facts[-1]["features"] = layer.w.shape[0]
            show_approximation(page, name, found, layer.w.shape[0])
    return facts


def show_study(page: Page, name: str, found: Study, pictures, number: int) -> dict:
    kinds = [("the layer", found.maps)]
    if found.approximations:
        kinds.append(("softmax of q·k", found.softmax))
    page.heading(name, 3)
    for index, (picture_name, _) in enumerate(pictures):
        cells = [
            draw.marked(draw.colored(maps[index, query]), position)
            for _, maps in kinds
            for query, position in enumerate(found.positions)
        ]
        file = f"t2t{number}-image{index}.png"
        heads = [f"token at row {y}, column {x}" for y, x in found.positions]
        rows = [kind for kind, _ in kinds]
        picture = draw.mosaic(cells, len(heads), 200, heads=heads, rows=rows)
        page.save(file, picture)
        page.pictures((file, f"{picture_name}: attention of four tokens, each marked orange"))
    return {
        str(key): {name: finite(value) for name, value in asdict(approximation).items()}
        for key, approximation in found.approximations.items()
    }


def show_approximation(page: Page, name: str, found: Study, features: int) -> None:
    errors = {
        key: value.distance for key, value in found.approximations.items() if isinstance(key, int)
    }
    own, uniform = found.approximations["own"], found.approximations["uniform"]
    if not all(map(math.isfinite, (*errors.values(), own.distance, uniform.distance))):
        page.text("Not compared with the softmax, because queries or keys are not finite.")
        return
    file = f"features-{name.rpartition('.')[2]}.png"
    draw.draw_approximation(
        errors, (features, own.distance), uniform.distance, name, page.folder / file
    )
    page.pictures((file, "distance from softmax attention by number of random features"))
    kinds: dict[str | int, str] = {
        "own": f"the model's {features}",
        "uniform": "uniform attention",
    }
    page.table(
        ("features", "distance", "relative error of the output", "sum of the weights"),
        (
            (
                kinds.get(key, key),
                f"{value.distance:.3f}",
                f"{value.output_error:.3f}",
                f"{value.mass:.4f}",
            )
            for key, value in found.approximations.items()
        ),
    )
    page.text(
        "Distance is the share of softmax(q·k) that the weights do not cover, from 0 to 1. The eps "
        "of the published layer makes the sum of the weights smaller than 1; near 0, the attention "
        "is off. The published features have rows of length √m instead of √E, so they approximate "
        "a flatter kernel than the softmax; the model was trained with them."
    )
