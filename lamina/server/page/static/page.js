// The page: asks for the status once a second while it is seen, and puts it where it belongs.

import { Strips } from "./chart.js";
import { Chat } from "./chat.js";
import { Events } from "./events.js";
import { Holders } from "./holders.js";
import { Joining } from "./joining.js";
import { Models } from "./models.js";
import { byId, count, duration, element, percent, rate, span, write } from "./units.js";

const [PERIOD, AGAIN, PATIENCE] = [1000, 2000, 5000]; // milliseconds between polls, after a failure, and for an answer
const [RATES, TIERS, EXCHANGES] = [3, 5, 10]; // seconds that figures are of
const SILENT = 4; // seconds without a new snapshot that are worth a word
const KEY = "lamina api key";

const strips = new Strips(byId("strips"), byId("spoken"));
const holders = new Holders(byId("spoken"));
const events = new Events();
const joining = new Joining(headers);
const models = new Models(headers, another, (text) => write(byId("chat-words"), text));
let status = null; // the last that came
let samples = []; // engines of the last seconds, [{ at, engine }], oldest first; one life of one engine
let timer = 0;
let polling = null; // the poll under way
let changing = false; // the key is typed anew at the reader's wish, not because the server asked

const clock = () => performance.now() / 1000;

let memory = ""; // where a browser keeps no storage
function key() {
  try {
    return sessionStorage.getItem(KEY) ?? memory;
  } catch {
    return memory;
  }
}

function setKey(value) {
  memory = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {} // storage may be off: the key lives as long as the page
}

function headers() {
  return key() ? { Authorization: `Bearer ${key()}` } : {};
}

// Another model or another key: what is known is of another engine, or of others' requests.
function another() {
  samples = [];
  holders.forget();
  strips.clear();
  joining.again();
  polling?.abort();
  polling = null;
  poll();
}

function notice(text, bad = false) {
  byId("notice").hidden = !text;
  byId("notice").classList.toggle("bad", bad);
  write(byId("notice"), text);
}

function state(kind, text) {
  byId("state").className = `state ${kind}`;
  write(byId("state"), text);
  document.body.classList.toggle("old", !kind.startsWith("ready"));
}

function askForKey() {
  const tried = key() !== "";
  write(byId("access-words"), tried ? "The server did not accept this API key." : "This server needs an API key.");
  if (byId("access").hidden) {
    byId("access").hidden = false;
    byId("key").value = "";
    byId("key").focus();
  }
  byId("open-access").hidden = true;
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden || polling) return;
  const asking = (polling = new AbortController());
  const impatient = setTimeout(() => asking.abort(), PATIENCE);
  let told = unanswered;
  try {
    const response = await fetch(`lamina/status${models.chosen && `?model=${encodeURIComponent(models.chosen)}`}`, { headers: headers(), signal: asking.signal });
    if (response.status === 401) {
      told = refused;
    } else if (response.ok) {
      const answer = await response.json();
      told = () => show(answer);
    }
  } catch {} // it stays unanswered
  clearTimeout(impatient);
  if (polling !== asking) return; // another key is tried instead
  polling = null;
  told();
  if (told !== unanswered && told !== refused) {
    joining.poll();
  }
  if (!document.hidden) timer = setTimeout(poll, told === unanswered || told === refused ? AGAIN : PERIOD);
}

function unanswered() {
  state("dead", "no connection");
  notice("The server does not answer. Trying again every 2 s.", true);
}

function refused() {
  state("", "no access");
  notice("");
  askForKey();
}

function show(answer) {
  status = answer;
  if (!changing) byId("access").hidden = true;
  byId("open-access").hidden = !key() || changing;
  write(byId("model"), answer.model);
  models.update(answer);
  document.title = `${answer.model} – Lamina`;
  write(byId("version"), answer.version);
  write(byId("restarts"), count(answer.restarts));
  if (answer.max_model_len !== null) write(byId("context"), `${count(answer.max_model_len)} tokens`);
  const gone = answer.engine?.missing.length ?? 0;
  const less = answer.state === "ready" && gone > 0;
  state(`${answer.state}${less ? " less" : ""}`, less ? `ready, ${count(gone)} ${gone === 1 ? "attention worker" : "attention workers"} lost` : answer.state);
  events.update(answer.events);
  const engine = answer.engine;
  const silent = engine ? take(engine) : 0;
  if (answer.state !== "ready") {
    const old = engine ? " The figures are the last that were seen." : "";
    const next = answer.state === "dead" ? " The server starts it again; answers under way wait for it and go on." : "";
    notice(`${answer.message.charAt(0).toUpperCase()}${answer.message.slice(1)}.${next}${old}`, answer.state === "dead");
  } else if (silent > SILENT) {
    notice(`The engine has told nothing new for ${span(silent)}: the figures are from then.`);
  } else {
    notice("");
  }
  figures(answer);
  strips.draw(clock());
  write(byId("window"), strips.title);
}

