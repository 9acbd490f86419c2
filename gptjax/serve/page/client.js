// What the page asks the server. Everything goes to where the page came from.

const KEY = "gptjax.key";

// One for each tab of the browser, so that two do not share what the model has read.
export const session = crypto.randomUUID?.() ?? Array.from(
  crypto.getRandomValues(new Uint32Array(4)), number => number.toString(16).padStart(8, "0"),
).join("-");

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function request(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the server does not answer", 0);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new ServerError(said?.error?.message ?? `the server answered ${response.status}`, response.status);
}

export async function ask(path, body, signal) {
  const response = await request(path, body, signal);
  return response.json();
}

// Yields the objects of a stream of server-sent events, each as soon as it is whole.
export async function* askStream(path, body, signal) {
  const response = await request(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value.replaceAll("\r", "");
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter(line => line.startsWith("data:"))
        .map(line => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const said = JSON.parse(data);
      if (said.error) throw new ServerError(said.error.message, 500);
      yield said;
    }
  }
}
