// KV pages of each holder as a map, and the table of holders.

import { byId, colour, count, element, known, percent, prepare, quantile, traffic, write } from "./units.js";

const [ROW, BETWEEN] = [10, 2]; // height of a map's row and the gap after it

export const label = (number) => `#${number}`;

// Neighbours in age are far apart in hue, by the golden angle; a sequence keeps its number, so its colour too.
function hue(number) {
  return `oklch(${colour("--hues-lightness")} ${colour("--hues-chroma")} ${((number * 137.508) % 360).toFixed(1)})`;
}

const EMPTY = " · empty: new KV comes here, older KV where steps gain by the move";
const used = (holder) => holder.total_pages - holder.free_pages;
const held = (holder) => Math.max(0, used(holder) - holder.cached_pages); // by sequences, shared pages counted once
const inSequences = (holder) => holder.pages.reduce((sum, value) => sum + value, holder.other_pages);

// What fills a holder, in the order in which it is drawn: [{ from, to, kind, pages, ... }], from and to in pages of the
// map. Pages that sequences share count for each of them, and are drawn once: then theirs are narrower than they count.
function segments(holder, sequences) {
  const parts = [];
  const busy = inSequences(holder);
  const room = Math.max(0, used(holder) - holder.cached_pages);
  const scale = busy > room ? room / busy : 1;
  let at = 0;
  const add = (pages, part, wide = pages) => {
    if (pages > 0) parts.push({ ...part, from: at, to: at + wide, pages });
    at += Math.max(0, wide);
  };
  holder.pages.forEach((pages, index) => add(pages, { kind: "sequence", index, ...sequences[index] }, pages * scale));
  add(holder.other_pages, { kind: "others" }, holder.other_pages * scale);
  add(Math.min(holder.cached_pages, used(holder)), { kind: "cache" });
  if (used(holder) - at > 0.5) add(used(holder) - at, { kind: "rest" });
  add(holder.free_pages, { kind: "free" });
  return parts;
}

const many = (number, what) => `${count(number)} ${what}${number === 1 ? "" : "s"}`;
const pages = (number) => many(number, "page");

class HolderMap {
  constructor(owner) {
    this.owner = owner;
    this.name = element("b");
    this.share = element("span");
    this.canvas = element("canvas", { role: "img", tabindex: "0" });
    this.words = element("p");
    this.figure = element("figure", {}, element("figcaption", {}, this.name, this.share), this.canvas, this.words);
    this.parts = [];
    this.chosen = -1;
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => owner.choose(null));
    this.canvas.addEventListener("blur", () => owner.choose(null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  update(holder, sequences, rows, others) {
    this.holder = holder;
    this.rows = rows;
    this.parts = segments(holder, sequences);
    write(this.name, holder.name);
    write(this.share, `${percent(held(holder) / holder.total_pages)} of ${pages(holder.total_pages)}`);
    write(this.words, `${pages(inSequences(holder))} in sequences · ${count(holder.cached_pages)} in the cache · ${count(holder.free_pages)} free${used(holder) || !others || !holder.address ? "" : EMPTY}`);
    this.canvas.setAttribute("aria-label", `KV pages of ${holder.name}: ${this.words.textContent}; the arrow keys go through them`);
  }

  draw(palette, only) {
    const total = Math.max(1, this.holder.total_pages);
    const width = this.canvas.clientWidth;
    let [cell, rows] = [(width * this.rows) / total, this.rows];
    this.cells = cell >= 4; // else pages are too small to be told apart, and a row is a ribbon
    if (this.cells) {
      cell = Math.min(12, Math.floor(cell));
      rows = Math.ceil(total / Math.floor(width / cell));
    }
    this.perRow = this.cells ? Math.floor(width / cell) : total / rows;
    this.cell = this.cells ? cell : width / this.perRow;
    const area = prepare(this.canvas, rows * (ROW + BETWEEN) - BETWEEN);
    if (!area) return;
    const { context } = area;
    for (const part of this.parts) {
      context.globalAlpha = only === null || part.label === only ? 1 : 0.28;
      const fill = part.kind === "sequence" ? palette.of(part.label) : palette[part.kind];
      this.#rows(part, (x, y, wide) => {
        const room = !this.cells && wide > 3 && part.kind !== "free" ? 1 : 0; // a line between neighbours
        context.fillStyle = fill;
        context.fillRect(x, y, wide - room, ROW);
        if (part.prefill) {
          context.fillStyle = palette.ink;
          context.fillRect(x, y, wide - room, 2.5);
        }
      });
    }
    context.globalAlpha = 1;
    if (this.cells) {
      context.fillStyle = palette.panel;
      for (let i = 1; i <= this.perRow; i++) context.fillRect(i * this.cell - 1, 0, 1, area.height);
    }
  }

