"""The page at `/`, in a browser that talks to a real server: what a newcomer sees, does and is told.

`PAGE_URL=http://127.0.0.1:8000 pytest tests/service/test_page.py -k screenshot` renews docs/page.png.
"""

import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from service import page as served
from service.access import new_key
from service.latency import Latency, LatencyProfile
from tests.service import toy_artifact
from tests.service.conftest import BATCH_SIZES, Launcher, Running

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DESKTOP, PHONE = (1280, 900), (360, 740)
FAR_APART = {"1": 1e-4, "2": 2.0, "3": 4.0}
"""What a run of each column is said to take [s]: between them no machine is slow enough to blur."""

CONTRAST = """() => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => {
        const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = color.map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        const color = rgb(getComputedStyle(element).backgroundColor);
        return color.length === 3 || color[3] === 1 ? color.slice(0, 3) : behind(element.parentElement);
    };
    const isText = (node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim();
    return [...document.body.querySelectorAll("*")]
        .filter((element) => element.checkVisibility() && [...element.childNodes].some(isText))
        .map((element) => {
            const pair = [rgb(getComputedStyle(element).color), behind(element)].map(luminance);
            return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), element.textContent.trim()];
        });
}"""
"""Each text with its contrast to what is behind it. Source: WCAG 2.2, "contrast ratio"."""


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium here: install it (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield started
        started.close()


Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, launch: Launcher) -> Iterator[Open]:
    """Opens the page of a server in a context of its own, and sees to it that nothing was amiss.

    No request may leave the host, and the console must stay empty but for refusals that the test expects.
    The servers that a test launches outlive its pages, which ask them for news to the end.
    """
    contexts, complaints, expected = [], list[str](), set[int]()

    def complain(message: ConsoleMessage) -> None:
        if not any(f"status of {status} " in message.text for status in expected):
            complaints.append(message.text)

    def visit(
        server: Running | str,
        *,
        size: tuple[int, int] = DESKTOP,
        refusals: tuple[int, ...] = (),
        path: str = "",
        **options: Any,
    ) -> Page:
        url = server if isinstance(server, str) else str(server.client.base_url)
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        expected.update(refusals)
        page = context.new_page()
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((url, "blob:", "data:")) else complaints.append(request.url)
            ),
        )
        page.goto(f"{url}{path}")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def apart(launch: Launcher) -> Running:
    """A server whose columns are told to take very different times."""
    latencies = {
        column: dict.fromkeys(BATCH_SIZES, Latency(seconds, seconds)) for column, seconds in FAR_APART.items()
    }
    # With no regard for others who might come meanwhile: the runs are said to be long.
    return launch(profile=LatencyProfile(latencies), answer_worth=0)


@pytest.fixture
def patient(launch: Launcher) -> Running:
    """A server whose callers have time, however busy this machine is."""
    return launch(default_budget_ms=5000)


def choose(page: Page, sample: str = "Airplane") -> None:
    page.get_by_role("button", name=sample).click()


def set_budget(page: Page, *, until: str) -> None:
    """Move the slider with the arrow keys until it says so."""
    slider = page.get_by_role("slider", name="Your budget")
    slider.press("Home")
    while slider.get_attribute("aria-valuetext") != until:
        slider.press("ArrowRight")


def verdict(page: Page) -> Any:
    return page.get_by_role("status")


def expect_answer_of(page: Page, column: str) -> None:
    expect(page.locator(".rung.is-answer h3")).to_contain_text(f"Column {column}")


# ---- how it is served ----


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_may_load_nothing_from_elsewhere_and_be_framed_by_nobody(server: Running, path: str) -> None:
    response = server.client.get(path)

    assert not re.search(rb"(src|href)=.(https?:|//)", response.content)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    )
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["cross-origin-opener-policy"] == "same-origin"
    assert "camera=()" in response.headers["permissions-policy"]


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/docs", "text/html; charset=utf-8"),
        ("/web/app.js", "text/javascript; charset=utf-8"),
        ("/web/docs.js", "text/javascript; charset=utf-8"),
        ("/web/style.css", "text/css; charset=utf-8"),
        ("/web/icon.svg", "image/svg+xml; charset=utf-8"),
        ("/web/samples/cat.svg", "image/svg+xml; charset=utf-8"),
    ],
)
def test_each_file_comes_as_what_it_is_and_only_when_it_has_changed(
    server: Running, path: str, content_type: str
) -> None:
    first = server.client.get(path)
    again = server.client.get(path, headers={"if-none-match": first.headers["etag"]})

    assert (first.status_code, first.headers["content-type"]) == (200, content_type)
    assert first.headers["x-content-type-options"] == "nosniff"
    assert first.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")


