// The page: a picture and a budget go to the server; what comes back, rung by rung, is drawn.
//
// It knows of the server what any caller may: /model, /predict and /metrics. Nothing else leaves the browser, and of
// a picture only as many pixels as the network takes.

const $ = (id) => document.getElementById(id);
const KEY = "anytime-key";
// What the slider can be set to in each decade: an arrow key changes the budget by about a tenth.
const STEPS = [1, 1.1, 1.2, 1.3, 1.5, 1.6, 1.8, 2, 2.2, 2.4, 2.7, 3, 3.3, 3.6, 3.9, 4.3, 4.7, 5, 5.6, 6.2, 6.8, 7.5, 8.2, 9.1];
const SETTLE_MS = 120; // the slider rests for so long before a request is sent
const POLL_MS = 2000;

const WHY = {
  budget: "Nothing deeper fits into what is left.",
  confidence: "It is as sure as you asked for, so it stopped.",
  deepest: "Nothing deeper is left to try.",
  load: "Something deeper would have fitted, but others needed the time.",
};
const FATE = {
  budget: "did not fit",
  confidence: "not needed: sure enough",
  deepest: "would not make it better",
  load: "not run: others needed the time",
};

/** What is served: filled once from /model. Times in ms, columns shallow first. */
const served = { columns: [], accuracy: new Map(), input: null, nTop: 1, budgets: [50], low: 0.5, high: 200 };
/** What was sent last and what came back. */
let asked = { body: null, abort: new AbortController() };
let answer = { records: [], done: null, problem: null };
let timer = 0;

// ---- the server ----

class Problem extends Error {
  constructor(title, detail, retryMs = 0) {
    super(detail);
    this.title = title;
    this.retryMs = retryMs;
  }
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Problem("No connection", "The server cannot be reached: is it still running?");
  }
  if (response.status === 401) $("key-form").hidden = false;
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const retryMs = Number(response.headers.get("retry-after-ms"));
  const told = await response.json().catch(() => ({}));
  return new Problem(told.title ?? `Status ${response.status}`, told.detail ?? "The server gave no reason.", retryMs);
}

async function* records(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines.map((line) => JSON.parse(line));
  }
}

async function describe() {
  const card = await (await call("model")).json();
  $("key-form").hidden = true;
  $("model").textContent = `${card.name}, version ${card.version}, on ${card.provider}`;
  served.input = card.input;
  served.nTop = Math.min(5, card.labels.length);
  served.accuracy = new Map(card.combinations.map((one) => [one.columns.join("+"), one.accuracy]));
  let expected = card.budget_ms.reserve;
  served.columns = card.rungs.map((rung) => {
    const median = card.latency_ms[rung.column]["1"].median;
    expected += median;
    return { column: rung.column, depth: rung.depth, accuracy: rung.accuracy, median, expected };
  });
  chooseAxis(card.budget_ms);
  const shown = card.labels.slice(0, 12).join(", ");
  const more = card.labels.length > 12 ? ` and ${card.labels.length - 12} more` : "";
  $("knows").textContent = `The network always answers with one of: ${shown}${more}.`;
  build();
}

/** Post the picture with the budget as it is now; whatever was under way is given up. */
async function send() {
  clearTimeout(timer);
  asked.abort.abort();
  asked.abort = new AbortController();
  if (!asked.body) return;
  const { signal } = asked.abort;
  const mine = { records: [], done: null, problem: null };
  const sure = $("sure").value && `&min_confidence=${$("sure").value}`;
  try {
    const response = await call(`predict?budget_ms=${budgetMs()}&top_k=${served.nTop}&stream=ndjson${sure}`, {
      method: "POST",
      headers: { "content-type": "image/png" },
      body: asked.body,
      signal,
    });
    for await (const record of records(response)) {
      if (record.event === "done") mine.done = record;
      else mine.records.push(record);
      answer = mine;
      render();
    }
    if (!mine.done) throw new Problem("Cut off", "The answer ended before it was complete: send it again.");
  } catch (error) {
    if (signal.aborted) return;
    mine.problem = error instanceof Problem ? error : new Problem("Cut off", "The connection was lost: send it again.");
    answer = mine;
    render();
  }
  await poll();
}

