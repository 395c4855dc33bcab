// Answers as Markdown. HTML that a model writes is shown as text, and DOMPurify lets only the tags below through.

import { Marked } from "./vendor/marked.esm.js";
import { element } from "./units.js";

const TAGS = ["a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
  "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"];
const NO_ADDRESS = ["start", "align", "data-language"]; // attributes of any value
const ALLOWED = { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", ...NO_ADDRESS], ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false, ADD_URI_SAFE_ATTR: NO_ADDRESS, ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, RETURN_DOM_FRAGMENT: true };
const MOST = 200000; // characters; longer texts are shown as they are
const PAUSE = 60; // the least milliseconds between two drawings of a text that grows

const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escape(text.trim())}</p>` : escape(text)),
    image: ({ raw }) => escape(raw), // the policy of the page lets none load
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => `<pre data-language="${escape((lang ?? "").split(/\s/)[0])}"><code>${escape(text)}</code></pre>`,
  },
});

// Text to the clipboard. Browsers give it to pages from https and this machine alone; elsewhere the old way is tried.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {}
  const field = element("textarea", { className: "hidden" });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

export function copyButton(text, label) {
  const button = element("button", { className: "copy", text: "Copy", type: "button", "aria-label": label });
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

function fragment(token) {
  const made = window.DOMPurify.sanitize(marked.parser([token]), ALLOWED);
  for (const link of made.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const block of made.querySelectorAll("pre")) {
    const frame = element("div", { className: "code" }, element("p", {}, element("span", { text: block.dataset.language }), copyButton(() => block.textContent, "Copy the code")));
    block.replaceWith(frame);
    frame.append(block);
  }
  for (const table of made.querySelectorAll("table")) {
    const frame = element("div", { className: "scroll" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return made;
}

// A text that grows in an element. Only the blocks that change are drawn anew, so a selection in the others stays.
export class Markdown {
  constructor(target, drawn) {
    Object.assign(this, { target, drawn, text: "" });
    this.blocks = []; // [{ raw, nodes }], as drawn
    this.timer = 0;
  }

  add(text) {
    this.text += text;
    this.timer ||= setTimeout(() => this.draw(), PAUSE);
  }

  draw() {
    clearTimeout(this.timer);
    this.timer = 0;
    try {
      if (this.text.length > MOST) throw new Error("too long");
      this.#draw(marked.lexer(this.text).filter(({ type }) => type !== "space"));
      this.target.classList.remove("plain");
    } catch { // or too deep
      this.target.classList.add("plain");
      this.target.textContent = this.text;
      this.blocks = [];
    }
    this.drawn();
  }

  #draw(tokens) {
    if (!this.blocks.length) this.target.replaceChildren();
    let same = 0;
    while (same < tokens.length && this.blocks[same]?.raw === tokens[same].raw) same += 1;
    for (const { nodes } of this.blocks.splice(same)) nodes.forEach((node) => node.remove());
    for (const token of tokens.slice(same)) {
      const made = fragment(token);
      this.blocks.push({ raw: token.raw, nodes: [...made.childNodes] });
      this.target.append(made);
    }
  }
}
