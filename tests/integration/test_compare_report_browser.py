"""The page of a comparison as a browser shows it: nothing overflows, nothing is loaded, both schemes are served."""

import pytest

from chromium import Chromium, find_chromium
from lightning_adam_mini.cli.compare.report import write_report
from synthetic_comparison import synthetic_comparison

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="needs chromium"),
]

OPTIMIZERS = ("AdamW", "AdamMini", "AdamMini:" + "partition=factored" * 3, "Lion with a long label")
OPTIMIZERS += tuple(f"optimizer{number}" for number in range(4))
RECIPES = ("llm/synthetic_tiny", "vision/synthetic", "/a/long/path/of/" + "x" * 80 + ".yaml")
PHONE, TABLET, DESKTOP = 390, 800, 1280
# What sticks out of the screen, or of the frame that it stands in; texts within a drawing count too.
OVERFLOWING = """[...document.querySelectorAll('main *, header *')].filter(element => {
    const frame = element.closest('figure, .frame, main, header') || document.documentElement;
    const box = element.getBoundingClientRect(), room = frame.getBoundingClientRect();
    const shown = box.width && !element.closest('.skip, defs, clipPath');
    return shown && !element.matches('svg g, svg path, svg use') && box.right > Math.max(room.right, 0) + 1;
}).map(element => element.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    def lose(recipe, optimizer, lr, seed):
        if optimizer == "optimizer1" and recipe == RECIPES[0]:
            return "failed", "ValueError: <script>alert(1)</script> " + "a_very_long_word" * 12
        return ("diverged", "training loss is not finite") if lr == 6e-3 and optimizer == "AdamW" else None

    comparison = synthetic_comparison(OPTIMIZERS, RECIPES, lose=lose)
    return write_report(comparison, tmp_path_factory.mktemp("report"))["page"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, TABLET, DESKTOP])
def test_nothing_overflows_and_nothing_is_loaded(browser, report, width, scheme):
    browser.open(report, width=width, scheme=scheme)
    browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(OVERFLOWING) == []
    addresses = {request["request"]["url"] for request in browser.events_of("Network.requestWillBeSent")}
    assert {address for address in addresses if not address.startswith("data:")} == {report.as_uri()}
    assert browser.events_of("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []


def test_the_browser_sees_what_overflows(browser, tmp_path):
    """So that the test above can fail."""
    (tmp_path / "wide.html").write_text("<main><p style='width:2000px'>wide</p></main><script>no_such()</script>")
    browser.open(tmp_path / "wide.html", width=PHONE, scheme="light")
    assert not browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.events_of("Runtime.exceptionThrown")


def test_page_and_charts_follow_the_scheme_of_the_system(browser, report):
    colours = """['body', 'svg.chart text', 'svg.chart [style*="stroke: currentColor"]'].map(
        name => getComputedStyle(document.querySelector(name))).map(
        style => [style.backgroundColor, style.color, style.fill, style.stroke])"""
    shown = {}
    for scheme in ("light", "dark"):
        browser.open(report, width=DESKTOP, scheme=scheme)
        (ground, ink, *_), (_, _, text, _), (*_, axis) = browser.evaluate(colours)
        assert ink == text == axis != ground
        shown[scheme] = (ground, ink)
    assert all(light != dark for light, dark in zip(shown["light"], shown["dark"], strict=True))


def test_texts_of_charts_are_readable_on_a_phone(browser, report):
    browser.open(report, width=PHONE, scheme="light")
    sizes = browser.evaluate("""[...document.querySelectorAll('svg.chart text')].map(text =>
        parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)""")
    upright = [size for size in sizes if size > 0.1]  # the others are turned
    assert len(upright) > 100
    assert min(upright) >= 11


def test_a_row_is_a_card_on_a_phone_and_a_row_on_a_desktop(browser, report):
    places = """[...document.querySelectorAll('table.cards')].pop().querySelectorAll('tbody tr:first-child td')"""
    tops = f"new Set([...{places}].map(cell => Math.round(cell.getBoundingClientRect().top))).size"
    browser.open(report, width=PHONE, scheme="light")
    assert browser.evaluate(tops) > 4
    browser.open(report, width=DESKTOP, scheme="light")
    assert browser.evaluate(tops) == 1


def test_paper_is_light_and_shows_the_commands(browser, report):
    browser.open(report, width=DESKTOP, scheme="dark", media="print")
    assert browser.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert browser.evaluate("document.querySelector('details pre').getBoundingClientRect().height") > 10
