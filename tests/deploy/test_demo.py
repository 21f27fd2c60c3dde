"""The page for photos, in a headless browser."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import class_spec_nms
from eecs598.data import unnormalize
from eecs598.deploy import demo

pytest.importorskip("gradio")


class RedSquares:
    """Finds the red part of an image twice, and a wide box that overlaps it by a third."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: torch.Tensor, score_thresh: float, nms_thresh: float) -> list[dict]:
        self.calls += 1
        found = []
        for red, green, _ in unnormalize(images):
            y, x = (red - green > 0.4).nonzero().unbind(1)
            x1, y1, x2, y2 = (int(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1))
            side = x2 - x1
            boxes = [[x1, y1, x2, y2], [x1, y1, x2, y2 - 1], [x1, y1, x2 + 2 * side, y2]]
            scores = torch.tensor([0.8, 0.7, 0.5])
            kept = scores > score_thresh
            found.append(
                {
                    "boxes": torch.tensor(boxes, dtype=torch.float32)[kept],
                    "labels": torch.tensor([1, 1, 1])[kept],
                    "scores": scores[kept],
                }
            )
        assert nms_thresh == 1.0
        return found


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    picture = Image.new("RGB", (600, 400), "white")
    picture.paste((220, 20, 20), (100, 100, 200, 200))
    path = tmp_path_factory.mktemp("photos") / "square.png"
    picture.save(path)
    return path


@pytest.fixture(scope="module")
def served(photo) -> Iterator[SimpleNamespace]:
    """A page for ``RedSquares``, with its address."""
    detector = RedSquares()
    page = demo.launch_demo(
        detector,
        class_spec_nms,
        ["cube", "<dice>"],
        image_size=200,
        title="squares",
        examples=[photo],
        inline=False,
    )
    yield SimpleNamespace(detector=detector, url=page.local_url)
    page.close()


@pytest.fixture
def page(served, browser):
    """The page at the width of a telephone; errors in the console and other hosts are faults."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.set_default_timeout(20_000)
    complaints = []

    def note(message) -> None:
        if message.type == "error":
            complaints.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url))
    page.goto(served.url)
    page.locator("#photo input[type=file]").wait_for(state="attached")
    yield page
    page.close()
    own = (served.url, served.url.replace("http:", "ws:"), "data:", "blob:")
    assert [text for text in complaints if not text.startswith(own)] == []


def set_slider(page, name: str, value: str) -> None:
    number = page.locator(f"#{name} input[type=number]")
    number.fill(value)
    number.press("Tab")


def wait_for_text(page, text: str) -> None:
    page.locator("#found").get_by_text(text).wait_for()


def test_a_box_appears_and_the_sliders_take_it_away(page, served, photo):
    served.detector.calls = 0
    page.locator("#photo input[type=file]").set_input_files(photo)
    wait_for_text(page, "2 objects above 0.40")
    assert page.locator("#found li").all_inner_texts() == ["<dice>\n0.80", "<dice>\n0.50"]
    assert page.locator("#picture img").is_visible()
    set_slider(page, "score", "0.6")
    wait_for_text(page, "1 object above 0.60")
    set_slider(page, "overlap", "1")
    wait_for_text(page, "2 objects above 0.60")  # the one that NMS has dropped
    set_slider(page, "score", "0.9")
    wait_for_text(page, "0 objects above 0.90")
    assert served.detector.calls == 1
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_an_example_is_one_click(page):
    page.locator("#examples .gallery-item").first.click()
    wait_for_text(page, "2 objects above 0.40")


def test_what_is_no_image_is_answered_with_a_sentence(page, photo, tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "notes.jpg")
    wait_for_text(page, "notes.jpg can't be read as an image: it is in none of the formats")
    assert page.locator("#picture img").count() == 0
    page.get_by_role("button", name="Remove Image").click()
    wait_for_text(page, "Drop a photo")


def test_the_page_follows_the_theme(browser, served):
    colors = []
    for theme in ("light", "dark"):
        page = browser.new_page(color_scheme=theme)
        page.goto(served.url)
        page.locator("#photo").wait_for()
        colors.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    light, dark = (sum(map(int, color[4:-1].split(", "))) for color in colors)
    assert light > 700 and dark < 100


def test_the_page_is_for_this_machine_alone(served):
    assert served.url.startswith("http://127.0.0.1:")
    port = served.url.rstrip("/").rsplit(":", 1)[1]
    with pytest.raises(OSError):  # another address of the same machine
        urllib.request.urlopen(f"http://127.0.0.2:{port}/", timeout=5)


def test_boxes_are_drawn_where_they_are(photo):
    seen = demo._look(photo, RedSquares(), 200, "cpu")
    found = demo._above(seen.candidates, class_spec_nms, 0.6, 0.6)
    torch.testing.assert_close(found["boxes"], torch.tensor([[100.0, 100, 200, 200]]))


def test_large_photos_are_shown_smaller(tmp_path):
    picture = Image.new("RGB", (4000, 2000), "white")
    picture.paste((220, 20, 20), (1000, 1000, 2000, 2000))
    picture.save(tmp_path / "large.jpg")
    seen = demo._look(tmp_path / "large.jpg", RedSquares(), 200, "cpu")
    assert seen.picture.size == (1600, 800)
    expected = torch.tensor([400.0, 400, 800, 800])
    torch.testing.assert_close(seen.candidates["boxes"][0], expected, atol=8, rtol=0)


def test_without_gradio(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Gradio is not installed"):
        demo.launch_demo(RedSquares(), class_spec_nms, ["cube"])
