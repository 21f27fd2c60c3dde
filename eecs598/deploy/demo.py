"""A page that detects objects in the photos dropped on it, made with Gradio (extra ``demo``).

The network runs once for a photo, for all detections above the lowest threshold. Moving a slider
filters these and runs NMS again. The page loads nothing from other machines and reports nothing.

Symbol: K detections.
"""

from __future__ import annotations

import html
import os
import socket
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from eecs598.data import ImageFiles, read_image
from eecs598.deploy.prediction import Detections, class_color, detect, draw_detections

if TYPE_CHECKING:
    import gradio

__all__ = ["launch_demo"]

LOWEST_SCORE = 0.05  # detections below it can't be asked for
SHOWN_SIDE = 1600  # larger photos are made smaller for the screen
LISTED = 12
LETTERS = 1.6  # a telephone shows a picture at a third of its size

_HINT = "Drop a photo, paste one, or take one with the camera."

_CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto; }
#head { margin: 0; }
#head h1 { font-size: 1.5rem; margin: 0 0 .1rem; }
#head p { color: var(--body-text-color-subdued); margin: 0; }
#found { padding: 0; }
#found p { margin: .3rem 0 .6rem; }
#found ul { list-style: none; margin: 0; padding: 0; display: grid; gap: .35rem .9rem;
            grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
#found li { display: flex; align-items: center; gap: .5rem; margin: 0; }
#found .color { width: .9rem; height: .9rem; border-radius: .2rem; flex: none;
                border: 1px solid rgb(0 0 0 / 40%); }