def test_head_says_what_get_would(server: Running) -> None:
    head, get = server.client.head("/"), server.client.get("/")

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(get.content))


@pytest.mark.parametrize(
    "path",
    [
        *("/web/", "/web/index.html", "/web/nothing.js", "/web/../page.py", "/web/%2e%2e/page.py"),
        *("/web/docs.html", "/docs/oauth2-redirect"),
        *("/web/..%2fpage.py", "/web//etc/passwd", "/web/samples", "/web/samples/../../page.py"),
    ],
)
def test_only_known_files_are_served(server: Running, path: str) -> None:
    request = httpx.Request("GET", str(server.client.base_url))
    request.url = request.url.copy_with(raw_path=path.encode())

    assert server.client.send(request).status_code == 404


def test_every_file_of_the_page_is_part_of_the_package() -> None:
    known = {
        path.relative_to(served.FOLDER).as_posix() for path in served.FOLDER.rglob("*") if path.is_file()
    }
    routes = {route.path for route in served.routes()}  # type: ignore[attr-defined] # each is a Route

    assert routes == {"/", "/docs", *(f"/web/{name}" for name in known - {"index.html", "docs.html"})}


# ---- what is seen ----


@pytest.mark.browser
def test_it_says_what_it_is_before_a_picture_is_chosen(visit: Open, server: Running) -> None:
    page = visit(server)

    expect(page.get_by_role("heading", level=1)).to_have_text("The best answer in 50 ms")
    expect(page.locator(".rung h3")).to_have_text(
        ["Column 1 4 layers, 0.01 ms", "Column 2 8 layers, 0.01 ms", "Column 3 12 layers, 0.01 ms"]
    )
    expect(page.locator(".rung .right")).to_have_text(
        ["80.0 % right alone", "85.0 % right alone", "90.0 % right alone"]
    )
    expect(page.locator("#knows")).to_have_text(
        "The network always answers with one of: ant, bee, cat, dog, elk."
    )


@pytest.mark.browser
def test_each_rung_is_shown_as_it_comes_shallow_first(visit: Open, patient: Running) -> None:
    page = visit(patient)
    expect(page.locator(".lane")).to_have_count(3)
    page.evaluate("""() => {
        window.arrivals = [];
        const isNew = ({ target, oldValue }) => target.matches(".arrived") && !oldValue.includes("arrived");
        const note = (changes) => window.arrivals.push(
            ...changes.filter(isNew).map(({ target }) => target.querySelector(".name").textContent));
        const options = { subtree: true, attributeFilter: ["class"], attributeOldValue: true };
        new MutationObserver(note).observe(document.getElementById("lanes"), options);
    }""")
    choose(page)

    expect_answer_of(page, "3")
    assert page.evaluate("window.arrivals") == ["Column 1", "Column 2", "Column 3"]
    expect(verdict(page)).to_contain_text("Nothing deeper is left to try.")
    expect(page.locator(".rung .right")).to_have_text(
        ["80.0 % right alone", "87.0 % right with 1", "93.0 % right with 1 and 2"]
    )
    answer = page.locator(".rung.is-answer")
    label = answer.locator(".says").inner_text()
    assert label in toy_artifact.LABELS
    expect(answer.locator(".top .label").first).to_have_text(label)
    expect(answer.locator(".top .percent")).to_have_count(5)
    expect(page.locator("#timeline")).to_have_attribute(
        "aria-label",
        re.compile(r"Budget 5000 ms; column 1 [\d.]+ ms.*; column 2 [\d.]+ ms.*; column 3 [\d.]+ ms"),
    )


@pytest.mark.browser
def test_the_slider_decides_how_deep_the_answer_is(visit: Open, apart: Running) -> None:
    page = visit(apart)
    set_budget(page, until="200 milliseconds")
    choose(page)

    expect_answer_of(page, "1")
    expect(verdict(page)).to_contain_text("Nothing deeper fits into what is left.")
    expect(page.locator(".lane.missed .when").last).to_contain_text("did not fit")

    page.get_by_role("slider").press("End")

    expect_answer_of(page, "3")


