"""The page, driven in a real browser: dropping an image, clicking, sliding, typing, two visitors at once."""

import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from modeling_castream import CAStreamForImageClassification
from tests.app.conftest import APP

pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[app]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[test]'")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver (Debian or Ubuntu)"
)
SECRET = "hf_secret_of_the_server"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-proxy-server",
)


def wait(condition, seconds=60):
    """Poll until `condition()` returns something true, and return that."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except Exception as error:  # elements come and go while the page redraws
            failure = error
        else:
            failure = None
        assert time.monotonic() < end, failure or "it did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Folder in which the app works; its temporary files go to `tmp`, Gradio's to `gradio`."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "tmp").mkdir()
    return folder


@pytest.fixture(scope="module")
def url(model_dir, scratch):
    """Address of the app, started as its users start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf_home"),
        "HF_TOKEN": SECRET,
        "GRADIO_TEMP_DIR": str(scratch / "gradio"),
        "TMPDIR": str(scratch / "tmp"),
    }
    command = [sys.executable, APP / "app.py", "--model", model_dir, "--port", str(port)]
    with open(scratch / "log", "w") as log:
        server = subprocess.Popen(command, cwd=scratch, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None, 180)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


class Visitor:
    """One browser on the page."""

    def __init__(self, url, profile, width=1280, height=1000, dark=False):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(profile / "downloads")})
        # on a busy machine it may not start within its own minute
        self.driver = wait(lambda: webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)), 150)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(url)
        wait(lambda: self.find("#photo input[type=file]"))

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def give(self, path):
        """Choose a file, as a drop does it, too."""
        self.find("#photo input[type=file]").send_keys(str(path))

    def classes(self):
        return [label.text for label in self.all("#classes label")]

    def headline(self):
        return self.find("#explanation h2").text

    def explained(self, label):
        wait(lambda: self.headline() == f"What speaks for “{label}”?")

    def image(self, alt):
        """A map as it came: RGBA pixels."""
        source = self.find(f'#explanation img[alt="{alt}"]').get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))

    def screenshot(self, element):
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        time.sleep(0.3)
        return Image.open(io.BytesIO(base64.b64decode(element.screenshot_as_base64))).convert("RGB")

    def move(self, selector, key, times=1):
        slider = self.find(f"{selector} input[type=range]")
        for _ in range(times):
            slider.send_keys(key)


@pytest.fixture
def visit(url, tmp_path):
    """Open the page, any number of times."""
    visitors = []

    def open_page(**kwargs):
        visitors.append(Visitor(url, tmp_path / f"profile{len(visitors)}", **kwargs))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.driver.quit()


@pytest.fixture(scope="module")
def explain(model_dir):
    model = CAStreamForImageClassification.from_pretrained(model_dir)
    return model.explainer(AutoImageProcessor.from_pretrained(model_dir))


def test_a_dropped_image_shows_its_classes_and_the_maps_of_the_first(visit, explain, photos):
    visitor, answers = visit(), explain(str(photos[0]), method="grad_cam", pooling="ca")
    visitor.give(photos[0])
    visitor.explained(answers[0]["label"])
    assert visitor.classes() == [f"{answer['label']}: {answer['score']:.1%}" for answer in answers]
    shown = visitor.image(f"Grad-CAM under CA for {answers[0]['label']}")
    seen = shown[..., 3] == 255
    expected = explain.color_map()[(answers[0]["saliency"] * 255).round().astype(np.uint8)]
    assert np.array_equal(shown[..., :3][seen], expected[seen])
    assert len(visitor.all("#explanation figure")) == 6 + 1 + 5


def test_the_shown_pixels_are_photo_and_map_at_the_slider_s_opacity(visit, explain, photos):
    visitor = visit()
    visitor.give(photos[0])
    label = explain(str(photos[0]), top_k=1)[0]["label"]
    visitor.explained(label)
    for key, opacity in ((None, 0.6), (Keys.END, 1.0), (Keys.HOME, 0.0)):
        if key:
            visitor.move("#opacity", key)
        image = visitor.find(f'#explanation img[alt="Attention-CAM under GAP for {label}"]')
        wait(lambda image=image, opacity=opacity: float(image.value_of_css_property("opacity")) == opacity)
        shown = visitor.screenshot(image.find_element(By.XPATH, ".."))
        [answer] = explain(str(photos[0]), method="attention_cam", pooling="gap", target=label, alpha=opacity)
        expected = answer["overlay"].resize(shown.size, Image.Resampling.BILINEAR)
        margin = 4  # rounded corners
        difference = np.abs(np.asarray(shown, dtype=float) - np.asarray(expected))[margin:-margin, margin:-margin]
        assert difference.mean() < 4, opacity


def test_another_class_is_explained_when_it_is_clicked(visit, explain, photos):
    visitor = visit()
    visitor.give(photos[0])
    first, second = (answer["label"] for answer in explain(str(photos[0]), top_k=2))
    visitor.explained(first)
    visitor.all("#classes label")[1].click()
    visitor.explained(second)
    [answer] = explain(str(photos[0]), method="grad_cam_plus_plus", pooling="gap", target=second)
    shown = visitor.image(f"Grad-CAM++ under GAP for {second}")
    seen = shown[..., 3] == 255
    expected = explain.color_map()[(answer["saliency"] * 255).round().astype(np.uint8)]
    assert np.array_equal(shown[..., :3][seen], expected[seen])