#found .score { margin-left: auto; font-variant-numeric: tabular-nums; }
@media (max-width: 640px) { #photo, #picture { height: 300px !important; } }
#found .error { border-left: .25rem solid #d33; padding-left: .6rem; }
"""


class _Seen(NamedTuple):
    """A photo and everything that was detected in it."""

    picture: Image.Image  # as shown
    candidates: Detections  # above ``LOWEST_SCORE`` and before NMS, in pixels of ``picture``
    seconds: float


def launch_demo(
    predict: Callable[..., Sequence[dict[str, Tensor]]],
    suppress: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    class_names: Sequence[str],
    *,
    image_size: int = 224,
    score_thresh: float = 0.4,
    nms_thresh: float = 0.6,
    device: str | torch.device = "cpu",
    title: str = "detector",
    examples: Sequence[str | os.PathLike[str]] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    inline: bool | None = None,
    open_browser: bool = False,
) -> gradio.Blocks:
    """Show a page for photos; it runs in the background until it is closed.

    Args:
        predict: ``FCOS.predict`` of a detector in evaluation mode, or what takes the same images
            ``(B, 3, H, W)``, ``score_thresh`` and ``nms_thresh`` and returns the same.
        suppress: ``common.class_spec_nms``.
        class_names: ``class_names[label]`` names a label.
        image_size: the shorter side of a photo is resized to it for the detector.
        score_thresh: where the slider of the score threshold stands at first.
        nms_thresh: likewise for NMS.
        device: of the detector.
        title: name of the detector, for the head of the page.
        examples: image files to try it on.
        host: address to listen on. The default can be reached from this machine alone.
        port: to listen on; the first free one from 7860 unless given.
        inline: show the page below the cell of a notebook; where there is one, unless given.
        open_browser: open the page in the browser.

    Returns:
        The running page, with its address ``local_url`` and a method ``close``.

    Raises:
        ValueError: Gradio is not installed.
        OSError: the port is taken.
    """
    if find_spec("gradio") is None:
        raise ValueError(
            'Gradio is not installed, which makes the page; `pip install -e ".[demo]"` does it.'
        )
    if port is not None:
        _check_port(host, port)  # Gradio would leave sockets open
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which Gradio reads when it is imported
    import gradio as gr

    def look(path: str | None, score: float, overlap: float) -> tuple[Any, Any, str]:
        if path is None:
            return None, None, f"<p>{_HINT}</p>"
        try:
            seen = _look(Path(path), predict, image_size, device)
        except ValueError as error:
            text = html.escape(str(error).replace(path, Path(path).name))
            return None, None, f'<p class="error" role="alert">{text}</p>'
        return seen, *show(seen, score, overlap)

    def show(seen: _Seen | None, score: float, overlap: float) -> tuple[Any, Any]:
        if seen is None:
            return gr.skip(), gr.skip()
        found = _above(seen.candidates, suppress, score, overlap)
        picture = draw_detections(seen.picture, found, class_names, letters=LETTERS)
        return picture, _list(found, class_names, score, seen.seconds)

    with gr.Blocks(
        title=f"FCOS: {title}", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.HTML(
            f"<h1>FCOS: {html.escape(title)}</h1><p>{len(class_names)} classes: "
            f"{html.escape(', '.join(class_names[:20]))}{'…' if len(class_names) > 20 else ''}</p>",
            elem_id="head",
        )
        seen = gr.State()
        with gr.Row():
            photo = gr.Image(
                type="filepath", show_label=False, height=400, elem_id="photo", buttons=[]
            )
            picture = gr.Image(
                show_label=False,
                interactive=False,
                format="jpeg",
                height=400,
                elem_id="picture",
                buttons=["download", "fullscreen"],
                alt_text="the photo with the boxes that were found",
            )
        # Gradio would open the file itself, and what is no image would fail without a sentence.
        photo.preprocess = _path_of  # type: ignore[assignment, method-assign]
        with gr.Row():
            with gr.Column():
                score = gr.Slider(
                    LOWEST_SCORE,
                    1,
                    max(score_thresh, LOWEST_SCORE),
                    step=0.01,
                    label="Score threshold",
                    info="Boxes score above it.",
                    elem_id="score",
                )
                overlap = gr.Slider(
                    0,
                    1,
                    nms_thresh,
                    step=0.01,
                    label="NMS threshold",
                    info="Of two boxes of a class with a higher IoU, the lower one is dropped.",
                    elem_id="overlap",
                )
            with gr.Column():
                found = gr.HTML(f"<p>{_HINT}</p>", elem_id="found")
        if examples:
            gr.Examples(
                [str(path) for path in examples], photo, label="Examples", elem_id="examples"
            )
        photo.change(look, [photo, score, overlap], [seen, picture, found], show_progress="minimal")
        for slider in (score, overlap):
            slider.change(
                show,
                [seen, score, overlap],
                [picture, found],
                show_progress="hidden",
                trigger_mode="always_last",
            )
    page.launch(
        server_name=host,
        server_port=port,
        inline=inline,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size="100mb",
        height=900,
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500"),
        css=_CSS,
    )
    return page


def _check_port(host: str, port: int) -> None:
    """Raise OSError unless this machine can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(
            f"can't listen on port {port} of {host} ({error.strerror or error}); choose another one"
        ) from error


def _path_of(upload: Any) -> str | None:
    """Return where Gradio put a file that was uploaded, whatever is in it."""
    return None if upload is None else upload.path


def _look(
    path: Path,
    predict: Callable[..., Sequence[dict[str, Tensor]]],
    image_size: int,
    device: str | torch.device,
) -> _Seen:
    """Read a photo and detect everything in it; raises ValueError for what is no image."""
    image = ImageFiles([path], image_size)[0]
    if image.error is not None:
        raise ValueError(image.error)
    start = time.perf_counter()

    def everything(images: Tensor) -> Sequence[dict[str, Tensor]]:
        return predict(images, score_thresh=LOWEST_SCORE, nms_thresh=1.0)

    ((_, candidates),) = detect(everything, [[image]], device)
    seconds = time.perf_counter() - start
    assert candidates is not None
    picture = read_image(path)
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    scale = torch.tensor([picture.width / image.width, picture.height / image.height])
    return _Seen(picture, {**candidates, "boxes": candidates["boxes"] * scale.repeat(2)}, seconds)


def _above(
    candidates: Detections,
    suppress: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    score: float,
    overlap: float,
) -> Detections:
    """Return the candidates above a score that NMS leaves, by decreasing score."""
    chosen = candidates["scores"] > score
    boxes, labels, scores = (candidates[key][chosen] for key in ("boxes", "labels", "scores"))
    kept = suppress(boxes, scores, labels, overlap)
    return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}


def _list(found: Detections, class_names: Sequence[str], score: float, seconds: float) -> str:
    """Write the detections as HTML, the highest score first."""
    count = len(found["scores"])
    rows = [
        f'<li><span class="color" style="background: rgb{class_color(label)}"></span>'
        f"<span>{html.escape(class_names[label])}</span>"
        f'<span class="score">{value:.2f}</span></li>'
        for label, value in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ]
    more = f"<p>and {count - LISTED} more</p>" if count > LISTED else ""
    head = f"{count} {'object' if count == 1 else 'objects'} above {score:.2f}"
    return f"<p>{head}, {1000 * seconds:.0f} ms</p><ul>{''.join(rows[:LISTED])}</ul>{more}"
