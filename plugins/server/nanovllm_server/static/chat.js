// Chat: one conversation, answered piece by piece. All text goes into text nodes.

import { Refused } from "./server.js";

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export class Chat {
  #server;
  #model; // () -> what the engine view knows of the model, or null
  #history = []; // messages that were answered, and their answers
  #answering = null; // AbortController of the answer that is being written

  constructor(server, model) {
    this.#server = server;
    this.#model = model;
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    $("message").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.#answering) $("composer").requestSubmit();
      }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
    $("stop").addEventListener("click", () => this.stop());
    $("clear").addEventListener("click", () => this.#clear());
    $("settings").addEventListener("input", () => this.#summarise());
    this.#summarise();
  }

  stop() {
    this.#answering?.abort();
  }

  async #submit() {
    const text = $("message").value.trim();
    if (!text || this.#answering) return;
    $("message").value = "";
    $("hint").hidden = true;
    addTurn("user", "You").text.data = text;
    const turn = addTurn("assistant", this.#model()?.name ?? "Model");
    $("log").scrollTo({ top: $("log").scrollHeight });
    this.#answering = new AbortController();
    this.#setBusy(true, turn);
    const asked = { role: "user", content: text };
    try {
      await this.#answer(asked, turn, this.#answering.signal);
      this.#remember(asked, turn);
    } catch (error) {
      if (error.name === "AbortError") {
        this.#remember(asked, turn);
        note(turn, "Stopped.");
      } else {
        if (!$("message").value) $("message").value = text; // to be sent again
        note(turn, error instanceof Refused ? error.message : "The connection to the server was lost.", true);
      }
    } finally {
      this.#answering = null;
      this.#setBusy(false, turn);
      $("message").focus();
    }
  }

  async #answer(asked, turn, signal) {
    const canChat = this.#model()?.has_chat ?? true; // a model without a template continues a text
    const body = { ...settings(), stream: true, stream_options: { include_usage: true } };
    const system = $("composer").elements.system.value.trim();
    if (canChat) body.messages = [...(system ? [{ role: "system", content: system }] : []), ...this.#history, asked];
    else body.prompt = asked.content;
    const began = performance.now();
    let first = null;
    let usage = null;
    let finish = null;
    for await (const event of this.#server.events(canChat ? "v1/chat/completions" : "v1/completions", signal, body)) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        const piece = choice.delta?.content ?? choice.text;
        if (piece) {
          first ??= performance.now();
          append(turn, piece);
        }
        finish = choice.finish_reason ?? finish;
      }
    }
    if (finish === null) throw new Error("the answer ended in its middle");
    note(turn, figures(usage, began, first, performance.now()) + (finish === "length" ? " · cut at the limit" : ""));
  }

  /** What was said counts for the next answer; a turn that brought nothing does not. */
  #remember(asked, turn) {
    if (turn.text.data) this.#history.push(asked, { role: "assistant", content: turn.text.data });
  }

  #setBusy(isBusy, turn) {
    turn.element.classList.toggle("open", isBusy);
    $("log").setAttribute("aria-busy", isBusy); // read out whole, not piece by piece
    $("send").hidden = isBusy;
    $("stop").hidden = !isBusy;
    $("clear").disabled = isBusy;
  }

  #clear() {
    this.#history = [];
    for (const turn of $("log").querySelectorAll(".turn")) turn.remove();
    $("hint").hidden = false;
    $("clear").disabled = true;
    $("message").focus();
  }

  #summarise() {
    const given = Object.entries(settings()).map(([name, value]) => `${name} ${value}`);
    $("settings-summary").textContent = given.length ? `· ${given.join(", ")}` : "";
  }
}

/** The sampling fields that hold a number; an empty one is left to the server. */
function settings() {
  const chosen = {};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    const { value, valueAsNumber } = $("composer").elements[name];
    if (value !== "") chosen[name] = valueAsNumber;
  }
  return chosen;
}

function figures(usage, began, first, ended) {
  const parts = [];
  if (usage) parts.push(`${number.format(usage.completion_tokens)} tokens`);
  if (first !== null) parts.push(`first after ${number.format(first - began)} ms`);
  if (usage && first !== null && usage.completion_tokens > 1 && ended > first) {
    parts.push(`${number.format((usage.completion_tokens - 1) / ((ended - first) / 1000))} tokens/s`);
  }
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (cached) parts.push(`${number.format(cached)} of ${number.format(usage.prompt_tokens)} prompt tokens cached`);
  return parts.join(" · ");
}

/** A turn of the conversation: its element, and the text node that grows. */
function addTurn(role, name) {
  const element = document.createElement("article");
  element.className = `turn ${role}`;
  const heading = document.createElement("h3");
  heading.textContent = name;
  const body = document.createElement("div");
  body.className = "text";
  const text = document.createTextNode("");
  body.append(text);
  element.append(heading, body);
  $("log").append(element);
  return { element, text };
}

/** Follows the end, unless its reader has scrolled away from it. */
function append(turn, piece) {
  const log = $("log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  turn.text.appendData(piece);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function note(turn, text, isError = false) {
  const element = document.createElement("p");
  element.className = isError ? "note error" : "note";
  element.textContent = text;
  turn.element.append(element);
  element.scrollIntoView({ block: "nearest" });
}
