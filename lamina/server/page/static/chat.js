// The chat box: a conversation with /v1/chat/completions, streamed.

import { copyButton, Markdown } from "./markdown.js";
import { byId, duration, element, rate, write } from "./units.js";

// Pieces of an event stream's data, as they come.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Why a request was refused, for people.
async function refusal(response) {
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    said = `status ${response.status}`;
  }
  if (response.status === 401) return `The server did not accept the API key: ${said}`;
  if (response.status === 429) {
    const wait = response.headers.get("Retry-After");
    return `The server is busy${wait ? `; try again in ${wait} s` : ""}: ${said}`;
  }
  if (response.status === 503) return `The model cannot answer now: ${said}`;
  return `The server refused: ${said}`;
}

export class Chat {
  // `model()` names the model, `headers()` has the API key, `refused()` is called where it is missing or wrong.
  constructor(model, headers, refused) {
    Object.assign(this, { model, headers, refused });
    this.messages = [];
    this.controller = null;
    this.bottom = 0; // how far the list could be scrolled when it was last drawn
    this.list = byId("messages");
    byId("say").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#send();
      }
    });
    byId("stop").addEventListener("click", () => this.controller?.abort());
    byId("chat").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.controller?.abort();
    });
    byId("clear").addEventListener("click", () => this.#clear());
  }

  #clear() {
    this.controller?.abort();
    this.messages = [];
    this.list.querySelectorAll("article").forEach((article) => article.remove());
    byId("empty").hidden = false;
    write(byId("chat-words"), "");
    byId("text").focus();
  }

  #add(who, name) {
    const said = element("div", { className: "said" });
    const article = element("article", { className: who }, element("p", { text: name }), said);
    byId("empty").hidden = true;
    this.list.append(article);
    this.list.scrollTop = this.list.scrollHeight;
    return { article, said };
  }

  // An answer: its text as Markdown, and above it what the model thought, folded.
  #answer(name) {
    const { article, said } = this.#add("assistant", name);
    const thought = element("div", { className: "thought" });
    const summary = element("summary", { text: "Reasoning" });
    const reasoning = element("details", { className: "reasoning", hidden: "" }, summary, thought);
    said.before(reasoning);
    const stay = () => this.#stay();
    return { article, said, reasoning, summary, text: new Markdown(said, stay), thoughts: new Markdown(thought, stay) };
  }

  // The fields of the request that are not left empty, or null where one is wrong.
  #fields() {
    const fields = {};
    for (const [id, name, low] of [["temperature", "temperature", 0], ["max-tokens", "max_tokens", 1]]) {
      const input = byId(id);
      if (!input.validity.valid || (input.value !== "" && !(Number(input.value) >= low))) {
        write(byId("chat-words"), `${name.replace("_", " ")}: ${input.validationMessage || "a number is needed"}`);
        input.focus();
        return null;
      }
      if (input.value !== "") fields[name] = Number(input.value);
    }
    return fields;
  }

  async #send() {
    const text = byId("text").value.trim();
    if (!text || this.controller) return;
    const fields = this.#fields();
    if (!fields) return;
    byId("text").value = "";
    write(byId("chat-words"), "");
    const messages = this.messages; // "New chat" puts another list in its place
    messages.push({ role: "user", content: text });
    this.#add("user", "you").said.textContent = text;
    const answer = this.#answer(this.model());
    this.#busy(answer, new AbortController());
    write(byId("chat-words"), "Waiting for the first token…");
    const outcome = await this.#stream(messages, fields, answer);
    this.#busy(answer, null);
    answer.text.draw();
    answer.thoughts.draw();
    const content = answer.text.text;
    if (content) messages.push({ role: "assistant", content });
    else messages.pop(); // nothing came: the question may be asked again
    if (!content) answer.said.remove();
    if (outcome.error && !content) byId("text").value ||= text;
    if (outcome.error) answer.article.append(element("p", { className: "wrong", text: outcome.error }));
    if (outcome.about) answer.article.append(element("p", { className: "about" }, element("span", { text: outcome.about }), ...(content ? [copyButton(() => content, "Copy the answer")] : [])));
    this.list.scrollTop = this.list.scrollHeight;
    if (messages === this.messages) write(byId("chat-words"), outcome.error ? "No answer." : outcome.stopped ? "Stopped." : "Answered.");
  }

  #busy({ article }, controller) {
    this.controller = controller;
    const had = document.activeElement;
    article.setAttribute("aria-busy", String(controller !== null));
    byId("send").hidden = controller !== null;
    byId("stop").hidden = controller === null;
    if (controller && had === byId("send")) byId("stop").focus();
    if (!controller && had === byId("stop")) byId("text").focus();
  }

  async #stream(messages, fields, answer) {
    const { signal } = this.controller;
    const began = performance.now();
    let [first, last, pieces, usage, reason, error, stopped] = [null, began, 0, null, null, null, false];
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST", signal, headers: { "Content-Type": "application/json", ...this.headers() },
        body: JSON.stringify({ model: this.model(), messages, stream: true, stream_options: { include_usage: true }, ...fields }),
      });
      if (!response.ok) {
        if (response.status === 401) this.refused();
        return { error: await refusal(response) };
      }
      for await (const data of events(response.body)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        const choice = chunk.choices?.[0];
        reason = choice?.finish_reason ?? reason;
        const { content, reasoning_content: thought } = choice?.delta ?? {};
        if (!content && !thought) continue;
        last = performance.now();
        first ??= last;
        pieces += 1;
        if (thought) this.#think(answer, thought, last - first);
        if (content) answer.text.add(content);
        write(byId("chat-words"), content ? "Answering…" : "Thinking…");
      }
      if (!reason) error = "The answer broke off.";
    } catch (caught) {
      stopped = signal.aborted;
      if (!stopped) error = caught instanceof TypeError ? "The server does not answer." : `The answer broke off: ${caught.message}`;
    }
    return { error, stopped, about: first === null ? "" : this.#about(usage?.completion_tokens, pieces, first - began, last - first, stopped ? "stopped" : reason) };
  }

  #think({ reasoning, summary, thoughts }, text, milliseconds) {
    reasoning.hidden = false;
    thoughts.add(text);
    write(summary, milliseconds < 100 ? "Reasoning" : `Reasoning, ${duration(milliseconds / 1000)}`);
  }

  // Stay at the end, unless the reader has gone up.
  #stay() {
    const bottom = this.list.scrollHeight - this.list.clientHeight;
    if (bottom - this.bottom > 0 && this.list.scrollTop > this.bottom - 40) this.list.scrollTop = bottom;
    this.bottom = bottom;
  }

  #about(tokens, pieces, firstMs, restMs, reason) {
    const known = tokens ?? pieces; // without a usage each piece counts as a token
    const speed = known > 1 && restMs > 0 ? `, ${rate(((known - 1) / restMs) * 1000)} tokens/s` : "";
    const why = { stop: "", stopped: ", stopped by you", length: ", cut at max tokens" }[reason] ?? (reason ? `, ${reason}` : "");
    return `${tokens === undefined ? "about " : ""}${known} ${known === 1 ? "token" : "tokens"}${speed}, first after ${duration(firstMs / 1000)}${why}`;
  }
}
