// Strips over the last five minutes that share one time axis.

import { colour, count, percent, prepare, rate } from "./units.js";

const KEPT = 300; // seconds of intervals
const WINDOWS = [60, 120, KEPT]; // seconds that are shown: as many as there is something for
const IN_WORDS = { 60: "Last minute", 120: "Last 2 minutes", 300: "Last 5 minutes" };
const [LEFT, TITLE, AXIS, GAP] = [44, 19, 20, 7];

// A strip: its title, its share of the height, and its series, the value of each in words. Of a stacked strip the series are shares of time.
const STRIPS = [
  { title: "Output", weight: 3, series: [{ key: "output", colour: "--model", words: (v) => `${rate(v)} tokens/s` }] },
  { title: "Prompt", weight: 2, series: [{ key: "prompt", colour: "--network", words: (v) => `${rate(v)} tokens/s` }] },
  { title: "Requests", weight: 2, series: [
    { key: "running", colour: "--ink", words: (v) => `${count(v)} running` },
    { key: "waiting", colour: "--bad", dashed: true, words: (v) => `${count(v)} waiting` } ] },
  { title: "Where time goes", weight: 2, stacked: true, series: [
    { key: "model", colour: "--model", words: (v) => `model ${percent(v)}` },
    { key: "attention", colour: "--attention", words: (v) => `attention ${percent(v)}` } ] },
];

function above(value) { // the next of 1, 2, 5, 10, 20, ...
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  for (const step of [1, 2, 5, 10]) if (value <= step * power) return Math.max(step * power, 2);
  return 10 * power;
}

