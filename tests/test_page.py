"""The page of `coca-jax serve` in a real browser without a window, as on a desk and on a phone."""

import base64
import json
import shutil

import pytest
from test_serve import Client, folder, model, no_compile_cache, png, searched, words  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'test'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra 'test'")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("needs Chromium", allow_module_level=True)

SIZES = dict(desktop=dict(width=1280, height=850), phone=dict(width=390, height=760))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as api:
        found = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(model, searched, tmp_path_factory):  # noqa: F811
    """A run with a report and held-out pictures, and an index; it needs a key."""
    run = tmp_path_factory.mktemp("run")
    (run / "report.html").write_text("<title>A report</title>")
    items = [dict(image=base64.b64encode(png(i)).decode()) for i in range(12)]
    (run / "eval_examples.json").write_text(json.dumps({"captioning/x": dict(items=items)}))
    client = Client(model, index=searched, folder=str(run), key="a key of many letters")
    yield client
    client.close()


@pytest.fixture(params=SIZES)
def page(request, browser, served):
    context = browser.new_context(viewport=SIZES[request.param])
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.fill("#key", "a key of many letters")
    page.click("#lock button")
    page.wait_for_selector("#examples img")
    yield page
    assert not problems
    context.close()


def file(name, seed=1, size=None):
    data = png(seed) if size is None else b"x" * size
    return dict(name=name, mimeType="image/png", buffer=data)


def accessible(page):
    found = axe.Axe().run(page).response["violations"]
    assert not found, [(one["id"], one["nodes"][0]["target"]) for one in found]


def test_an_example_is_described_beside_it(page, served, model):  # noqa: F811
    """The caption is seen without scrolling, a word lights the picture, links lead to the run."""
    accessible(page)
    page.click("#examples li:nth-child(2) button")
    page.wait_for_selector("#captions .words button")
    (caption,) = model.caption([png(1)])
    assert page.inner_text("#line") == (caption or "(no words)")
    end = page.locator("#line").bounding_box()
    assert end["y"] + end["height"] < page.viewport_size["height"]
    page.click("#captions .words button:first-child")
    assert "Where the model looked" in page.inner_text("#looks")
    assert page.locator("#heat.on").count() == 1
    accessible(page)
    page.click("#report")
    page.wait_for_url("**/api/report")
    assert page.title() == "A report"


def test_labels_questions_and_search(page):
    page.set_input_files("#file", [file("cat.png")])
    page.wait_for_selector("#captions .words button")
    page.click("#tab-labels")
    page.fill("#labels-form textarea", "red\nblue\ngreen")
    page.click("#labels-form button")
    page.wait_for_selector("#labels li:nth-child(3)")
    shares = [float(text.strip("%")) for text in page.locator("#labels b").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert page.locator("#labels-guess").is_visible() == (shares[0] < 50)
    page.fill("#labels-form textarea", "red")  # what the server refuses is said
    page.click("#labels-form button")
    expect(page.locator("#error")).to_contain_text("1 labels. Give 2 to 1000.")
    page.click("#tab-search")
    page.fill("#search-form [name=text]", "red")
    page.click("#search-form button")
    expect(page.locator("#gallery img")).to_have_count(6)
    page.click("#gallery li:first-child button")
    expect(page.locator("#large-picture")).to_have_js_property("naturalWidth", 20)
    accessible(page)


@pytest.mark.parametrize("similarity, guessing", [(0.2, True), (0.9, False)])
def test_a_caption_that_fits_badly_is_called_a_guess(page, similarity, guessing):
    page.evaluate("info.usual_similarity = 0.5")
    caption = dict(text="a cat", log_prob=-1, confidence=0.9, finished=True, similarity=similarity)
    body = f"event: result\ndata: {json.dumps(dict(captions=[caption]))}\n\n"
    page.route("**/api/caption", lambda route: route.fulfill(body=body))
    page.set_input_files("#file", [file("cat.png")])
    expect(page.locator("#line")).to_have_text("a cat")
    assert page.locator("#guess").is_visible() == guessing


def test_late_answers_are_not_shown_beside_another_picture(page):
    held = []
    page.route("**/api/zero_shot", lambda route: held.append(route))
    page.set_input_files("#file", [file("cat.png", 1), file("dog.png", 2)])
    page.wait_for_selector("#captions .words button")
    dog = page.inner_text("#line")
    page.click("#tab-labels")
    page.fill("#labels-form textarea", "red\nblue")
    page.click("#labels-form button")
    expect(page.locator("#labels-form button")).to_be_disabled()
    page.click("#chosen li:first-child button")  # the cat
    held[0].fulfill(json=dict(results=[dict(labels=[dict(label="late", probability=1)])]))
    expect(page.locator("#labels-form button")).to_be_enabled()
    assert page.inner_text("#labels") == ""
    page.click("#chosen li:last-child button")
    assert page.inner_text("#line") == dog  # kept with its picture


def test_a_file_that_is_too_large_is_named_and_the_others_are_taken(page):
    page.set_input_files("#file", [file("a.png"), file("huge.png", size=5 << 20)])
    page.wait_for_selector("#captions .words button")
    assert page.inner_text("#error") == "huge.png is larger than 1 MiB; make it smaller."
