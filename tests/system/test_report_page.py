"""The report page in a real browser: headless Chromium, driven by Selenium."""

import io

import numpy as np
import pytest
from PIL import Image

from engine.cli.batch import Outcome
from engine.cli.jobs import PhotoJob
from engine.cli.report_page import ReportPage, check_page
from engine.cli.summary import RunSummary
from engine.errors import ImageError

#: What a stranger may call a file to harm whoever looks at the page.
EVIL = '<img src=x onerror=alert(1)>"\' onmouseover="alert(2)" x="</script><script>alert(3)</script>$title.png'
RED, BLUE = (220, 30, 30), (30, 30, 220)


def webp(color, size=(300, 200)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def report(output, size):
    return {
        "output": str(output),
        "input_size": size,
        "output_size": size,
        "total_ms": 1234.5,
        "settings": {"seed": 7},
    }


@pytest.fixture
def page(tmp_path):
    """A page of a tall photo, a wide one with an evil name, one that was there already and one that failed."""
    path = tmp_path / "report.html"
    tally, tall = RunSummary(), (200, 600)
    outcomes = [
        Outcome(PhotoJob("tall.jpg", ()), (report("tall.png", tall),), None, webp(RED, tall), webp(BLUE, tall)),
        Outcome(PhotoJob(EVIL, ()), (report(EVIL, (300, 200)),), None, webp(RED), webp(BLUE)),
        Outcome(PhotoJob("old.jpg", (), ("old.png",)), (), None, webp(RED), webp(BLUE)),
        Outcome(PhotoJob(f"bad{EVIL}", ()), (), ImageError("is truncated", found="<b>5</b> bytes")),
    ]
    with ReportPage(path) as made:
        for outcome in outcomes:
            tally.add(outcome)
            made.add(outcome)
        made.write(tally, {"prompt": "</dd><script>alert(4)</script>", "steps": 15})
    return path


@pytest.fixture
def show(window, page):
    """Open the page in a window of a size; returns the browser."""

    def open_page(width=1200, height=900):
        browser = window(width, height)
        browser.get(page.as_uri())
        return browser

    return open_page


def colors(browser, index):
    """Of a pair's middle row as it is seen: the colour of every pixel, red or blue or neither."""
    pair = browser.find_elements("css selector", ".pair")[index]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", pair)
    pixels = np.asarray(Image.open(io.BytesIO(pair.screenshot_as_png)).convert("RGB")).astype(int)
    row = pixels[pixels.shape[0] // 2]
    return [np.abs(row - color).sum(axis=1) < 60 for color in (RED, BLUE)]


def test_every_photo_is_there_and_failures_are_told(show):
    browser = show()
    assert browser.title == "Restored photos"
    names = [element.text for element in browser.find_elements("css selector", "article h2")]
    assert names == ["tall.jpg", EVIL, "old.jpg"]
    assert browser.find_element("css selector", "header p").text.startswith(
        "4 photos: 2 restored, 1 had a result already, 1 failed, in "
    )
    failed = browser.find_element("css selector", ".failed li").text
    assert failed == f"bad{EVIL}: is truncated (<b>5</b> bytes)"
    metas = [element.text for element in browser.find_elements("css selector", ".meta")]
    assert metas[0] == "tall.png: 200 × 600 to 200 × 600, 1.23 s, seed 7"
    assert metas[2] == "old.png: was there already"
    sizes = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert sizes == [200, 200, 300, 300, 300, 300]


def test_names_are_names_and_nothing_comes_from_elsewhere(show, page):
    browser = show()
    assert browser.get_log("browser") == []  # no script was refused, none failed
    assert len(browser.find_elements("css selector", "script")) == 1
    assert len(browser.find_elements("css selector", "img")) == 6
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.find_element("css selector", "details").get_attribute("textContent").count("alert(4)") == 1
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit = 1\">')")
    assert browser.execute_script("return window.hit") is None  # the page's policy runs no script but its own


def test_the_slider_moves_with_the_keyboard(show):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser = show()
    slider = browser.find_elements(By.CSS_SELECTOR, "input[type=range]")[1]
    assert EVIL in slider.get_attribute("aria-label")
    before, after = colors(browser, 1)
    assert (before.mean(), after.mean()) == (pytest.approx(0.5, abs=0.03), pytest.approx(0.5, abs=0.03))
    assert np.flatnonzero(before).max() < np.flatnonzero(after).min()
    slider.send_keys(Keys.ARROW_RIGHT * 30)
    before, after = colors(browser, 1)
    assert (before.mean(), after.mean()) == (pytest.approx(0.8, abs=0.03), pytest.approx(0.2, abs=0.03))
    slider.send_keys(Keys.HOME)
    before, after = colors(browser, 1)
    assert not before.any()
    assert after.mean() > 0.95
    slider.send_keys(Keys.END)
    before, after = colors(browser, 1)
    assert before.mean() > 0.95
    assert not after.any()
    assert colors(browser, 2)[0].mean() == pytest.approx(0.5, abs=0.03)  # the others stay


def test_it_can_be_reached_by_tab_and_the_focus_is_seen(show):
    from selenium.webdriver.common.keys import Keys

    browser = show()
    reached = []
    for _ in range(5):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(browser.execute_script("return document.activeElement.type || document.activeElement.localName"))
    assert reached == ["summary", "checkbox", "range", "range", "range"]
    outline = "return getComputedStyle(document.activeElement.parentElement).outlineStyle"
    assert browser.execute_script(outline) == "solid"


def test_side_by_side(show):
    browser = show()
    browser.find_element("id", "side").click()
    places = browser.execute_script(
        "return [...document.querySelectorAll('.pair')].map(p => [...p.querySelectorAll('img')].map(i => {"
        " const r = i.getBoundingClientRect(); return [r.left, r.right, r.top, r.bottom] }))"
    )
    assert len(places) == 3
    for before, after in places:
        assert before[1] <= after[0]
        assert before[2:] == after[2:]
    assert all(color.mean() > 0.4 for color in colors(browser, 1))


@pytest.mark.parametrize("size", [(64, 64), (64, 48), (40, 600), (960, 30)])
def test_labels_do_not_lie_over_each_other(window, tmp_path, size):
    path = tmp_path / "report.html"
    tally = RunSummary()
    outcome = Outcome(PhotoJob("small.jpg", ()), (report("small.png", size),), None, webp(RED, size), webp(BLUE, size))
    tally.add(outcome)
    with ReportPage(path) as made:
        made.add(outcome)
        made.write(tally, {})
    browser = window(1200, 900)
    browser.get(path.as_uri())
    places = "return [...document.querySelectorAll('figcaption')].map(c => c.getBoundingClientRect().toJSON())"
    before, after = browser.execute_script(places)
    apart = before["right"] <= after["left"] or after["bottom"] <= before["top"]
    assert apart, (before, after)


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_it_fits_the_screen(show, width):
    browser = show(width, 700)
    inner, scroll = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert scroll <= inner == width
    for box in browser.execute_script(
        "return [...document.querySelectorAll('.pair')].map(p => { const r = p.getBoundingClientRect();"
        " return [r.width / r.height, r.height] })"
    ):
        assert box[0] == pytest.approx(200 / 600 if box[0] < 1 else 1.5, rel=0.02)
        assert box[1] <= 0.81 * 700  # seen whole
    size = browser.execute_script("return parseFloat(getComputedStyle(document.querySelector('.meta')).fontSize)")
    assert size >= 14


def test_without_scripts_the_pictures_lie_side_by_side(browser, page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page.as_uri())
        images = browser.find_elements("css selector", "article:nth-of-type(2) img")
        assert images[0].rect["x"] + images[0].rect["width"] <= images[1].rect["x"]
        assert not browser.find_element("id", "side").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_page_of_an_earlier_run_is_replaced(page):
    check_page(page)


def test_a_command_writes_its_page(browser, bundle_fp32, tmp_path, run_restore):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    picture = rng.integers(0, 256, (64, 96, 4), dtype=np.uint8)
    Image.fromarray(picture, "RGBA").save(tmp_path / "photos" / "glass.png")
    Image.fromarray(picture[:, :, 0]).save(tmp_path / "photos" / "grey.png")
    page = tmp_path / "report.html"
    arguments = [tmp_path / "photos", "-o", tmp_path / "out", "--bundle", bundle_fp32, "--steps", 1, "--report", page]
    for restored in ("2 restored", "0 restored, 2 had a result already"):
        done = run_restore(*arguments)
        assert done.returncode == 0, done.stderr
        browser.get(page.as_uri())
        assert restored in browser.find_element("css selector", "header p").text
        sizes = "return [...document.images].map(image => [image.naturalWidth, image.naturalHeight])"
        assert browser.execute_script(sizes) == [[96, 64]] * 4
