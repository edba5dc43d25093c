"use strict";
// The page's pictures, what asks the server about them, and where the model looks; serve.js, which
// stands after it in the page, has what is asked.

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const percent = (p) => (p >= 0.9995 ? "100" : p < 0.0995 ? (100 * p).toFixed(1) : (100 * p).toFixed(0)) + "%";
const plural = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;

let info = null;
let pictures = []; // {file, url, clip, captions}
let current = null;
let asking = null; // AbortController of what is under way

// -- asking ------------------------------------------------------------------------------------

// The key is sent once; the server answers with a cookie.
async function ask(path, form, signal, key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const how = form ? { method: "POST", body: form, headers, signal } : { headers, signal };
  let response;
  try {
    response = await fetch(path, how);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.status === 401) {
    $("lock").hidden = false;
    $("key").focus();
  }
  if (!response.ok) {
    const { detail } = await response.json().catch(() => ({}));
    throw new Error(problem(detail) || `The server answered ${response.status}.`);
  }
  return response;
}

// A sentence, or FastAPI's list of fields that are wrong.
const problem = (detail) =>
  Array.isArray(detail) ? detail.map((one) => `${one.loc.at(-1)}: ${one.msg}.`).join(" ") : detail;

// Does `work` while the form's button waits; says what it came to.
async function during(form, says, work) {
  asking?.abort();
  const own = (asking = Object.assign(new AbortController(), { form }));
  const button = form.querySelector("button");
  button.disabled = true;
  $("error").textContent = "";
  $("status").textContent = says;
  try {
    $("status").textContent = (await work(own.signal)) || "";
  } catch (error) {
    if (error.name !== "AbortError") {
      $("status").textContent = "";
      $("error").textContent = error.message;
    }
  } finally {
    // Where the same form was sent again meanwhile, that one's end frees its button.
    if (asking === own || asking.form !== form) button.disabled = false;
  }
}

function withPicture(values) {
  if (!current) throw new Error("Choose a picture or an example first.");
  const form = new FormData();
  form.append("image", current.file);
  for (const [name, value] of Object.entries(values)) form.append(name, value);
  return form;
}

// The first result of what `path` says of the chosen picture, and that picture: by then another one
// may be chosen.
async function askAbout(path, values, signal) {
  const form = withPicture(values);
  const one = current;
  const { results: [found] } = await (await ask(path, form, signal)).json();
  return [found, one];
}

// -- pictures ----------------------------------------------------------------------------------

function add(files, source) {
  const limits = info?.limits;
  let added = null;
  let refused = "";
  for (const file of files) {
    if (limits && file.size > limits.bytes - 4096) {
      refused = `${file.name} is larger than ${limits.bytes >> 20} MiB; make it smaller.`;
      continue;
    }
    const clip = file.type.startsWith("video/");
    added = { file, url: URL.createObjectURL(file), clip, name: file.name || "pasted picture", source };
    pictures.push(added);
  }
  pictures.splice(0, pictures.length - 48).forEach((old) => URL.revokeObjectURL(old.url));
  if (added) show(added, true);
  $("error").textContent = refused; // now: the caption of what is shown began without one
}

function list() {
  const own = pictures.filter((one) => !one.source);
  $("chosen").hidden = own.length < 2;
  for (const button of document.querySelectorAll("#examples button"))
    button.setAttribute("aria-pressed", String(button.dataset.url === current?.source));
  $("chosen").replaceChildren(
    ...own.map((one) => {
      const inside = one.clip ? make("span", { textContent: "▶" }) : make("img", { src: one.url, alt: "" });
      const button = make("button", { type: "button", onclick: () => show(one, false) }, inside);
      button.setAttribute("aria-label", one.name);
      button.setAttribute("aria-pressed", String(one === current));
      return make("li", {}, button);
    })
  );
}

function show(one, isNew) {
  current = one;
  list();
  $("view").hidden = false;
  $("shown").hidden = one.clip;
  $("clip").hidden = !one.clip;
  if (one.clip) $("clip").src = one.url;
  else Object.assign($("shown"), { src: one.url, alt: one.name });
  $("stage").classList.add("chosen");
  if (isNew) $("stage").scrollIntoView({ block: "nearest" });
  hideHeat();
  for (const id of ["labels", "answers", "captions"]) $(id).replaceChildren();
  for (const id of ["line", "guess", "labels-guess", "answers-guess"]) $(id).hidden = true;
  if (one.captions) results(one.captions);
  if (isNew && !$("panel-caption").hidden) $("caption-form").requestSubmit();
}

// Pictures that the server offers to start with.
function offer(count) {
  $("examples").hidden = !count;
  const list = $("examples").querySelector("ul");
  list.replaceChildren(
    ...Array.from({ length: count }, (_, n) => {
      const url = `/api/examples/${n}`;
      const button = make("button", { type: "button" }, make("img", { src: url, alt: "" }));
      button.setAttribute("aria-label", `Example ${n + 1}`);
      button.setAttribute("aria-pressed", "false");
      button.dataset.url = url;
      button.addEventListener("click", async () => {
        const there = pictures.find((one) => one.source === url);
        if (there) return show(there, !there.captions);
        const blob = await (await ask(url)).blob();
        add([new File([blob], `example ${n + 1}`, { type: blob.type })], url);
      });
      return make("li", {}, button);
    })
  );
}

$("file").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  add(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});

// -- where the model looks ---------------------------------------------------------------------

let lit = null; // what `heat` shows, for when the window changes

// A map [R][C] over the part of the picture that the model sees; of clips there is none here,
// nor where margins were cut away: the page does not know how much.
function heat(map, says) {
  $("looks").textContent = says;
  const picture = $("shown");
  const unseen = current?.clip || info.num_frames || info.resize === "trim" || !picture.naturalWidth;
  if (!map || unseen) return hideHeat(says);
  const rows = map.length, columns = map[0].length;
  const small = make("canvas", { width: columns, height: rows });
  const most = Math.max(...map.flat());
  const image = new ImageData(columns, rows);
  map.flat().forEach((value, i) => {
    const strength = most ? value / most : 0;
    // What is not looked at is covered, what is looked at stays clear.
    image.data.set([8, 12, 24, Math.round(215 * (1 - Math.pow(strength, 0.8)))], 4 * i);
  });
  small.getContext("2d").putImageData(image, 0, 0);
  const { width, height } = picture.getBoundingClientRect();
  // The middle of the picture, in the proportions of the model's images.
  const [high, wide] = [info.image_size, info.image_size].flat().slice(0, 2);
  const scale = Math.min(width / wide, height / high);
  const [w, h] = info.resize === "crop" ? [wide * scale, high * scale] : [width, height];
  const canvas = $("heat");
  canvas.width = Math.round(w * devicePixelRatio);
  canvas.height = Math.round(h * devicePixelRatio);
  Object.assign(canvas.style, {
    width: `${w}px`, height: `${h}px`, left: `${(width - w) / 2}px`, top: `${(height - h) / 2}px`,
  });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  canvas.classList.add("on");
  lit = [map, says];
}

function hideHeat(says = "") {
  lit = null;
  $("heat").classList.remove("on");
  $("looks").textContent = says;
}
addEventListener("resize", () => lit && heat(...lit));