function sendSoon() {
  clearTimeout(timer);
  timer = setTimeout(send, SETTLE_MS);
}

// ---- the picture ----

async function take(url, name) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    return refuse(`${name} is not a picture that this browser can read: choose a PNG, JPEG or WebP.`);
  }
  $("preview").src = url;
  $("preview").alt = name;
  $("preview").hidden = $("seen").hidden = false;
  $("drop").classList.add("has-picture");
  $("drop-hint").firstElementChild.textContent = "Choose another";
  shrink(image, $("seen"));
  asked.body = await new Promise((resolve) => $("seen").toBlob(resolve, "image/png"));
  await send();
}

function refuse(detail) {
  asked.abort.abort();
  answer = { records: [], done: null, problem: new Problem("Not a picture", detail) };
  render();
}

/** Crop to the network's shape and halve until it fits: each step averages four pixels, in every browser alike. */
function shrink(image, canvas) {
  const { width, height } = served.input ?? canvas;
  canvas.width = width;
  canvas.height = height;
  const scale = Math.min(image.naturalWidth / width, image.naturalHeight / height);
  const [w, h] = [width * scale, height * scale];
  let [source, x, y, sw, sh] = [image, (image.naturalWidth - w) / 2, (image.naturalHeight - h) / 2, w, h];
  for (let factor = 2 ** Math.floor(Math.log2(Math.max(1, scale))); factor > 1; factor /= 2) {
    const step = Object.assign(document.createElement("canvas"), { width: width * factor, height: height * factor });
    step.getContext("2d").drawImage(source, x, y, sw, sh, 0, 0, step.width, step.height);
    [source, x, y, sw, sh] = [step, 0, 0, step.width, step.height];
  }
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(source, x, y, sw, sh, 0, 0, width, height);
}

function takeFile(file) {
  if (!file) return;
  press(null);
  take(URL.createObjectURL(file), file.name);
}

function press(button) {
  for (const one of document.querySelectorAll(".samples button")) one.setAttribute("aria-pressed", one === button);
}

// ---- the budget, and the time axis that shares its scale ----

/** From well below the first answer to well beyond the last, within what the server takes. */
function chooseAxis(bounds) {
  const first = served.columns[0].expected;
  const last = served.columns.at(-1).expected;
  const low = Math.max(bounds.min, nice(first / 2));
  const high = Math.min(bounds.max, nice(Math.max(20 * last, 2 * bounds.default)));
  const decades = [-3, -2, -1, 0, 1, 2, 3, 4, 5, 6];
  served.budgets = decades
    .flatMap((decade) => STEPS.map((step) => Number(`${step}e${decade}`)))
    .filter((ms) => low <= ms && ms <= high);
  served.low = served.budgets[0];
  served.high = served.budgets.at(-1);
  const slider = $("budget");
  slider.max = served.budgets.length - 1;
  slider.value = served.budgets.findLastIndex((ms) => ms <= bounds.default);
}

/** The largest 1, 2 or 5 times a power of ten that is not above this. */
function nice(ms) {
  const power = 10 ** Math.floor(Math.log10(ms));
  return power * [5, 2, 1].find((digit) => digit * power <= ms * (1 + 1e-9));
}

/** Where a time lies on the axis, from 0 to 1. */
function place(ms) {
  const share = Math.log(ms / served.low) / Math.log(served.high / served.low);
  return Math.min(1, Math.max(0, share));
}

function budgetMs() {
  return served.budgets[$("budget").value];
}

function milliseconds(ms) {
  return ms < 0.995 ? ms.toFixed(2) : ms < 9.95 ? ms.toFixed(1) : ms.toFixed(0);
}

function percent(share) {
  const shown = share < 1 ? Math.min(share, 0.999) : share; // nearly all is not all
  return `${(100 * shown).toFixed(share < 1 && (share > 0.99 || share < 0.01) ? 1 : 0)} %`;
}

// ---- what is seen: built once, filled again and again, so that nothing jumps ----

function copy(template) {
  return $(template).content.firstElementChild.cloneNode(true);
}

function put(element, texts) {
  for (const [name, text] of Object.entries(texts)) element.querySelector(name).textContent = text;
}

