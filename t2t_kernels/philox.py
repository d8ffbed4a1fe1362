"""Counter-based dropout: Philox-4x32-10 (Salmon et al., "Parallel random numbers", SC 2011).

Whether an element is kept is a pure function of (seed, site, element index), so every backend draws
the same mask, and a backward recomputes it instead of storing it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# A block's four words are eight numbers of 16 bits.
_BLOCK, _RANGE = 8, 2**16


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox: four counter words and two key words to four random words.

    All are int64 tensors of 32-bit words, and are broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps in int64, which keeps all 64 bits; the masks remove the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def rounded_probability(p: float) -> float:
    """The probability that masks use: ``p`` rounded to a multiple of 2⁻¹⁶."""
    return round(p * _RANGE) / _RANGE


def signed(seed: int) -> int:
    """The lower 64 bits of ``seed`` as a signed number, which int64 tensors can hold."""
    return seed if -(2**63) <= seed < 2**63 else (seed + 2**63) % 2**64 - 2**63


def keep_mask(shape: torch.Size, p: float, seed: int | Tensor, site: int, device) -> Tensor:
    """The elements that a dropout keeps: a boolean tensor of ``shape``.

    Element i (row-major) uses number i mod 8 of the block with counter (i div 8, low and high word;
    ``site``; 0) and key (``seed``, low and high word). A block's numbers are the lower and the upper 16
    bits of its words in turn. The element is kept if its number is at least round(p·2¹⁶).

    Args:
        shape: The shape of the input of the dropout.
        p: Probability of dropping, 0 to 1.
        seed: 64 bits; an integer or an int64 tensor of one element.
        site: Distinguishes the dropouts of a layer.
    """
    elements = shape.numel()
    block = torch.arange((elements + _BLOCK - 1) // _BLOCK, device=device)
    if isinstance(seed, int):
        seed = signed(seed)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    zero = torch.zeros_like(block)
    words = philox_4x32(
        (block & _WORD, block >> 32, zero + site, zero),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    numbers = torch.stack([half for word in words for half in (word % _RANGE, word // _RANGE)], -1)
    return (numbers.flatten()[:elements] >= round(p * _RANGE)).view(shape)


def dropout(x: Tensor, p: float, seed: int | Tensor | None, site: int) -> Tensor:
    """Dropout of ``x`` by :func:`keep_mask`; PyTorch's dropout if the seed is None.

    Kept elements are divided by 1 − :func:`rounded_probability`, so that the expectation is ``x``.
    """
    if p == 0:
        return x
    if seed is None:
        return F.dropout(x, p)
    dropped = rounded_probability(p)
    if dropped == 1:
        return x * 0
    return x * keep_mask(x.shape, p, seed, site, x.device) / (1 - dropped)
