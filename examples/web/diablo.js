// A folder of `diablo-export export --for web` in onnxruntime-web or onnxruntime-node, adapters swapped between runs.
//
// The blocks of every adapted layer are inputs of the graph. An adapter is a safetensors file with a tensor for each
// of them; no adapter is such a file too, with empty blocks. Swapping is feeding other tensors: nothing loads again.

const TYPES = { F32: "float32", F16: "float16", I8: "int8", U8: "uint8", I64: "int64" };
const ARRAYS = {
  float32: Float32Array,
  float16: globalThis.Float16Array, // Chrome 135, Firefox 129, Safari 18.2, Node 24
  int8: Int8Array,
  uint8: Uint8Array,
  int64: BigInt64Array,
};

/**
 * Open a folder.
 *
 * @param ort  the module onnxruntime-web or onnxruntime-node
 * @param read  path within the folder → Promise of its bytes as Uint8Array
 * @param options  of the session
 * @returns {session, config, manifest, adapters: {name: {input: ort.Tensor}}}; the name of no adapter is "base"
 */
export async function open(ort, read, options = {}) {
  const manifest = await json(read, "diablo_export.json");
  if (manifest.for !== "web") {
    throw new Error("not an export for the web; make it with: diablo-export export --for web");
  }
  const externalData = [];
  for (const path of ["model.onnx.data"]) {
    if (path in manifest.files) externalData.push({ path, data: await read(path) });
  }
  const session = await ort.InferenceSession.create(await read("model.onnx"), { externalData, ...options });
  const adapters = {};
  for (const { name, file } of [{ name: "base", file: manifest.no_adapter }, ...manifest.adapters]) {
    adapters[name] = tensors(ort, await read(file), manifest["diablo.base"]);
  }
  return { session, manifest, config: await json(read, "config.json"), adapters };
}

/**
 * The tensors of a safetensors file: 8 bytes of header size, the header as JSON, then the values, little-endian.
 *
 * @param base  SHA-256 of the model's base: an adapter that was made for another one would run, and talk nonsense
 */
export function tensors(ort, bytes, base) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const madeFor = header.__metadata__?.["diablo.base"];
  if (base && madeFor !== base) throw new Error(`the adapter is for the base ${madeFor}, the model is ${base}`);
  delete header.__metadata__;
  const made = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    const type = TYPES[dtype];
    if (!type) throw new Error(`${name} is ${dtype}; known are ${Object.keys(TYPES).join(", ")}`);
    // a copy, which begins where any type may begin; the slice of node's Buffer would be none
    const values = Uint8Array.prototype.slice.call(bytes, start + from, start + to);
    made[name] = new ort.Tensor(type, new (array(type))(values.buffer), shape);
  }
  return made;
}

/** Run token ids (and a KV cache of `past` tokens) with an adapter: every output by name. */
export async function run(ort, model, adapter, ids, cache = emptyCache(ort, model), past = 0) {
  const whole = (value, count) => integers(ort, Array.from({ length: count }, (_, index) => value(index)));
  const known = {
    input_ids: () => whole((index) => ids[index], ids.length),
    attention_mask: () => whole(() => 1, past + ids.length),
    position_ids: () => whole((index) => past + index, ids.length),
    token_type_ids: () => whole(() => 0, ids.length),
  };
  const positions = model.session.inputMetadata.find(({ name }) => name === "position_ids")?.shape ?? [];
  if (positions.length === 3) {
    // the same one for time, height and width
    known.position_ids = () =>
      integers(ort, Array.from({ length: positions[0] * ids.length }, (_, at) => past + (at % ids.length)), [
        positions[0], 1, ids.length,
      ]);
  }
  const feeds = { ...cache, ...model.adapters[adapter] };
  for (const name of model.session.inputNames) if (name in known) feeds[name] = known[name]();
  return model.session.run(feeds);
}

/** Greedy text: yields one token id after another, until the end of the text or `count` of them. */
export async function* generate(ort, model, adapter, prompt, count) {
  const ends = [model.config.eos_token_id].flat();
  let [ids, cache, past] = [prompt, emptyCache(ort, model), 0];
  for (let step = 0; step < count; step++) {
    const outputs = await run(ort, model, adapter, ids, cache, past);
    const token = largest(outputs.logits);
    if (ends.includes(token)) return;
    yield token;
    past += ids.length;
    ids = [token];
    // present.0.key goes to past_key_values.0.key, present.0.conv to past.0.conv
    cache = Object.fromEntries(pasts(model).map(({ name }) => [name, outputs[name.replace(/^[^.]*/, "present")]]));
  }
}

/** The token with the largest of the last position's logits (1, tokens, vocabulary). */
function largest({ data, dims }) {
  const row = data.subarray(data.length - dims.at(-1));
  let best = 0;
  for (let index = 1; index < row.length; index++) if (row[index] > row[best]) best = index;
  return best;
}

/** What is kept from token to token: keys and values, and the states of convolutions and linear attention. */
function pasts(model) {
  return model.session.inputMetadata.filter(({ name }) => name.startsWith("past"));
}

function emptyCache(ort, model) {
  const cache = {};
  for (const { name, type, shape } of pasts(model)) {
    // one sequence, and no token yet where the size is open
    const sizes = [1, ...shape.slice(1).map((size) => (size > 0 ? size : 0))];
    const count = sizes.reduce((product, size) => product * size);
    cache[name] = new ort.Tensor(type, new (array(type))(count), sizes);
  }
  return cache;
}

function array(type) {
  if (!ARRAYS[type]) throw new Error(`no array for ${type} here; export in fp32, or take a newer browser`);
  return ARRAYS[type];
}

function integers(ort, values, sizes = [1, values.length]) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), sizes);
}

async function json(read, path) {
  return JSON.parse(new TextDecoder().decode(await read(path)));
}
