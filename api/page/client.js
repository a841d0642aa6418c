// Asks the server, with the visitor's key if it has one. The key lives in this tab's session storage.

const KEY = "stemcache.key";

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Client {
  salt = "";

  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  }

  async get(path, query = {}) {
    const given = Object.entries({ ...query, ...(path.startsWith("/v1/cache/") && { cache_salt: this.salt }) });
    const text = new URLSearchParams(given.filter(([, value]) => value !== "")).toString();
    return (await this.#send("GET", text ? `${path}?${text}` : path)).json();
  }

  async post(path, body) {
    return (await this.#send("POST", path, this.#salted(body))).json();
  }

  // Calls `onEvent` with each event of a stream of server-sent events.
  async stream(path, body, onEvent) {
    const response = await this.#send("POST", path, this.#salted({ ...body, stream: true }));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const data of events.filter((event) => event.startsWith("data: ")).map((event) => event.slice(6))) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(500, event.error.message);
        onEvent(event);
      }
    }
  }

  #salted(body) {
    return this.salt ? { ...body, cache_salt: this.salt } : body;
  }

  async #send(method, path, body) {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
    if (response.ok) return response;
    const told = await response.json().catch(() => null);
    throw new ServerError(response.status, told?.error?.message ?? `The server answered ${response.status}.`);
  }
}
