"""Checks of the network: the ``hello_*`` functions, backbone with feature pyramid, and head."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from eecs598.grading.answers import to_plain_data
from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.result import CheckFailure, CheckResult, expect, expect_close, once, show
from eecs598.grading.submission import OWN_GROUND, Submission, build, evaluating

__all__ = [
    "build_backbone",
    "check_backbone",
    "check_head",
    "check_hello",
    "convolutions",
    "with_random_weights",
]


_Module = TypeVar("_Module", bound=nn.Module)


def check_hello(submission: Submission) -> CheckResult:
    """Check the three functions that print a greeting."""
    result = CheckResult("hello")
    for function, line, module in (
        ("hello_common", "Hello from common.py!", submission.common),
        (
            "hello_one_stage_detector",
            "Hello from one_stage_detector.py!",
            submission.one_stage_detector,
        ),
        ("hello_helper", "Hello from a4_helper.py!", submission.a4_helper),
    ):
        with result.probe(function):
            printed = io.StringIO()
            with redirect_stdout(printed):
                getattr(module, function)()
            got = printed.getvalue().strip()
            expect(got == line, f"expected it to print {line!r}, got {show(got)}")
    return result


def check_backbone(submission: Submission) -> CheckResult:
    """Check ``DetectorBackboneWithFPN``: layers, shapes, top-down pathway, construction."""
    result = CheckResult("backbone")
    channels = OWN_GROUND.fpn_channels
    built = once(lambda: build_backbone(submission, channels))

    def backbone() -> Any:
        return built()[0]

    @torch.no_grad()
    def run(height: int, width: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        images, stages = torch.randn(1, 3, height, width), {}

        def note(_module: nn.Module, _inputs: object, output: dict[str, Tensor]) -> None:
            stages.update(to_plain_data(output))

        handle = backbone().backbone.register_forward_hook(note)
        try:
            levels = to_plain_data(backbone()(images))
        finally:
            handle.remove()
        return stages or to_plain_data(backbone().backbone(images)), levels

    with result.probe("fpn_strides and out_channels"):
        strides = dict(to_plain_data(backbone().fpn_strides))
        expect(strides == STRIDES, f"fpn_strides: expected {STRIDES}, got {strides}")
        got = to_plain_data(backbone().out_channels)
        expect(
            got == channels,
            f"out_channels={channels}: expected the attribute out_channels, got {got}",
        )

    with result.probe("fpn_params has three 1x1 and three 3x3 convolutions"):
        layers = convolutions(backbone().fpn_params)
        sizes = to_plain_data([(conv.kernel_size, conv.out_channels) for conv in layers])
        for side, role in ((1, "lateral"), (3, "output")):
            number = sizes.count(((side, side), channels))
            expect(
                number == 3,
                f"out_channels={channels}: expected three {side}x{side} {role} convolutions with "
                f"{channels} output channels, got {number} among {sizes}",
            )

    on_the_cell = once(lambda: run(224, 224))

    with result.probe("shapes at 224 x 224"):
        stages, levels = on_the_cell()
        expect(
            sorted(levels) == sorted(STRIDES),
            f"expected the levels {list(STRIDES)}, got {show(list(levels))}",
        )
        for level, stride in STRIDES.items():
            shape = (1, channels, 224 // stride, 224 // stride)
            stage_shape = tuple(stages[f"c{level[1]}"].shape)
            got = tuple(levels[level].shape)
            expect(
                got == shape,
                f"{level} of an image (1, 3, 224, 224): expected {shape}, got {got} (the "
                f"backbone's c{level[1]} is {stage_shape})",
            )

    with result.probe("top-down pathway of the FPN paper, figure 3"):
        stages, levels = on_the_cell()
        _expect_top_down(backbone().fpn_params, stages, levels)

    with result.probe("building leaves the batch-norm statistics alone"):
        disturbed = built()[1]
        expect(
            disturbed == 0,
            "expected no batch-norm layer to run in training mode while the backbone is built, got "
            f"{disturbed}: that moves their statistics. Call eval() before the dummy pass",
        )
    return result


def build_backbone(submission: Submission, out_channels: int) -> tuple[nn.Module, int]:
    """Build a backbone.

    Returns:
        The backbone in evaluation mode, and how often a batch norm ran in training mode while it
        was built.
    """
    disturbed = []

    def note_training(module: nn.Module, _inputs: object, _output: object) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            disturbed.append(module)

    handle = register_module_forward_hook(note_training)
    try:
        model = build(submission.common.DetectorBackboneWithFPN, out_channels=out_channels)
    finally:
        handle.remove()
    return evaluating(model), len(disturbed)


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """Return all two-dimensional convolutions of a module, in its own order."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


