"""Seeds, drawings, numeric gradients."""

from __future__ import annotations

import random

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from eecs598 import reset_seed
from eecs598.grad import compute_numeric_gradient, rel_error
from eecs598.utils import contact_sheet, detection_visualizer, tensor_to_image


def test_reset_seed_repeats_every_generator():
    draws = []
    for _ in range(2):
        reset_seed(7)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]


def test_tensor_to_image():
    tensor = torch.zeros(3, 2, 4)
    tensor[0, 1, 3], tensor[1, 0, 0], tensor[2] = 1.0, 2.0, -1.0
    image = tensor_to_image(tensor)
    assert image.shape == (2, 4, 3) and image.dtype == np.uint8
    assert image[1, 3].tolist() == [255, 0, 0] and image[0, 0].tolist() == [0, 255, 0]
    with pytest.raises(ValueError, match="expected"):
        tensor_to_image(torch.zeros(1, 2, 4))


def test_visualizer_draws_boxes_labels_and_points():
    ax = detection_visualizer(
        torch.rand(3, 40, 60),
        {0: "cat", 1: "dog"},
        bbox=torch.tensor([[5.0, 5, 20, 30, 0], [1, 1, 9, 9, 1]]),
        pred=torch.tensor([[6.0, 4, 21, 31, 0, 0.875]]),
        points=[[3, 4], [50, 30]],
    )
    assert [patch.get_xy() for patch in ax.patches] == [(5, 5), (1, 1), (6, 4)]
    assert (ax.patches[0].get_width(), ax.patches[0].get_height()) == (15, 25)
    assert [text.get_text() for text in ax.texts] == ["cat", "dog", "cat 0.88"]
    assert ax.lines[0].get_xydata().tolist() == [[3, 4], [50, 30]]


@pytest.mark.parametrize("box", [torch.tensor([1.0, 2, 3, 4, 0]), [[1, 2, 3, 4]], [], None])
def test_visualizer_takes_single_rows_lists_and_nothing(box):
    ax = detection_visualizer(torch.rand(3, 8, 8), {0: "cat"}, bbox=box)
    assert len(ax.patches) == (0 if box is None or len(box) == 0 else 1)


def test_visualizer_saves(tmp_path):
    detection_visualizer(torch.rand(3, 40, 60), {}, path=tmp_path / "new/picture.png")
    with Image.open(tmp_path / "new/picture.png") as picture:
        assert min(picture.size) > 100
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_visualizer_leaves_the_backend_alone():
    before = matplotlib.get_backend()
    detection_visualizer(torch.rand(3, 8, 8), {})
    assert matplotlib.get_backend() == before


def test_visualizer_wants_rows_of_the_right_length():
    with pytest.raises(ValueError, match="bbox has shape"):
        detection_visualizer(torch.rand(3, 8, 8), {}, bbox=torch.zeros(2, 3))


def test_contact_sheet(tmp_path):
    pictures = [(torch.rand(3, 30, 40), torch.zeros(0, 5), torch.zeros(0, 6))] * 5
    contact_sheet(pictures, {}, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 800


def test_rel_error():
    assert rel_error(torch.tensor([1.0, 2]), torch.tensor([1.0, 2])) == 0
    assert rel_error(torch.tensor([1.0, -4]), torch.tensor([2.0, -4])) == pytest.approx(1 / 8)
    assert rel_error(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(ValueError, match="one shape"):
        rel_error(torch.zeros(2), torch.zeros(3))


def test_numeric_gradient():
    x = torch.tensor([[1.0, -2], [0.5, 3]], dtype=torch.float64)
    numeric = compute_numeric_gradient(lambda v: v**3, x)
    assert rel_error(numeric, 3 * x**2) < 1e-8
    weighted = compute_numeric_gradient(lambda v: v**3, x, grad_output=x)
    assert rel_error(weighted, 3 * x**3) < 1e-8
