// Machines that ask to join, and those that have: the operator compares a code and accepts.

import { byId, element, size, write } from "./units.js";

const PERIOD = 2000; // milliseconds

export class Joining {
  constructor(headers) {
    this.headers = headers;
    this.off = false; // the server lets none join, or the key is not the operator's
    this.asked = 0; // when it was asked last, in milliseconds of this page's clock
    this.written = "";
    this.wrong = new Map(); // what went wrong with an answer, by machine
  }

  // Another key may see what this one may not.
  again() {
    this.off = false;
    this.asked = 0;
  }

  async poll(now = performance.now()) {
    if (this.off || now - this.asked < PERIOD) return;
    this.asked = now;
    try {
      const response = await fetch("joining", { headers: this.headers() });
      if ([401, 403, 404, 405].includes(response.status)) this.off = true;
      const { allowed = false, machines = [] } = response.ok ? await response.json() : {};
      this.off ||= response.ok && !allowed;
      this.#show(machines);
    } catch {} // the page's own poll says that the server does not answer
  }

  #show(machines) {
    const written = JSON.stringify([machines, [...this.wrong]]);
    if (written === this.written) return;
    this.written = written;
    const section = byId("joining");
    section.hidden = !machines.length;
    const had = document.activeElement?.closest?.("#joining [data-id]")?.dataset.id;
    section.replaceChildren(...machines.map((machine) => this.#row(machine)));
    if (had) section.querySelector(`[data-id="${CSS.escape(had)}"] button`)?.focus();
  }

  #row(machine) {
    const about = [machine.address, machine.memory ? `${size(machine.memory)} of memory` : ""].filter(Boolean).join(", ");
    const row = element("div", { className: `machine ${machine.state}`, "data-id": machine.id });
    if (machine.state === "waiting") {
      row.append(
        element("p", {}, element("b", { text: machine.name }), ` asks to join (${about}). Accept it only if it shows this code:`),
        element("p", { className: "code-of", text: machine.code }),
        element("span", {}, this.#button("Accept", "main", machine, true), this.#button("Refuse", "", machine, false)),
      );
    } else {
      const words = { accepted: "is accepted and starts its worker", serving: "joined and serves", lost: "joined and is lost; it comes back by itself" };
      row.append(element("p", {}, element("b", { text: machine.name }), ` ${words[machine.state] ?? machine.state} (${about})`), this.#button("Remove", "", machine, false));
    }
    const wrong = this.wrong.get(machine.id);
    if (wrong) row.append(element("p", { className: "wrong", role: "alert", text: wrong }));
    return row;
  }

  #button(text, className, machine, accept) {
    const button = element("button", { text, className, type: "button", "aria-label": `${text} ${machine.name}` });
    button.addEventListener("click", () => this.#answer(machine, accept, button));
    return button;
  }

  // The code is typed, and the server compares it: a machine in between can choose its name, but not its code.
  async #answer(machine, accept, button) {
    const about = `${machine.name} at ${machine.address}`;
    const code = accept ? prompt(`Which code does your machine show? The one that asks is ${about}.`) : "";
    if (code === null) return;
    button.disabled = true;
    this.wrong.delete(machine.id);
    try {
      const response = await fetch(`joining/${encodeURIComponent(machine.id)}`, {
        method: "POST", headers: { "Content-Type": "application/json", ...this.headers() }, body: JSON.stringify({ accept, code }),
      });
      if (!response.ok) this.wrong.set(machine.id, (await response.json()).error.message);
    } catch {
      this.wrong.set(machine.id, "The server does not answer.");
    }
    this.written = "";
    this.asked = 0;
    await this.poll();
    write(byId("spoken"), this.wrong.get(machine.id) ?? `${accept ? `${about} with the code ${code}` : machine.name} is ${accept ? "accepted" : machine.state === "waiting" ? "refused" : "removed"}`);
  }
}
