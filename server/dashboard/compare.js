// One question to the model server twice: to the base model, and with a run's adapter.

import { Refusal, json, path } from "./api.js";
import { byId, el, setText } from "./dom.js";
import { duration } from "./format.js";
import { eventsOf } from "./stream.js";

const labelled = (label, control) => el("div", { class: "field" }, el("label", { for: control.id }, label), control);

/** The base model's id and those with an adapter, which are called base:run. */
export function sorted(ids) {
  const base = ids.find((id) => ids.some((other) => other.startsWith(`${id}:`))) ?? ids.find((id) => !id.includes(":")) ?? ids[0];
  return { base, tuned: ids.filter((id) => id !== base) };
}

/** Asks a model and hands on its answer piece by piece. */
async function ask({ url, chat, model, prompt, maxTokens, signal, onText }) {
  const question = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const response = await fetch(`${url}/v1/${chat ? "chat/completions" : "completions"}`, {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, ...question, max_tokens: maxTokens, temperature: 0, stream: true }),
  });
  if (!response.ok) {
    const text = await response.text();
    throw new Refusal(response.status, problemOf(text) ?? `The model server answered ${response.status}.`);
  }
  for await (const event of eventsOf(response.body)) {
    if (event.data === "[DONE]") continue; // the server ends the stream
    const data = JSON.parse(event.data);
    if (data.error) throw new Refusal(200, data.error.message ?? "The model server gave up.");
    const choice = data.choices?.[0];
    onText((chat ? choice?.delta?.content : choice?.text) ?? "");
  }
}

function problemOf(text) {
  try {
    const { detail, error } = JSON.parse(text);
    return typeof detail === "string" ? detail : (error?.message ?? null);
  } catch {
    return null;
  }
}

export class CompareBox {
  constructor() {
    this.url = null;
    this.running = null;
    this.run = null;
    this.state = el("p", { class: "hint", role: "status" });
    this.prompt = el("textarea", { id: "compare-prompt", rows: 4, required: true });
    this.tuned = el("select", { id: "compare-tuned" });
    this.kind = el("select", { id: "compare-kind" }, el("option", { value: "chat" }, "a message (chat template)"), el("option", { value: "text" }, "a text to continue"));
    this.most = el("input", { id: "compare-most", type: "number", min: 1, max: 4096, value: 64, inputmode: "numeric" });
    this.submit = el("button", { type: "submit", class: "main" }, "Ask both");
    this.form = el(
      "form",
      { class: "card", hidden: true },
      labelled("Question", this.prompt),
      el("div", { class: "fields" }, labelled("With the adapter", this.tuned), labelled("Send it as", this.kind), labelled("Tokens at most", this.most)),
      this.submit,
    );
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#askBoth();
    });
    this.answers = [this.#answer("Base"), this.#answer("Tuned")];
    this.said = el("div", { class: "said", hidden: true }, ...this.answers.map((answer) => answer.element));
    byId("compare-box").append(this.state, this.form, this.said);
  }

  /** Looks for the model server; nothing here fails, it says what is missing. */
  async connect() {
    const { model_server: url } = await json(path(["dashboard"]));
    if (url === null) {
      const command = (text) => el("code", {}, text);
      this.state.replaceChildren(
        "No model server is attached. Start one with ",
        command("fwdllama serve-model"),
        ", and the aggregator with ",
        command("--model-server http://127.0.0.1:8081"),
        " (its address).",
      );
      return;
    }
    this.url = url.replace(/\/+$/, "").replace(/\/v1$/, "");
    try {
      const response = await fetch(`${this.url}/v1/models`);
      const { data } = await response.json();
      this.models = sorted(data.map((model) => model.id));
    } catch {
      setText(this.state, `The model server at ${this.url} does not answer, or does not allow this page (${location.origin}) to ask it.`);
      return;
    }
    this.tuned.replaceChildren(...this.models.tuned.map((id) => el("option", {}, id)));
    const missing = this.models.tuned.length === 0;
    setText(this.state, missing ? `The model server at ${this.url} has no adapter loaded yet.` : `Answers come from ${this.url}.`);
    this.form.hidden = missing;
    this.show(this.run);
  }

  /** Chooses the adapter of the run that is shown, where the model server has it. */
  show(run) {
    if (run === null || (this.run?.run === run.run && this.run !== null && this.chosen)) return;
    this.run = run;
    const own = this.models?.tuned.find((id) => id.endsWith(`:${run.spec.name}`) || id.endsWith(`:${run.run}`));
    this.chosen = own !== undefined;
    if (own) this.tuned.value = own;
  }

  #answer(label) {
    const parts = { head: el("span", {}, label), took: el("b"), text: el("dd") };
    return { ...parts, label, element: el("div", { class: label === "Tuned" ? "right" : "" }, el("dl", {}, el("dt", {}, parts.head, parts.took), parts.text)) };
  }

  async #askBoth() {
    this.running?.abort();
    this.running = new AbortController();
    const { signal } = this.running;
    const common = { url: this.url, chat: this.kind.value === "chat", prompt: this.prompt.value, maxTokens: Number(this.most.value), signal };
    this.said.hidden = false;
    setText(this.state, "Both are answering …");
    const models = [this.models.base, this.tuned.value];
    await Promise.all(this.answers.map((answer, index) => this.#fill(answer, { ...common, model: models[index] })));
    if (signal.aborted) return;
    const texts = this.answers.map((answer) => answer.text.textContent);
    setText(this.state, `Both have answered${texts[0] === texts[1] ? ", with the same words" : ""}.`);
  }

  async #fill(answer, question) {
    const started = performance.now();
    setText(answer.head, `${answer.label} (${question.model})`);
    setText(answer.took, "");
    answer.text.replaceChildren();
    answer.text.className = "";
    try {
      await ask({ ...question, onText: (text) => answer.text.append(text) });
      setText(answer.took, duration((performance.now() - started) / 1000));
      if (!answer.text.textContent) throw new Refusal(200, "no answer");
    } catch (error) {
      if (error.name === "AbortError") return;
      answer.text.className = "none";
      setText(answer.text, error instanceof Refusal ? error.message : "The model server broke off.");
    }
  }
}