function build() {
  const ticks = [];
  for (let ms = nice(served.low); ms <= served.high * 1.001; ms = nice(ms * 2.5)) {
    if (ms < served.low * 0.999) continue;
    const tick = document.createElement("li");
    tick.textContent = String(Number(ms.toPrecision(1)));
    tick.style.setProperty("--at", place(ms));
    tick.classList.toggle("minor", ticks.length > 0 && !Number.isInteger(Math.log10(ms)));
    ticks.push(tick);
  }
  ticks.at(-1).textContent += " ms";
  $("ticks").replaceChildren(...ticks);
  const depth = (i) => i / Math.max(1, served.columns.length - 1);
  $("lanes").replaceChildren(...served.columns.map((one, i) => tinted(copy("lane-template"), depth(i))));
  $("rungs").replaceChildren(
    ...served.columns.map((one, i) => {
      const rung = tinted(copy("rung-template"), depth(i));
      put(rung, { ".name": `Column ${one.column}`, ".depth": `${one.depth} layers, ${milliseconds(one.median)} ms` });
      for (let k = 0; k < served.nTop; k++) rung.querySelector(".top").append(copy("top-template"));
      return rung;
    }),
  );
  $("shares").replaceChildren(...served.columns.map((one, i) => tinted(document.createElement("span"), depth(i))));
  render();
}

function tinted(element, depth) {
  element.style.setProperty("--depth", depth);
  return element;
}

function render() {
  const budget = milliseconds(budgetMs());
  $("headline").textContent = `${budget} ms`;
  $("budget").setAttribute("aria-valuetext", `${budget} milliseconds`);
  $("timeline").style.setProperty("--budget", $("budget").value / $("budget").max); // where the thumb is
  $("curl").textContent =
    `curl -F image=@picture.jpg '${new URL("predict", location.href)}?budget_ms=${budgetMs()}'`;
  const fates = served.columns.map(fateOf);
  served.columns.forEach((one, i) => {
    renderLane($("lanes").children[i], one, fates[i]);
    renderRung($("rungs").children[i], one, fates[i]);
  });
  $("timeline").setAttribute("aria-label", inWords(budget, fates));
  renderVerdict();
}

/** What became of a column: its state, when that was or would be, the same in words, and in a word. */
function fateOf({ column, median, expected }, i) {
  const record = answer.records.find((one) => one.column === column);
  const last = answer.records.at(-1);
  if (record) {
    const late = record.deadline_met ? "" : ", late";
    return { state: "arrived", at: record.elapsed_ms, text: `${milliseconds(record.elapsed_ms)} ms${late}`, record };
  }
  if (answer.problem) return { state: "missed", at: expected, text: "not run", word: "not run" };
  if (!last) return { state: "expected", at: expected, text: `expected at ${milliseconds(expected)} ms`, word: "–" };
  if (served.columns.slice(i).some((one) => one.column === last.column)) {
    return { state: "skipped", at: expected, text: "skipped: deeper was worth more", word: "skipped" };
  }
  if (!answer.done) return { state: "expected", at: last.elapsed_ms + median, text: "may follow", word: "…" };
  const why = answer.done.stopped_by;
  const needs = why === "budget" ? `: takes about ${milliseconds(median)} ms more` : "";
  const least = why === "budget" ? answer.done.budget_ms : 0; // the server keeps something back for sending
  return { state: "missed", at: Math.max(least, last.elapsed_ms + median), text: FATE[why] + needs, word: "not run" };
}

function renderLane(lane, { column }, { state, at, text }) {
  lane.className = `lane ${state}`;
  lane.style.setProperty("--at", place(at));
  put(lane, { ".name": `Column ${column}`, ".when": text });
}

function renderRung(rung, { column, accuracy }, { word, record }) {
  const run = record ? record.columns_run : [column];
  const right = served.accuracy.get(run.join("+")) ?? accuracy;
  const who = run.length > 1 ? `with ${run.slice(0, -1).join(" and ")}` : "alone";
  rung.classList.toggle("waiting", !record);
  rung.classList.toggle("is-answer", Boolean(answer.done && record === answer.records.at(-1)));
  put(rung, {
    ".right": `${(100 * right).toFixed(1)} % right ${who}`,
    ".says": record?.label ?? word,
  });
  [...rung.querySelector(".top").children].forEach((row, k) => {
    const one = record?.top[k];
    put(row, { ".label": one?.label ?? "", ".percent": one ? percent(one.probability) : "" });
    row.style.setProperty("--share", one?.probability ?? 0);
  });
}

