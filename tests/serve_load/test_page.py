"""The chat page in a real browser: needs playwright (`pip install playwright`) and a Chromium on the path."""

import re
import shutil

import pytest
from live_server import live

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server():
    with live() as running:
        yield running


@pytest.fixture
def page(server):
    """A fresh browser; afterwards: nothing went wrong in the page, and nothing was asked of another host."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(locale="en-US", permissions=["clipboard-read", "clipboard-write"])
        opened, wrong, asked = context.new_page(), [], []
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("console", lambda message: message.type == "error" and "status of 400" not in message.text
                  and wrong.append(message.text))   # Chromium's own line for an answer that the page shows
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(server.url)
        opened.wait_for_function("document.querySelector('#model').options.length > 0")
        yield opened
        assert wrong == [] and all(url.startswith(server.url) for url in asked) and len(asked) > 5
        browser.close()
    server.idle()


def write(page, text):
    page.fill("#ask", text)
    page.click("#send")
    page.wait_for_selector("#send:not([hidden])")


def set_tokens(page, number):
    page.click("#open-settings")
    page.fill("#dials label:nth-child(6) input", str(number))
    page.press("#dials label:nth-child(6) input", "Tab")
    page.click("#close-settings")


def test_a_base_model_continues_a_text(page, server):
    assert "base model" in page.inner_text(".welcome")
    set_tokens(page, 30)
    write(page, "hello ")
    body = page.locator("article.assistant .body")
    first = body.inner_text()
    assert page.locator("article.assistant .token").count() > 10
    assert "30 tokens" in page.inner_text("article.assistant .note") and "of 256" in page.inner_text("#room")
    page.click("#send")   # go on: the box is empty
    page.wait_for_selector("#send:not([hidden])")
    assert body.count() == 2 and body.first.inner_text() == first


def test_probabilities_on_hover_and_by_keys(page):
    set_tokens(page, 20)
    write(page, "abc")
    page.locator("article.assistant .token").nth(3).hover()
    rows = page.locator("#tip > div")
    assert 3 <= rows.count() <= 6 and re.search(r"\d %", rows.first.inner_text())
    page.keyboard.press("Escape")
    page.focus("#talk")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".looked-at").count() == 1 and "probability" in page.inner_text("#status")


def test_stop_stops_the_engine(page, server, monkeypatch):
    server.slow(monkeypatch, 0.05)
    page.fill("#ask", "go")
    page.click("#send")
    page.wait_for_selector("article.assistant .token")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:not([hidden])")
    server.idle(3)
    assert page.locator("article.assistant .token").count() < 100 and "Stopped" in page.inner_text("#status")


def test_chat_edit_regenerate_copy_and_what_is_kept(page, server):
    page.click("#mode-chat")
    set_tokens(page, 12)
    write(page, "first words")
    page.hover("article.user")
    page.click("article.user .actions button:has-text('Edit')")
    page.fill("article.user textarea", "other words")
    page.click("article.user button:has-text('Save and send')")
    page.wait_for_selector("#send:not([hidden])")
    assert page.locator("article").count() == 2 and page.inner_text("article.user .body") == "other words"
    before = page.inner_text("article.assistant .note")
    page.click("article.assistant .actions button:has-text('Write again')")
    page.wait_for_selector("#send:not([hidden])")
    assert page.locator("article").count() == 2 and page.inner_text("article.assistant .note") != before
    page.click("article.assistant .actions button:has-text('Copy')")
    copied = page.evaluate("navigator.clipboard.readText()")
    page.reload()
    page.wait_for_selector("article.assistant .token")
    assert page.evaluate("document.querySelector('article.assistant .body').textContent") == copied
    assert page.inner_text("#list li button:first-child") == "other words"


def test_the_system_prompt_and_dials_are_sent(page):
    page.click("#mode-chat")
    page.click("#open-settings")
    page.fill("#system", "be kind")
    page.fill("#dials label:nth-child(1) input[type=number]", "0")
    page.press("#dials label:nth-child(1) input[type=number]", "Tab")
    with page.expect_request("**/v1/chat/completions") as sent:
        write(page, "hi")
    body = sent.value.post_data_json
    assert body["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert body["temperature"] == 0 and "top_p" not in body
    assert page.locator(".error").count() == 0


def test_a_refusal_is_shown_and_can_be_tried_again(page, server):
    page.click("#mode-chat")
    write(page, "x" * 400)
    assert "at most 256" in page.inner_text(".error") and page.get_attribute(".error", "role") == "alert"


def test_chinese_dark_and_phones(page):
    page.click("#language")
    assert page.inner_text("#new") == "新对话" and page.get_attribute("html", "lang") == "zh-Hans"
    light = page.evaluate("getComputedStyle(document.body.parentNode).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body.parentNode).backgroundColor") != light
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("#open-side")
    page.click("#new")
    unnamed = page.evaluate("""[...document.querySelectorAll('button, input, select, textarea')].filter(one =>
        !one.textContent.trim() && !one.getAttribute('aria-label') && !one.labels?.length).map(one => one.outerHTML)""")
    assert unnamed == []
