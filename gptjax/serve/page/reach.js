// How much of a text the model reads: the end of what stands before the cursor.
//
// Where a text outgrows the context, the server cuts it and says by how much. The cut is kept for
// the requests that follow, so that what was read with it need not be read again.

export class Reach {
  constructor() {
    this.limit = 8192;
    this.start = 0;
    this.before = "";
  }

  // Returns the text before the cursor that is sent.
  take(text, cursor) {
    const holds = cursor >= this.start && cursor - this.start <= this.limit
      && text.startsWith(this.before);
    if (!holds) this.move(text, Math.max(0, cursor - this.limit));
    return text.slice(this.start, cursor);
  }

  // Takes over what the server left out of the text that was sent.
  cut(text, count) {
    if (count) this.move(text, this.start + count);
  }

  move(text, start) {
    // Never between the halves of a character.
    const isHalf = /[\udc00-\udfff]/.test(text[start] ?? "");
    this.start = start + (isHalf ? 1 : 0);
    this.before = text.slice(0, this.start);
  }
}