@pytest.mark.browser
def test_it_stops_early_when_it_is_sure_enough(visit: Open, apart: Running) -> None:
    page = visit(apart)
    page.get_by_role("slider").press("End")
    choose(page)
    expect_answer_of(page, "3")
    page.get_by_label("Stop early when").evaluate("select => select.options[1].value = '0.01'")
    page.get_by_label("Stop early when").select_option(index=1)

    expect(verdict(page)).to_contain_text("It is as sure as you asked for, so it stopped.")


@pytest.mark.browser
def test_a_refusal_says_what_it_would_need_and_can_be_answered(visit: Open, apart: Running) -> None:
    page = visit(apart, refusals=(429,))
    page.get_by_role("slider").press("Home")
    choose(page)

    expect(verdict(page)).to_contain_text("Not in time")
    expect(verdict(page)).to_contain_text("grant")
    expect(page.locator(".rung .says")).to_have_text(["not run"] * 3)

    page.get_by_role("slider").press("End")

    expect_answer_of(page, "3")
    expect(page.get_by_role("button", name="Send again")).to_be_hidden()


@pytest.mark.browser
def test_the_servers_figures_follow(visit: Open, patient: Running) -> None:
    page = visit(patient)
    expect(page.locator("#attainment-of")).to_have_text("0 of 0 requests")
    choose(page)

    expect(page.locator("#attainment")).to_have_text("100 %")
    expect(page.locator("#attainment-of")).to_have_text("1 of 1 requests")
    expect(page.locator("#by-column")).to_have_text("column 1: 0, column 2: 0, column 3: 1")
    expect(page.locator("#queue")).to_have_text("0")


# ---- how a picture is given ----


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), "#3366cc").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.browser
def test_a_file_can_be_chosen(visit: Open, patient: Running) -> None:
    page = visit(patient)
    page.get_by_label("Choose a picture").set_input_files(
        {"name": "blue.png", "mimeType": "image/png", "buffer": png()}
    )

    expect(page.locator(".rung.is-answer")).to_be_visible()
    expect(page.get_by_alt_text("blue.png")).to_be_visible()
    seen = page.locator("#seen").evaluate(
        "c => [c.width, c.height, ...c.getContext('2d').getImageData(4, 4, 1, 1).data]"
    )
    assert seen == [toy_artifact.WIDTH, toy_artifact.HEIGHT, 0x33, 0x66, 0xCC, 255]


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_file_can_be_pasted_and_dropped(visit: Open, patient: Running, kind: str) -> None:
    page = visit(patient)
    page.evaluate(
        """([kind, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "blue.png", { type: "image/png" }));
            const given = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(kind === "paste"
                ? new ClipboardEvent(kind, { ...given, clipboardData: data })
                : new DragEvent(kind, { ...given, dataTransfer: data }));
        }""",
        [kind, list(png())],
    )

    expect(page.locator(".rung.is-answer")).to_be_visible()


@pytest.mark.browser
def test_what_is_no_picture_is_named_as_such(visit: Open, server: Running) -> None:
    page = visit(server)
    page.get_by_label("Choose a picture").set_input_files(
        {"name": "letter.txt", "mimeType": "text/plain", "buffer": b"Dear server"}
    )

    expect(verdict(page)).to_contain_text("letter.txt is not a picture that this browser can read")


@pytest.mark.browser
def test_a_server_that_asks_for_a_key_is_given_one(visit: Open, launch: Launcher) -> None:
    key, hash_ = new_key()
    page = visit(launch(default_budget_ms=5000, api_keys=(hash_,)), refusals=(401,))
    choose(page)
    expect(verdict(page)).to_contain_text("A key is needed")
    page.get_by_label("This server asks for an API key").fill(key)
    page.get_by_role("button", name="Use it").click()

    expect(page.locator(".rung.is-answer")).to_be_visible()
    expect(page.get_by_label("This server asks for an API key")).to_be_hidden()
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]


# ---- for everybody ----


@pytest.mark.browser
def test_a_keyboard_is_enough_and_what_has_the_focus_is_marked(visit: Open, apart: Running) -> None:
    page = visit(apart)
    expect(page.locator(".lane")).to_have_count(3)
    reached = []
    while "budget" not in reached:
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent || 'sample'")
        )
        marked = page.evaluate("""() => {
            const focused = document.activeElement; // of a slider the thumb is marked, which nobody can ask
            const marked = focused.closest(".drop") ?? focused;
            return focused.id === "budget" || getComputedStyle(marked).outlineStyle !== "none";
        }""")
        assert marked, reached
        if reached[-1] == "sample" and reached.count("sample") == 1:
            page.keyboard.press("Enter")
    assert reached == ["API", "Model", "Metrics", "file", *["sample"] * 10, "sure", "budget"]
    page.keyboard.press("End")

    expect_answer_of(page, "3")


