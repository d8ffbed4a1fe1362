"""Position embeddings: the sinusoid and its resizing."""

import math

import pytest
import torch
import torch.nn.functional as F

from t2tvit import create_model
from t2tvit.models.positions import resize_positions, sinusoid


def test_sinusoid_follows_the_formula():
    table = sinusoid(9, 6)
    assert table.shape == (1, 9, 6) and table.dtype == torch.float32
    for position in range(9):
        for j in range(6):
            angle = position / 10000 ** (2 * (j // 2) / 6)
            expected = math.cos(angle) if j % 2 else math.sin(angle)
            assert table[0, position, j].item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("size, positions", [(384, 577), ((224, 160), 141)])
def test_a_model_has_the_sinusoid_of_the_size_it_is_built_for(size, positions):
    model = create_model("t2t_vit_7", depth=1, img_size=size)
    assert torch.equal(model.pos_embed, sinusoid(positions, 256))
    height, width = (size, size) if isinstance(size, int) else size
    assert model.positions(height, width) is model.pos_embed


def test_resizing_keeps_the_class_position_and_interpolates_the_grid():
    old, new = (3, 5), (6, 4)
    table = torch.randn(1, 16, 8, dtype=torch.float64)
    got = resize_positions(table, old, new)
    assert got.shape == (1, 25, 8) and got.dtype == torch.float64
    assert torch.equal(got[:, 0], table[:, 0])
    for channel in range(8):
        plane = table[0, 1:, channel].view(1, 1, *old)
        expected = F.interpolate(plane, new, mode="bicubic", align_corners=False)
        torch.testing.assert_close(got[0, 1:, channel].view(new), expected[0, 0])


def test_resizing_keeps_a_constant():
    table = torch.full((1, 1 + 4 * 6, 2), 3.0)
    torch.testing.assert_close(resize_positions(table, (4, 6), (9, 5)), torch.full((1, 46, 2), 3.0))


def test_resizing_to_the_same_grid_changes_nothing():
    table = sinusoid(1 + 4 * 6, 16)
    torch.testing.assert_close(resize_positions(table, (4, 6), (4, 6)), table)


def test_forward_at_another_size_resizes_even_at_the_same_number_of_tokens():
    model = create_model("t2t_vit_7", depth=1, img_size=(32, 128)).eval()
    assert model.grid_size == (2, 8)
    assert model.positions(64, 64).shape == model.pos_embed.shape
    expected = resize_positions(model.pos_embed, (2, 8), (4, 4))
    assert torch.equal(model.positions(64, 64), expected)
