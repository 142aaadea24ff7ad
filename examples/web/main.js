// The page: a column for the base and one for each adapter, written one after the other by the same session.

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";

import { generate, open } from "./diablo.js";

const folder = new URL(`${new URLSearchParams(location.search).get("model") ?? "model"}/`, location.href);
const form = document.querySelector("form");
const button = form.querySelector("button");
const status = document.querySelector(".status");
const columns = {};

async function read(path) {
  const answer = await fetch(new URL(path, folder));
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText} from ${folder}`);
  return new Uint8Array(await answer.arrayBuffer());
}

function say(text, fault = false) {
  status.textContent = text;
  status.classList.toggle("fault", fault);
}

function addColumn(name, blocks) {
  const column = document.querySelector("template").content.cloneNode(true).firstElementChild;
  const values = Object.values(blocks).reduce((sum, tensor) => sum + tensor.size, 0);
  column.dataset.adapter = name;
  column.querySelector("h2").textContent = name === "base" ? "Base, no adapter" : `Adapter ${name}`;
  column.querySelector("footer").textContent = values ? `${values.toLocaleString("en")} parameters` : "empty blocks";
  document.querySelector("main").append(column);
  columns[name] = column;
}

/** Show a column's text; what differs from the base's is marked from the first word on that does. */
function show(column, text, base) {
  let same = 0;
  while (same < text.length && text[same] === base[same]) same++;
  if (same < text.length) same = text.lastIndexOf(" ", same) + 1;
  column.querySelector(".same").textContent = text.slice(0, same);
  column.querySelector("mark").textContent = text.slice(same);
}

async function write(model, tokenizer, prompt, count) {
  const ids = tokenizer.encode(prompt).ids;
  const decode = (tokens) => tokenizer.decode(tokens, { skip_special_tokens: true });
  const given = decode(ids).length;
  let base = null;
  for (const column of Object.values(columns)) {
    column.querySelector(".given").textContent = prompt;
    show(column, "", "");
  }
  for (const [name, column] of Object.entries(columns)) {
    say(name === "base" ? "Writing without adapter …" : `Writing with ${name} …`);
    column.classList.add("writing");
    const began = performance.now();
    const tokens = [];
    let text = "";
    for await (const token of generate(ort, model, name, ids, count)) {
      tokens.push(token);
      // of the whole, as a character may be made of several tokens and some tokenizers drop a leading space
      text = decode([...ids, ...tokens]).slice(given);
      show(column, text, base ?? text);
      await new Promise(requestAnimationFrame); // let the browser paint
    }
    const seconds = (performance.now() - began) / 1000;
    const speed = (tokens.length / seconds).toFixed(0);
    column.querySelector("footer").textContent = `${tokens.length} tokens, ${speed} a second`;
    column.dataset.tokens = tokens.join(" ");
    column.classList.remove("writing");
    base ??= text;
  }
  say("Done. The marked text is what the adapter changed.");
}

async function start() {
  const parse = async (path) => JSON.parse(new TextDecoder().decode(await read(path)));
  const model = await open(ort, read);
  const tokenizer = new Tokenizer(await parse("tokenizer.json"), await parse("tokenizer_config.json"));
  for (const [name, blocks] of Object.entries(model.adapters)) addColumn(name, blocks);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    document.body.dataset.state = "writing";
    try {
      await write(model, tokenizer, form.prompt.value, Number(form.count.value));
      document.body.dataset.state = "done";
    } catch (error) {
      say(String(error.message ?? error), true);
      document.body.dataset.state = "fault";
    }
    button.disabled = false;
  });
  button.disabled = false;
  document.body.dataset.state = "ready";
  const count = Object.keys(model.adapters).length - 1;
  say(`Ready: ${count} adapter${count === 1 ? "" : "s"} for one model.`);
}

start().catch((error) => {
  document.body.dataset.state = "fault";
  say(`${error.message ?? error}`, true);
});
