"use strict";
// The page of `coca-jax serve`: captions, labels, questions, search. It asks the API that
// /openapi.json describes, and nothing else; how is in pictures.js, which stands before it.

// -- captions ----------------------------------------------------------------------------------

function release() {
  document.querySelectorAll(".words button[aria-pressed=true]").forEach((b) => b.setAttribute("aria-pressed", "false"));
}

function wordButton(word, others) {
  const name = word.text || "end";
  const button = make("button", { type: "button" }, `${name} `, make("small", { textContent: percent(word.probability) }));
  button.style.setProperty("--sure", word.probability);
  button.setAttribute("aria-pressed", "false");
  const tell = () => {
    const listed = word.alternatives.map((a) => `${a.text || "end"} ${percent(a.probability)}`).join(" · ");
    others.textContent = `Most probable here: ${listed}`;
    heat(word.attention, word.text ? `Where the model looked for “${word.text}”` : "Where the model looked when it ended");
  };
  button.addEventListener("click", () => {
    const was = button.getAttribute("aria-pressed") === "true";
    release();
    if (was) return hideHeat();
    button.setAttribute("aria-pressed", "true");
    tell();
  });
  button.addEventListener("mouseenter", () => {
    if (!document.querySelector(".words button[aria-pressed=true]")) tell();
  });
  button.addEventListener("mouseleave", () => {
    if (!document.querySelector(".words button[aria-pressed=true]")) hideHeat();
  });
  return button;
}

const GUESS = 0.5; // probability of a label or class, or mean probability of a caption's words

function guess(id, probability, what) {
  $(id).hidden = !(probability < GUESS);
  $(id).textContent = `The model is guessing: ${what} only ${percent(probability)}.`;
}

// Against the captions of pictures from its evaluation, where the server has some; else by its words.
function guessCaption({ similarity, confidence }) {
  if (similarity === undefined || info.usual_similarity === null)
    return guess("guess", confidence, "on average it gave each word a probability of");
  $("guess").hidden = similarity >= info.usual_similarity;
  $("guess").textContent = "The model is guessing: this picture is unlike those it knows.";
}

function results(answer) {
  const [best] = answer.captions;
  $("line").hidden = false;
  $("line").textContent = best.text || "(no words)";
  guessCaption(best);
  hideHeat(best.words && !info.num_frames ? "Choose a word to see where the model looked." : "");
  $("captions").replaceChildren(
    ...answer.captions.map((caption) => {
      const others = make("p", { className: "others" });
      const words = make("div", { className: "words" });
      words.setAttribute("role", "group");
      words.setAttribute("aria-label", caption.text);
      words.append(...(caption.words ? caption.words.map((word) => wordButton(word, others)) : [caption.text]));
      others.textContent = caption.finished ? "" : "Cut off at the longest length.";
      return make("li", {}, words, others);
    }),
    ...(info.num_frames || !answer.attention ? [] : [make("li", {}, overall(answer.attention))])
  );
}

function overall(map) {
  const button = make("button", { type: "button", textContent: "Where the model looked overall" });
  button.addEventListener("click", () => {
    release();
    if ($("heat").classList.contains("on") && $("looks").dataset.whole) {
      delete $("looks").dataset.whole;
      return hideHeat();
    }
    heat(map, "Where the model looked overall");
    $("looks").dataset.whole = "1";
  });
  return button;
}

// Pieces of captions that are being written.
function growing() {
  const lines = [];
  return (tokens) => {
    for (const { caption, text, probability } of tokens) {
      if (!lines[caption]) {
        const words = make("div", { className: "words" });
        lines[caption] = { words, text: "" };
        $("captions").append(make("li", {}, words));
      }
      const line = lines[caption];
      if (text.length <= line.text.length) continue;
      const span = make("span", { textContent: text.slice(line.text.length).trimStart() });
      span.append(make("small", { textContent: percent(probability) }));
      line.words.append(span);
      line.text = text;
      if (caption === 0) Object.assign($("line"), { hidden: false, textContent: text });
    }
  };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const [, kind, data] = part.match(/^event: (\w+)\ndata: (.*)$/s);
      yield [kind, JSON.parse(data)];
    }
  }
}

