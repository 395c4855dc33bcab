// Which model the page shows and talks to, where a server has several; the operator loads and unloads it.

import { byId, element, write } from "./units.js";

const GO = { unloaded: "load", loaded: "unload" }; // what may be done, by state

export class Models {
  // `changed()` is called once another model is chosen, `told(text)` with what the server answers.
  constructor(headers, changed, told) {
    Object.assign(this, { headers, told });
    this.chosen = ""; // empty: the server's choice
    byId("models").addEventListener("change", () => {
      this.chosen = byId("models").value;
      changed();
    });
    byId("load").addEventListener("click", () => this.#go());
  }

  // Show what a status says of the models. It is of one of them.
  update({ model, models, on_demand: onDemand }) {
    const several = models.length > 1;
    byId("models-label").hidden = !several;
    byId("model").hidden = several;
    this.model = model;
    this.go = onDemand && GO[models.find(({ id }) => id === model)?.state];
    byId("load").hidden = !this.go;
    if (this.go) write(byId("load"), this.go === "load" ? "Load" : "Unload");
    if (!several) return;
    const select = byId("models");
    const texts = models.map(({ id, state }) => `${id} (${state})`);
    if (select.options.length !== texts.length) select.replaceChildren(...models.map(({ id }) => element("option", { value: id })));
    texts.forEach((text, index) => write(select.options[index], text));
    this.chosen ||= model;
    select.value = this.chosen;
  }

  async #go() {
    const [button, model, go] = [byId("load"), this.model, this.go];
    button.disabled = true;
    this.told(`${go === "load" ? "Loading" : "Unloading"} ${model}…`);
    try {
      const response = await fetch(`v1/models/${model.split("/").map(encodeURIComponent).join("/")}/${go}`, { method: "POST", headers: this.headers() });
      this.told(response.ok ? `${model} is ${go}ed.` : (await response.json()).error.message);
    } catch {
      this.told("The server does not answer.");
    }
    button.disabled = false;
  }
}
