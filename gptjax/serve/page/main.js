// The editor: the text, its keys, and what they set going.

import { ask, askStream, ServerError, session, setKey } from "./client.js";
import { Choices } from "./choices.js";
import { Documents, isKept, settings, title } from "./documents.js";
import { Insight } from "./insight.js";
import { Reach } from "./reach.js";
import { Sheet } from "./sheet.js";

const byId = id => document.getElementById(id);
const sheet = new Sheet(byId("text"), byId("mirror"));
const documents = new Documents();
const reach = new Reach();
const form = byId("settings");
const THEMES = ["auto", "light", "dark"];
const RULES = ["temperature", "repetition_penalty", "no_repeat_ngram_size"];
// Without effect, and so refused, where temperature 0 takes the likeliest token.
const DRAWING = ["top_k", "top_p", "min_p", "typical_p", "seed"];
const RETRY_MS = 2000;
let model = null;
let writing = null, writingAt = 0;
// Escape lets the next Tab go where Tab goes elsewhere, so that the keyboard is never trapped.
let tabLeaves = false;
// What went wrong while looking at the text is no more said once looking works again.
let isAlertPassing = false;

// ---- What is said to the user.

function say(text) {
  byId("status").textContent = text;
  byId("alert").textContent = "";
}

function fail(error) {
  if (error.name === "AbortError") return;
  isAlertPassing = false;
  if (!(error instanceof ServerError)) console.error(error);
  say("");
  if (error.status === 401) {
    byId("key-dialog").showModal();
  } else {
    byId("alert").textContent = `${sentence(error.message)} Your text is kept in this browser.`;
  }
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

// ---- What is sent of the text, and what the model read of it.

const place = () => reach.take(sheet.text, sheet.cursor);

function read({ left_out: leftOut, num_tokens: numTokens }) {
  if (isAlertPassing) byId("alert").textContent = "";
  reach.cut(sheet.text, leftOut);
  sheet.markLeftOut(reach.start);
  byId("window").textContent = reach.start
    ? `The model reads ${numTokens} tokens before the cursor; the`
      + ` ${reach.start.toLocaleString("en")} characters before them (hatched) do not fit its context.`
    : "";
}

function options() {
  return Object.fromEntries([...form.elements].filter(field => field.name).map(field => {
    const value = field.validity.valid ? field.value : field.defaultValue;
    return [field.name, value === "" ? null : Number(value)];
  }));
}

const choices = new Choices(sheet, byId("choices"), {
  place, read, options, limit: () => model.max_new_tokens, say, fail,
});
const insight = new Insight(sheet, byId("panel"), {
  place: () => (sheet.text ? place() : null),
  read, options,
  fail: error => { fail(error); isAlertPassing = true; },
  mayAsk: () => model !== null && !choices.isActive && !writing && !sheet.isComposing,
});

// ---- Sampling, written into the text as it comes.

async function writeOn() {
  if (writing) return writing.abort();
  choices.close();
  const stop = writing = new AbortController();
  writingAt = sheet.cursor;
  byId("write").textContent = "Stop";
  say("Writing…");
  try {
    const text = place();
    read(await ask("editor/read", { session, text }, stop.signal));
    const given = options();
    const names = given.temperature ? [...RULES, ...DRAWING] : RULES;
    const chosen = Object.fromEntries(names.map(name => [name, given[name]]));
    // The space before a word belongs to the word's token.
    let space = model.joins_spaces && /\S $/.test(text) ? 1 : 0;
    const sent = place();
    const body = {
      model: model.name, prompt: sent.slice(0, sent.length - space),
      max_tokens: Math.min(given.max_tokens, model.max_new_tokens), ...chosen,
    };
    let drawn = null;
    for await (const piece of askStream("v1/completions", body, stop.signal)) {
      const written = piece.choices[0]?.text ?? "";
      drawn = piece.seed ?? drawn;
      if (!written || stop.signal.aborted) continue;
      sheet.insert(space && written.startsWith(" ") ? written.slice(1) : written);
      [space, writingAt] = [0, sheet.cursor];
    }
    say(drawn === null ? "Written" : `Written with seed ${drawn}`);
  } catch (error) {
    if (stop.signal.aborted) say("Stopped");
    else fail(error);
  } finally {
    writing = null;
    byId("write").replaceChildren("Write on ", Object.assign(document.createElement("kbd"), {
      textContent: "Ctrl ↵",
    }));
    insight.schedule();
  }
}

// ---- The keys of the text.

function onKey(event) {
  if (sheet.isInputMethod(event)) return;
  const plain = !(event.ctrlKey || event.altKey || event.metaKey || event.shiftKey);
  const act = {
    Tab: plain && !tabLeaves && (() => press()),
    Escape: plain && leave,
    Enter: event.ctrlKey || event.metaKey ? writeOn : plain && choices.isOpen && (() => choices.take()),
    ArrowDown: plain && choices.isOpen && (() => choices.choose(choices.index + 1)),
    ArrowUp: plain && choices.isOpen && (() => choices.choose(choices.index - 1)),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function press() {
  if (writing) return;
  if (!model?.has_tokenizer) {
    return fail(new ServerError(model ? "this model has no tokenizer" : "the model is not there yet"));
  }
  choices.press();
}

function leave() {
  writing?.abort();
  choices.close();
  tabLeaves = !tabLeaves;
  say(tabLeaves ? "Tab now moves on from the text. Typing, or Esc again, takes it back." : "");
}

function onText() {
  if (!sheet.isInserting) {
    tabLeaves = false;
    writing?.abort();
  }
  choices.close();
  try {
    documents.save(sheet.text);
  } catch {
    fail(new Error("this browser has no room left for the document; download it."));
  }
  showTitle();
  if (!sheet.isComposing) insight.schedule();
}

sheet.textarea.addEventListener("keydown", onKey);
sheet.textarea.addEventListener("input", onText);
sheet.textarea.addEventListener("compositionstart", () => { choices.close(); writing?.abort(); });
sheet.textarea.addEventListener("compositionend", () => insight.schedule());
sheet.textarea.addEventListener("blur", () => {
  // Another window has the focus, and the text will have it again.
  if (document.activeElement === sheet.textarea) return;
  choices.close();
  writing?.abort();
});
sheet.textarea.addEventListener("focus", () => { tabLeaves = false; });
document.addEventListener("selectionchange", () => {
  if (document.activeElement !== sheet.textarea || sheet.isComposing) return;
  if (choices.isActive && sheet.cursor !== choices.cursor) choices.close();
  if (sheet.cursor !== writingAt) writing?.abort();
  if (!writing) insight.schedule();
});

// ---- Documents.

function showTitle() {
  const current = byId("document-list").querySelector("[aria-current]");
  if (current) current.textContent = title(sheet.text);
  document.title = `${title(sheet.text)} – gptjax`;
}

function showDocuments() {
  byId("document-list").replaceChildren(...documents.list().map(({ id }) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.textContent = title(documents.text(id));
    if (id === documents.currentId) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => openDocument(id));
    item.append(button);
    return item;
  }));
}

function openDocument(id = documents.currentId) {
  writing?.abort();
  choices.close();
  documents.open(id);
  insight.clear();
  sheet.setText(documents.text());
  byId("window").textContent = "";
  showDocuments();
  showTitle();
  insight.schedule();
  sheet.textarea.focus();
}

byId("new").addEventListener("click", () => { documents.create(); openDocument(); });
byId("delete").addEventListener("click", () => {
  const undo = documents.remove();
  openDocument();
  say("Deleted. ");
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Undo" });
  button.addEventListener("click", () => { undo(); openDocument(); say("Brought back"); });
  byId("status").append(button);
});
byId("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([sheet.text], { type: "text/plain" }));
  link.download = `${title(sheet.text).replace(/[\\/:*?"<>|]/g, "")}.txt`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
documents.onChange(text => {
  if (text !== null && text !== sheet.text && !document.hasFocus()) sheet.setText(text);
  showDocuments();
});

// ---- Buttons, panel and settings.

function toggle(button, part, isShown) {
  part.hidden = !isShown;
  button.setAttribute("aria-expanded", String(isShown));
  settings.save({ [part.id]: isShown });
}

for (const part of [byId("panel"), byId("documents")]) {
  const button = byId(`toggle-${part.id}`);
  button.addEventListener("click", () => {
    toggle(button, part, part.hidden);
    if (part.id === "panel") {
      if (part.hidden) sheet.colour([]);
      else insight.schedule(0);
    }
  });
  toggle(button, part, settings.load()[part.id] ?? (part.id === "documents" && innerWidth > 900));
}

for (const id of ["continue", "write"]) {
  byId(id).addEventListener("pointerdown", event => event.preventDefault());
}
byId("continue").addEventListener("click", () => { sheet.textarea.focus(); press(); });
byId("write").addEventListener("click", () => { sheet.textarea.focus(); writeOn(); });

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
}

byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  settings.save({ theme: next });
  showTheme(next);
});

