"""What several test files share."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

# The models of the tests are tiny: a second thread, here or in a process that a test starts, would
# spend its time waiting for the first.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C interrupt this process and those that it starts.

    A shell starts its background jobs with SIGINT ignored, and processes inherit that.
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        # CI runs as root, where Chromium has no sandbox.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def voc2007_dir() -> Path:
    """The development copy of VOC 2007, where there is one."""
    folder = SHARED / "voc2007"
    if not folder.is_dir():
        pytest.skip("no development copy of VOC 2007 on this machine")
    return folder


@pytest.fixture
def voc_folder(tmp_path: Path):
    """Return a function that writes a data set in VOC layout and returns its folder."""

    def write(images: dict[str, dict[str, tuple[Image.Image, list[tuple]]]]) -> Path:
        """``images[split][id] = (picture, [(class, x1, y1, x2, y2), ...])``."""
        folder = tmp_path / "data"
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for split, entries in images.items():
            (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{i}\n" for i in entries))
            for name, (picture, objects) in entries.items():
                picture.save(folder / f"JPEGImages/{name}.jpg", quality=95)
                xml = "".join(
                    f"<object><name>{label}</name><difficult>0</difficult><bndbox>"
                    f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
                    "</bndbox></object>"
                    for label, x1, y1, x2, y2 in objects
                )
                (folder / f"Annotations/{name}.xml").write_text(
                    f"<annotation><size><width>{picture.width}</width>"
                    f"<height>{picture.height}</height></size>{xml}</annotation>"
                )
        return folder

    return write


@pytest.fixture
def small_voc(voc_folder) -> Path:
    """Eight training and four validation images with one or two squares, of two classes."""
    random_numbers = random.Random(0)
    images: dict[str, dict] = {"train": {}, "val": {}}
    for number in range(12):
        size = (96, 64) if number % 2 else (64, 96)
        picture = Image.new("RGB", size, (90, 100, 110))
        objects = []
        for label, color in (("cube", (200, 40, 40)), ("dice", (40, 40, 200)))[: 1 + number % 2]:
            side = random_numbers.randint(16, 40)
            x, y = (random_numbers.randint(0, whole - side) for whole in size)
            picture.paste(color, (x, y, x + side, y + side))
            objects.append((label, x, y, x + side, y + side))
        images["train" if number < 8 else "val"][f"{number:04d}"] = (picture, objects)
    return voc_folder(images)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Grade first: submissions run in copies of this process, as long as copies work.

    After gradients with ``torch.compile`` or fake tensors, new processes take the place of copies.
    These are slower, and know nothing of what a test has replaced.
    """
    items.sort(key=lambda item: "grad" not in item.path.name and "grading" not in item.path.parts)
