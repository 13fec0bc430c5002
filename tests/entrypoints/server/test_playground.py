"""The playground in a real browser: it draws, sounds, cancels, and can be read on a phone and used by keyboard."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import soundfile
from openai import OpenAI
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from support.server import ServerProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
SCENE = "show me a scarlet ball and play a C4 on a string"
ENDED = "#timeline svg, #error:not(:empty)"
LIMIT_MS = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 860}, bypass_csp=False)
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(server.address, timeout=LIMIT_MS)
    opened.wait_for_selector("svg .node", timeout=LIMIT_MS)
    yield opened
    context.close()
    assert not faults


def run(page: Page, model: str, prompt: str) -> None:
    page.select_option("#model", model)
    page.wait_for_selector("svg .node", timeout=LIMIT_MS)
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")


def keep_captions(page: Page) -> None:
    """What stands below the first picture, one after another: a picture may be done before one has looked."""
    page.evaluate("""() => {
        window.captions = [];
        new MutationObserver(() => {
            const caption = document.querySelector("#picture-0 figcaption")?.textContent;
            if (caption && caption !== captions.at(-1)) captions.push(caption);
        }).observe(document.body, {childList: true, subtree: true, characterData: true});
    }""")


def fetched(page: Page, selector: str) -> bytes:
    """What an element shows or plays."""
    script = """async element => {
        const bytes = new Uint8Array(await (await fetch(element.src)).arrayBuffer());
        return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""));
    }"""
    return base64.b64decode(page.eval_on_selector(selector, script))


def test_words_picture_and_sound_of_one_request(page: Page, client: OpenAI) -> None:
    page.get_by_text("Parameters").click()
    page.fill("input[name=seed]", "5")
    keep_captions(page)
    run(page, "tiny-omni", SCENE)
    page.wait_for_selector(ENDED, timeout=LIMIT_MS)
    *emerging, done = page.evaluate("captions")
    assert emerging and all(caption.startswith("emerging") for caption in emerging) and done.startswith("done after")
    options: Any = {"modalities": ["text", "image", "audio"], "seed": 5, "audio": {"format": "pcm16"}}
    whole = client.chat.completions.create(
        model="tiny-omni", messages=[{"role": "user", "content": SCENE}], **options
    ).choices[0]
    content: Any = whole.message.content
    assert page.inner_text("#words") == content[0]["text"]
    png = base64.b64decode(content[1]["image_url"]["url"].partition(",")[2])
    shown = Image.open(io.BytesIO(fetched(page, "#picture-0 img")))
    assert shown.tobytes() == Image.open(io.BytesIO(png)).tobytes()
    assert whole.message.audio is not None
    sound, rate = soundfile.read(io.BytesIO(fetched(page, "#sound")), dtype="int16")
    assert (sound.tobytes(), rate) == (base64.b64decode(whole.message.audio.data), 16_000)
    assert page.locator("svg .node.done").count() == page.locator("svg .node").count()
    assert "first sound" in page.inner_text("#facts")


def test_escape_cancels_and_the_request_ends(page: Page, server: ServerProcess) -> None:
    page.get_by_text("Parameters").click()
    page.fill("input[name=num_inference_steps]", "900")
    run(page, "tiny-omni", SCENE)
    page.wait_for_selector("figure.emerging", timeout=LIMIT_MS)
    assert len(server.requests()) == 1
    page.keyboard.press("Escape")
    page.wait_for_selector("#error:not(:empty)", timeout=LIMIT_MS)
    assert page.inner_text("#error") == "Cancelled."
    assert server.wait_until_idle() < 20
    assert page.is_enabled("#run")


def test_what_is_wrong_is_said_where_one_looks(page: Page) -> None:
    page.get_by_text("Parameters").click()
    page.fill("input[name=size]", "100000x10000")
    run(page, "tiny-omni", SCENE)
    page.wait_for_selector("#error:not(:empty)", timeout=LIMIT_MS)
    assert "height: got 10000" in page.inner_text("#error")


def test_the_same_request_can_be_copied(page: Page, server: ServerProcess) -> None:
    page.select_option("#model", "tiny-image")
    page.fill("#prompt", "it's a red circle")
    page.get_by_text("The same request by hand").click()
    assert page.inner_text("#code").startswith(f"curl {server.address}/v1/chat/completions")
    page.get_by_text("Copy as Python").click()
    code = page.inner_text("#code")
    shown: list[Any] = []
    exec(compile(code.replace("print(", "shown.append("), "copied", "exec"), {"shown": shown})
    assert shown[0].content[0]["type"] == "image_url"


def test_everything_fits_a_phone_and_can_be_reached_by_keyboard(browser: Browser, server: ServerProcess) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = context.new_page()
    page.goto(server.address, timeout=LIMIT_MS)
    page.wait_for_selector("svg .node", timeout=LIMIT_MS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"model", "theme", "run"} <= reached
    context.close()


def test_the_page_loads_nothing_from_elsewhere(browser: Browser, server: ServerProcess) -> None:
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.address, timeout=LIMIT_MS)
    page.wait_for_selector("svg .node", timeout=LIMIT_MS)
    assert asked and all(url.startswith((server.address, "data:", "blob:")) for url in asked)
    context.close()
