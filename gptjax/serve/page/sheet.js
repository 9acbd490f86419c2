// The text: a textarea over a mirror of it, which is drawn alike and shows what a textarea cannot:
// colours behind words, and where on the screen the cursor is.

export class Sheet {
  constructor(textarea, mirror) {
    this.textarea = textarea;
    this.mirror = mirror;
    this.spans = [];
    this.leftOut = 0;
    this.isComposing = false;
    this.isInserting = false;
    this.wasText = textarea.value;
    textarea.addEventListener("compositionstart", () => { this.isComposing = true; });
    textarea.addEventListener("compositionend", () => { this.isComposing = false; });
    textarea.addEventListener("input", () => this.draw());
  }

  get text() { return this.textarea.value; }

  get cursor() { return this.textarea.selectionEnd; }

  // Says whether a key press belongs to an input method: 229 is Safari's last one, after its end.
  isInputMethod(event) {
    return this.isComposing || event.isComposing || event.keyCode === 229;
  }

  setText(text, cursor = text.length) {
    this.textarea.value = text;
    this.textarea.setSelectionRange(cursor, cursor);
    this.forget();
    this.draw();
  }

  forget() {
    this.spans = [];
    this.leftOut = 0;
  }

  // As if typed, so that the browser's undo knows of it.
  insert(text) {
    this.textarea.focus();
    const end = this.cursor;
    this.textarea.setSelectionRange(end, end);
    this.isInserting = true;
    if (text && !document.execCommand("insertText", false, text)) {
      this.textarea.setRangeText(text, end, end, "end");
      this.textarea.dispatchEvent(new Event("input", { bubbles: true }));
    }
    this.isInserting = false;
  }

  // spans: [{start, end, level}] in order; what changes before one takes it away.
  colour(spans) {
    this.spans = spans;
    this.draw();
  }

  markLeftOut(count) {
    if (count === this.leftOut) return;
    this.leftOut = count;
    this.draw();
  }

  draw() {
    const text = this.text, same = commonLength(this.wasText, text);
    if (text !== this.wasText) {
      this.spans = this.spans.filter(span => span.end <= same);
      if (same < this.leftOut) this.leftOut = 0;
      this.wasText = text;
    }
    const parts = [];
    let place = 0;
    const add = (end, className = "") => {
      if (end <= place) return;
      const part = document.createElement("span");
      part.className = className;
      part.textContent = text.slice(place, end);
      parts.push(part);
      place = end;
    };
    add(this.leftOut, "left-out");
    for (const { start, end, level } of this.spans) {
      if (start < place) continue;
      add(start);
      add(end, `surprise-${level}`);
    }
    add(text.length);
    // A last empty line takes room only where something stands on it.
    this.mirror.replaceChildren(...parts, "\u200b");
  }

  // Returns where the cursor is, {left, top, bottom}, from the sheet's corner.
  caretBox() {
    let node = this.mirror.lastChild, place = 0, before = 0;
    for (const { firstChild } of this.mirror.children) {
      if (this.cursor < before + firstChild.length) {
        [node, place] = [firstChild, this.cursor - before];
        break;
      }
      before += firstChild.length;
    }
    const range = document.createRange();
    range.setStart(node, place);
    range.setEnd(node, place + 1);
    const sheet = this.mirror.parentElement.getBoundingClientRect();
    const box = range.getClientRects()[0];
    return { left: box.left - sheet.left, top: box.top - sheet.top, bottom: box.bottom - sheet.top };
  }
}

function commonLength(one, other) {
  const most = Math.min(one.length, other.length);
  let same = 0;
  while (same < most && one.charCodeAt(same) === other.charCodeAt(same)) same++;
  return same;
}
