// Polling, keys, copying, the reader's own clock. Every page can be read without it.
"use strict";

const base = document.body.dataset.base;
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function prepare(root) {
  for (const button of all("[data-copy], [data-copy-from], [data-help], [data-clock], [data-link]", root)) button.hidden = false;
  for (const time of all("time[datetime]", root)) {
    const then = new Date(time.dateTime);
    const isToday = then.toDateString() === new Date().toDateString();
    time.title = then.toLocaleString();
    time.textContent = isToday
      ? then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
      : then.toLocaleDateString([], { day: "numeric", month: "short" });
  }
}

// ------------------------------------------------------------------------------------------------- copying

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // the clipboard is open to secure pages only
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy], [data-copy-from]");
  if (!button) return;
  const from = button.dataset.copyFrom;
  copy(from ? document.getElementById(from).textContent : button.dataset.copy);
  const before = button.textContent;
  button.textContent = "copied";
  setTimeout(() => { button.textContent = before; }, 1200);
});

// ------------------------------------------------------------------------------------------------- theme

all("[data-theme-form]").forEach((form) => form.addEventListener("submit", (event) => {
  event.preventDefault();  // a new page would lose what is typed
  const button = form.querySelector("button");
  const theme = button.value;
  const body = new URLSearchParams({ theme, back: form.back.value });
  fetch(form.action, { method: "POST", body, redirect: "manual" });
  document.documentElement.dataset.theme = theme;
  button.value = { auto: "light", light: "dark", dark: "auto" }[theme];
  button.title = `Theme: ${theme}`;
  button.setAttribute("aria-label", button.title);
}));

// ------------------------------------------------------------------------------------------------- polling

const live = document.getElementById("live");
const POLL_MS = Number(live?.dataset.every || 5000);
let isPaused = false;
let isStreaming = false;
let lastAnswer = new Date();

async function poll() {
  if (isPaused || isStreaming || document.hidden || live.contains(document.activeElement)) return;
  const lost = document.querySelector("[data-lost]");
  try {
    const answer = await fetch(live.dataset.poll, { headers: { accept: "text/html" }, signal: AbortSignal.timeout(POLL_MS) });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const next = page.getElementById("live");
    if (answer.ok && !next) return location.reload();  // it has ended, or a key is needed again
    if (!answer.ok) throw new Error(String(answer.status));
    const open = new Set(all("details[open]", live).map((details) => details.dataset.key));
    for (const details of all("details", next)) details.open = open.has(details.dataset.key);
    live.replaceChildren(...next.childNodes);
    live.classList.remove("old");
    lost.hidden = true;
    lastAnswer = new Date();
    prepare(live);
    clock();
  } catch {
    lost.querySelector("[data-since]").textContent = lastAnswer.toLocaleTimeString();
    lost.hidden = false;
    live.classList.add("old");
  }
}

function clock() {
  const now = live.querySelector("[data-now]");
  if (now) now.textContent = lastAnswer.toLocaleTimeString();
  const pause = live.querySelector("[data-pause]");
  if (pause) pause.textContent = isPaused ? "resume" : "pause";
}

// Progress comes as server-sent events; while they do not come, the page is asked for.
function follow(source) {
  source.addEventListener("progress", (event) => {
    const { step, done, total, question } = JSON.parse(event.data);
    const [text, bar] = ["[data-step]", "[data-bar]"].map((part) => live.querySelector(part));
    isStreaming = true;
    if (Boolean(question) === Boolean(text)) return location.reload();
    if (question) return;
    const number = (value) => value.toLocaleString("en-US");
    text.textContent = total ? `${step}: ${number(done)} of ${number(total)}` : step;
    bar.setAttribute("width", `${Math.min(100, total ? (100 * done) / total : 0)}%`);
    const meter = bar.closest("svg");
    for (const [name, value] of [["label", step], ["valuemax", total || 1], ["valuenow", done]]) meter.setAttribute(`aria-${name}`, value);
  });
  source.addEventListener("end", () => { source.close(); location.reload(); });
  source.addEventListener("error", () => { isStreaming = false; });
}