  #rows(part, paint) {
    for (let row = Math.floor(part.from / this.perRow + 1e-9); row * this.perRow < part.to - 1e-9; row++) {
      const from = Math.max(part.from, row * this.perRow) - row * this.perRow;
      const to = Math.min(part.to, (row + 1) * this.perRow) - row * this.perRow;
      paint(from * this.cell, row * (ROW + BETWEEN), (to - from) * this.cell);
    }
  }

  #point(event) {
    const page = Math.floor(event.offsetY / (ROW + BETWEEN)) * this.perRow + event.offsetX / this.cell;
    const part = this.parts.find(({ from, to }) => from <= page && page < to);
    this.owner.choose(part ?? null, part && this.#describe(part), event.clientX, event.clientY);
  }

  #key(event) {
    if (event.key === "Escape") return this.owner.choose(null);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !this.parts.length) return;
    event.preventDefault();
    this.chosen = Math.min(Math.max(this.chosen + step, 0), this.parts.length - 1);
    const part = this.parts[this.chosen];
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor(part.from / this.perRow);
    this.owner.choose(part, this.#describe(part), box.left + (part.from - row * this.perRow) * this.cell, box.top + row * (ROW + BETWEEN), true);
  }

  #describe(part) {
    if (part.kind === "free") return `${pages(part.pages)} free`;
    if (part.kind === "cache") return `${pages(part.pages)} of the prefix cache alone`;
    if (part.kind === "rest") return `${pages(part.pages)} in use otherwise, or just freed`;
    if (part.kind === "others") return `${pages(part.pages)} of further sequences`;
    return `${label(part.label)}: ${pages(part.pages)} here, ${many(part.tokens, "token")}, ${part.prefill ? "reads its prompt" : "decodes"}`;
  }
}