@torch.no_grad()
def _expect_top_down(
    fpn_params: nn.Module, stages: Mapping[str, Tensor], levels: Mapping[str, Tensor]
) -> None:
    """Expect levels p3 to p5 to follow from stages c3 to c5 as in the FPN paper, figure 3.

    Source: Feature Pyramid Networks (arXiv 1612.03144), section 3.
    """
    layers = convolutions(fpn_params)
    outputs = [conv for conv in layers if to_plain_data(conv.kernel_size) == (3, 3)]
    merged: Tensor | None = None
    for stage, above in (("c5", ""), ("c4", "p5"), ("c3", "p4")):
        feats, level = stages[stage], levels[f"p{stage[1]}"]
        laterals = [
            conv
            for conv in layers
            if to_plain_data((conv.kernel_size, conv.in_channels)) == ((1, 1), feats.shape[1])
        ]
        expect(
            len(laterals) == 1,
            f"expected one 1x1 convolution with the {feats.shape[1]} input channels of {stage}, "
            f"got {len(laterals)}",
        )

        def upsampled(maps: Tensor, mode: str = "nearest", like: Tensor = feats) -> Tensor:
            return F.interpolate(maps, size=like.shape[-2:], mode=mode)

        def is_output_of(maps: Tensor, level: Tensor = level) -> bool:
            # The names of layers are not fixed: it may be any of the 3x3 convolutions.
            got = [to_plain_data(conv(maps)) for conv in outputs]
            return any(torch.allclose(one, level, rtol=1e-3, atol=1e-4) for one in got)

        lateral = to_plain_data(laterals[0](feats))
        wrong = {f"conv3x3(conv1x1({stage})), nothing from above": lateral}
        rule = f"conv3x3(conv1x1({stage}))"
        if merged is None:
            wrong, merged = {}, lateral
        else:
            name = f"the sum that {above} is computed from"
            rule = f"conv3x3(conv1x1({stage}) + {name}, upsampled to its size)"
            wrong["it added after upsampling it bilinearly"] = lateral + upsampled(
                merged, "bilinear"
            )
            wrong[f"the finished {above}, after its 3x3 convolution, added"] = lateral + upsampled(
                levels[above]
            )
            merged = lateral + upsampled(merged)
        got = next((name for name, maps in wrong.items() if is_output_of(maps)), "other values")
        expect(is_output_of(merged), f"p{stage[1]}: expected {rule}, got {got}")