function onSetting() {
  for (const field of form.elements) {
    if (field.name) field.setAttribute("aria-invalid", String(!field.validity.valid));
  }
  const wrong = [...form.elements].find(field => field.name && !field.validity.valid);
  say(wrong ? `${wrong.labels[0].firstChild.textContent.trim()}: ${wrong.validationMessage}` : "");
  settings.save({ options: options() });
  insight.schedule();
}

form.addEventListener("input", onSetting);
form.addEventListener("reset", () => setTimeout(onSetting));
form.addEventListener("submit", event => event.preventDefault());
byId("colour").addEventListener("change", () => insight.schedule(0));
byId("key-dialog").addEventListener("close", () => {
  if (byId("key").value) setKey(byId("key").value);
  byId("key").value = "";
  if (model) insight.schedule(0);
  else loadModel();
});

// ---- The beginning.

async function loadModel() {
  try {
    model = await ask("editor/model");
  } catch (error) {
    fail(error);
    if (error.status !== 401) setTimeout(loadModel, RETRY_MS);
    return;
  }
  byId("model").textContent = `${model.name} · ${model.context_length.toLocaleString("en")} tokens`;
  reach.limit = model.max_characters;
  for (const field of [form.elements.max_tokens, form.elements.num_tokens]) {
    field.max = model.max_new_tokens;
    for (const name of ["defaultValue", "value"]) {
      if (Number(field[name]) > model.max_new_tokens) field[name] = model.max_new_tokens;
    }
  }
  say("");
  if (!model.has_tokenizer) fail(new ServerError("this model has no tokenizer, so it cannot write here."));
  else insight.schedule(0);
}

const kept = settings.load();
for (const [name, value] of Object.entries(kept.options ?? {})) {
  if (form.elements[name]) form.elements[name].value = value ?? "";
}
showTheme(THEMES.includes(kept.theme) ? kept.theme : "auto");
openDocument();
if (!isKept) byId("alert").textContent = "This browser keeps no documents: download them before you leave.";
loadModel();
