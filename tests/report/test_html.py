"""The report of an evaluation: what is in the file, and how it behaves in a browser."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch

from eecs598.metrics.text_format import read_text_format
from eecs598.report.analysis import analyze, compare
from eecs598.report.html import figures_html, write_report
from tests.evaluations import KINDS, export, make_evaluation

VOID = {"meta", "link", "image", "rect", "path", "polyline", "circle", "input", "br"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    evaluation = make_evaluation(folder)
    other = export(make_evaluation(folder, drop=("first",)), folder / "other")
    write_report(
        folder / "report.html",
        analyze(evaluation),
        title="shapes <val>",
        facts=["run/checkpoint.pt"],
        comparison=compare(evaluation, read_text_format(other), "the other run"),
    )
    return folder / "report.html"


class _Outline(HTMLParser):
    """Checks that what is opened is closed, and collects references and labels."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.ids, self.labelled_by = [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.references += [attributes[name] for name in ("href", "src") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.labelled_by += [attributes.get("aria-labelledby")]

    def handle_startendtag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_outside(report):
    text = report.read_text(encoding="utf-8")
    outline = _Outline()
    outline.feed(text)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    for reference in outline.references:
        assert reference.startswith(("data:", "#"))
        assert not reference.startswith("#") or reference[1:] in outline.ids
    assert {name for name in outline.labelled_by if name} <= set(outline.ids)
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_both_rules_for_difficult_objects_are_named(report, tmp_path):
    text = report.read_text(encoding="utf-8")
    assert "mAP by the devkit&#39;s rule" in text
    assert "it is not known which objects are difficult" in text
    evaluation = make_evaluation(tmp_path)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    found_too = {"boxes": torch.tensor([[0.0, 0, 30, 30]]), "labels": torch.tensor([1])}
    difficult = [nothing, nothing, nothing, found_too]
    evaluation = dataclasses.replace(evaluation, difficult=difficult)
    write_report(tmp_path / "report.html", analyze(evaluation), title="val")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a match to one of 1 difficult objects counts neither way" in text


def test_names_are_text_and_not_markup(report):
    text = report.read_text(encoding="utf-8")
    assert "a &lt; b" in text and "a < b" not in text
    assert "shapes &lt;val&gt;" in text and "<val>" not in text


def test_every_kind_of_mistake_has_a_picture(report):
    text = report.read_text(encoding="utf-8")
    figures = re.findall(r'<figure data-kind="(\w+)" data-class=', text)
    assert set(figures) == KINDS
    assert text.count("data:image/jpeg;base64,") == len(figures)
    # The duplicate at 11, 10, 50, 50, in a file with twice the pixels that the detector saw. The
    # margin reaches over the corner of the image, so that the picture begins there.
    assert '<rect class="found" x="22.0" y="20.0" width="78.0" height="80.0"/>' in text


def test_the_comparison_is_in_words(report):
    text = report.read_text(encoding="utf-8")
    assert "Compared with the other run" in text
    assert "a difference of +25.0 points" in text


def test_images_that_are_gone_leave_out_pictures_only(tmp_path):
    analysis = analyze(make_evaluation(tmp_path))
    for path in tmp_path.glob("*.png"):
        path.unlink()
    write_report(tmp_path / "report.html", analysis, title="val")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<figure data-kind" not in text and "Precision and recall" in text


def test_ground_truth_outside_its_image(tmp_path):
    evaluation = make_evaluation(tmp_path)
    evaluation.targets[2]["boxes"] += 300.0
    write_report(tmp_path / "report.html", analyze(evaluation), title="val")
    assert 'data-kind="missed"' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_many_classes_all_have_their_mistakes(tmp_path):
    evaluation = make_evaluation(tmp_path)
    names = [f"class {number}" for number in range(150)]
    count = len(names)
    boxes = torch.tensor([[10.0, 10, 50, 50]]).repeat(count, 1)
    everything = {"boxes": boxes, "labels": torch.arange(count), "scores": torch.rand(count)}
    nothing = {"boxes": boxes + 50, "labels": torch.arange(count)}
    evaluation = dataclasses.replace(
        evaluation,
        class_names=names,
        **{name: getattr(evaluation, name)[:1] for name in ("image_paths", "image_sizes")},
        predictions=[everything],
        targets=[nothing],
    )
    write_report(tmp_path / "report.html", analyze(evaluation), title="val")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for kind in ("missed", "background"):
        assert len(re.findall(f'data-kind="{kind}"', text)) == count


def test_figures_for_a_notebook(tmp_path):
    html = figures_html(analyze(make_evaluation(tmp_path)))
    assert html.count("<svg") >= 5 and "<html" not in html and "<script" not in html


# --------------------------------------------------------------------------------------------
# In a browser
# --------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser, report):
    """The report at the width of a phone; a message in the console is an error."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert [text for text in complaints if not text.startswith(("file:", "data:"))] == []


def test_headings_sort_their_table_with_the_keyboard(page):
    names = "#classes tbody th"
    assert page.locator(names).all_inner_texts() == ["cat", "a < b"]
    heading = page.locator("#classes thead th").nth(0)
    heading.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert page.locator(names).all_inner_texts() == ["a < b", "cat"]
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert page.locator(names).all_inner_texts() == ["cat", "a < b"]
    page.locator("#classes thead th").nth(1).get_by_role("button").click()  # AP, the highest first
    assert heading.get_attribute("aria-sort") is None
    assert page.locator(names).all_inner_texts() == ["cat", "a < b"]


def test_mistakes_are_filtered_by_kind_and_class(page):
    shown = page.locator(".gallery figure:visible")
    total = shown.count()
    assert total == 6
    page.get_by_role("combobox", name="Kind").select_option("duplicate")
    assert shown.count() == 1 and "duplicate" in shown.inner_text().lower()
    page.get_by_role("combobox", name="Class").select_option("a < b")
    assert shown.count() == 0
    assert page.locator("#shown").inner_text() == "0 of 0 shown"
    page.get_by_role("combobox", name="Kind").select_option("")
    assert {figure.get_attribute("data-class") for figure in shown.all()} == {"a < b"}


def test_the_page_fits_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_page_follows_the_theme(browser, report):
    backgrounds = []
    for theme in ("light", "dark"):
        page = browser.new_page(color_scheme=theme)
        page.goto(report.as_uri())
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(20, 24, 28)"]