def test_the_depth_slider_shows_one_depth_at_a_time(visit, photos):
    visitor = visit()
    visitor.give(photos[0])
    wait(lambda: visitor.find("#explanation h2"))

    def visible():
        return [figure.get_attribute("data-depth") for figure in visitor.all("[data-depth]") if figure.is_displayed()]

    assert visible() == ["5"]
    visitor.move("#depth", Keys.ARROW_LEFT, 3)
    wait(lambda: visible() == ["2"])


def test_everything_works_by_keyboard(visit, explain, photos):
    visitor = visit()
    visitor.give(photos[0])
    first, second = (answer["label"] for answer in explain(str(photos[0]), top_k=2))
    visitor.explained(first)
    visitor.driver.execute_script("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        visitor.driver.switch_to.active_element.send_keys(Keys.TAB)
        active = visitor.driver.switch_to.active_element
        for name in ("classes", "opacity", "depth", "download"):
            if visitor.driver.execute_script("return arguments[0].closest('#' + arguments[1]) !== null", active, name):
                reached.add(name)
        text = active.find_element(By.XPATH, "..").text
        if active.get_attribute("type") == "radio" and text.startswith(f"{second}:"):
            active.send_keys(Keys.SPACE)
            visitor.explained(second)
    assert reached == {"classes", "opacity", "depth", "download"} and visitor.headline().endswith(f"“{second}”?")


def test_a_text_file_named_jpg_is_refused_in_words(visit, photos, tmp_path, model_dir):
    visitor = visit()
    (tmp_path / "notes.jpg").write_text("dear diary")
    visitor.give(tmp_path / "notes.jpg")
    wait(lambda: "not an image" in visitor.find("#message").text)
    assert not visitor.all("#explanation") and not visitor.classes()
    source = visitor.driver.page_source
    assert SECRET not in source and str(model_dir) not in source and str(APP) not in source
    visitor.find("#photo button[aria-label='Remove Image']").click()
    wait(lambda: visitor.find("#photo input[type=file]"))
    visitor.give(photos[0])
    wait(lambda: visitor.find("#explanation h2"))
    assert visitor.find("#message").text == ""


def test_two_visitors_at_once_see_each_their_own(visit, explain, photos):
    visitors = [visit(), visit()]
    for visitor, path in zip(visitors, photos, strict=True):
        visitor.give(path)
    answers = [explain(str(path), method="grad_cam", pooling="ca", top_k=2) for path in photos]
    for visitor, (best, _) in zip(visitors, answers, strict=True):
        visitor.explained(best["label"])
    for visitor in visitors:
        visitor.all("#classes label")[1].click()
    for visitor, path, (_, second) in zip(visitors, photos, answers, strict=True):
        visitor.explained(second["label"])
        [answer] = explain(str(path), method="grad_cam", pooling="ca", target=second["label"])
        shown = visitor.image(f"Grad-CAM under CA for {second['label']}")
        seen = shown[..., 3] == 255
        expected = explain.color_map()[(answer["saliency"] * 255).round().astype(np.uint8)]
        assert np.array_equal(shown[..., :3][seen], expected[seen])


def test_the_picture_can_be_kept(visit, photos, tmp_path, scratch):
    visitor = visit()
    visitor.give(photos[0])
    wait(lambda: visitor.find("#explanation h2"))
    button = wait(lambda: visitor.find("#download:not([disabled])"))
    time.sleep(0.5)
    button.click()
    path = wait(lambda: [path for path in tmp_path.rglob("downloads/*") if path.suffix == ".png"])[0]
    assert Image.open(path).width == 676
    # what Gradio does not know of, it never deletes: each visitor's picture would stay
    assert not list(scratch.glob("tmp/**/explanation.png"))
    assert list(scratch.glob("gradio/**/explanation.png"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 1000)], ids=["phone", "desktop"])
def test_it_fits_the_screen_and_can_be_read(visit, photos, width, height, dark):
    visitor = visit(width=width, height=height, dark=dark)
    visitor.give(photos[0])
    wait(lambda: visitor.find("#explanation h2"))
    assert visitor.driver.execute_script("return document.documentElement.scrollWidth") <= width
    figures = [figure for figure in visitor.all("#explanation figure") if figure.is_displayed()]
    assert min(figure.size["width"] for figure in figures) >= 140
    for selector in ("#explanation figcaption", "#explanation p", "#classes label", "#opacity label, #opacity span"):
        ink, paper = visitor.driver.execute_script(_COLORS, visitor.find(selector))
        assert contrast(ink, paper) >= 4.5, selector


_COLORS = """
let element = arguments[0], paper = element;
while (paper && /rgba\\(.*, 0\\)|transparent/.test(getComputedStyle(paper).backgroundColor)) {
    paper = paper.parentElement;
}
return [getComputedStyle(element).color, paper ? getComputedStyle(paper).backgroundColor : 'rgb(255, 255, 255)'];
"""


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two CSS colours."""

    def luminance(color):
        numbers = color[color.index("(") + 1 : color.index(")")].replace(",", " ").split()[:3]
        values = [float(number) / 255 for number in numbers]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)
