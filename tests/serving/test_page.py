"""The page, in a real browser against a real server whose model follows a script."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from nanochat_pl.serving.settings import SamplingDefaults
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.conversations import ConversationSet, ConversationSettings
from tests.helpers.scripted_server import HOSTILE, MARKDOWN, RunningServer, scripted_server

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
PAGE = Path(__file__).parents[2] / "src" / "nanochat_pl" / "serving" / "page"
AXE = Path(__file__).parent / "axe" / "axe.min.js"
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"]
SIZES = {"desktop": (1280, 860, False), "phone": (390, 844, True)}
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Runs before the page's own scripts: what the policy has stopped, and what a hostile answer has managed to call.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
window.alert = (what) => window.violations.push(`alert ${what}`);
window.requested = [];
new PerformanceObserver((list) => list.getEntries().forEach((entry) => window.requested.push(entry.name)))
  .observe({ type: "resource", buffered: true });
"""
T = TypeVar("T")


def needs_browser(test):
    """Marks a test."""
    skip = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
    return pytest.mark.slow(skip(test))


def until(look: Callable[[], T], seconds: float = 20) -> T:
    """What ``look`` returns, as soon as it is something."""
    ends_at, found = time.monotonic() + seconds, None
    while time.monotonic() < ends_at:
        try:
            if found := look():
                return found
        except (NoSuchElementException, StaleElementReferenceException):
            pass
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:g} s: {found!r}")