function captionFields(form) {
  const mode = form.mode.value;
  const values = { prompt: form.prompt.value, explain: info.explains, stream: true };
  if (mode !== "greedy") values.num_return_sequences = form.num_return_sequences.value;
  if (mode === "beams") values.num_beams = form.num_beams.value;
  if (mode === "sample") Object.assign(values, { do_sample: true, temperature: form.temperature.value, seed: form.seed.value });
  return values;
}

$("caption-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  during(form, "Writing …", async (signal) => {
    const request = withPicture(captionFields(form));
    const one = current;
    release();
    hideHeat();
    const response = await ask("/api/caption", request, signal);
    if (one === current) $("captions").replaceChildren();
    if (one === current) $("line").hidden = $("guess").hidden = true;
    const grow = growing();
    for await (const [kind, data] of events(response)) {
      if (kind === "error") throw new Error(data.detail);
      if (kind === "tokens" && one === current) grow(data.tokens);
      if (kind === "result") {
        one.captions = data;
        if (one !== current) return "";
        results(data);
        return "";
      }
    }
    throw new Error("The answer ended early. Try again.");
  });
});

function modeChanged() {
  const mode = $("caption-form").mode.value;
  for (const field of document.querySelectorAll("[data-for]")) field.hidden = !field.dataset.for.split(" ").includes(mode);
}
$("caption-form").mode.addEventListener("change", modeChanged);
modeChanged();

$("explain-form").addEventListener("submit", (event) => {
  event.preventDefault();
  during(event.target, "Reading …", async (signal) => {
    const [found, one] = await askAbout("/api/explain", { text: event.target.text.value }, signal);
    one.captions = found;
    if (one !== current) return "";
    results(found);
    return "";
  });
});

// -- labels and questions ----------------------------------------------------------------------

function bars(list, labels) {
  $(list).replaceChildren(
    ...labels.map(({ label, probability }) => {
      const bar = make("div", { className: "bar" }, make("i"));
      bar.firstChild.style.width = `${100 * probability}%`;
      bar.setAttribute("aria-hidden", "true");
      return make("li", {}, make("div", {}, make("span", { textContent: label }), make("b", { textContent: percent(probability) })), bar);
    })
  );
}

$("labels-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const { label, template } = event.target;
  during(event.target, "Comparing …", async (signal) => {
    const values = { label: label.value, template: template.value };
    const [{ labels, cut }, one] = await askAbout("/api/zero_shot", values, signal);
    if (one !== current) return "";
    bars("labels", labels);
    guess("labels-guess", labels[0].probability, "its first choice has a probability of");
    const told = cut ? " A label was cut: the model reads fewer words." : "";
    return `Most probable: ${labels[0].label}, ${percent(labels[0].probability)}.${told}`;
  });
});

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = event.target.question.value;
  const told = (cut) => (cut ? " The question was cut: the model reads fewer words." : "");
  during(event.target, "Asking …", async (signal) => {
    if (info.head) {
      const values = info.head.reads_text ? { question } : {};
      const [{ labels, cut }, one] = await askAbout("/api/head", values, signal);
      if (one !== current) return "";
      bars("answers", labels);
      guess("answers-guess", labels[0].probability, "its first choice has a probability of");
      return `Answer: ${labels[0].label}, ${percent(labels[0].probability)}.${told(cut)}`;
    }
    const [{ answer, cut }, one] = await askAbout("/api/answer", { question }, signal);
    if (one !== current) return "";
    $("answers").replaceChildren(make("li", { textContent: answer || "(nothing)" }));
    return `Answer: ${answer || "nothing"}.${told(cut)}`;
  });
});

// -- search ------------------------------------------------------------------------------------

function searchForm(values) {
  const form = new FormData();
  for (const [name, value] of Object.entries(values)) form.append(name, value);
  return form;
}