export class Holders {
  constructor(spoken) {
    this.spoken = spoken;
    this.maps = new Map();
    this.seen = new Map(); // holders that are gone, as they were last
    this.only = null;
    this.engine = null;
    byId("by-sequence").addEventListener("toggle", () => this.#bySequence());
  }

  // `earlier` is the engine's status some seconds before, or null.
  update(engine, earlier) {
    this.engine = engine;
    const names = new Set(engine.holders.map(({ name }) => name));
    for (const [name, map] of this.maps) {
      if (names.has(name)) continue;
      this.seen.set(name, map.holder);
      map.figure.remove();
      this.maps.delete(name);
    }
    for (const name of this.seen.keys()) if (!engine.missing.includes(name)) this.seen.delete(name);
    const rows = names.size <= 2 ? 8 : names.size <= 8 ? 5 : names.size <= 16 ? 4 : 3;
    byId("maps").classList.toggle("many", names.size > 8);
    for (const holder of engine.holders) {
      let map = this.maps.get(holder.name);
      if (!map) {
        map = new HolderMap(this);
        this.maps.set(holder.name, map);
        byId("maps").append(map.figure);
      }
      map.update(holder, engine.sequences, rows, engine.joined_holders && engine.holders.some(used));
    }
    const cached = engine.holders.reduce((sum, holder) => sum + holder.cached_pages, 0);
    write(byId("kv-words"), `${many(engine.sequences.length, "sequence")}, ${pages(cached)} of prefix cache, ${many(engine.page_size, "token")} a page`);
    byId("rest-key").hidden = ![...this.maps.values()].some((map) => map.parts.some(({ kind }) => kind === "rest"));
    this.draw();
    this.#table(engine, earlier);
    this.#bySequence();
  }

  forget() { // another engine is another set of holders
    this.seen.clear();
    for (const map of this.maps.values()) map.figure.remove();
    this.maps.clear();
  }

  draw() {
    const palette = { of: this.#colours(), others: colour("--soft"), cache: this.#hatch(), rest: colour("--faint"),
      free: colour("--free"), ink: colour("--ink"), panel: colour("--panel") };
    for (const map of this.maps.values()) map.draw(palette, this.only);
  }

  choose(part, words, x, y, keyed = false) {
    const only = part?.kind === "sequence" ? part.label : null;
    const tip = byId("tip");
    tip.hidden = !part;
    if (part) {
      const whole = only === null ? "" : ` (${pages(this.#whole(part.index))} in all)`;
      tip.textContent = words + whole;
      tip.style.left = `${Math.min(x + 12, Math.max(8, window.innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${y + 18 + tip.offsetHeight > window.innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
      if (keyed) this.spoken.textContent = tip.textContent;
    }
    if (only === this.only) return;
    this.only = only;
    requestAnimationFrame(() => this.draw());
  }

  #colours() {
    const made = new Map();
    return (number) => {
      if (!made.has(number)) made.set(number, hue(number));
      return made.get(number);
    };
  }

  #hatch() {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 5;
    const context = tile.getContext("2d");
    context.fillStyle = colour("--free");
    context.fillRect(0, 0, 5, 5);
    context.strokeStyle = colour("--soft");
    context.lineWidth = 1.2;
    for (const shift of [-5, 0, 5]) {
      context.moveTo(shift, 5);
      context.lineTo(shift + 5, 0);
    }
    context.stroke();
    return context.createPattern(tile, "repeat");
  }

  #whole(index) {
    return this.engine.holders.reduce((sum, holder) => sum + holder.pages[index], 0);
  }

  #table(engine, earlier) {
    const body = byId("workers").querySelector("tbody");
    const rows = engine.holders.map((holder) => this.#row(holder, engine, earlier));
    for (const name of engine.missing) {
      const last = this.seen.get(name);
      const texts = ["lost", last?.channel ?? "–", "–", "–", "–", "–", "–", last?.address ?? "–"];
      rows.push(element("tr", { className: "lost" }, element("th", { scope: "row", text: name }), ...texts.map((text) => element("td", { text }))));
    }
    body.replaceChildren(...rows);
    const joined = engine.joined_holders ? `, ${count(engine.joined_holders)} joined` : "";
    const gone = engine.missing.length;
    write(byId("holders-up"), gone ? `${count(engine.holders.length)} of ${count(engine.holders.length + gone)} up` : `${count(engine.holders.length)} up`);
    byId("holders-up").classList.toggle("bad", gone > 0);
    write(byId("workers-words"), `${engine.holders.length} up; since the start ${count(engine.lost_holders)} lost${joined}`);
  }

  #row(holder, engine, earlier) {
    const before = earlier?.holders.find(({ name }) => name === holder.name);
    const seconds = before ? engine.uptime - earlier.uptime : NaN;
    const counts = before ? holder.exchange_counts.map((value, i) => value - before.exchange_counts[i]) : [];
    const share = held(holder) / holder.total_pages;
    const meter = element("meter", { min: "0", max: "1", high: "0.9", value: known(share) ? String(share) : "0", "aria-hidden": "true" });
    const cells = [
      element("td", { className: "up", text: "up" }),
      element("td", { text: holder.channel }),
      element("td", { className: "used" }, meter, percent(share)),
      ...[0.5, 0.99].map((q) => element("td", { text: quantile(counts, engine.exchange_buckets, q) })),
      ...["bytes_sent", "bytes_received"].map((name) => element("td", { text: traffic(before ? (holder[name] - before[name]) / seconds : NaN) })),
      element("td", { className: "soft", text: holder.address || "–" }),
    ];
    return element("tr", {}, element("th", { scope: "row", text: holder.name }), ...cells);
  }

  #bySequence() {
    const details = byId("by-sequence");
    if (!details.open || !this.engine) return;
    const { sequences, holders } = this.engine;
    const shown = holders.length <= 8 ? holders : [];
    const head = ["sequence", "tokens", "", "pages", ...shown.map(({ name }) => `on ${name}`)];
    const rows = sequences.map((sequence, index) => element("tr", {},
      element("th", { scope: "row", text: label(sequence.label) }),
      ...[count(sequence.tokens), sequence.prefill ? "reads its prompt" : "decodes", count(this.#whole(index)),
        ...shown.map((holder) => count(holder.pages[index]))].map((text) => element("td", { text }))));
    if (!rows.length) rows.push(element("tr", {}, element("td", { text: "none now", colspan: String(head.length) })));
    details.querySelector("table").replaceChildren(
      element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col", text })))),
      element("tbody", {}, ...rows));
  }
}
