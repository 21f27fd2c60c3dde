"""Settings, recipes and their options."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from a4_helper import train_detector
from eecs598 import training
from eecs598.data import AUGMENTATIONS
from eecs598.training.optimization import OPTIMIZERS, SCHEDULES, network_dtype
from eecs598.training.run import TrainingRun
from eecs598.training.settings import (
    RECIPES,
    SETTINGS,
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
    Setting,
    Settings,
    from_recipe,
)
from one_stage_detector import ASSIGNMENTS, BOX_LOSSES, FCOS, HEAD_NORMS, QUALITY_TARGETS


def find(name: str) -> Setting:
    return next(settings[name] for settings in SETTINGS.values() if name in settings)


def test_the_handout_is_the_assignment():
    handout = RECIPES["handout"]
    assert handout == Settings()
    assert (handout.data.batch_size, handout.data.image_size) == (16, 224)
    assert (handout.model.fpn_channels, handout.model.stem_channels) == (128, (128, 128))
    assert handout.model.box_loss == "l1" and not handout.data.augment
    solver = handout.optimization
    assert (solver.max_iters, solver.learning_rate) == (9000, 8e-3)
    assert (solver.optimizer, solver.schedule) == ("sgd", "step")
    assert solver.ema_decay is None and solver.amp == "off"


# --------------------------------------------------------------------------------------------
# Where settings go
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "group, function",
    [
        (ModelSettings(), FCOS),
        (OptimizationSettings(), train_detector),
        (RunSettings(), TrainingRun),
    ],
)
def test_settings_are_arguments_of_what_they_are_for(group, function):
    assert set(group.kwargs()) <= set(inspect.signature(function).parameters)


def test_the_backbones_weights_are_named_as_the_detector_does():
    weights = {
        name: ModelSettings(weights=name).kwargs()["weights"] for name in ("default", "none")
    }
    assert weights == {"default": "DEFAULT", "none": None}
    assert ModelSettings(weights="net.pth").kwargs()["weights"] == "net.pth"


def test_no_two_settings_have_a_name_or_an_option_in_common():
    settings = [setting for group in SETTINGS.values() for setting in group.values()]
    assert len({setting.name for setting in settings}) == len(settings)
    assert len({setting.option for setting in settings}) == len(settings)
    assert [setting.name for setting in settings] == list(Settings().values())


def test_every_public_name_of_the_package_is_there():
    assert [name for name in training.__all__ if not hasattr(training, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        training.other  # noqa: B018


def test_the_choices_of_a_setting_are_what_is_implemented():
    assert find("optimizer").choices == tuple(OPTIMIZERS)
    assert find("schedule").choices == tuple(SCHEDULES)
    assert find("augment").choices == AUGMENTATIONS
    assert find("box_loss").choices == tuple(BOX_LOSSES)
    assert find("quality").choices == tuple(QUALITY_TARGETS)
    assert find("assignment").choices == ASSIGNMENTS
    for name in find("amp").choices:
        network_dtype(torch.device("cpu"), name)
    assert find("head_norm").choices == HEAD_NORMS


# --------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_settings_survive_json(name):
    settings = RECIPES[name]
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_settings_are_replaced_by_name_in_whatever_group_they_are():
    changed = Settings().replace(stem_channels=(8,), seed=3, eval_every=7)
    assert changed == Settings(
        model=ModelSettings(stem_channels=(8,)),
        data=DataSettings(seed=3),
        run=RunSettings(eval_every=7),
    )
    with pytest.raises(ValueError, match="unknown settings dropout"):
        Settings().replace(dropout=0.1)


def test_printed_settings_mark_what_differs():
    settings = Settings().replace(learning_rate=0.1, augment=("flip", "zoom"), eval_every=7)
    lines = str(settings).splitlines()
    assert "* learning_rate        0.1" in lines
    assert "* augment              flip,zoom" in lines
    assert sum(line.startswith("*") for line in lines) == 2
    names = [line[2:].split()[0] for line in lines]
    assert names == [name for name in settings.values() if name not in SETTINGS["run"]]


@pytest.mark.parametrize(
    "changed, sizes",
    [
        ({}, (96, 128, 160)),
        ({"learning_rate": 0.1}, (96, 128, 160)),
        ({"image_size": 256}, (192, 256, 320)),
        ({"image_size": 100}, (68, 100, 132)),
        ({"image_size": 48}, (48,)),  # its neighbors are nearer than 32 px
        ({"image_size": 256, "image_sizes": ()}, ()),
        ({"image_size": 256, "image_sizes": (96, 128)}, (96, 128)),
    ],
)
def test_another_size_takes_the_sizes_of_the_batches_along(changed, sizes):
    expected = RECIPES["shapes"].replace(**{**changed, "image_sizes": sizes})
    assert from_recipe("shapes", **changed) == expected
    assert from_recipe("handout", image_size=256).data.image_sizes == ()


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("max_iters", "12", 12),
        ("learning_rate", "1e-3", 1e-3),
        ("stem_channels", "64,32", (64, 32)),
        ("stem_channels", "", ()),
        ("box_stem_channels", "64,32", (64, 32)),
        ("box_stem_channels", "none", None),
        ("augment", "flip,mosaic", ("flip", "mosaic")),
        ("augment", "none", ()),
        ("max_grad_norm", "none", None),
        ("max_grad_norm", "5", 5.0),
        ("weights", "none", "none"),
        ("backbone", "timm:tf_efficientnet_lite0", "timm:tf_efficientnet_lite0"),
    ],
)
def test_what_is_typed(name, text, value):
    parsed = find(name).parse(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("max_iters", "0", "at least 1"),
        ("max_iters", "1.5", "whole number"),
        ("max_iters", "none", "whole number"),
        ("learning_rate", "0", "above 0"),
        ("learning_rate", "nan", "above 0"),
        ("learning_rate", "inf", "above 0"),
        ("weight_decay", "-1", "at least 0"),
        ("ema_decay", "1", "above 0 and below 1"),
        ("stem_channels", "64,x", "whole number"),
        ("augment", "flip,rotate", "one of flip"),
        ("box_loss", "l2", "one of l1, giou"),
    ],
)
def test_what_is_typed_wrong(name, text, words):
    with pytest.raises(ValueError, match=f"{name} is .*{words}"):
        find(name).parse(text)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ema_decay": 1.0}, "below 1"),
        ({"augment": ("blur",)}, "one of flip"),
        ({"image_sizes": (0,)}, "at least 1"),
        ({"schedule": "linear"}, "one of step, cosine"),
        ({"max_iters": 1.5}, "whole number"),
        ({"max_iters": None}, "whole number"),
        ({"max_iters": True}, "whole number"),
        ({"batch_size": "4"}, "whole number"),
        ({"stem_channels": 128}, "tuple"),
        ({"compile": "no"}, "True or False"),
        ({"weight_decay": float("inf")}, "at least 0"),
    ],
)
def test_settings_out_of_range(changes, words):
    ((name, _),) = changes.items()
    with pytest.raises(ValueError, match=f"{name} is .*{words}"):
        Settings().replace(**changes)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda values: values["model"].update(dropout=0.1),
            "unknown settings in 'model': drop",
        ),
        (lambda values: values.update(log={}), "unknown groups of settings: log"),
        (lambda values: values.pop("run"), "missing groups of settings: run"),
        (lambda values: values.update(data=3), "settings in 'data' are 3; expected a dict"),
        (lambda values: values["data"].update(seed=-1), "seed is -1"),
    ],
)
def test_settings_of_another_version(change, words):
    values = Settings().to_dict()
    change(values)
    with pytest.raises(ValueError, match=words):
        Settings.from_dict(values)


def test_a_setting_that_an_earlier_version_did_not_have():
    values = Settings().replace(seed=3, max_iters=7).to_dict()
    del values["data"]["seed"]
    assert Settings.from_dict(values) == Settings().replace(max_iters=7)