const ago = (seconds) => `−${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

export class Strips {
  // `spoken` gets what the cursor shows when keys move it.
  constructor(canvas, spoken) {
    this.canvas = canvas;
    this.window = WINDOWS[0];
    this.spoken = spoken;
    this.intervals = []; // { from, to, and a value for each series }, in seconds of this page's clock, oldest first
    this.now = 0;
    this.cursor = null; // seconds before now
    canvas.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    canvas.addEventListener("pointerleave", () => this.#move(null));
    canvas.addEventListener("blur", () => this.#move(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  push(interval) {
    this.intervals.push(interval);
    while (this.intervals.length && this.intervals[0].to < interval.to - KEPT) this.intervals.shift();
  }

  clear() {
    this.intervals = [];
  }

  draw(now = this.now) {
    this.now = now;
    const age = this.intervals.length ? now - this.intervals[0].from : 0;
    this.window = WINDOWS.find((seconds) => age <= seconds + 1) ?? KEPT;
    const area = prepare(this.canvas);
    if (!area) return;
    const { context, width, height } = area;
    const plot = { left: LEFT, width: width - LEFT - 1 };
    const shown = this.#at();
    const room = height - AXIS - STRIPS.length * (TITLE + GAP) + GAP;
    const weights = STRIPS.reduce((sum, strip) => sum + strip.weight, 0);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.#times(context, plot, height);
    let top = 0;
    for (const strip of STRIPS) {
      const tall = Math.round((room * strip.weight) / weights);
      this.#title(context, strip, shown, top + TITLE / 2 - 1, width);
      this.#strip(context, strip, { ...plot, top: top + TITLE, height: tall });
      top += TITLE + tall + GAP;
    }
    if (this.cursor !== null) {
      const x = this.#x(this.now - this.cursor, plot);
      context.strokeStyle = colour("--ink");
      context.beginPath();
      context.moveTo(x, TITLE);
      context.lineTo(x, height - AXIS);
      context.stroke();
    }
    this.canvas.setAttribute("aria-label", `${this.title}; the arrow keys go back and forth. ${this.#words(shown)}`);
  }

  get title() {
    return IN_WORDS[this.window];
  }

  #x(time, plot) {
    return plot.left + plot.width * (1 - (this.now - time) / this.window);
  }

  #at() {
    if (this.cursor === null) return this.intervals[this.intervals.length - 1];
    const time = this.now - this.cursor;
    return this.intervals.find(({ from, to }) => from <= time && time <= to);
  }

  #words(interval) {
    if (!interval) return "Nothing measured.";
    return STRIPS.map(({ title, series }) => `${title}: ${series.map(({ key, words }) => words(interval[key])).join(", ")}`).join("; ");
  }

  #steps(plot) { // seconds before now at which there is a line
    const parts = plot.width < 440 ? 3 : 6;
    return Array.from({ length: parts + 1 }, (_, index) => (index * this.window) / parts);
  }

  #times(context, plot, height) {
    const y = height - 8;
    if (this.cursor === null) {
      context.fillStyle = colour("--soft");
      for (const back of this.#steps(plot)) {
        context.textAlign = back === 0 ? "right" : back === this.window ? "left" : "center";
        context.fillText(back ? ago(back) : "now", this.#x(this.now - back, plot), y);
      }
      return;
    }
    const x = this.#x(this.now - this.cursor, plot);
    context.fillStyle = colour("--ink");
    context.textAlign = "center";
    context.fillText(ago(this.cursor), Math.min(Math.max(x, plot.left + 16), plot.left + plot.width - 16), y);
  }

  #title(context, strip, shown, y, width) {
    context.textAlign = "left";
    context.fillStyle = colour("--ink");
    context.fillText(strip.title, 0, y);
    let x = width;
    context.textAlign = "right";
    for (const { key, words, colour: name, dashed } of [...strip.series].reverse()) {
      const text = shown ? words(shown[key]) : "–";
      context.fillStyle = colour("--ink");
      context.fillText(text, x, y);
      x -= context.measureText(text).width + 6;
      context.strokeStyle = colour(name);
      context.lineWidth = strip.stacked ? 9 : 2;
      context.setLineDash(dashed ? [4, 3] : []);
      context.beginPath();
      context.moveTo(x - (strip.stacked ? 9 : 14), y);
      context.lineTo(x, y);
      context.stroke();
      context.setLineDash([]);
      context.lineWidth = 1;
      x -= 28;
    }
  }

  #strip(context, strip, box) {
    const most = strip.stacked ? 1 : above(Math.max(0, ...this.intervals.flatMap((interval) => strip.series.map(({ key }) => interval[key]))));
    const y = (value) => box.top + box.height * (1 - Math.min(value, most) / most);
    context.strokeStyle = colour("--rule");
    for (const back of this.#steps(box)) {
      const x = Math.round(this.#x(this.now - back, box)) - 0.5;
      context.beginPath();
      context.moveTo(x, box.top);
      context.lineTo(x, box.top + box.height);
      context.stroke();
    }
    context.textAlign = "right";
    for (const value of [0, most / 2, most]) {
      const line = Math.round(y(value)) + 0.5;
      context.strokeStyle = colour(value ? "--rule" : "--faint");
      context.beginPath();
      context.moveTo(box.left, line);
      context.lineTo(box.left + box.width, line);
      context.stroke();
      context.fillStyle = colour("--soft");
      if (value !== most / 2) context.fillText(strip.stacked ? percent(value) : count(value), box.left - 6, line + (value ? 4 : -3));
    }
    context.save();
    context.beginPath();
    context.rect(box.left, box.top - 2, box.width + 1, box.height + 4);
    context.clip();
    if (strip.stacked) this.#stack(context, strip, box, y);
    else strip.series.forEach((series, index) => this.#line(context, series, box, y, index === 0));
    context.restore();
  }

  #line(context, { key, colour: name, dashed }, box, y, filled) {
    context.strokeStyle = context.fillStyle = colour(name);
    context.lineWidth = 1.6;
    context.setLineDash(dashed ? [4, 3] : []);
    context.beginPath();
    let last = null;
    for (const interval of this.intervals) {
      const [from, to, level] = [this.#x(interval.from, box), this.#x(interval.to, box), y(interval[key])];
      if (filled) {
        context.globalAlpha = 0.14;
        context.fillRect(Math.round(from), level, Math.round(to) - Math.round(from), box.top + box.height - level);
        context.globalAlpha = 1;
      }
      if (last === null || interval.from - last > 0.01) context.moveTo(from, level);
      else context.lineTo(from, level);
      context.lineTo(to, level);
      last = interval.to;
    }
    context.stroke();
    context.setLineDash([]);
    context.lineWidth = 1;
  }

  #stack(context, strip, box, y) {
    for (const interval of this.intervals) {
      const [from, to] = [Math.round(this.#x(interval.from, box)), Math.round(this.#x(interval.to, box))];
      let below = 0;
      for (const { key, colour: name } of strip.series) {
        context.fillStyle = colour(name);
        context.fillRect(from, y(below + interval[key]), to - from, y(below) - y(below + interval[key]));
        below += interval[key];
      }
    }
  }

  #point(x) {
    const width = this.canvas.clientWidth - LEFT - 1;
    this.#move(Math.min(Math.max((1 - (x - LEFT) / width) * this.window, 0), this.window));
  }

  #key(event) {
    const step = { ArrowLeft: 5, ArrowRight: -5, PageUp: 60, PageDown: -60, Home: KEPT, End: -KEPT }[event.key];
    if (event.key === "Escape") this.#move(null);
    if (!step) return;
    event.preventDefault();
    this.#move(Math.min(Math.max((this.cursor ?? 0) + step, 0), this.window));
    this.spoken.textContent = `${ago(this.cursor)}: ${this.#words(this.#at())}`;
  }

  #move(cursor) {
    if (this.cursor === cursor) return;
    this.cursor = cursor;
    requestAnimationFrame(() => this.draw());
  }
}
