"""The patch tokens of a plain Vision Transformer, for comparison with the T2T module."""

from torch import Tensor, nn

from t2tvit.errors import InputError
from t2tvit.models.bounds import check_integer
from t2tvit.models.t2t_module import check_images

PATCH = 16


class PatchTokens(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, T, embed_dim), one per 16 × 16 pixels.

    Pixels at the right and bottom that do not fill a patch are ignored.

    Args:
        in_chans: channels of the image.
        embed_dim: width of the tokens.
    """

    backend = None  # a convolution of PyTorch

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        check_integer("in_chans", in_chans)
        check_integer("embed_dim", embed_dim)
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=PATCH, stride=PATCH)

    def set_fused_kernels(self, name: str) -> None:
        """Accept "auto" and "reference", which are equivalent here.

        Raises:
            InputError: Any other backend.
        """
        if name not in ("auto", "reference"):
            raise InputError(
                f"fused_kernels: got {name!r}, but patches have no kernels; expected auto or reference"
            )

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of the T = h·w tokens of an image of ``height`` × ``width``."""
        return height // PATCH, width // PATCH

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, embed_dim) of the images ``x``; raises the errors of :class:`T2TModule`."""
        check_images(x, self.in_chans, self.proj.weight)
        return self.proj(x).flatten(2).transpose(1, 2)
