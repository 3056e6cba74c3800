"""The page in a real browser: it draws, answers clicks, keys and filters, and breaks no rule of its own policy."""

from __future__ import annotations

import os
import shutil

import pytest
from viz_kit import wide

from anabranch import viz

sync = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"no Chromium to start: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """open(result, **context): the page, drawn; nothing may have been said on its console by the end."""
    said: list[str] = []
    contexts = []

    def open_(result, width=1280, height=800, **options):
        path = tmp_path / "page.html"
        viz.save_html(result, path)
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url)
        )
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []


def press(page, *keys):
    page.focus("#stage")
    for key in keys:
        page.keyboard.press(key)


def details(page) -> str:
    return page.inner_text("#of")


def test_keys_walk_along_threads_and_across_them(open_page):
    page = open_page(wide())
    press(page, "ArrowDown")
    assert "Thread 0\n" in details(page) and "Token 1" in details(page)
    press(page, "n")  # the first fork
    assert "Thread 0.0\n" in details(page) and "forked from 0, at tick 5" in details(page)
    assert "put there by the strategy" in details(page)  # its header
    press(page, "ArrowRight", "ArrowRight")
    assert "Token 3" in details(page) and "log-probability" in details(page)
    press(page, "p")
    assert "Thread 0\n" in details(page) and "Token 5" in details(page)
    press(page, "n", "j")
    assert "Thread 0\n" in details(page)
    press(page, "End")
    count = len(viz.timeline(wide()).lanes[0].tokens)
    assert f"Token {count}" in details(page)
    press(page, "Home", "ArrowLeft")
    assert "Token 1\n" in details(page)
    assert "thread 0, token 1 of" in page.inner_text("#said")
    press(page, "Escape")
    assert "Click or tap" in details(page)
    press(page, "?")
    assert page.is_visible("#help") and "join" in page.inner_text("#help")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help")


@pytest.mark.parametrize("lane", [0, 1, 2, 5])
def test_what_a_thread_saw_is_what_python_says(open_page, lane):
    result = wide()
    drawn = viz.timeline(result)
    page = open_page(result)
    press(page, *["ArrowDown"] * (lane + 1), "End", "Enter")
    token = len(drawn.lanes[lane].tokens) - 1
    shown = "".join(page.locator("#text div").all_inner_texts())
    assert page.get_attribute("#tab-saw", "aria-selected") == "true"
    seen = drawn.context_ids(lane, token)
    assert f"{len(seen)} tokens" in details(page)
    origins = [head.split(" · ")[0] for head in page.locator("#text h3").all_inner_texts()]
    assert origins[0] == "prompt" and origins[1] == "thread 0"
    text = page.evaluate("[...document.querySelectorAll('#text div')].map((d) => d.textContent).join('')")
    expected = drawn.text(seen)
    # Each origin is decoded for itself, so a character across two of them differs.
    assert expected is not None and text.replace("\ufffd", "") == expected.replace("\ufffd", "") and shown


def test_a_click_selects_and_the_pointer_shows_the_text(open_page):
    page = open_page(wide(), width=1400)
    box = page.locator("#canvas").bounding_box()
    gutter, top, row = 150, 70, 26  # as in chart.js
    page.mouse.move(box["x"] + gutter + 34 + 18 * 2.5, box["y"] + top + row / 2)
    page.wait_for_selector("#tip", state="visible")
    assert "thread 0, token 3" in page.inner_text("#tip")
    page.mouse.click(box["x"] + gutter + 34 + 18 * 2.5, box["y"] + top + row / 2)
    assert "Thread 0\n" in details(page) and "Token 3" in details(page)
    page.locator('#text [data-token="7"]').click()
    assert "Token 8" in details(page)
    page.mouse.move(box["x"] + 20, box["y"] + 5)
    assert page.is_hidden("#tip")


def test_markup_in_texts_stays_text(open_page):
    page = open_page(wide(prompt="<img src=x onerror='document.title=1'></script><script>document.title=2</script>"))
    press(page, "ArrowDown", "ArrowRight", "Enter")
    assert "</script><script>document.title=2</script>" in page.inner_text("#text")
    assert page.locator("#text img, #text script").count() == 0 and "anabranch" in page.title()


def test_filters_and_colours(open_page):
    page = open_page(wide())
    assert "9 threads" in page.inner_text("#count")
    page.select_option("#fate", "discarded")
    assert page.inner_text("#count") == "2 of 9 threads"
    page.select_option("#fate", "")
    page.keyboard.press("Escape")
    press(page, "/")
    page.keyboard.type("0.2.0")
    assert page.inner_text("#count") == "1 of 9 threads"
    page.keyboard.press("Enter")
    press(page, "ArrowDown", "ArrowDown", "ArrowDown")  # its ancestors are kept
    assert "Thread 0.2.0\n" in details(page)
    press(page, "Escape")
    assert "9 threads" in page.inner_text("#count") and page.input_value("#find") == ""
    for colour in ("origin", "thread", "confidence"):
        press(page, "c")
        assert page.input_value("#colour") == colour
    page.locator("#below").fill("50")
    assert page.inner_text("#shown-below") == "50 %"


def test_without_log_probabilities_there_is_no_confidence_to_choose(open_page):
    page = open_page(wide(logprobs=False))
    assert page.locator("#colour option").all_inner_texts() == ["who wrote it", "thread"] and page.is_hidden("#unsure")
    press(page, "ArrowDown")
    assert "not recorded" in details(page)


def pixels(page) -> set[tuple[int, ...]]:
    """Colours on the canvas."""
    return set(
        map(
            tuple,
            page.evaluate(
                """() => { const from = document.getElementById("canvas"), c = document.createElement("canvas");
                [c.width, c.height] = [from.width, from.height];
                const pen = c.getContext("2d", { willReadFrequently: true });
                pen.drawImage(from, 0, 0);
                const d = pen.getImageData(0, 0, c.width, c.height).data, s = new Set();
                for (let i = 0; i < d.length; i += 4) s.add(`${d[i]},${d[i+1]},${d[i+2]}`);
                return [...s].map((x) => x.split(",").map(Number)); }"""
            ),
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_button(open_page, scheme):
    page = open_page(wide(), color_scheme=scheme)
    paper = {"light": (255, 255, 255), "dark": (20, 23, 26)}
    other = "dark" if scheme == "light" else "light"
    assert paper[scheme] in pixels(page) and paper[other] not in pixels(page) - {(255, 255, 255)}
    page.click("#theme")
    page.wait_for_function(f"getComputedStyle(document.body).colorScheme !== '{scheme}'")
    page.wait_for_timeout(100)
    assert paper[other] in pixels(page)
    assert len(pixels(page)) > 10  # something is drawn


def test_on_a_phone_nothing_sticks_out_and_a_tap_selects(open_page):
    page = open_page(wide(), width=390, height=844, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    box = page.locator("#stage").bounding_box()
    assert box["height"] > 250 and box["width"] == 390
    page.touchscreen.tap(box["x"] + 200, box["y"] + 83)
    assert "Thread 0\n" in details(page)


def test_two_fingers_zoom_and_one_scrolls(open_page):
    page = open_page(wide(), width=390, height=844, has_touch=True, is_mobile=True)
    touch = page.context.new_cdp_session(page)
    box = page.locator("#stage").bounding_box()
    y = box["y"] + 150

    def fingers(kind: str, *xs: float) -> None:
        points = [{"x": x, "y": y, "id": i} for i, x in enumerate(xs)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    before = page.evaluate("document.getElementById('space').offsetWidth")
    fingers("touchStart", 180, 220)
    for d in range(0, 100, 10):
        fingers("touchMove", 180 - d, 220 + d)
    fingers("touchEnd")
    page.wait_for_function(f"document.getElementById('space').offsetWidth > {2 * before}")
    assert page.evaluate("visualViewport.scale") == 1  # the page itself stays as it is
    left = page.evaluate("document.getElementById('stage').scrollLeft")
    fingers("touchStart", 300)
    for d in range(0, 150, 15):
        fingers("touchMove", 300 - d)
    fingers("touchEnd")
    page.wait_for_function(f"document.getElementById('stage').scrollLeft > {left + 50}")


def test_zoom_and_scroll_in_two_hundred_threads(open_page):
    page = open_page(wide(100, 10))  # and one more under each
    assert "201 threads" in page.inner_text("#count")
    press(page, "ArrowDown", *["PageDown"] * 19)
    assert page.evaluate("document.getElementById('stage').scrollTop") > 1000
    before = page.evaluate("document.getElementById('space').offsetWidth")
    press(page, "+", "+", "+")
    wider = page.evaluate("document.getElementById('space').offsetWidth")
    assert wider > before
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 500, box["y"] + 200)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function(f"document.getElementById('space').offsetWidth > {wider}")
    page.focus("#stage")
    page.keyboard.press("0")
    assert page.evaluate("document.getElementById('space').offsetWidth") <= before
