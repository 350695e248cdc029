// Server: calls with the key, and the events of an answer. Knows no field of them but the error's.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Server {
  key = ""; // in memory only: gone with the page

  /** The JSON of each event, until the server ends the answer. Throws Refused, or fetch's own errors. */
  async *events(path, signal, body) {
    const headers = { accept: "text/event-stream" };
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    const init = { headers, signal, cache: "no-store", credentials: "omit" };
    if (body !== undefined) {
      headers["content-type"] = "application/json";
      Object.assign(init, { method: "POST", body: JSON.stringify(body) });
    }
    const response = await fetch(path, init);
    if (!response.ok) throw new Refused(response.status, await sentence(response));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    try {
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        const blocks = (rest + value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) {
          if (!block.startsWith("data: ")) continue; // a comment that keeps the connection alive
          if (block === "data: [DONE]") return;
          const event = JSON.parse(block.slice("data: ".length));
          if (event.error) throw new Refused(response.status, event.error.message);
          yield event;
        }
      }
    } finally {
      reader.cancel().catch(() => {}); // it may have failed already
    }
  }
}

async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}
