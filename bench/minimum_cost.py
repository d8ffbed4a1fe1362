"""The minimum operations and bytes of a call, in closed form.

Operations are those of matrix products, 2 per multiply-add, without recomputation. Bytes are the
compulsory traffic: each input is read once, each output is written once, and intermediate results are
not counted.

T tokens of n elements, E = 64, m = 32 random features, O outputs, B images.
"""

from dataclasses import dataclass

from bench.kernel_rows import CLASS_WIDTH, EMBED, FEATURES, LAYERS, MODULES, Row


@dataclass(frozen=True)
class Cost:
    flops: int
    bytes: int


@dataclass(frozen=True)
class Tensors:
    """Numbers of elements of inputs and outputs: maps and result per image, parameters once.

    ``learned`` parameters receive a gradient, and with ``map_gradient`` also the maps.
    """

    maps: int
    result: int
    learned: int
    map_gradient: bool
    constant: int = 0


def cost(row: Row) -> Cost:
    """The cost of a call of ``row``: its pass for the whole batch."""
    forward, backward = _flops(row.op, row.size)
    flops = {"forward": forward, "backward": backward, "full": forward + backward}[row.direction]
    return Cost(row.batch * flops, minimum_bytes(row))


def minimum_bytes(row: Row) -> int:
    tensors, itemsize = _tensors(row.op, row.size), {"fp32": 4, "bf16": 2}[row.dtype]
    into = row.batch * tensors.maps + tensors.learned
    # The random features stay float32.
    constant = 4 * tensors.constant
    forward = itemsize * (into + row.batch * tensors.result) + constant
    gradients = tensors.learned + row.batch * tensors.maps * tensors.map_gradient
    # The backward of a copy only needs the gradient of the result.
    needed = 0 if row.op == "soft_split" else into
    backward = itemsize * (needed + row.batch * tensors.result + gradients) + constant
    return {"forward": forward, "backward": backward, "full": forward + backward}[row.direction]


def _flops(op: str, size: str) -> tuple[int, int]:
    """Forward and backward, for one image."""
    if op in MODULES:
        parts = [(MODULES[op], "L1"), (MODULES[op], "L2"), ("soft_split_linear", "L3")]
        forward, backward = zip(*(_flops(*part) for part in parts), strict=True)
        return sum(forward), sum(backward)
    layer = LAYERS[size]
    tokens, width = layer.tokens, layer.width
    if op == "soft_split":
        return 0, 0
    if op == "soft_split_linear":
        product = 2 * tokens * width * _outputs(size)
        # G = Σ dy ûᵀ gives the gradients of W and of the norm. The image needs no gradient.
        return product, product * (1 if size == "L1" else 2)
    if op == "performer_attention":
        # w·k, w·q; Σ φ(k) vᵀ, φ(q) S; φ(q) Σ φ(k).
        features, sums, normalizer = 2, 2, 2 * tokens * FEATURES
        product = 2 * tokens * EMBED * FEATURES
        # w is constant: products with it have one gradient, all others two.
        return (features + sums) * product + normalizer, (
            (features + 2 * sums) * product + 2 * normalizer
        )
    if op == "token_attention":
        return 4 * tokens**2 * EMBED, 8 * tokens**2 * EMBED
    # A layer: the parts above, and proj, mlp.0, mlp.2.
    attention = "performer_attention" if op == "performer_layer" else "token_attention"
    forward, backward = zip(_flops("soft_split_linear", size), _flops(attention, size), strict=True)
    tail = 3 * 2 * tokens * EMBED**2
    return sum(forward) + tail, sum(backward) + 2 * tail


def _tensors(op: str, size: str) -> Tensors:
    if op in MODULES:
        parts = [_tensors(MODULES[op], "L1"), _tensors(MODULES[op], "L2")]
        parts.append(_tensors("soft_split_linear", "L3"))
        learned, constant = sum(p.learned for p in parts), sum(p.constant for p in parts)
        return Tensors(parts[0].maps, parts[-1].result, learned, False, constant)
    layer = LAYERS[size]
    tokens, width = layer.tokens, layer.width
    pixels = layer.channels * layer.size**2
    if op == "soft_split":
        return Tensors(pixels, tokens * width, 0, True)
    if op == "soft_split_linear":
        outputs = _outputs(size)
        norm = 0 if size == "L3" else 2 * width
        return Tensors(pixels, tokens * outputs, outputs * width + outputs + norm, size != "L1")
    if op in ("performer_attention", "token_attention"):
        constant = FEATURES * EMBED if op == "performer_attention" else 0
        return Tensors(3 * tokens * EMBED, tokens * EMBED, 0, True, constant)
    # The norms; kqv; proj, mlp.0 and mlp.2 with their biases.
    learned = 2 * width + 3 * EMBED * width + 3 * (EMBED**2 + EMBED) + 2 * EMBED
    constant = 0
    if op == "performer_layer":
        # Its kqv has a bias.
        learned, constant = learned + 3 * EMBED, FEATURES * EMBED
    return Tensors(pixels, tokens * EMBED, learned, size != "L1", constant)


def _outputs(size: str) -> int:
    return CLASS_WIDTH if size == "L3" else 3 * EMBED