// Keep an engine's counters and what happened between them and those before. Returns how old they are, in seconds.
function take(engine) {
  const now = clock();
  const last = samples[samples.length - 1];
  if (last && engine.uptime === last.engine.uptime) return now - last.at;
  if (last && (engine.began !== last.engine.began || engine.uptime < last.engine.uptime)) { // another engine: its counters begin anew
    samples = [];
    holders.forget();
  } else if (last) {
    const made = between(last.engine, engine);
    strips.push({ from: last.at, to: now, running: engine.running, waiting: engine.waiting, ...made });
  }
  samples.push({ at: now, engine });
  while (samples.length > 2 && engine.uptime - samples[1].engine.uptime >= EXCHANGES) samples.shift();
  holders.update(engine, before(EXCHANGES));
  return 0;
}

// The engine about so many seconds before the last, or null.
function before(seconds) {
  const { engine } = samples[samples.length - 1];
  const found = [...samples].reverse().find((sample) => engine.uptime - sample.engine.uptime >= seconds - 0.5) ?? samples[0];
  return found.engine === engine ? null : found.engine;
}

function between(from, to) {
  const seconds = to.uptime - from.uptime;
  const share = (name) => Math.min(Math.max((to[name] - from[name]) / seconds, 0), 1);
  const model = share("model_seconds");
  return {
    output: (to.generation_tokens - from.generation_tokens) / seconds,
    prompt: (to.prompt_tokens - from.prompt_tokens) / seconds,
    model,
    attention: Math.min(share("attention_seconds"), 1 - model),
  };
}

function figures(answer) {
  const engine = answer.engine;
  const spread = (id, found) => {
    write(byId(id), duration(found?.p50));
    write(byId(`${id}99`), found ? `p99 ${duration(found.p99)}` : "none lately");
  };
  spread("ttft", answer.first_token);
  spread("tbt", answer.next_token);
  if (!engine) return;
  write(byId("uptime"), span(engine.uptime));
  write(byId("running"), count(engine.running));
  write(byId("waiting"), `, ${count(engine.waiting)} waiting`);
  const [total, free, cached] = ["total_pages", "free_pages", "cached_pages"].map((name) =>
    engine.holders.reduce((sum, holder) => sum + holder[name], 0));
  write(byId("kv-used"), percent(Math.max(0, total - free - cached) / total));
  write(byId("kv-of"), `in sequences, ${percent(cached / total)} cache`);
  write(byId("hits"), engine.prefix_queries ? percent(engine.prefix_hits / engine.prefix_queries) : "–");
  write(byId("hits-of"), "of prompts' tokens");
  byId("drafts-row").hidden = !engine.draft_tokens;
  write(byId("drafts"), engine.draft_tokens ? percent(engine.accepted_tokens / engine.draft_tokens) : "–");
  write(byId("drafts-of"), engine.drafts ? `accepted, ${(1 + engine.accepted_tokens / engine.drafts).toFixed(1)} tokens a row` : "");
  const lately = before(RATES);
  const made = lately ? between(lately, engine) : {};
  write(byId("output"), rate(made.output));
  write(byId("prompt"), rate(made.prompt));
  const earlier = before(TIERS);
  if (earlier) tiers(between(earlier, engine));
}

function tiers({ model, attention }) {
  const [first, second] = byId("tier-bar").children;
  first.style.width = `${model * 100}%`;
  second.style.width = `${attention * 100}%`;
  const words = byId("tier-words");
  const texts = [["m", `dense layers ${percent(model)}`], ["a", `attention ${percent(attention)}`], ["", `idle ${percent(1 - model - attention)}`]];
  if (words.children.length !== texts.length) words.replaceChildren(...texts.map(([className]) => element("span", { className })));
  texts.forEach(([, text], index) => write(words.children[index], text));
}

byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key").value = "";
  changing = false;
  another();
});
byId("open-access").addEventListener("click", () => {
  changing = true;
  byId("open-access").hidden = true;
  write(byId("access-words"), "Another API key for this tab, or none:");
  byId("access").hidden = false;
  byId("key").focus();
});
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));

let drawing = 0;
function redraw() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => {
    strips.draw();
    holders.draw();
  });
}
window.addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

new Chat(() => models.chosen || status?.model || "", headers, askForKey);
strips.draw(clock());
poll();
