"""Position embeddings: fixed sinusoids, and resizing to another grid of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoid(positions: int, dim: int) -> Tensor:
    """Sinusoidal embedding of shape (1, positions, dim); position 0 is the class token's.

    Entry j of position p is the sine (even j) or cosine (odd j) of p / 10000^(2⌊j/2⌋ / dim).
    Computed in float64 and rounded to float32, the precision of the published models.
    """
    position = torch.arange(positions, dtype=torch.float64).unsqueeze(1)
    pair = torch.arange(dim, dtype=torch.float64).div(2, rounding_mode="floor")
    angle = position / 10000.0 ** (2 * pair / dim)
    even = torch.arange(dim) % 2 == 0
    table = torch.where(even, angle.sin(), angle.cos())
    return table.float().to(torch.get_default_dtype()).unsqueeze(0)


def resize_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize (1, 1 + h·w, dim) from the grid ``old`` = (h, w) to the grid ``new``.

    The class token's position is unchanged. The others are interpolated bicubically, at least in
    float32.
    """
    class_position, grid = pos_embed[:, :1], pos_embed[:, 1:]
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, new, mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([class_position, grid], dim=1)
