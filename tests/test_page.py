"""What the page of `serve` does with answers that come late, in Node without a browser."""

import json
import pathlib
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
PAGE = HERE.parent / "coca_jax/apps/serve/page"

if not shutil.which("node"):
    pytest.skip("needs Node", allow_module_level=True)


def after(steps: str):
    """What the page came to by some steps, which have what page_stand_ins.js gives them."""
    command = ["node", HERE / "page_stand_ins.js", PAGE / "pictures.js", PAGE / "serve.js"]
    done = subprocess.run(command, input=steps, capture_output=True, text=True, timeout=60)
    assert not done.returncode and not done.stderr, done.stderr
    return json.loads(done.stdout)


TWO = """
add([picture("cat.png"), picture("dog.png")]);
const [cat, dog] = pictures;
show(cat, false);
"""


def test_an_explanation_is_of_the_picture_that_was_asked_about():
    found = after(
        TWO
        + """
        element("explain-form").fire("submit");
        show(dog, false);
        const captions = [{ text: "words of cat", log_prob: -1, finished: true }];
        await asked[0].answer({ results: [{ captions }] });
        const then = text(element("captions"));
        show(cat, false);
        return [asked[0].picture, then, dog.captions, text(element("captions")).trim()];
        """
    )
    assert found[:2] == ["cat.png", ""] and found[2] is None
    assert found[3].startswith("words of cat log probability -1.00")


@pytest.mark.parametrize(
    "form, into, answer, says",
    [
        ("labels", "labels", dict(labels=[dict(label="cat", probability=0.9)]), "cat90%"),
        ("ask", "answers", dict(answer="a cat"), "a cat"),
    ],
)
def test_labels_and_answers_are_not_shown_beside_another_picture(form, into, answer, says):
    found = after(
        TWO
        + f"""
        const seen = [];
        for (const one of [dog, cat]) {{
          show(cat, false);
          element("{form}-form").fire("submit");
          show(one, false);
          await asked.pop().answer({{ results: [{json.dumps(answer)}] }});
          seen.push(text(element("{into}")).replace(/ /g, ""), text(element("status")));
        }}
        return seen;
        """
    )
    assert found[:2] == ["", ""]
    assert found[2] == says.replace(" ", "") and "cat" in found[3]


def test_captions_of_another_picture_stay_while_one_is_written():
    found = after(
        TWO
        + """
        dog.captions = { captions: [{ text: "words of dog", log_prob: -2, finished: true }] };
        element("caption-form").fire("submit");
        show(dog, false);
        await asked[0].answer({});
        return text(element("captions"));
        """
    )
    assert "words of dog" in found


def test_a_file_that_is_too_large_is_said_and_no_other_is_captioned_again():
    found = after(
        """
        element("panel-caption").hidden = false;
        add([picture("a.png")]);
        add([picture("huge.png", 5 << 20)]);
        const told = text(element("error"));
        add([picture("b.png"), picture("huge.png", 5 << 20)]);
        return [told, text(element("error")), asked.map((one) => one.picture)];
        """
    )
    told = "huge.png is larger than 1 MiB; make it smaller."
    assert found == [told, told, ["a.png", "b.png"]]


def test_the_picture_that_was_opened_last_is_the_one_that_is_shown_large():
    found = after(
        """
        enlarge({ picture: "/api/pictures/1", image: "one", score: 0.5 }, "one");
        enlarge({ picture: "/api/pictures/2", image: "two", score: 0.5 }, "two");
        await asked[1].answer({ name: "two" });
        await asked[0].answer({ name: "one" });
        return [text(element("large-title")), element("large-picture").src];
        """
    )
    assert found == ["two", "blob:two"]
