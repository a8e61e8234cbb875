// /docs: what openapi.json says, to be read and to be tried. It knows of the server nothing else.

const $ = (id) => document.getElementById(id);
const KEY = "anytime-key"; // as on the page at /
const MOST_SHOWN = 20000;
const METHODS = ["get", "post", "put", "delete"];

/** An element of this kind; the rest are properties, and what it contains. */
function made(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A text in which what stands between backticks is code. */
function marked(text) {
  return text.split("`").map((part, i) => (i % 2 ? made("code", { textContent: part }) : part));
}

function copyOf(template) {
  return $(template).content.firstElementChild.cloneNode(true);
}

// ---- schemas ----

/** A schema as a reader of code would write it. */
function written(schema, indent = "") {
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.anyOf) return schema.anyOf.map((one) => written(one, indent)).join(" | ");
  if (schema.type === "array") return schema.items ? `[${written(schema.items, indent)}, …]` : "[…]";
  if (schema.type !== "object") return simple(schema);
  if (!schema.properties) return schema.additionalProperties ? `{name: ${written(schema.additionalProperties, indent)}, …}` : "{…}";
  const needed = new Set(schema.required);
  const lines = Object.entries(schema.properties).map(([name, inner]) => {
    const about = inner.description ? `  // ${inner.description}` : "";
    return `${indent}  ${name}${needed.has(name) ? "" : "?"}: ${written(inner, `${indent}  `)}${about}\n`;
  });
  return `{\n${lines.join("")}${indent}}`;
}

function simple(schema) {
  const { minimum, maximum } = schema;
  const range = minimum === undefined ? "" : maximum === undefined ? `, at least ${minimum}` : `, ${minimum} to ${maximum}`;
  const kind = schema.contentEncoding ?? schema.format;
  return `${schema.type ?? "anything"}${kind ? ` (${kind})` : ""}${range}`;
}

/** A document that has what a schema needs, to begin with. */
function example(schema) {
  if (schema.enum) return schema.enum[0];
  if (schema.type === "array") return schema.minItems ? [example(schema.items)] : [];
  if (schema.type === "object") {
    const needed = (schema.required ?? []).map((name) => [name, example(schema.properties[name])]);
    return Object.fromEntries(needed);
  }
  return { string: "", boolean: false, number: 0, integer: 0 }[schema.type] ?? null;
}

const isFile = (type, schema) => schema.format === "binary" || type === "multipart/form-data";

// ---- one operation ----

