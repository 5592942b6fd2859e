"""The page: photo and classes above, maps below. Whatever belongs to a visitor lives in that visitor's session."""

import os
import tempfile
from pathlib import Path

import gradio as gr
from explanation import Explainer, Explanation, NoPhoto, open_photo
from PIL import Image
from rendering import to_html, to_picture

FILES_LIVE_SECONDS = 3600
LARGEST_UPLOAD = "20mb"
MOST_SESSIONS = 200
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]  # of the visitor's machine: nothing is fetched
THEME = gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"])
# Opacity and depth act in the browser, on what is there already.
_SET_OPACITY = "value => document.querySelector('#explanation')?.style.setProperty('--opacity', value)"
_SET_DEPTH = """value => document.querySelectorAll('#explanation [data-depth]').forEach(
    figure => { figure.hidden = figure.dataset.depth != value; })"""
INTRODUCTION = """# What does this classifier look at?
Give it a photo, pick a class, and compare what speaks for it under {own} and under the attention
of [CA-Stream](https://arxiv.org/abs/2404.14996) (CA): the same network, pooled in two ways."""
EMPTY = '<p class="empty">The maps will appear here.</p>'


def build_page(explainer: Explainer, title: str) -> gr.Blocks:
    """The page for a model.

    Args:
        title: name of the model, for the browser's tab and the first line.
    """
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(FILES_LIVE_SECONDS, FILES_LIVE_SECONDS)) as page:
        photo_state = gr.State(None, time_to_live=FILES_LIVE_SECONDS)
        explanation_state = gr.State(None, time_to_live=FILES_LIVE_SECONDS)
        gr.Markdown(f"{INTRODUCTION.format(own=explainer.own_readout)} Model: {title}.")
        with gr.Row():
            upload = gr.Image(
                type="filepath", label="Photo", height=300, sources=["upload", "webcam", "clipboard"], elem_id="photo"
            )
            # The page itself judges what was uploaded: Gradio's own check would end in an error without words.
            upload.preprocess = lambda payload: payload.path if payload else None
            with gr.Column():
                message = gr.Markdown(elem_id="message")
                classes = gr.Radio([], label="Top classes", elem_id="classes", visible=False)
                opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity of the colours", elem_id="opacity")
                depths = len(explainer.depths)
                depth = gr.Slider(
                    1,
                    max(depths, 2),  # Gradio's sliders have two ends
                    depths,
                    step=1,
                    label="Depth of the raw attention",
                    elem_id="depth",
                    visible=depths > 1,
                )
                download = gr.DownloadButton("Download the picture", elem_id="download", interactive=False)
        maps = gr.HTML(EMPTY, elem_id="maps")

        acts = _Acts(explainer, download.GRADIO_CACHE)
        shown = {"outputs": [explanation_state, maps, download], "api_visibility": "private"}
        upload.change(acts.read, upload, [photo_state, message, classes], api_visibility="private").then(
            acts.show, [photo_state, classes, opacity, depth], **shown
        )
        classes.input(acts.show, [photo_state, classes, opacity, depth], **shown)
        for slider, act in ((opacity, _SET_OPACITY), (depth, _SET_DEPTH)):
            slider.change(None, slider, None, js=act)
            slider.release(
                acts.redraw,
                [explanation_state, opacity, depth],
                download,
                api_visibility="private",
                show_progress="hidden",
            )
    return page


class _Acts:
    """What the page answers to what a visitor does.

    Args:
        cache: folder of the download button: Gradio empties it, and of a file elsewhere it would keep the original.
    """

    def __init__(self, explainer: Explainer, cache: str):
        self.explainer = explainer
        self.cache = cache

    def read(self, path: str | None):
        """A new photo: its classes, or a line that says why there are none."""
        if path is None:
            return None, "", gr.Radio([], value=None, visible=False)
        try:
            photo = open_photo(path, self.explainer.pipe.decode_image)
        except NoPhoto as error:
            return None, f"**{error}**", gr.Radio([], value=None, visible=False)
        found = self.explainer.classes(photo)
        choices = [(f"{label}: {score:.1%}", class_id) for class_id, label, score in found]
        return photo, "", gr.Radio(choices, value=found[0][0], visible=True)

    def show(self, photo: Image.Image | None, class_id: int | None, opacity: float, depth: int):
        """Maps for the chosen class."""
        explanation = None if photo is None or class_id is None else self.explainer.explain(photo, class_id)
        shown = EMPTY if explanation is None else to_html(explanation, self.explainer.colors, opacity, depth)
        return explanation, shown, self.redraw(explanation, opacity, depth)

    def redraw(self, explanation: Explanation | None, opacity: float, depth: int):
        """The picture for keeping, after a slider moved."""
        if explanation is None:
            return gr.DownloadButton(value=None, interactive=False)
        os.makedirs(self.cache, exist_ok=True)
        path = Path(tempfile.mkdtemp(dir=self.cache)) / "explanation.png"
        to_picture(explanation, self.explainer.colors, opacity, int(depth)).save(path)
        return gr.DownloadButton(value=str(path), interactive=True)
