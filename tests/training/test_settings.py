"""Settings, recipes and their options."""

from __future__ import annotations

import dataclasses
import json

import pytest

from eecs598.training.settings import RECIPES, Settings, from_recipe, parse_setting


def test_the_handout_is_the_assignment():
    handout = RECIPES["handout"]
    assert handout == Settings()
    assert (handout.iters, handout.batch_size, handout.image_size) == (9000, 16, 224)
    assert (handout.fpn_channels, handout.stem, handout.lr) == (128, (128, 128), 8e-3)
    assert (handout.optimizer, handout.schedule, handout.box_loss) == ("sgd", "step", "l1")
    assert not handout.augment and handout.average_decay is None and handout.amp == "off"


@pytest.mark.parametrize("name", RECIPES)
def test_settings_survive_json(name):
    settings = RECIPES[name]
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_printed_settings_mark_what_differs():
    text = str(dataclasses.replace(Settings(), lr=0.1, augment=("flip", "zoom")))
    assert "* lr                   0.1" in text and "flip,zoom" in text
    assert sum(line.startswith("*") for line in text.splitlines()) == 2
    assert len(text.splitlines()) == len(dataclasses.fields(Settings))


@pytest.mark.parametrize(
    "changed, sizes",
    [
        ({}, (96, 128, 160)),
        ({"lr": 0.1}, (96, 128, 160)),
        ({"image_size": 256}, (192, 256, 320)),
        ({"image_size": 100}, (68, 100, 132)),
        ({"image_size": 48}, (48,)),  # its neighbours are nearer than 32 px
        ({"image_size": 256, "image_sizes": ()}, ()),
        ({"image_size": 256, "image_sizes": (96, 128)}, (96, 128)),
    ],
)
def test_another_size_takes_the_sizes_of_the_batches_along(changed, sizes):
    expected = dataclasses.replace(RECIPES["shapes"], **{**changed, "image_sizes": sizes})
    assert from_recipe("shapes", **changed) == expected
    assert from_recipe("handout", image_size=256).image_sizes == ()


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("iters", "12", 12),
        ("lr", "1e-3", 1e-3),
        ("stem", "64,32", (64, 32)),
        ("stem", "", ()),
        ("augment", "flip,mosaic", ("flip", "mosaic")),
        ("augment", "none", ()),
        ("max_grad_norm", "none", None),
        ("max_grad_norm", "5", 5.0),
        ("weights", "none", "none"),
        ("backbone", "timm:tf_efficientnet_lite0", "timm:tf_efficientnet_lite0"),
    ],
)
def test_what_is_typed(name, text, value):
    parsed = parse_setting(name, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("iters", "0", "at least 1"),
        ("iters", "1.5", "whole number"),
        ("iters", "none", "whole number"),
        ("lr", "0", "above 0"),
        ("lr", "nan", "above 0"),
        ("lr", "inf", "above 0"),
        ("weight_decay", "-1", "at least 0"),
        ("stem", "64,x", "whole number"),
        ("augment", "flip,rotate", "one of flip"),
        ("box_loss", "l2", "one of l1, giou"),
    ],
)
def test_what_is_typed_wrong(name, text, words):
    with pytest.raises(ValueError, match=f"{name} is .*{words}"):
        parse_setting(name, text)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"average_decay": 1.0}, "below 1"),
        ({"augment": ("blur",)}, "one of flip"),
        ({"image_sizes": (0,)}, "at least 1"),
        ({"schedule": "linear"}, "one of step, cosine"),
        ({"iters": 1.5}, "int"),
        ({"iters": None}, "int"),
        ({"batch_size": "4"}, "int"),
        ({"stem": 128}, "tuple"),
        ({"compile": "no"}, "compile"),
        ({"weight_decay": float("inf")}, "at least 0"),
    ],
)
def test_settings_out_of_range(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(Settings(), **changes)


def test_settings_of_another_version():
    with pytest.raises(ValueError, match="dropout"):
        Settings.from_dict({"dropout": 0.1})
