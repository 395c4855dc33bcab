// Numbers in words, and elements.

export const NONE = "–";

export const known = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (known(value) ? Math.round(value).toLocaleString("en-US") : NONE);

export function rate(value) {
  if (!known(value)) return NONE;
  return value > 0 && value < 9.95 ? value.toFixed(1) : count(value);
}

export const percent = (share) => (known(share) ? `${Math.round(share * 100)} %` : NONE);

export function duration(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds < 0.00995) return `${(seconds * 1000).toFixed(2)} ms`;
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 99.5 ? `${seconds.toFixed(seconds < 9.95 ? 2 : 1)} s` : span(seconds);
}

export function span(seconds) {
  if (!known(seconds)) return NONE;
  const whole = Math.floor(seconds);
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

export function traffic(bytesPerSecond) {
  if (!known(bytesPerSecond)) return NONE;
  let value = bytesPerSecond;
  for (const unit of ["B/s", "kB/s", "MB/s", "GB/s"]) {
    if (value < 999.5 || unit === "GB/s") return `${value > 0 && value < 99.5 && unit !== "B/s" ? value.toFixed(1) : Math.round(value)} ${unit}`;
    value /= 1000;
  }
  return NONE;
}

export function size(bytes) {
  if (!known(bytes)) return NONE;
  const power = Math.min(Math.max(Math.floor(Math.log2(Math.max(bytes, 1)) / 10), 0), 4);
  const value = bytes / 1024 ** power;
  return `${value < 9.95 && power ? value.toFixed(1) : Math.round(value)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

// Seconds that `share` of the exchanges took at most, by interpolation within a bucket; text, since the last is open.
export function quantile(counts, bounds, share) {
  const total = counts.reduce((sum, value) => sum + value, 0);
  if (total <= 0) return NONE;
  let before = 0;
  for (let i = 0; i < bounds.length; i++) {
    if (before + counts[i] >= share * total && counts[i] > 0) {
      const low = i ? bounds[i - 1] : 0;
      return duration(low + ((bounds[i] - low) * (share * total - before)) / counts[i]);
    }
    before += counts[i];
  }
  return `> ${duration(bounds[bounds.length - 1])}`;
}

export const byId = (id) => document.getElementById(id);

// Text goes in as text only: nothing that comes from the server is ever read as HTML.
export function element(tag, { text, className, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function write(target, text) {
  if (target.textContent !== text) target.textContent = text; // screen readers speak what changes
}

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A canvas's context in CSS pixels, cleared; null while it is not laid out.
export function prepare(canvas, height) {
  const width = canvas.clientWidth;
  if (!width) return null;
  if (height !== undefined && canvas.style.height !== `${height}px`) canvas.style.height = `${height}px`;
  const tall = height ?? canvas.clientHeight;
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(tall * ratio)];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== h) canvas.height = h;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, tall);
  return { context, width, height: tall };
}
