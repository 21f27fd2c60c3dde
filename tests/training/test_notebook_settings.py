"""The notebook's settings: each mode with the values of the assignment or of the generated set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eecs598.data import SHAPES_CLASSES, VOC2007_CLASSES, write_shapes
from eecs598.training import RECIPES, NotebookSettings, notebook_settings

# What the two training runs of the notebook get, by schedule and kind of images.
QUICK_GENERATED = {
    "weights": None,
    "image_size": 128,
    "fpn_channels": 64,
    "stem_channels": (64, 64),
    "learning_rate": 2e-3,
    "max_iters": 600,
    "overfit_learning_rate": 2e-3,
    "overfit_iters": 60,
    "overfit_batches": 1,
}
QUICK_PHOTOGRAPHS = QUICK_GENERATED | {
    "weights": "DEFAULT",
    "learning_rate": 8e-3,
    "overfit_learning_rate": 5e-3,
}
FULL = {
    "weights": "DEFAULT",
    "image_size": 224,
    "fpn_channels": 128,
    "stem_channels": (128, 128),
    "learning_rate": 8e-3,
    "max_iters": 9000,
    "overfit_learning_rate": 5e-3,
    "overfit_iters": 500,
    "overfit_batches": 10,
}
SGD = {
    "optimizer": "sgd",
    "weight_decay": 1e-4,
    "schedule": "step",
    "warmup_iters": 0,
    "max_grad_norm": None,
    "amp": "off",
}
ADAMW = {
    "optimizer": "adamw",
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "max_grad_norm": 5.0,
    "amp": "auto",
}


@pytest.fixture
def decide(tmp_path, monkeypatch):
    """Return a function that decides in an empty folder, without a GPU unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FCOS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "project").mkdir()

    def run(*args: str, cuda: bool = False, in_colab: bool = False) -> NotebookSettings:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        return notebook_settings(*args, project_dir=tmp_path / "project", in_colab=in_colab)

    return run


@pytest.fixture
def generated(tmp_path) -> Path:
    return write_shapes(tmp_path / "generated", num_train=4, num_val=2)


@pytest.fixture
def photographs(tmp_path) -> Path:
    """The same images without the file that says that they are generated."""
    folder = write_shapes(tmp_path / "photographs", num_train=4, num_val=2)
    (folder / "shapes.json").unlink()
    return folder


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(
    ("in_colab", "voc_beside", "data", "chosen", "folder"),
    [
        (False, None, "auto", "shapes", "cache/eecs598-fcos/shapes"),
        (False, None, "shapes", "shapes", "cache/eecs598-fcos/shapes"),
        (False, None, "voc2007", "voc2007", "project"),
        (False, "VOCdevkit/", "auto", "voc2007", "project"),
        (False, "voc07_train.json", "auto", "voc2007", "project"),
        (False, "VOCdevkit/", "shapes", "shapes", "cache/eecs598-fcos/shapes"),
        (True, None, "auto", "voc2007", "/content/voc2007"),
        (True, None, "voc2007", "voc2007", "/content/voc2007"),
        (True, None, "shapes", "shapes", "cache/eecs598-fcos/shapes"),
        (True, "VOCdevkit/", "auto", "voc2007", "project"),
        (True, "voc07_train.json", "voc2007", "voc2007", "project"),
    ],
)
def test_data(decide, tmp_path, cuda, in_colab, voc_beside, data, chosen, folder):
    if voc_beside is not None:
        path = tmp_path / "project" / voc_beside
        path.mkdir() if voc_beside.endswith("/") else path.touch()
    settings = decide(data, cuda=cuda, in_colab=in_colab)
    assert (settings.data, settings.data_dir) == (chosen, tmp_path / folder)
    assert settings.download == (chosen == "voc2007" and voc_beside is None)
    assert settings.generated == (chosen == "shapes")
    assert settings.classes == (SHAPES_CLASSES if chosen == "shapes" else VOC2007_CLASSES)
    assert settings.device == torch.device("cuda" if cuda else "cpu")
    # Photographs on a GPU are trained on for long; the generated set is small.
    assert settings.schedule == ("full" if cuda and chosen == "voc2007" else "quick")
    if in_colab:
        assert settings.output_dir == tmp_path / "project"
        assert settings.export_dir == tmp_path / "mAP" / "input"  # not in Google Drive
    else:
        assert settings.output_dir == Path("runs/notebook")
        assert settings.export_dir == Path("runs/notebook/mAP/input")


