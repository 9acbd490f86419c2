// The list of continuations at the cursor, as a combobox has one: focus stays in the text.

import { ask, session } from "./client.js";

const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 2 });

export class Choices {
  // `place()` returns the text to send; `read(answer)` takes what an answer says of it; `limit()`
  // is how many tokens a continuation may have.
  constructor(sheet, list, { place, read, options, limit, say, fail }) {
    Object.assign(this, { sheet, list, place, read, options, limit, say, fail });
    this.reset();
    list.addEventListener("pointerdown", event => event.preventDefault());
    list.addEventListener("click", event => {
      const item = event.target.closest("[role=option]");
      if (item) this.take([...list.children].indexOf(item));
    });
  }

  reset() {
    this.found = [];
    this.index = 0;
    this.wanted = 0;
    this.cursor = null;
    this.asking = null;
  }

  get isOpen() { return !this.list.hidden; }

  get isActive() { return this.isOpen || this.asking !== null; }

  // Opens the list, or makes what it holds longer.
  async press() {
    const { count, num_tokens: step } = this.options();
    this.wanted = Math.min(this.wanted + step, this.limit());
    if (this.asking) return;
    const asking = this.asking = new AbortController();
    this.cursor = this.sheet.cursor;
    try {
      for (let got = 0; got < this.wanted;) {
        const text = this.place();
        const body = { session, text, count, num_tokens: got = this.wanted };
        const started = performance.now();
        this.say(this.isOpen ? "Going on…" : "Thinking…");
        const answer = await ask("editor/continuations", body, asking.signal);
        this.read(answer);
        this.show(answer.choices, (performance.now() - started) / 1000, got);
      }
    } catch (error) {
      if (asking.signal.aborted) return;
      this.close();
      this.fail(error);
    } finally {
      if (this.asking === asking) this.asking = null;
    }
  }

  show(choices, seconds, numTokens) {
    this.found = choices;
    this.list.replaceChildren(...choices.map(makeItem));
    if (!this.isOpen) {
      const { left, bottom } = this.sheet.caretBox();
      this.list.hidden = false;
      const room = this.list.parentElement.clientWidth - this.list.offsetWidth;
      this.list.style.left = `${Math.max(0, Math.min(left - 16, room))}px`;
      this.list.style.top = `${bottom + 6}px`;
      this.describe({
        role: "combobox", "aria-expanded": "true", "aria-controls": this.list.id,
        "aria-haspopup": "listbox",
      });
    }
    this.choose(Math.min(this.index, choices.length - 1));
    this.say(`${choices.length} continuations of up to ${numTokens} tokens, ${seconds.toFixed(2)} s`);
  }

  // Makes the textarea a combobox while the list is open, or with nulls a textarea again.
  describe(attributes) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null) this.sheet.textarea.removeAttribute(name);
      else this.sheet.textarea.setAttribute(name, value);
    }
  }

  choose(index) {
    const count = this.found.length;
    this.index = (index + count) % count;
    for (const [i, item] of [...this.list.children].entries()) {
      item.setAttribute("aria-selected", String(i === this.index));
    }
    const chosen = this.list.children[this.index];
    this.describe({ "aria-activedescendant": chosen.id });
    chosen.scrollIntoView({ block: "nearest" });
  }

  take(index = this.index) {
    const text = this.found[index].pieces.join("");
    this.close();
    this.sheet.insert(text);
    this.say(text ? "Taken" : "Nothing to take: the text ends here");
  }

  close() {
    this.asking?.abort();
    this.list.hidden = true;
    this.list.replaceChildren();
    this.reset();
    this.describe({
      role: null, "aria-expanded": null, "aria-controls": null, "aria-haspopup": null,
      "aria-activedescendant": null,
    });
  }
}

function makeItem({ probability, pieces, is_end: isEnd }, index) {
  const item = document.createElement("li");
  item.id = `choice-${index}`;
  item.role = "option";
  const share = make("span", "share", percent.format(probability));
  const bar = make("span", "bar");
  bar.style.width = `${100 * probability}%`;
  share.append(bar);
  // The first whole characters are what sets this one apart.
  const first = pieces.findIndex(piece => piece);
  const words = make("span", "words");
  words.append(
    make("b", "", inOneLine(pieces.slice(0, first + 1))),
    inOneLine(pieces.slice(first + 1)),
  );
  if (isEnd) words.append(make("i", "", first < 0 ? "the text ends here" : " end of the text"));
  else words.append(make("span", "quiet", "…"));
  item.append(share, words);
  return item;
}

function inOneLine(pieces) {
  return pieces.join("").replaceAll("\n", " ↵ ");
}

export function make(name, className, text = "") {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}
