// EngineView: what /v1/engine/live says, as figures and two pictures; and whether it says anything.

import { Refused } from "./server.js";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const NUM_STEPS = 60; // bars in the picture
const MAX_CELLS = 256; // squares in the picture of the blocks
const RATE_SECONDS = 2; // that the tokens per second are taken over
const SILENCE = 5000; // ms; the server says something every second
const MAX_PAUSE = 5000; // ms between two tries to connect

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export class EngineView {
  model = null; // what the server said of it
  #server;
  #onStatus;
  #steps = [];
  #samples = []; // of the last RATE_SECONDS
  #connection = null; // AbortController
  #isHeard = false; // has this connection said anything?
  #wake = () => {};

  /** `onStatus(error, event)`: one of them is null. */
  constructor(server, onStatus) {
    this.#server = server;
    this.#onStatus = onStatus;
    const again = () => {
      if (document.hidden) this.#connection?.abort(); // nobody looks
      else this.retry();
    };
    document.addEventListener("visibilitychange", again);
    window.addEventListener("online", again);
  }

  /** Connects, for ever again; but not while nobody looks, nor before there is a key where one is asked for. */
  async run() {
    for (let numFailed = 0; ; numFailed++) {
      let needsKey = false;
      try {
        await this.#follow((event) => this.#onStatus(null, event));
        numFailed = -2; // all is well: a stream has an end
      } catch (error) {
        if (this.#isHeard) numFailed = 0;
        needsKey = error instanceof Refused && error.status === 401;
        if (!document.hidden) this.#onStatus(error, null);
      }
      await new Promise((resolve) => {
        this.#wake = resolve;
        if (!document.hidden && !needsKey) setTimeout(resolve, Math.min(MAX_PAUSE, 500 * 2 ** numFailed));
      });
    }
  }

  /** Connects now. */
  retry() {
    this.#wake();
  }

  async #follow(onEvent) {
    this.#isHeard = false;
    this.#connection = new AbortController();
    const lose = () => this.#connection.abort(new Error("the server went silent"));
    let watchdog = setTimeout(lose, SILENCE);
    try {
      for await (const event of this.#server.events("v1/engine/live", this.#connection.signal)) {
        clearTimeout(watchdog);
        watchdog = setTimeout(lose, SILENCE);
        if (event.model) this.#begin(event.model);
        this.#show(event);
        this.#isHeard = true;
        onEvent(event);
      }
    } finally {
      clearTimeout(watchdog);
    }
  }

  #begin(model) {
    this.model = model;
    this.#steps = [];
    $("about").textContent = [model.name, model.runner].join(" · ");
    const facts = {
      Name: model.name,
      Runner: model.runner,
      ...model.facts,
      "Tokens in a sequence": `up to ${whole.format(model.max_model_len)}`,
      "Sequences in a batch": `up to ${whole.format(model.max_num_seqs)}`,
    };
    if (model.block_size) facts["Tokens in a block"] = model.block_size;
    $("facts").replaceChildren(
      ...Object.entries(facts).map(([name, value]) => {
        const row = document.createElement("div");
        row.append(document.createElement("dt"), document.createElement("dd"));
        row.firstChild.textContent = name;
        row.lastChild.textContent = typeof value === "number" ? whole.format(value) : value;
        return row;
      }),
    );
  }

  #show(event) {
    const { totals, running, waiting, blocks } = event;
    set("running", whole.format(running));
    set("waiting", whole.format(waiting));
    set("rate", this.#rate(event));
    const prompt = totals.prefill_tokens + totals.cached_tokens;
    set("hits", prompt ? `${whole.format((100 * totals.cached_tokens) / prompt)} %` : "–");
    set("requests", whole.format(totals.requests));
    set("num-steps", whole.format(totals.steps));
    set("prefill-tokens", whole.format(totals.prefill_tokens));
    set("decode-tokens", whole.format(totals.decode_tokens));
    set("preemptions", whole.format(totals.preemptions));
    set("failed-steps", whole.format(totals.failed_steps));
    if (event.steps.length) {
      this.#steps = [...this.#steps, ...event.steps].slice(-NUM_STEPS);
      this.#drawSteps();
    }
    this.#drawBlocks(blocks);
  }

  #rate({ at, totals }) {
    const samples = this.#samples;
    if (totals.decode_tokens < samples.at(-1)?.tokens) samples.length = 0; // the server began anew
    samples.push({ at, tokens: totals.decode_tokens });
    while (samples.length > 2 && at - samples[1].at >= RATE_SECONDS) samples.shift();
    const seconds = at - samples[0].at;
    const rate = seconds > 0 ? (totals.decode_tokens - samples[0].tokens) / seconds : 0;
    return rate > 0 && rate < 10 ? rate.toFixed(1) : whole.format(rate);
  }

  /** Decode tokens grow up from the middle and prefill tokens down, each by its own scale. */
  #drawSteps() {
    const steps = this.#steps;
    const most = { decode: 0, prefill: 0 };
    for (const step of steps) {
      most.decode = Math.max(most.decode, step.decode);
      most.prefill = Math.max(most.prefill, step.prefill);
    }
    const middle = 48;
    const bars = [shape("line", { x1: 0, x2: 4 * NUM_STEPS, y1: middle, y2: middle })];
    steps.forEach((step, i) => {
      const x = 4 * (NUM_STEPS - steps.length + i) + 0.5;
      for (const kind of ["decode", "prefill"]) {
        if (!step[kind]) continue;
        const height = Math.max(1.5, (44 * step[kind]) / most[kind]);
        const y = kind === "decode" ? middle - height : middle;
        bars.push(shape("rect", { x, y, width: 3, height, "data-kind": step.failed ? "failed" : kind }));
      }
    });
    $("steps").replaceChildren(...bars);
    const last = steps.at(-1);
    set(
      "last-step",
      `${count(last.seqs, "sequence")}, ${whole.format(last.decode)} decode + ` +
        `${whole.format(last.prefill)} prefill tokens, ${(1000 * last.seconds).toFixed(1)} ms` +
        (last.failed ? ", failed" : ""),
    );
    set("max-decode", most.decode ? `up to ${compact.format(most.decode)}` : "none");
    set("max-prefill", most.prefill ? `up to ${compact.format(most.prefill)}` : "none");
  }

  #drawBlocks(blocks) {
    $("kv").hidden = $("kv-legend").hidden = !blocks;
    if (!blocks) {
      set("kv-line", "This runner keeps its KV cache by itself.");
      return;
    }
    const { total, used, shared, cached } = blocks;
    const counts = { shared, used: used - shared, cached, free: Math.max(0, total - used - cached) };
    const size = Math.ceil(total / MAX_CELLS); // blocks in a square
    const kinds = []; // of the squares; one for a part of its blocks is rounded up, at the cost of the free ones
    for (const [kind, num] of Object.entries(counts)) {
      set(`kv-${kind}`, whole.format(num));
      for (let i = 0; i < num; i += size) kinds.push(kind);
    }
    const cells = $("kv");
    const numCells = Math.ceil(total / size);
    while (cells.childElementCount > numCells) cells.lastChild.remove();
    while (cells.childElementCount < numCells) cells.append(document.createElement("i"));
    [...cells.children].forEach((cell, i) => (cell.dataset.kind = kinds[i]));
    set(
      "kv-line",
      `${whole.format(used)} of ${count(total, "block")} used` +
        (shared ? `, ${whole.format(shared)} of them by several sequences` : "") +
        (size > 1 ? `; a square is ${size} blocks` : ""),
    );
  }
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** Writes what changed, and nothing else: a screen reader hears no repetitions. */
function set(id, text) {
  const element = $(id);
  if (element.textContent !== text) element.textContent = text;
}

function count(number, noun) {
  return `${whole.format(number)} ${noun}${number === 1 ? "" : "s"}`;
}