class Operation {
  constructor(path, method, told) {
    Object.assign(this, { path, method, told, inputs: [], types: Object.entries(told.requestBody?.content ?? {}) });
    this.element = copyOf("operation-template");
    this.element.id = told.operationId;
    this.find = (selector) => this.element.querySelector(selector);
    this.find(".method").textContent = method.toUpperCase();
    this.find(".method").classList.add(method);
    this.find(".path").textContent = path;
    this.describe();
    this.fields();
    this.answers();
    this.find("form").addEventListener("input", () => this.show());
    this.find("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.show();
  }

  describe() {
    const [first, ...rest] = (this.told.description ?? this.told.summary).split("\n\n");
    this.find(".says").append(...marked(first));
    if (this.told.security) rest.push("It needs a key, if the operator has set any.");
    this.find(".described").append(...rest.map((text) => made("p", {}, ...marked(text))));
  }

  field(name, about, input, { isNeeded = false, isWide = false } = {}) {
    const field = copyOf("field-template");
    input.id = `${this.told.operationId}-${name}`;
    field.querySelector("label").append(name, isNeeded ? made("span", { className: "needed", textContent: " *" }) : "");
    field.querySelector("label").htmlFor = input.id;
    field.querySelector(".about").append(...marked(about));
    field.classList.toggle("wide", isWide);
    field.insertBefore(input, field.lastElementChild);
    this.find(".fields").append(field);
    return input;
  }

  fields() {
    for (const { name, in: place, schema, description, required } of this.told.parameters ?? []) {
      const choices = schema.enum && ["", ...schema.enum].map((value) => made("option", { textContent: value }));
      const input = choices ? made("select", {}, ...choices) : made("input", { placeholder: schema.default ?? "", spellcheck: false });
      const about = [description, choices ? "" : `(${simple(schema)})`].filter(Boolean).join(" ");
      this.inputs.push({ name, place, input: this.field(name, about, input, { isNeeded: required }) });
    }
    if (!this.types.length) return;
    const types = this.types.map(([type]) => made("option", { textContent: type }));
    this.type = this.field("Content-Type", "Of the body.", made("select", {}, ...types));
    this.file = this.field("File", "The body, or the form's field.", made("input", { type: "file" }));
    this.text = this.field("Body", "", made("textarea", { rows: 8, spellcheck: false }), { isWide: true });
    this.type.addEventListener("input", () => this.begin());
    this.file.addEventListener("input", () => {
      const type = this.file.files[0]?.type;
      if (this.type.value.startsWith("image/") && this.types.some(([known]) => known === type)) this.type.value = type;
    });
    this.begin();
  }

  /** Show what belongs to the type of body that is chosen. */
  begin() {
    const [type, { schema }] = this.types.find(([known]) => known === this.type.value);
    this.file.parentElement.hidden = !isFile(type, schema);
    this.text.parentElement.hidden = isFile(type, schema);
    this.text.value = JSON.stringify(example(schema), null, 2);
    this.text.parentElement.querySelector(".about").replaceChildren(made("pre", { textContent: written(schema) }));
  }

  answers() {
    for (const [status, { description, content = {}, headers = {} }] of Object.entries(this.told.responses)) {
      const answer = copyOf("answer-template");
      answer.querySelector(".code").textContent = status;
      answer.querySelector(".says").append(...marked(description));
      const parts = Object.entries(content).map(([type, { schema }]) => `${type}\n${written(schema)}`);
      parts.unshift(...Object.keys(headers).map((name) => `${name}: …`));
      answer.append(made("pre", { textContent: parts.join("\n\n") }));
      this.find(".answers-told").append(answer);
    }
  }

  // ---- trying it ----

  url() {
    const given = (place) => this.inputs.filter((one) => one.place === place && one.input.value);
    const fill = (path, { name, input }) => path.replace(`{${name}}`, encodeURIComponent(input.value));
    const query = new URLSearchParams(given("query").map(({ name, input }) => [name, input.value])).toString();
    return given("path").reduce(fill, this.path).slice(1) + (query && `?${query}`);
  }

  headers() {
    const given = this.inputs.filter(({ place, input }) => place === "header" && input.value);
    const headers = given.map(({ name, input }) => [name, input.value]);
    // A form's type has a boundary in it, which the browser makes.
    if (this.type && this.type.value !== "multipart/form-data") headers.push(["Content-Type", this.type.value]);
    if (this.told.security && $("key").value) headers.push(["Authorization", `Bearer ${$("key").value}`]);
    return headers;
  }

  body() {
    if (!this.type) return undefined;
    if (this.file.parentElement.hidden) return this.text.value;
    const [file] = this.file.files;
    if (this.type.value !== "multipart/form-data" || !file) return file;
    const form = new FormData();
    form.append("image", file);
    return form;
  }

  /** The command that does the same. */
  show() {
    const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
    const secret = ([name, value]) => quoted(`${name}: ${name === "Authorization" ? "Bearer …" : value}`);
    const parts = this.headers().map((header) => `-H ${secret(header)}`);
    if (this.type) {
      const file = this.file.files[0]?.name ?? "picture.png";
      if (this.file.parentElement.hidden) parts.push(`--data ${quoted(this.text.value.replace(/\s+/g, " "))}`);
      else if (this.type.value === "multipart/form-data") parts.push(`-F ${quoted(`image=@${file}`)}`);
      else parts.push(`--data-binary ${quoted(`@${file}`)}`);
    } else if (this.method !== "get") parts.push(`-X ${this.method.toUpperCase()}`);
    this.find(".curl").textContent = ["curl", ...parts, quoted(new URL(this.url(), document.baseURI).href)].join(" ");
  }

  async send() {
    const status = this.find(".status");
    const shown = this.find(".answer");
    status.textContent = "…";
    const started = performance.now();
    try {
      const response = await fetch(this.url(), { method: this.method.toUpperCase(), headers: this.headers(), body: this.body() });
      const text = await response.text();
      status.textContent = `${response.status} ${response.statusText}, ${(performance.now() - started).toFixed(1)} ms`;
      shown.textContent = pretty(response.headers.get("content-type") ?? "", text);
      shown.hidden = false;
    } catch (error) {
      status.textContent = `It could not be sent: ${error.message}.`;
      shown.hidden = true;
    }
  }
}

function pretty(type, text) {
  let shown = text;
  if (/json$/.test(type) && !/ndjson/.test(type)) {
    try {
      shown = JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      // it is shown as it came
    }
  }
  return shown.length > MOST_SHOWN ? `${shown.slice(0, MOST_SHOWN)}…` : shown;
}

// ---- all of them ----

function build(document_) {
  const { title, version, description } = document_.info;
  $("title").textContent = `${title} ${version}`;
  $("lead").textContent = description;
  const groups = new Map();
  for (const [path, operations] of Object.entries(document_.paths)) {
    for (const method of METHODS.filter((one) => one in operations)) {
      const operation = new Operation(path, method, operations[method]);
      const name = operations[method].tags?.[0] ?? "This server";
      groups.set(name, [...(groups.get(name) ?? []), operation]);
    }
  }
  for (const [name, operations] of groups) {
    const group = copyOf("group-template");
    group.querySelector("h2").textContent = name;
    group.querySelector(".operations").append(...operations.map((one) => one.element));
    $("groups").append(group);
  }
  const all = [...groups.values()].flat();
  $("key").addEventListener("input", () => {
    sessionStorage.setItem(KEY, $("key").value);
    for (const one of all) one.show();
  });
  open();
  return all;
}

/** The operation that the address names. */
function open() {
  const named = location.hash && $(decodeURIComponent(location.hash.slice(1)));
  if (!named) return;
  named.open = true;
  named.scrollIntoView();
}

/** Most paths want the name of a model: the one that is served is as good as any. */
async function nameModel(operations) {
  const { name, version } = await (await fetch("model")).json();
  for (const operation of operations) {
    for (const { name: what, place, input } of operation.inputs) {
      if (place === "path") input.value = { name, version }[what] ?? "";
    }
    operation.show();
  }
}

async function start() {
  $("key").value = sessionStorage.getItem(KEY) ?? "";
  $("key-form").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", open);
  let operations;
  try {
    const response = await fetch("openapi.json");
    if (!response.ok) throw new Error(`status ${response.status}`);
    operations = build(await response.json());
  } catch (error) {
    $("problem").textContent = `openapi.json cannot be read: ${error.message}.`;
    $("problem").hidden = false;
    return;
  }
  await nameModel(operations).catch(() => {}); // it is not ready: the names are typed by hand
}

start();
