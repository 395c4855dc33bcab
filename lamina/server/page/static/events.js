// What happened to the engine and its holders, newest first, as the server noticed it.

import { byId, count, element } from "./units.js";

const SHOWN = 3; // events above the fold
const WATCHED = 5; // seconds between two looks within which a time is told as exact

function time(seconds) {
  const then = new Date(seconds * 1000);
  const clock = then.toLocaleTimeString("en-GB");
  return Date.now() / 1000 - seconds < 43200 ? clock : `${then.toLocaleDateString("en-CA")} ${clock}`;
}

function sentence(event) {
  const when = event.at - event.since > WATCHED ? `between ${time(event.since)} and ${time(event.at)}` : `at ${time(event.at)}`;
  const why = event.why ? ` (${event.why})` : "";
  const again = event.tokens ? `; ${count(event.tokens)} ${event.tokens === 1 ? "token" : "tokens"} computed again` : "";
  const back = event.back !== null && event.back !== event.at ? time(event.back) : "";
  switch (event.what) {
    case "lost":
      return `${event.subject} lost ${when}${again}${back && `; back at ${back}`}${event.back === event.at ? "; back since" : ""}`;
    case "dead":
      return `engine died ${when}${why}${back ? `; serving again at ${back}` : "; answers under way wait for the next one"}${again}`;
    case "halted":
      return `engine waited for a worker ${back ? `from ${time(event.at)} to ${back}` : `since ${time(event.at)}`}`;
    default:
      return `${event.subject} ${event.what} ${when}${again}`;
  }
}

const grave = ({ what, back }) => back === null && ["lost", "dead", "halted"].includes(what);

export class Events {
  constructor() {
    this.written = "";
  }

  update(events) {
    const written = JSON.stringify(events);
    if (written === this.written) return; // screen readers speak what changes
    this.written = written;
    const items = events.map((event) => element("li", { className: grave(event) ? "bad" : "", text: sentence(event) }));
    byId("events").hidden = !items.length;
    byId("older-events").hidden = items.length <= SHOWN;
    byId("newest-events").replaceChildren(...items.slice(0, SHOWN));
    byId("older-events").querySelector("ol").replaceChildren(...items.slice(SHOWN));
  }
}