@pytest.mark.parametrize(
    ("kind", "schedule", "cuda"),
    list(itertools.product(("generated", "photographs"), ("auto", "quick", "full"), (False, True))),
)
def test_training_runs(decide, request, kind, schedule, cuda):
    folder = request.getfixturevalue(kind)
    settings = decide(str(folder), schedule, cuda=cuda)
    assert settings.data_dir == folder and not settings.download
    assert settings.generated == (kind == "generated")
    assert set(settings.classes) <= set(SHAPES_CLASSES)
    assert list(settings.classes) == sorted(settings.classes)
    assert settings.batch_size == 16 and 1 <= settings.num_workers <= 4

    full = schedule == "full" or (schedule == "auto" and cuda and kind == "photographs")
    assert settings.schedule == ("full" if full else "quick")
    quick = QUICK_GENERATED if kind == "generated" else QUICK_PHOTOGRAPHS
    expected = FULL if full else quick
    assert {name: getattr(settings, name) for name in expected} == expected
    if kind == "generated" and not full:
        # A ninth of the run, as in the recipe.
        assert ADAMW.items() | {("warmup_iters", 67)} <= settings.solver_kwargs(600).items()
        assert ADAMW.items() | {("warmup_iters", 7)} <= settings.solver_kwargs(60).items()
        assert settings.recipe.optimization == RECIPES["shapes"].optimization
    else:
        assert settings.solver_kwargs(9000) == settings.solver_kwargs(60)
        assert SGD.items() <= settings.solver_kwargs(60).items()
        assert not {"learning_rate", "max_iters"} & settings.solver_kwargs(60).keys()
        assert settings.recipe.optimization == RECIPES["handout"].optimization


def test_environment_takes_precedence(decide, monkeypatch, photographs):
    monkeypatch.setenv("FCOS_DATA", str(photographs))
    monkeypatch.setenv("FCOS_SCHEDULE", "full")
    monkeypatch.setenv("FCOS_TRAIN_ITERS", "30")
    settings = decide("shapes", "quick")
    assert (settings.data, settings.schedule) == (str(photographs), "full")
    assert (settings.max_iters, settings.overfit_iters) == (30, 500)
    monkeypatch.setenv("FCOS_DATA", "auto")
    assert decide("voc2007").data == "shapes"


def test_wrong_values(decide, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="SCHEDULE is 'slow'; expected 'auto', 'quick' or 'full'"):
        decide("shapes", "slow")
    with pytest.raises(ValueError, match="nowhere"):
        decide(str(tmp_path / "nowhere"))
    for text in ("many", "0", "-3", "1.5", ""):
        monkeypatch.setenv("FCOS_TRAIN_ITERS", text)
        with pytest.raises(ValueError, match="FCOS_TRAIN_ITERS is .*; expected a positive number"):
            decide()


def test_prints_what_was_decided(decide):
    lines = str(decide("voc2007", "full")).splitlines()
    assert "training        9000 iterations, learning rate 0.008" in lines
    assert "overfitting     500 iterations, learning rate 0.005" in lines
    assert "backbone start  ImageNet weights" in lines
    assert any(line.endswith("project (to be downloaded)") for line in lines)
    assert "backbone start  random weights" in str(decide()).splitlines()


def test_the_settings_of_the_command_line_stay_free_of_torch():
    code = (
        "import sys, eecs598.training as training; training.RECIPES; 'torch' in sys.modules and "
        "sys.exit('torch was imported'); training.notebook_settings; "
        "'torch' in sys.modules or sys.exit('torch was not imported')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