def check_head(submission: Submission) -> CheckResult:
    """Check ``FCOSPredictionNetwork``: layers, initial values, output shapes and data flow."""
    result = CheckResult("head")

    @cache
    def head(num_classes: int, in_channels: int, stem: tuple[int, ...]) -> Any:
        return build(
            submission.one_stage_detector.FCOSPredictionNetwork,
            num_classes=num_classes,
            in_channels=in_channels,
            stem_channels=list(stem),
        )

    settings = ((20, 64, (64, 64)), (20, 128, (128, 128)))  # those of the assignment
    example = settings[0]

    def describe(num_classes: int, in_channels: int, stem: tuple[int, ...]) -> str:
        return f"num_classes={num_classes}, in_channels={in_channels}, stem_channels={list(stem)}"

    with result.probe("3x3 convolutions of the right sizes"):
        for setting in settings:
            num_classes, in_channels, stem = setting
            model = head(*setting)
            chain = list(zip((in_channels, *stem), stem, strict=False))
            for name, sizes in (
                ("stem_cls", chain),
                ("stem_box", chain),
                ("pred_cls", [(stem[-1], num_classes)]),
                ("pred_box", [(stem[-1], 4)]),
                ("pred_ctr", [(stem[-1], 1)]),
            ):
                layers = convolutions(getattr(model, name))
                got = to_plain_data([(conv.in_channels, conv.out_channels) for conv in layers])
                what = f"{name} with {describe(*setting)}"
                expect(got == sizes, f"{what}: expected channels {sizes}, got {got}")
                kernels = {to_plain_data(conv.kernel_size) for conv in layers}
                expect(kernels == {(3, 3)}, f"{what}: expected 3x3 kernels, got {kernels}")

    with result.probe("weights drawn from N(0, 0.01)"):
        for name, conv in _named_convolutions(head(*example)):
            weight = to_plain_data(conv.weight)
            mean, std = weight.mean().item(), weight.std().item()
            # Six standard errors of the smallest layer, which has 576 weights.
            expect(
                abs(mean) < 0.0025 and abs(std - 0.01) < 0.0018,
                f"{name}: expected weights of mean 0 and standard deviation 0.01, got mean "
                f"{mean:.3g} and standard deviation {std:.3g}",
            )

    with result.probe("biases 0"):
        for name, conv in _named_convolutions(head(*example)):
            if not name.startswith("pred_cls"):
                bias = to_plain_data(conv.bias)
                largest = "no bias" if bias is None else bias.abs().max().item()
                expect(largest == 0, f"{name}.bias: expected 0, got up to {show(largest)}")

    with result.probe("pred_cls.bias is -log(99)"):
        model = head(*example)
        expect_close("pred_cls.bias", model.pred_cls.bias, [-math.log(99)] * 20, 1e-5)

    with result.probe("predictions of shape (B, H * W, C)"):
        for setting in settings:
            num_classes, in_channels, _ = setting
            feats = {
                "p3": torch.randn(2, in_channels, 28, 28),
                "p4": torch.randn(2, in_channels, 14, 14),
                "p5": torch.randn(2, in_channels, 7, 7),
            }
            predictions = to_plain_data(head(*setting)(feats))
            for name, values, channels in zip(
                ("class logits", "deltas", "centerness logits"),
                predictions,
                (num_classes, 4, 1),
                strict=True,
            ):
                for level, feat in feats.items():
                    shape = (2, feat[0, 0].numel(), channels)
                    got = tuple(values[level].shape)
                    expect(
                        got == shape,
                        f"{name} of {level} with {describe(*setting)}, features "
                        f"{tuple(feat.shape)}: expected {shape}, got {got}",
                    )

    with result.probe("ReLU after each stem convolution"):
        model = with_random_weights(head(*example))
        maps = torch.randn(1, 64, 14, 14)
        for name in ("stem_cls", "stem_box"):
            stem = getattr(model, name)
            number = len(convolutions(stem))
            expect(number == 2, f"stem_channels=[64, 64]: expected 2 in {name}, got {number}")
            got, expected = to_plain_data(stem(maps)), _run_stem(stem, maps)
            expect(
                got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-3),
                f"{name} of a random feature map: expected 3x3 convolutions with padding 1, each "
                f"followed by ReLU, got other values (smallest {got.min():.3g})",
            )

    with result.probe("centerness comes from the box stem"):
        model = with_random_weights(head(*example))
        maps = torch.randn(1, 64, 14, 14)
        predictions = to_plain_data(model({level: maps for level in STRIDES}))
        for name, stem_name, values in (
            ("pred_cls", "stem_cls", predictions[0]["p3"]),
            ("pred_box", "stem_box", predictions[1]["p3"]),
            ("pred_ctr", "stem_box", predictions[2]["p3"]),
        ):
            outputs = getattr(model, name)(getattr(model, stem_name)(maps))  # (1, C, H, W)
            expected = _sorted_over_locations(to_plain_data(outputs))
            got = values.sort(dim=1).values
            if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-3):
                continue
            other = "stem_box" if stem_name == "stem_cls" else "stem_cls"
            outputs = getattr(model, name)(getattr(model, other)(maps))
            swapped = _sorted_over_locations(to_plain_data(outputs))
            same = got.shape == swapped.shape and torch.allclose(got, swapped, rtol=1e-3, atol=1e-3)
            raise CheckFailure(
                f"expected the outputs of {name}({stem_name}(features)), got "
                f"{f'those of {name}({other}(features))' if same else 'other values'}"
            )

    with result.probe("shared by all levels"):
        model = with_random_weights(head(*example))
        maps = torch.randn(1, 64, 14, 14)
        for values in to_plain_data(model({level: maps for level in STRIDES})):
            for level in ("p4", "p5"):
                what = f"the same features as p3 and as {level}: predictions of {level}"
                expect_close(what, values[level], values["p3"].detach(), 1e-5)
    return result


def _sorted_over_locations(maps: Tensor) -> Tensor:
    """Return maps ``(1, C, H, W)`` as ``(1, H * W, C)``, sorted: another check tests the order."""
    return maps.flatten(2).transpose(1, 2).sort(dim=1).values


def _named_convolutions(model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    expect(bool(layers), "expected torch.nn.Conv2d layers, found none")
    return layers


@torch.no_grad()
def with_random_weights(model: _Module) -> _Module:
    """Give convolutions weights that keep the size of signals, unlike a head's initial ones."""
    for conv in convolutions(model):
        nn.init.kaiming_normal_(conv.weight)
        if conv.bias is not None:
            nn.init.normal_(conv.bias, std=0.1)
    return model


def _run_stem(stem: nn.Module, feats: Tensor) -> Tensor:
    for conv in convolutions(stem):
        feats = F.conv2d(
            feats, to_plain_data(conv.weight), to_plain_data(conv.bias), padding=1
        ).relu()
    return feats
