// The page: a chat and a view of the engine that answers it, and what both need: a key, a status, which one is shown.

import { Chat } from "./chat.js";
import { EngineView } from "./engine.js";
import { Refused, Server } from "./server.js";

const $ = (id) => document.getElementById(id);

const server = new Server();
const engine = new EngineView(server, showStatus);
new Chat(server, () => engine.model);

function showStatus(error, event) {
  const needsKey = error instanceof Refused && error.status === 401;
  if (needsKey && $("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  } else if (needsKey && server.key) {
    $("key-error").textContent = "The server does not know this key.";
  } else if (!error) {
    $("key-form").hidden = true;
  }
  document.body.classList.toggle("stale", error !== null);
  const [state, text] = describe(error, event);
  if ($("status").textContent !== text) $("status").firstChild.textContent = text;
  $("status").dataset.state = state;
}

function describe(error, event) {
  if (error instanceof Refused) return ["waiting", error.status === 401 ? "A key is needed" : error.message];
  if (error) return ["down", "Disconnected, trying again"];
  if (!event.is_live) return ["down", "The engine has stopped"];
  if (!event.is_ready) return ["waiting", "The engine makes no progress"];
  return ["ok", "Connected"];
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  server.key = $("key").value.trim();
  $("key").value = "";
  $("key-error").textContent = "";
  engine.retry();
});

for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.view;
    for (const other of document.querySelectorAll("nav button")) {
      other.setAttribute("aria-pressed", other === button);
    }
  });
}

engine.run();