class Page:
    """What a person does with the page."""

    def __init__(self, driver: webdriver.Chrome, server: RunningServer, downloads: Path) -> None:
        self.driver, self.server, self.downloads = driver, server, downloads

    def open(self, place: str = "/") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.server.url + place)

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait_for_model(self) -> None:
        until(lambda: self.one("#hint").get_attribute("textContent"))

    def type(self, text: str) -> None:
        self.one("#input").send_keys(text + Keys.ENTER)

    def ask(self, text: str) -> str:
        """Send a message and wait for the whole answer."""
        number = len(self.all(".turn")) + 1
        self.type(text)
        until(lambda: len(self.all(".turn")) == number)
        return self.answer()

    def answer(self) -> str:
        """The last answer, once it is whole."""
        until(lambda: self.one(".turn:last-child .answer:last-child .below .actions"))
        until(lambda: self.one("#stop").get_attribute("hidden"))
        return self.one(".turn:last-child .body").text

    def button(self, label: str):
        """The last button whose name begins so."""
        return self.all(f"button[aria-label^='{label}']")[-1]

    def resize(self, size: str) -> None:
        width, height, mobile = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def require_accessible(self) -> None:
        if not self.run("return Boolean(window.axe)"):
            self.run(AXE.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const [tags, done] = arguments; axe.run(document, {runOnly: {type: 'tag', values: tags}}).then("
            "({violations}) => done(violations.map(({id, nodes}) => [id, nodes.map((node) => node.html)])))",
            AXE_TAGS,
        )
        assert found == []

    def exported(self) -> list[dict]:
        """The lines of the file that the button gives."""
        for file in self.downloads.iterdir():
            file.unlink()
        self.one("#export-all").click()
        # The browser makes an empty file of that name first.
        file = until(lambda: next((each for each in self.downloads.glob("*.jsonl") if each.stat().st_size), None))
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    with scripted_server(
        folder, ("demo", "other"), sampling=SamplingDefaults(max_tokens=1500), feedback=str(folder / "liked.jsonl")
    ) as running:
        yield running


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, server: RunningServer, tmp_path: Path) -> Iterator[Page]:
    """A page as one sees it for the first time. At the end no policy was violated and nothing was logged."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": server.url, "storageTypes": "all"})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page = Page(driver, server, downloads)
    page.resize("desktop")
    page.open()
    page.wait_for_model()
    yield page
    assert page.run("return window.violations") == []
    assert [name for name in page.run("return window.requested") if not name.startswith(server.url)] == []
    assert [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_shipped_libraries_are_the_published_files():
    """A newer version is put in with its hash and its licence."""
    entries = json.loads((PAGE / "vendor" / "manifest.json").read_text(encoding="utf-8"))
    for entry in entries:
        assert hashlib.sha256((PAGE / "vendor" / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        assert (PAGE / "vendor" / entry["licence_file"]).stat().st_size > 500
    named = {"manifest.json", *(entry[key] for entry in entries for key in ("file", "licence_file"))}
    assert {path.name for path in (PAGE / "vendor").iterdir()} == named


def test_files_of_the_page_are_small():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PAGE.glob("*.*")}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


@needs_browser
def test_an_answer_grows_and_can_be_stopped_and_asked_for_again(page):
    page.type("slow")
    short = until(lambda: page.one(".body").text)
    until(lambda: len(page.one(".body").text) > len(short) + 10)
    assert page.one(".answer").get_attribute("aria-busy") == "true"
    until(lambda: "This is sentence number 1." in page.one("#log").get_attribute("textContent"))
    assert "demo is answering." in page.one("#log").get_attribute("textContent")
    page.one("#stop").click()
    stopped = page.answer()
    assert "is answering" not in page.one("#log").get_attribute("textContent")
    assert stopped.startswith("This is sentence number 0.") and len(stopped) < 300
    assert "stopped" in page.one(".facts-line").text
    assert page.run("return document.activeElement.id") == "input"
    page.button("Generate another answer").click()
    until(lambda: page.one("#stop").is_displayed())
    page.one("#input").send_keys(Keys.ESCAPE)
    page.answer()
    assert page.one(".count").text == "2 / 2"
    page.button("Previous answer").click()
    assert page.answer() == stopped


@needs_browser
def test_what_was_there_of_an_answer_is_found_after_the_page_was_left(page):
    page.type("slow")
    until(lambda: len(page.one(".body").text) > 60)
    page.open(f"/#{page.driver.current_url.partition('#')[2]}")
    assert until(lambda: page.one(".body").text).startswith("This is sentence number 0. This is sentence number 1.")
    until(lambda: page.all(".facts-line"))
    page.wait_for_model()
    page.button("Generate another answer").click()
    until(lambda: page.one("#stop").is_displayed())
    page.one("#stop").click()
    page.answer()


@needs_browser
def test_an_answer_that_a_reload_ended_was_stopped(page):
    page.type("slow")
    until(lambda: len(page.one(".body").text) > 60)
    page.driver.refresh()
    assert until(lambda: page.one(".facts-line").text) == "stopped"
    assert page.all(".problem") == []


@needs_browser
def test_an_answer_that_fills_the_context_offers_no_more(page):
    page.ask("a" * 1900)  # of 2,048 tokens, and the answer repeats them
    assert "the model's context is full" in page.one(".facts-line").text
    assert [each for each in page.all(".below button") if each.text == "Continue"] == []
    page.ask("Hallo")
    assert "The first message was left out, with its answer:" in page.one(".turn:last-child .above").text


@needs_browser
def test_an_answer_that_fills_the_context_goes_on_where_older_messages_can_be_left_out(page):
    page.ask("Hallo")
    page.ask("a" * 1020)
    assert "the model's context is full" in page.one(".turn:last-child .facts-line").text
    assert "Continue" in [each.text for each in page.all(".turn:last-child .below button")]


@needs_browser
def test_a_message_is_edited_and_what_followed_it_is_replaced(page):
    assert page.ask("Hallo") == "You said: Hallo"
    assert page.ask("second") == "You said: second"
    page.run("document.getElementById('scroller').scrollTop = 0")
    until(lambda: page.all("button[aria-label='Edit the message']"))[0].click()
    field = page.one("textarea.edit")
    field.clear()
    field.send_keys("Hello" + Keys.ENTER)
    until(lambda: len(page.all(".turn")) == 1)
    assert page.answer() == "Hello there, grüß Gott! How are you?"
    assert page.exported() == [
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hello there, grüß Gott! How are you?"},
            ]
        }
    ]


@needs_browser
def test_an_edit_that_the_server_would_refuse_loses_nothing(page):
    page.ask("Hallo")
    page.ask("second")
    until(lambda: page.all("button[aria-label='Edit the message']"))[0].click()
    page.run("document.querySelector('textarea.edit').value = 'x'.repeat(8001)")
    page.one("textarea.edit").send_keys(Keys.ENTER)
    until(lambda: "8,001 characters; 8,000 are allowed" in page.one("#notice").text)
    assert len(page.all(".turn")) == 2 and page.all("textarea.edit"), "it can be made shorter"
    assert [row["content"] for row in page.exported()[0]["messages"][::2]] == ["Hallo", "second"]


@needs_browser
def test_the_skip_link_leads_to_the_field_and_stays_in_the_conversation(page):
    page.ask("Hallo")
    place = page.driver.current_url
    page.run("document.activeElement.blur(); document.querySelector('.skip').click()")
    until(lambda: page.run("return document.activeElement.id") == "input")
    assert bubbles(page) == ["Hallo"] and page.driver.current_url == place


@needs_browser
def test_another_answer_to_an_early_message_leaves_the_view_where_it_is(page):
    for number in range(5):
        page.ask(f"message {number} " + "with many words " * 20)
    page.run("document.getElementById('scroller').scrollTop = 0")
    until(lambda: page.all(".turn:first-child button[aria-label='Generate another answer']"))[0].click()
    until(lambda: page.one(".turn:first-child .count").text == "2 / 2")
    assert page.one("#to-end").is_displayed(), "the view is not at the end"
    assert page.run("return document.activeElement.id") == "input"


@needs_browser
def test_enter_that_ends_a_composition_sends_nothing(page):
    """Safari tells of it behind the composition."""
    page.run(
        "const input = document.getElementById('input'); input.value = 'にほ';"
        "input.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true}))"
    )
    assert not page.all(".turn") and page.one("#input").get_attribute("value") == "にほ"


# Edits the last message but one, whose upper end is out of sight. Gives how far the field is from both ends of what is
# seen, once the page has been drawn.
EDIT_AT_EDGE = """
const done = arguments[0];
const frames = (next) => requestAnimationFrame(() => requestAnimationFrame(next));
const [scroller, mine] = [document.getElementById("scroller"), [...document.querySelectorAll(".mine")].at(-2)];
const seen = scroller.getBoundingClientRect();
scroller.scrollTop += mine.getBoundingClientRect().top - seen.top + 20;
frames(() => {
  mine.querySelector("button[aria-label='Edit the message']").click();
  frames(() => {
    const field = mine.querySelector("textarea").getBoundingClientRect();
    done([field.top - seen.top, seen.bottom - field.bottom]);
  });
});
"""


@needs_browser
@pytest.mark.parametrize("height", [500, 860])
def test_the_field_of_a_message_at_the_edge_is_in_view(page, height):
    """Above an answer that is higher than the window, and near the end of the conversation, which the page follows."""
    metrics = {"width": 1280, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for message in ("Hallo", "Markdown", "Hallo"):
        page.ask(message)
    assert min(page.driver.execute_async_script(EDIT_AT_EDGE)) > 0


@needs_browser
def test_a_token_is_looked_at_and_the_answer_goes_on_from_an_alternative(page):
    page.ask("Hello")
    page.button("Tokens and").click()
    until(lambda: len(page.all(".token")) == len("Hello there, grüß Gott! How are you?".encode()) + 1)
    assert page.all(".token")[5].text == "␣"
    page.all(".token")[0].click()
    keys = [Keys.END, Keys.HOME, *[Keys.ARROW_RIGHT] * 4, Keys.ARROW_LEFT, Keys.ENTER]  # with the keyboard alone
    webdriver.ActionChains(page.driver).send_keys(*keys).perform()
    details = until(lambda: page.one(".token-details").text)
    assert "95.3%" in details and "token 108, number 4 of" in details  # 1 / (1 + e^-3)
    page.button("Continue with p").click()
    until(lambda: page.one(".count").text == "2 / 2")
    assert page.answer() == "Help is on its way."
    assert "Continued with “p” in place of “l”." in page.one(".answer").text
    page.button("Tokens and").click()
    until(lambda: page.all(".token"))[3].click()
    assert page.one(".tokens").text.replace("\n", "").startswith("Hel")


@needs_browser
def test_an_answer_goes_on_from_half_a_character(page):
    page.ask("Hello")
    page.button("Tokens and").click()
    tokens = until(lambda: page.all(".token"))
    tokens[6].click()  # behind "Hello ", where the other answer has an emoji of four bytes
    page.button("Continue with <F0>").click()
    until(lambda: page.one(".count").text == "2 / 2")
    assert page.answer() == "Hello 🌍."


@needs_browser
def test_what_the_calculator_did_is_one_line_and_is_told_by_the_tokens(page):
    assert page.ask("What is 12 * 34?") == "It is 12*34 = 408408, I think."
    assert page.one(".tool").get_attribute("textContent") == "12*34 = 408"
    assert page.one(".tool svg").get_attribute("aria-label") == "Calculator:"
    assert page.one(".body strong").text == "408"
    page.button("Tokens and").click()
    until(lambda: page.all(".token"))
    assert [each.text for each in page.all(".token.forced")] == ["output_start", "4", "0", "8", "output_end"]
    page.all(".token.forced")[1].click()
    assert "The calculator put this token in" in page.one(".token-details").text
    assert page.exported()[0]["messages"][1]["content"] == [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "12*34"},
        {"type": "python_output", "text": "408"},
        {"type": "text", "text": "**408**, I think."},
    ]


@needs_browser
def test_conversations_are_found_again_and_can_be_trained_on(page, tmp_path):
    page.ask("Markdown")
    page.ask("What is 12 * 34?")
    page.one("#new-chat").click()
    page.type("slow")
    until(lambda: page.one(".body").text)
    page.all(".conversation")[1].click()  # the stream goes on meanwhile
    until(lambda: len(page.all(".turn")) == 2)
    until(lambda: page.one(".code code"))
    until(lambda: not page.all(".dot"))
    page.open(f"/#{page.driver.current_url.partition('#')[2]}")
    page.wait_for_model()
    assert [each.text for each in until(lambda: page.all(".bubble"))] == ["Markdown", "What is 12 * 34?"]
    assert until(lambda: page.all(".table td"))[3].text == "144"
    page.button("Tokens and").click()
    until(lambda: page.all(".token.forced"))
    lines = page.exported()
    assert sorted(line["messages"][0]["content"] for line in lines) == ["Markdown", "slow"]
    assert next(line for line in lines if line["messages"][0]["content"] == "slow")["messages"][1]["content"].endswith(
        "This is sentence number 11. "
    )
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n', encoding="utf-8")
    file = next(page.downloads.glob("*.jsonl"))
    settings = ConversationSettings(path=str(file), test_path=str(held_out))
    task = ConversationSet("mine", settings, "train", TaskContext(tmp_path / "cache"))
    assert [task[i]["messages"] for i in range(len(task))] == [line["messages"] for line in lines]
    assert (task.audit.num_bad, task.audit.changed) == (0, {})


@needs_browser
def test_a_conversation_is_deleted_once_that_was_agreed_to(page):
    page.ask("Hallo")
    page.button("Delete").click()
    page.all("#question button")[0].click()
    assert len(page.all(".conversation")) == 1
    page.button("Delete").click()
    page.all("#question button")[1].click()
    until(lambda: not page.all(".conversation"))
    assert page.all(".turn") == []


@pytest.fixture
def other_tab(page: Page) -> Iterator[str]:
    """Another tab, which is closed in the end."""
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    other = page.driver.current_window_handle
    page.driver.switch_to.window(first)
    yield other
    page.driver.switch_to.window(other)
    page.driver.close()
    page.driver.switch_to.window(first)


def bubbles(page: Page) -> list[str]:
    return [each.text for each in page.all(".bubble")]


@needs_browser
def test_two_tabs_with_one_conversation_lose_nothing(page, other_tab):
    """Each shows what the other one has added, also while both are answering."""
    first, window = page.driver.current_window_handle, page.driver.switch_to.window
    page.ask("Hallo")
    place = f"/#{page.driver.current_url.partition('#')[2]}"
    window(other_tab)
    page.open(place)
    page.wait_for_model()
    assert bubbles(page) == ["Hallo"]
    page.ask("from the other tab")
    window(first)
    until(lambda: bubbles(page) == ["Hallo", "from the other tab"])
    assert page.ask("from the first tab") == "You said: from the first tab"
    page.type("slow")
    until(lambda: page.one("#stop").is_displayed())
    window(other_tab)
    until(lambda: len(page.all(".turn")) == 4)
    page.button("Generate another answer").click()  # of the same message
    until(lambda: page.one("#stop").is_displayed())
    page.one("#stop").click()
    window(first)
    assert page.answer().endswith("This is sentence number 11.")
    messages = ["Hallo", "from the other tab", "from the first tab", "slow"]
    for tab in (first, other_tab):
        window(tab)
        until(lambda: page.one(".turn:last-child .count").text.endswith("/ 2"))
        page.open(place)
        assert until(lambda: bubbles(page)) == messages
        until(lambda: page.one(".turn:last-child .count").text.endswith("/ 2"))
    window(first)
    page.button("Delete").click()
    page.all("#question button")[1].click()
    until(lambda: not page.all(".turn"))
    window(other_tab)
    until(lambda: not page.all(".turn") and not page.all(".conversation"))
    window(first)


@needs_browser
def test_a_message_that_is_edited_outlives_what_another_tab_writes(page, other_tab):
    first, window = page.driver.current_window_handle, page.driver.switch_to.window
    page.ask("Hallo")
    place = f"/#{page.driver.current_url.partition('#')[2]}"
    until(lambda: page.all("button[aria-label='Edit the message']"))[0].click()
    page.one("textarea.edit").send_keys(", half a")
    window(other_tab)
    page.open(place)
    page.wait_for_model()
    page.ask("from the other tab")
    window(first)
    time.sleep(0.3)
    assert page.one("textarea.edit").get_attribute("value") == "Hallo, half a"
    page.one("textarea.edit").send_keys(Keys.ESCAPE)
    until(lambda: bubbles(page) == ["Hallo", "from the other tab"])


@needs_browser
def test_hostile_answers_do_nothing(page):
    page.ask("Hostile")
    body = page.one(".body")
    assert "<img src=x onerror=alert(1)>" in body.text and "a cat (picture, not loaded)" in body.text
    assert page.all(".body img, .body script, .body style, .body form, .body iframe, .body input") == []
    assert [link.get_attribute("href") for link in page.all(".body a")] == ["https://example.org/?a=%3Cb%3E"]
    assert page.one(".body a").get_attribute("rel") == "noopener noreferrer nofollow"


GROWING = [
    MARKDOWN,
    HOSTILE,
    "- a\n- b\n\n  more\n\n- c\n\nend\n\n1. x\n   ```\n   code\n\n   more\n   ```\n2. y\n",
    "Title\n===\n\ntext\nline\n---\n\n> quoted\nlazy\n\n    indented\n\n    more\n\n***\n\n",
    "| a |\n|---|\n| b |\nafter\n\n* * *\n",
    "**open\r\n\r\nno** _x_\r\rbut\n\n```\nnot closed\n\n\nstill",
]
COMPARE = """
const [text, done] = arguments;
import("/static/markdown.js").then(({ GrowingText, renderParts }) => {
  const [one, other] = [document.createElement("div"), document.createElement("div")];
  const growing = new GrowingText(one);
  const plain = (node) => node.innerHTML.replace(/\\s+/g, " ").replaceAll("> <", "><").trim();
  const wrong = [];
  for (let end = 1; end <= text.length; end += 1) {
    const parts = [{ type: "text", text: text.slice(0, end) }];
    growing.update(parts);
    renderParts(other, parts);
    if (plain(one) !== plain(other)) wrong.push(text.slice(0, end));
  }
  done(wrong);
});
"""


@needs_browser
@pytest.mark.parametrize("text", GROWING, ids=range(len(GROWING)))
def test_text_that_grows_looks_like_the_same_text_at_once(page, text):
    assert page.driver.execute_async_script(COMPARE, text) == []


SHOW = """
const [text, done] = arguments;
const show = ({ renderParts }) => renderParts(document.querySelector(".body"), [{ type: "text", text }]);
import("/static/markdown.js").then(show).then(done);
"""


@needs_browser
def test_quotes_in_quotes_reach_to_the_right(page):
    page.resize("phone")
    page.ask("Hallo")
    page.driver.execute_async_script(SHOW, ">>> Some words in a quote that is in two others.")
    boxes = [each.rect for each in page.all(".body, .body blockquote")]
    assert len(boxes) == 4 and len({box["x"] + box["width"] for box in boxes}) == 1
    assert boxes[-1]["x"] - boxes[0]["x"] < 50


@needs_browser
def test_two_models_answer_side_by_side_each_with_its_own_history(page):
    Select(page.one("#compare")).select_by_value("other")
    page.ask("Hello")
    page.ask("Markdown")
    assert [each.text for each in page.all(".turn:last-child .who")] == ["demo", "other"]
    left, right = page.all(".turn:last-child .answer")
    assert left.rect["y"] == right.rect["y"] and left.rect["x"] < right.rect["x"]
    page.resize("phone")
    assert left.rect["x"] == right.rect["x"] and left.rect["y"] < right.rect["y"]
    page.require_accessible()
    assert len(page.run("return [...document.querySelectorAll('.answer')]")) == 4
    page.resize("desktop")
    assert [len(line["messages"]) for line in page.exported()] == [4, 4]


@needs_browser
def test_settings_hold_and_go_with_the_request(page):
    page.one("#open-settings").click()
    for name, value in (("max_tokens", "5"), ("seed", "7")):
        page.one(f"#setting-{name}").clear()
        page.one(f"#setting-{name}").send_keys(value)
    page.one("#setting-top_k").clear()
    page.one("#setting-top_k").send_keys("999")
    assert page.all(".problem")[1].text
    page.one("#settings .main-button").click()
    assert page.ask("Hello") == "Hello"
    facts = page.one(".facts-line").text
    assert "5 tokens" in facts and "seed 7" in facts and "ended at the length limit" in facts
    next(each for each in page.all(".below button") if each.text == "Continue").click()
    until(lambda: page.one(".count").text == "2 / 2")
    assert page.answer() == "Hello ther"
    page.open()
    page.wait_for_model()
    page.one("#open-settings").click()
    assert page.one("#setting-max_tokens").get_attribute("value") == "5"
    assert page.one("#setting-top_k").get_attribute("value") == "50"


@needs_browser
def test_thumbs_write_conversations(page, server):
    page.ask("What is 12 * 34?")
    file = Path(server.settings.feedback)
    before = len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0
    page.run("for (const _ of [1, 2]) document.querySelector(\"button[aria-label='Good answer']\").click()")
    until(lambda: page.button("Good answer").get_attribute("aria-pressed") == "true")
    until(lambda: file.exists() and len(file.read_text(encoding="utf-8").splitlines()) > before)
    assert len(file.read_text(encoding="utf-8").splitlines()) == before + 1
    page.open(f"/#{page.driver.current_url.partition('#')[2]}")
    (again,) = until(lambda: page.all("button[aria-label='Good answer']"))
    assert again.get_attribute("aria-pressed") == "true", "found again"
    row = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    assert (row["rating"], row["model"], row["messages"][0]["content"]) == ("up", "demo", "What is 12 * 34?")
    assert row["messages"][1]["content"][1] == {"type": "python", "text": "12*34"}


@needs_browser
def test_what_is_there_stays_when_the_worker_dies(page, server):
    page.type("slow")
    until(lambda: len(page.one(".body").text) > 30)
    server.pool.workers[0]._process.kill()
    until(lambda: page.all(".below .problem"))
    assert page.one(".body").text.startswith("This is sentence number 0.")
    assert "ask again" in page.one(".below .problem").text
    until(lambda: server.pool.workers[0].state == "ready", 60)
    next(each for each in page.all(".below button") if each.text == "Try again").click()
    until(lambda: page.one("#stop").is_displayed())
    page.one("#stop").click()
    page.answer()


FILL = """
const [turns, text, done] = arguments;
import("/static/store.js").then(async (store) => {
  await store.openStore();
  await store.putConversation({id: "long", title: "Long", created: 1, updated: 1, models: ["demo"]});
  for (let i = 0; i < turns; i += 1) {
    const parts = [{type: "text", text: `${i}: ${text}`}];
    const version = {id: `v${i}`, model: "demo", parts, finish: "stop", error: null, seed: 1,
      usage: null, seconds: 1, rating: null, leftOut: 0, from: null, hasTokens: false};
    const answers = [{model: "demo", shown: 0, versions: [version]}];
    await store.putTurn({id: `t${i}`, conversation: "long", position: i, user: `Question ${i}?`, answers});
  }
  done();
});
"""
# From a key to the end of the frame that shows it.
LAG = """
window.lags = [];
document.getElementById("input").addEventListener("keydown", ({ timeStamp }) => requestAnimationFrame(() => {
  const channel = new MessageChannel();
  channel.port1.onmessage = () => window.lags.push(performance.now() - timeStamp);
  channel.port2.postMessage(null);
}));
"""


@needs_browser
def test_a_conversation_of_500_messages_opens_at_once_and_typing_stays_fluid(page):
    page.driver.execute_async_script(FILL, 250, MARKDOWN + "\n\n" + "Some more of it. " * 30)
    page.open("/#long")
    until(lambda: page.all(".turn:last-child table"))
    seconds = page.run("return performance.now()") / 1000
    assert len(page.all(".turn")) == 250
    assert len(page.all(".turn table")) < 25  # those near the end alone are more than text
    assert seconds < 3
    page.run(LAG)
    for letter in "fluid typing in a long conversation":
        page.one("#input").send_keys(letter)
    until(lambda: len(page.run("return window.lags")) == 35)
    assert sorted(page.run("return window.lags"))[17] < 50
    page.one("#input").send_keys(Keys.ENTER)
    assert page.answer() == "You said: fluid typing in a long conversation"
    assert "messages were left out" in page.one(".turn:last-child .above").text  # the context has 2,048 tokens
    page.run("document.getElementById('scroller').scrollTop = 0")
    until(lambda: page.all(".turn:first-child table"))
    page.driver.get_log("browser")  # the browser logs that the server refused what was too long


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_accessible(page, size, theme):
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    page.resize(size)
    assert (
        page.run("return getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(255, 255, 255)",
            "dark": "rgb(22, 24, 28)",
        }[theme]
    )
    page.require_accessible()
    page.ask("What is 12 * 34?")
    page.ask("Markdown")
    page.button("Tokens and").click()
    until(lambda: page.all(".token"))[2].click()
    page.require_accessible()
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    for opener in ("#open-settings", "#open-card"):
        page.one(opener).click()
        page.require_accessible()
        page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        until(lambda: not page.all("dialog[open]"))
    if size == "phone":
        page.one("#open-sidebar").click()
        until(lambda: page.one("#new-chat").is_displayed())
        page.require_accessible()
        assert page.run("return document.activeElement.id") == "close-sidebar"
        page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert page.run("return document.activeElement.id") == "open-sidebar"
    page.one("#theme").click()
    assert page.run("return document.documentElement.dataset.theme") == {"light": "dark", "dark": "light"}[theme]


@needs_browser
def test_a_server_with_a_key_is_asked_with_it(driver, tmp_path):
    with scripted_server(tmp_path, keys=["a-key-of-the-test"]) as running:
        page = Page(driver, running, tmp_path)
        page.open()
        until(lambda: page.one("#key").get_attribute("open"))
        page.require_accessible()
        page.one("#key-input").send_keys(Keys.ESCAPE)
        until(lambda: "asks for an API key" in page.one("#notice").text)
        page.type("Hallo")
        until(lambda: page.one("#key").get_attribute("open"))
        page.one("#key-input").send_keys("wrong-key" + Keys.ENTER)
        until(lambda: "did not take" in page.one("#key").text)
        page.one("#key-input").send_keys("a-key-of-the-test" + Keys.ENTER)
        page.wait_for_model()
        page.one("#input").clear()
        assert page.ask("Hallo") == "You said: Hallo"
        driver.get_log("browser")  # the browser logs the 401s