@pytest.mark.browser
def test_an_answer_moves_nothing(visit: Open, apart: Running) -> None:
    page = visit(apart)
    expect(page.locator(".lane")).to_have_count(3)
    expect(page.locator("#attainment-of")).to_have_text("0 of 0 requests")
    places = "[...document.querySelectorAll('main [id]')].map((one) => [one.id, one.offsetTop])"
    before = dict(page.evaluate(places))
    set_budget(page, until="200 milliseconds")
    choose(page)
    expect_answer_of(page, "1")
    after = dict(page.evaluate(places))

    for name in ("timeline", "lanes", "verdict", "timing", "rungs", "knows", "attainment", "queue", "curl"):
        assert after[name] == before[name], name


@pytest.mark.browser
def test_a_phone_needs_no_scrolling_sideways(visit: Open, apart: Running) -> None:
    page = visit(apart, size=PHONE, refusals=(429,))
    width = "document.documentElement.scrollWidth"
    expect(page.locator(".lane")).to_have_count(3)
    assert page.evaluate(width) == PHONE[0]
    page.get_by_role("slider").press("Home")
    choose(page)
    expect(verdict(page)).to_contain_text("Not in time")
    assert page.evaluate(width) == PHONE[0]
    page.get_by_role("slider").press("End")
    expect_answer_of(page, "3")
    assert page.evaluate(width) == PHONE[0]


@pytest.mark.browser
def test_light_and_dark_differ_and_both_can_be_read(visit: Open, apart: Running) -> None:
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = visit(apart, color_scheme=scheme, reduced_motion="reduce")
        page.get_by_role("slider").press("End")
        choose(page)
        expect_answer_of(page, "3")
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))

        assert [(ratio, text) for ratio, text in page.evaluate(CONTRAST) if ratio < 4.5] == []
    assert len(backgrounds) == 2


@pytest.mark.browser
def test_who_wants_no_motion_sees_none(visit: Open, server: Running) -> None:
    page = visit(server, reduced_motion="reduce")
    expect(page.locator(".lane")).to_have_count(3)
    durations = "[...document.querySelectorAll('*')].map((one) => getComputedStyle(one).transitionDuration)"

    assert set(page.evaluate(durations)) == {"0s"}


# ---- /docs ----


def operation(page: Page, method: str, path: str) -> Any:
    """One of them, opened."""
    named = page.locator(".path").get_by_text(path, exact=True)
    found = page.locator(".operation").filter(has=named).filter(has=page.locator(f".method.{method}"))
    found.locator("summary").first.click()
    return found


@pytest.mark.browser
def test_the_documentation_shows_every_operation(visit: Open, server: Running) -> None:
    told = server.client.get("/openapi.json").json()
    page = visit(server, path="/docs")
    expect(page.locator("h1")).to_have_text("Anytime inference 0.1.0")
    listed = {(method.upper(), path) for path, methods in told["paths"].items() for method in methods}
    expect(page.locator(".operation")).to_have_count(len(listed))
    shown = page.evaluate(
        "[...document.querySelectorAll('.operation > summary')].map("
        "(one) => [one.querySelector('.method').textContent, one.querySelector('.path').textContent])"
    )
    assert {tuple(one) for one in shown} == listed

    predict = operation(page, "post", "/predict")
    expect(predict.locator(".described")).to_contain_text("It needs a key, if the operator has set any.")
    expect(predict.locator(".fields label")).to_have_text(
        [
            *("budget_ms", "top_k", "min_confidence", "stream", "X-Budget-Ms", "X-Request-Id"),
            *("Content-Type", "File", "Body"),
        ]
    )
    expect(predict.locator(".fields .about").first).to_have_text(
        "Wall time inside the server, arrival to last byte [ms]. (number, 0.1 to 10000)"
    )
    statuses = list(told["paths"]["/predict"]["post"]["responses"])
    expect(predict.locator(".answer-told .code")).to_have_text(statuses)
    predict.locator(".answer-told summary").first.click()
    expect(predict.locator(".answer-told pre").first).to_contain_text("deadline_met: boolean")