async function search(form, signal) {
  const { results: found, cut } = await (await ask("/api/search", form, signal)).json();
  $("found").hidden = false;
  $("gallery").replaceChildren(
    ...found.map((one) => {
      const says = one.caption || one.image.split("/").pop();
      const img = make("img", { src: one.picture, alt: "", loading: "lazy" });
      img.addEventListener("error", () => img.replaceWith(make("span", { className: "none", textContent: "not shown" })));
      const button = make("button", { type: "button" }, img, says, " ", make("small", { textContent: one.score.toFixed(3) }));
      button.addEventListener("click", () => enlarge(one, says));
      return make("li", {}, button);
    })
  );
  return `Found ${plural(found.length, "picture")}.${cut ? " The text was cut: the model reads fewer words." : ""}`;
}

function enlarge(one, says) {
  $("large-title").textContent = says;
  $("large-note").textContent = `${one.image} · similarity ${one.score.toFixed(4)}`;
  Object.assign($("large-picture"), { src: `${one.picture}?large=true`, alt: says });
  $("more-like").onclick = () => {
    $("large").close();
    during($("search-form"), "Searching …", (signal) => search(searchForm({ like: one.row }), signal));
  };
  $("large").showModal();
}

$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const { text, with: both, balance } = event.target;
  during(event.target, "Searching …", async (signal) => {
    const words = text.value.trim();
    const form = both.checked ? withPicture({}) : new FormData();
    if (words) form.append("text", words);
    if (words && both.checked) {
      form.append("text_weight", (100 - balance.value) / 100);
      form.append("image_weight", balance.value / 100);
    }
    if (!words && !both.checked) throw new Error("Type words, or use the chosen picture.");
    return search(form, signal);
  });
});
$("search-form").with.addEventListener("change", (event) => ($("balance").hidden = !event.target.checked));
$("search-form").balance.addEventListener("input", (event) => {
  const picture = Number(event.target.value);
  $("balance-says").textContent = picture === 50 ? "as much of each" : `words ${100 - picture}%, picture ${picture}%`;
});

// -- tabs, key, start --------------------------------------------------------------------------

const tabs = () => [...document.querySelectorAll("[role=tab]:not([hidden])")];
function openTab(tab) {
  for (const other of tabs()) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  $("status").textContent = $("error").textContent = "";
}
$("tabs").addEventListener("click", (event) => event.target.getAttribute("role") === "tab" && openTab(event.target));
$("tabs").addEventListener("keydown", (event) => {
  const all = tabs();
  const at = all.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined || at < 0) return;
  event.preventDefault();
  const tab = all[(to + all.length) % all.length];
  openTab(tab);
  tab.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  release();
  hideHeat();
});

$("lock").addEventListener("submit", (event) => {
  event.preventDefault();
  $("lock").hidden = true;
  start($("key").value);
});

async function start(key) {
  try {
    info = await (await ask("/api/info", null, undefined, key)).json();
  } catch (error) {
    $("about").textContent = error.message;
    return;
  }
  $("name").textContent = document.title = info.name;
  const kind = info.num_frames ? "clips" : "pictures";
  const does = [info.captions ? `writes captions of ${kind}` : "", "compares labels", info.index ? `searches ${plural(info.index.pictures, "picture")}` : ""];
  $("about").textContent = `This model ${does.filter(Boolean).join(", ").replace(/, ([^,]*)$/, " and $1")}.`;
  if (!info.captions) $("picture-title").textContent = "Choose a picture, and compare labels for it.";
  for (const page of info.pages) $(page).hidden = false;
  if (!info.num_frames) offer(info.examples);
  if (info.num_frames) $("file").accept = "image/*,video/*";
  $("tab-search").hidden = !info.index;
  if (!info.captions) {
    $("tab-caption").hidden = true;
    openTab($("tab-labels"));
    $("panel-caption").hidden = true;
  }
  $("explain-form").hidden = !info.explains;
  $("tab-ask").hidden = !(info.answers || (info.head && info.head.images === 1));
  if (info.head && !info.head.reads_text) {
    $("tab-ask").textContent = "Classes";
    $("question-label").hidden = true;
    $("ask-form").question.required = false;
    $("ask-form").querySelector("button").textContent = "Classify";
  }
}
start();
