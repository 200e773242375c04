"""The page at / in a browser without a window."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jmoe.serve.settings import Settings
from jmoe.text import encode, load_tokenizer
from tests.browser import NoBrowserError, browser_path
from tests.serve.conftest import STOPS
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import TINY, Serving, service_of, serving

pytestmark = pytest.mark.slow

KEY = "of the page"
MARKUP = "<img src=x onerror=\"document.title='run'\"><b>bold</b>"


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    try:
        path = browser_path()
    except NoBrowserError as error:
        (pytest.fail if request.config.getoption("--registry-required") else pytest.skip)(
            f"the page's tests need a browser: {error}"
        )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def locked(module_engine: FakeEngine) -> Iterator[Serving]:
    settings = Settings(api_keys=(KEY,))
    with serving(service_of(module_engine, TINY, stop_tokens=STOPS, vocab_size=512), settings) as server:
        yield server


@pytest.fixture
def page(browser: Any, locked: Serving, engine: FakeEngine) -> Iterator[Any]:
    """The page, with the key as a password; nothing may be wrong on it."""
    context = browser.new_context(http_credentials={"username": "", "password": KEY})
    shown = context.new_page()
    problems: list[str] = []
    shown.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.goto(locked.url)
    yield shown
    # Of an answer that is no success the browser says so itself.
    assert [problem for problem in problems if "the server responded with a status of 400" not in problem] == []
    context.close()


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.click("#ask")


def wait_for(page: Any, condition: Callable[[], bool]) -> None:
    """Waits until something is so; the page's policy lets no script do it."""
    for _ in range(1000):
        if condition():
            return
        page.wait_for_timeout(10)
    pytest.fail("the page did not come to it")


def wait_for_speeds(page: Any) -> list[str]:
    wait_for(page, lambda: all(each.text_content() for each in page.query_selector_all(".speed")))
    page.wait_for_selector("#ask:enabled")
    return [each.text_content() for each in page.query_selector_all(".speed")]


def contents(page: Any) -> list[str]:
    return [each.text_content() for each in page.query_selector_all(".content")]


def test_two_models_answer_side_by_side(page: Any, engine: FakeEngine) -> None:
    tokenizer = load_tokenizer(TINY)
    said = {None: "The License", "tuned": "You may reproduce it"}
    engine.script = lambda request: encode(tokenizer, said[request.adapter])
    engine.step_seconds = 0.005
    lists = page.query_selector_all("select")
    wait_for(page, lambda: len(page.query_selector_all("option")) == 6)
    assert [each.input_value() for each in lists] == ["base", "base-too"]
    lists[1].select_option("tuned")
    ask(page, "What may I do?")
    assert all(speed.endswith("tokens/s") for speed in wait_for_speeds(page))
    assert contents(page) == list(said.values())
    assert [request.adapter for request in sorted(engine.requests, key=lambda each: each.adapter or "")] == list(said)


def test_answers_are_written_as_text(page: Any, engine: FakeEngine) -> None:
    tokens = encode(load_tokenizer(TINY), MARKUP)
    engine.script = lambda request: tokens
    ask(page, "Anything")
    wait_for_speeds(page)
    assert contents(page) == [MARKUP, MARKUP]
    assert page.query_selector_all("img, b") == []
    assert page.title() == "jmoe"


def test_stop_ends_both(page: Any, engine: FakeEngine) -> None:
    engine.script = lambda request: [7] * 200
    engine.step_seconds = 0.02
    try:
        ask(page, "Go on")
        wait_for(page, lambda: all(contents(page)))
        page.click("#stop")
        page.wait_for_selector("#ask:enabled")
        assert engine.is_empty(2)
    finally:
        engine.step_seconds = 0


def test_a_refusal_is_shown(page: Any, engine: FakeEngine, locked: Serving) -> None:
    page.fill("#tokens", "100000")
    ask(page, "Too much")
    page.wait_for_selector(".content.problem")
    page.wait_for_selector("#ask:enabled")
    assert all("200 tokens" in text for text in contents(page))