if (live) {
  if (live.dataset.events) follow(new EventSource(live.dataset.events));
  clock();
  setInterval(poll, POLL_MS);
  live.addEventListener("click", (event) => {
    if (!event.target.closest("[data-pause]")) return;
    isPaused = !isPaused;
    clock();
    document.activeElement.blur();
  });
}

// ------------------------------------------------------------------------------------------------- texts in a link

// What is typed stays behind `#`, which browsers send to no server.
const bench = document.querySelector("[data-bench]");

function link() {
  const fields = new URLSearchParams([...new FormData(bench)].filter(([, value]) => value));
  return `${location.origin}${base}/playground#${fields}`;
}

if (bench) {
  const linked = new URLSearchParams(location.hash.slice(1));
  if (linked.size && !bench.dataset.done) {
    const arms = linked.getAll("arm");
    all("[name=arm]", bench).forEach((field, index) => { field.value = arms[index] || ""; });
    for (const name of ["query", "candidates"]) bench.elements[name].value = linked.get(name) || "";
    const kind = bench.querySelector(`[name=kind][value="${CSS.escape(linked.get("kind") || "")}"]`);
    if (kind) kind.checked = true;
    bench.requestSubmit();
  } else if (bench.dataset.done) {
    history.replaceState(null, "", link());
  }
  bench.addEventListener("submit", () => {
    const button = bench.querySelector("button.primary");
    button.textContent = "Running …";
    button.setAttribute("aria-busy", "true");
  });
  const button = document.querySelector("[data-link]");
  if (button) button.addEventListener("click", async () => {
    await copy(link());
    button.textContent = "copied";
  });
}

// A text is marked in all rankings at once.
function mark(event) {
  const chosen = event.target.closest("[data-text]");
  for (const item of all("[data-text]")) {
    item.classList.toggle("same", Boolean(chosen) && item.dataset.text === chosen.dataset.text);
  }
}
const ranks = document.querySelector("[data-ranks]");
if (ranks) for (const name of ["mouseover", "mouseleave", "focusin"]) ranks.addEventListener(name, mark);

// ------------------------------------------------------------------------------------------------- keys

const help = document.getElementById("help");
const KEYS = "gateway-console-keys";
let hasKeys = localStorage.getItem(KEYS) !== "off";
let isGoing = false;

function showKeys() {
  const button = help.querySelector("[data-keys]");
  button.setAttribute("aria-pressed", String(hasKeys));
  button.textContent = `Keys of one letter are ${hasKeys ? "on" : "off"}`;
}

help.addEventListener("click", (event) => {
  if (event.target.closest("[data-close]")) help.close();
  if (!event.target.closest("[data-keys]")) return;
  hasKeys = !hasKeys;
  localStorage.setItem(KEYS, hasKeys ? "on" : "off");
  showKeys();
});
document.querySelector("[data-help]").addEventListener("click", () => help.showModal());

document.addEventListener("keydown", (event) => {
  const field = event.target.closest("input, textarea, select");
  if (field && event.key === "Escape") field.blur();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && field && field.form) field.form.requestSubmit();
  if (field || help.open || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !hasKeys) return;
  if (isGoing) {
    isGoing = false;
    const view = document.querySelector(`.views [data-key="${CSS.escape(event.key)}"]`);
    if (view) view.click();
    return;
  }
  const button = document.querySelector(`[data-hotkey="${CSS.escape(event.key)}"]`);
  if (event.key === "g") isGoing = true;
  else if (event.key === "?") help.showModal();
  else if (event.key === "/") document.querySelector("main textarea, main input:not([type=hidden])")?.focus();
  else if (button) button.click();
  else return;
  event.preventDefault();
});

showKeys();
prepare(document);
