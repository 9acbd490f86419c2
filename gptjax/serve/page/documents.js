// Documents in the browser's localStorage: a list of {id}, and each text by itself.

const LIST = "gptjax.documents", CURRENT = "gptjax.current", SETTINGS = "gptjax.settings";
export let isKept = true;
// A browser that keeps nothing still holds the texts until the page is left.
const storage = (() => {
  try {
    localStorage.setItem("gptjax.probe", "");
    localStorage.removeItem("gptjax.probe");
    return localStorage;
  } catch {
    const held = new Map();
    isKept = false;
    return {
      getItem: key => held.get(key) ?? null,
      setItem: (key, value) => held.set(key, value),
      removeItem: key => held.delete(key),
    };
  }
})();

const textKey = id => `gptjax.document.${id}`;

function read(key, otherwise) {
  try {
    return JSON.parse(storage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(key, value) {
  storage.setItem(key, JSON.stringify(value));
}

export function title(text) {
  const line = text.split("\n").find(line => line.trim()) ?? "";
  const short = [...line.trim()].slice(0, 40).join("");
  return short || "Empty document";
}

export class Documents {
  constructor() {
    this.currentId = read(CURRENT, null);
    if (!this.list().some(one => one.id === this.currentId)) {
      this.currentId = this.list()[0]?.id ?? this.create();
    }
  }

  // Newest first, as they were made: a list that moves while one writes is hard to use.
  list() {
    return read(LIST, []);
  }

  text(id = this.currentId) {
    return read(textKey(id), "");
  }

  create(text = "", id = `${Date.now()}-${Math.random().toString(36).slice(2, 8)}`, place = 0) {
    write(textKey(id), text);
    write(LIST, this.list().toSpliced(place, 0, { id }));
    this.open(id);
    return id;
  }

  open(id) {
    this.currentId = id;
    write(CURRENT, id);
  }

  // Another tab may have removed the document: writing brings it back.
  save(text) {
    write(textKey(this.currentId), text);
    if (!this.list().some(one => one.id === this.currentId)) {
      write(LIST, [{ id: this.currentId }, ...this.list()]);
    }
  }

  // Returns how to undo it.
  remove() {
    const [id, text, list] = [this.currentId, this.text(), this.list()];
    const place = list.findIndex(one => one.id === id);
    const rest = list.filter(one => one.id !== id);
    write(LIST, rest);
    storage.removeItem(textKey(id));
    if (rest.length) this.open(rest[Math.min(place, rest.length - 1)].id);
    else this.create();
    return () => this.create(text, id, place);
  }

  // Calls back when another tab changes the current document, or the list.
  onChange(callback) {
    addEventListener("storage", event => {
      if (event.key === textKey(this.currentId) && event.newValue !== null) callback(this.text());
      else if (event.key === LIST) callback(null);
    });
  }
}

export const settings = {
  load: () => read(SETTINGS, {}),
  save: changed => write(SETTINGS, { ...read(SETTINGS, {}), ...changed }),
};