@pytest.mark.browser
def test_what_is_documented_can_be_tried(visit: Open, patient: Running, tmp_path: Path) -> None:
    picture = tmp_path / "a picture.png"
    Image.new("RGB", (20, 20)).save(picture)
    page = visit(patient, path="/docs", refusals=(422,))

    model = operation(page, "get", "/v2/models/{name}")
    expect(model.locator(".curl")).to_have_text(f"curl '{patient.client.base_url}/v2/models/toy'")
    model.get_by_role("button", name="Send").click()
    expect(model.get_by_role("status")).to_contain_text("200 OK")
    expect(model.locator(".answer")).to_contain_text('"platform": "onnxruntime_onnx"')

    predict = operation(page, "post", "/predict")
    predict.get_by_label("top_k").fill("2")
    predict.get_by_label("File").set_input_files(picture)
    expect(predict.locator(".curl")).to_have_text(
        f"curl -H 'Content-Type: image/png' --data-binary '@a picture.png' "
        f"'{patient.client.base_url}/predict?top_k=2'"
    )
    predict.get_by_role("button", name="Send").click()
    expect(predict.locator(".answer")).to_contain_text('"columns_run"')
    predict.get_by_label("Content-Type").select_option("multipart/form-data")
    predict.get_by_label("stream").select_option("ndjson")
    expect(predict.locator(".curl")).to_contain_text("-F 'image=@a picture.png'")
    predict.get_by_role("button", name="Send").click()
    expect(predict.locator(".answer")).to_contain_text('{"event":"done"')
    predict.get_by_label("top_k").fill("0")
    predict.get_by_role("button", name="Send").click()
    expect(predict.get_by_role("status")).to_contain_text("422")
    expect(predict.locator(".answer")).to_contain_text("top_k must be a number from 1 to 5")

    infer = operation(page, "post", "/v2/models/{name}/infer")
    body = '{"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": [%s]}]}'
    infer.get_by_label("Body").fill(body % ", ".join(["7"] * 192))
    infer.get_by_role("button", name="Send").click()
    expect(infer.locator(".answer")).to_contain_text('"model_name": "toy"')


@pytest.mark.browser
def test_the_documentation_sends_the_key_and_shows_it_to_nobody(visit: Open, launch: Launcher) -> None:
    key, hashed = new_key()
    page = visit(launch(api_keys=(hashed,)), path="/docs", refusals=(400, 401))
    infer = operation(page, "post", "/v2/models/{name}/infer")
    infer.get_by_role("button", name="Send").click()
    expect(infer.get_by_role("status")).to_contain_text("401")
    page.get_by_label("API key").fill(key)
    page.get_by_label("API key").press("Enter")
    infer.get_by_label("Body").fill('{"inputs": []}')
    expect(infer.locator(".curl")).to_contain_text("-H 'Authorization: Bearer …'")
    infer.get_by_role("button", name="Send").click()
    expect(infer.get_by_role("status")).to_contain_text("400")
    assert key not in page.locator("body").inner_text()


@pytest.mark.browser
def test_an_address_opens_the_operation_that_it_names(visit: Open, server: Running) -> None:
    page = visit(server, path="/docs#model_model_get")
    expect(page.locator("#model_model_get > .tried")).to_be_visible()
    expect(page.locator(".operation > .tried:visible")).to_have_count(1)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_documentation_can_be_read_on_a_phone(visit: Open, server: Running, scheme: str) -> None:
    page = visit(server, path="/docs", size=PHONE, color_scheme=scheme)
    expect(page.locator(".operation")).not_to_have_count(0)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    assert [(ratio, text) for ratio, text in page.evaluate(CONTRAST) if ratio < 4.5] == []


@pytest.mark.browser
@pytest.mark.skipif(
    "PAGE_URL" not in os.environ, reason="set PAGE_URL to a running server to renew docs/page.png"
)
def test_a_screenshot(visit: Open) -> None:
    for scheme, name in (("light", "page.png"), ("dark", "page-dark.png")):
        page = visit(os.environ["PAGE_URL"], color_scheme=scheme, reduced_motion="reduce")
        choose(page, "Deer in the fog")
        set_budget(page, until="20 milliseconds")
        expect(verdict(page)).to_contain_text("of 20 ms")
        page.screenshot(path=ROOT / "docs" / name, full_page=True)
