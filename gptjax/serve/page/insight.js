// The side panel: how each token of the text surprised the model, and what it expects next.

import { ask, session } from "./client.js";
import { make } from "./choices.js";

// In nats; a token's level is how many of them it reaches.
const LEVELS = [1, 2, 4, 6, 9];
const IDLE_MS = 350;
const NEXT_TOKENS = 12;
const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 3 });
const WARPERS = ["temperature", "top_k", "top_p", "min_p", "typical_p"];

export class Insight {
  // `place()` may be null, which is nothing to look at; `mayAsk()` is false while the text is not to
  // be looked at; the others as of Choices.
  constructor(sheet, panel, { place, read, options, mayAsk, fail }) {
    Object.assign(this, { sheet, panel, place, read, options, mayAsk, fail });
    this.timer = null;
    this.isAsking = false;
    this.isStale = false;
    const field = id => panel.querySelector(`#${id}`);
    this.fields = Object.fromEntries(
      ["colour", "legend", "surprise-summary", "surprise-here", "next", "next-summary"]
        .map(id => [id, field(id)]),
    );
    this.fields.legend.replaceChildren(...[0, ...LEVELS].map((low, level) => {
      const high = LEVELS[level];
      return make("li", `surprise-${level}`, high === undefined ? `${low} +` : `${low}–${high}`);
    }));
  }

  // Looks at the text once it rests. Even with the panel closed, so that TAB finds it read.
  schedule(delay = IDLE_MS) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), delay);
  }

  async look() {
    if (!this.mayAsk()) return;
    if (this.isAsking) {
      this.isStale = true;
      return;
    }
    this.isAsking = true;
    const { text: all, cursor } = this.sheet;
    try {
      const text = this.place();
      if (text === null) return;
      if (this.panel.hidden) {
        this.read(await ask("editor/read", { session, text }));
      } else {
        const warpers = Object.fromEntries(WARPERS.map(name => [name, this.options()[name]]));
        // As much of what follows as may fit; the server cuts it.
        const after = all.slice(cursor, cursor + text.length + 2048).replace(/[\ud800-\udbff]$/, "");
        this.fields["surprise-summary"].textContent ||= "Reading…";
        const answer = await ask(
          "editor/insight", { session, text, after, count: NEXT_TOKENS, ...warpers },
        );
        const start = cursor - text.length;
        this.read(answer);
        if (this.sheet.text === all) this.show(answer, start, cursor);
      }
    } catch (error) {
      this.fail(error);
      if (error.status === 503) this.schedule(2000);
    } finally {
      this.isAsking = false;
      if (this.isStale) {
        this.isStale = false;
        this.schedule();
      }
    }
  }

  clear() {
    for (const name of ["surprise-summary", "surprise-here", "next-summary"]) {
      this.fields[name].textContent = "";
    }
    this.fields.next.replaceChildren();
  }

  show({ surprise, next_tokens: next }, start, cursor) {
    this.showSurprise(surprise, start, cursor);
    this.showNext(next);
  }

  showSurprise(surprise, start, cursor) {
    const { "surprise-summary": summary, "surprise-here": here, colour } = this.fields;
    here.textContent = "";
    if (surprise === null) {
      summary.textContent = "This tokenizer rewrites the text, so its tokens have no place in it.";
      this.sheet.colour([]);
      return;
    }
    const known = surprise.filter(one => one.nats !== null).map(
      one => ({ start: one.start + start, end: one.end + start, nats: one.nats }),
    );
    this.sheet.colour(colour.checked ? known.map(one => ({ ...one, level: level(one.nats) })) : []);
    if (!known.length) {
      summary.textContent = "The first token is not scored: nothing stands before it.";
      return;
    }
    const mean = known.reduce((sum, one) => sum + one.nats, 0) / known.length;
    summary.textContent = `${mean.toFixed(2)} nats a token over ${known.length};`
      + ` perplexity ${Math.exp(mean).toPrecision(3)}`;
    const last = known.findLast(one => one.start < cursor);
    if (last) {
      const word = visible(this.sheet.text.slice(last.start, last.end));
      here.textContent = `Before the cursor: “${word}”, ${last.nats.toFixed(2)} nats,`
        + ` probability ${percent.format(Math.exp(-last.nats))}`;
    }
  }

  showNext(next) {
    const most = next[0]?.probability ?? 1;
    this.fields.next.replaceChildren(...next.map(one => {
      const item = make("li", one.is_cut ? "cut" : "");
      const bar = make("span", "bar");
      bar.style.width = `${100 * one.probability / most}%`;
      const track = make("span", "track");
      track.append(bar);
      const share = make("span", "share", percent.format(one.probability));
      item.append(nextName(one), track, share, make("span", "mark", one.is_cut ? "cut" : ""));
      return item;
    }));
    const kept = next.filter(one => !one.is_cut);
    const sum = kept.reduce((sum, one) => sum + one.probability, 0);
    this.fields["next-summary"].textContent = next.length === kept.length
      ? `These ${next.length} have ${percent.format(sum)} together.`
      : `Sampling keeps ${kept.length} of these ${next.length}; they have ${percent.format(sum)}.`;
  }
}

function level(nats) {
  return LEVELS.filter(low => nats >= low).length;
}

function nextName({ text, is_end: isEnd }) {
  if (isEnd) return make("i", "token", "end of the text");
  return text ? make("span", "token", visible(text)) : make("i", "token", "part of a character");
}

function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}