function inWords(budget, fates) {
  const columns = fates.map(({ text }, i) => `column ${served.columns[i].column} ${text}`);
  return `Time since the picture's arrival. Budget ${budget} ms; ${columns.join("; ")}.`;
}

function renderVerdict() {
  const { records, done, problem } = answer;
  const last = records.at(-1);
  $("verdict").classList.toggle("problem", Boolean(problem));
  $("again").hidden = !(problem && asked.body);
  if (problem) {
    const retry = problem.retryMs ? ` Or try again in ${milliseconds(problem.retryMs)} ms.` : "";
    $("verdict-title").textContent = problem.title;
    $("verdict-detail").textContent = problem.message + retry;
    $("timing").textContent = "";
  } else if (done) {
    const took = `${milliseconds(last.elapsed_ms)} of ${milliseconds(done.budget_ms)} ms`;
    const { decode, queue, inference } = done.timing_ms;
    $("verdict-title").textContent = `${last.label}, ${percent(last.confidence)} sure`;
    $("verdict-detail").textContent = `${last.deadline_met ? "After" : "Late: after"} ${took}. ${WHY[done.stopped_by]}`;
    $("timing").textContent =
      `${milliseconds(decode)} ms decoding, ${milliseconds(queue)} ms waiting, ${milliseconds(inference)} ms computing`;
  }
}

// ---- the server's own figures ----

async function poll() {
  if (document.visibilityState !== "visible" || !$("key-form").hidden) return;
  try {
    renderFigures(series(await (await call("metrics")).text()));
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    $("attainment-of").textContent = error.message;
  }
}

/** Samples of the text format that Prometheus reads, as [name, labels, value]. */
function series(text) {
  const lines = [...text.matchAll(/^(\w+)(?:\{(.*)\})? (\S+)$/gm)];
  return lines.map(([, name, labels = "", value]) => [
    name,
    Object.fromEntries([...labels.matchAll(/(\w+)="([^"]*)"/g)].map(([, key, text]) => [key, text])),
    Number(value),
  ]);
}

function renderFigures(samples) {
  const sum = (wanted, is = () => true) =>
    samples.reduce((total, [name, labels, value]) => total + (name === wanted && is(labels) ? value : 0), 0);
  const all = sum("anytime_requests_total");
  const answered = sum("anytime_requests_total", ({ outcome }) => outcome === "answered");
  const counts = served.columns.map(({ column }) => sum("anytime_answers_total", (labels) => labels.column === column));
  $("attainment").textContent = all ? percent(answered / all) : "–";
  $("attainment-of").textContent = `${answered.toLocaleString("en")} of ${all.toLocaleString("en")} requests`;
  [...$("shares").children].forEach((share, i) => {
    share.hidden = !counts[i];
    share.style.setProperty("--share", counts[i]);
  });
  $("by-column").textContent = served.columns
    .map(({ column }, i) => `column ${column}: ${counts[i].toLocaleString("en")}`)
    .join(", ");
  $("queue").textContent = sum("anytime_queue_length").toLocaleString("en");
}

// ---- what people do ----

async function start() {
  try {
    await describe();
    await poll();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    answer.problem = error;
    renderVerdict();
  }
}

$("budget").addEventListener("input", () => {
  render();
  sendSoon();
});
$("sure").addEventListener("change", send);
$("again").addEventListener("click", send);
$("file").addEventListener("change", () => takeFile($("file").files[0]));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  answer.problem = null;
  start().then(send);
});
for (const button of document.querySelectorAll(".samples button")) {
  const image = button.firstElementChild;
  button.addEventListener("click", () => {
    press(button);
    take(image.src, image.alt);
  });
}
document.addEventListener("paste", (event) => takeFile(event.clipboardData.files[0]));
document.addEventListener("visibilitychange", poll);
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // or the browser would leave the page for the picture
    $("drop").classList.toggle("is-over", kind === "dragover");
    if (kind === "drop") takeFile(event.dataTransfer.files[0]);
  });
}
setInterval(poll, POLL_MS);

start();
