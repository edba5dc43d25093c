"use strict";
// The scripts of the page of `coca-jax serve` in Node, without a browser: elements that keep what
// is put into them, and a server that answers when it is told to. Its arguments are the two scripts;
// standard input is what is done with the page, whose last value is printed as JSON.

const fs = require("fs");
const vm = require("vm");

class Element {
  constructor() {
    const list = { add() {}, remove() {}, contains: () => false };
    Object.assign(this, { children: [], heard: {}, style: { setProperty() {} }, dataset: {} });
    Object.assign(this, { classList: list, textContent: "", value: "", hidden: false });
  }
  append(...more) { this.children.push(...more); }
  replaceChildren(...all) { this.children = all; }
  get firstChild() { return this.children[0]; }
  addEventListener(kind, act) { (this.heard[kind] ??= []).push(act); }
  fire(kind) { for (const act of this.heard[kind] ?? []) act({ target: this, preventDefault() {} }); }
  requestSubmit() { this.fire("submit"); }
  querySelector(selector) { return (this[selector] ??= new Element()); }
  getAttribute() { return ""; }
  setAttribute() {}
  removeAttribute(name) { delete this[name]; }
  replaceWith() {}
  showModal() {}
  close() {}
}

const elements = {};
const element = (id) => (elements[id] ??= new Element());
const text = (one) => (typeof one === "string" ? one : one.textContent + one.children.map(text).join(" "));
const fields = { "caption-form": ["mode", "prompt"], "explain-form": ["text"], "labels-form": ["label", "template"] };
Object.assign(fields, { "ask-form": ["question"], "search-form": ["text", "with", "balance"] });
for (const [form, names] of Object.entries(fields)) {
  for (const name of names) element(form)[name] = new Element();
}
element("caption-form").mode.value = "greedy";

const info = { name: "m", num_frames: 0, image_size: 16, limits: { bytes: 1 << 20 }, captions: true, explains: true };
info.answers = true;
const asked = []; // {path, picture, answer}
function fetch(path, { body, signal }) {
  if (path === "/api/info") return Promise.resolve({ ok: true, json: async () => info });
  return new Promise((resolve, reject) => {
    signal?.addEventListener("abort", () => reject(Object.assign(new Error(), { name: "AbortError" })));
    const answer = (found) => {
      resolve({ ok: true, json: async () => found, blob: async () => found });
      return settle();
    };
    asked.push({ path, picture: body?.get("image")?.name, answer });
  });
}
const settle = () => new Promise((resolve) => setTimeout(resolve, 5));
const picture = (name, size = 10) => ({ name, size, type: "image/png" });

class FormData {
  values = {};
  append(name, value) { this.values[name] = value; }
  get(name) { return this.values[name]; }
}
const document = { getElementById: element, createElement: () => new Element(), addEventListener() {} };
Object.assign(document, { querySelectorAll: () => [], querySelector: () => null });
const URL = { createObjectURL: (file) => `blob:${file.name}`, revokeObjectURL() {} };
const page = { document, fetch, FormData, URL, AbortController, addEventListener() {} };
Object.assign(page, { sessionStorage: { getItem: () => "" }, element, text, asked, settle, picture });
page.element("panel-caption").hidden = true; // nothing is captioned unasked

const scripts = process.argv.slice(2).map((path) => fs.readFileSync(path, "utf8"));
const steps = `(async () => { await settle(); ${fs.readFileSync(0, "utf8")} })()`;
vm.runInNewContext([...scripts, steps].join("\n"), page).then((found) => console.log(JSON.stringify(found)));
