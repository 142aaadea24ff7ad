// What node and the browser both do: run an export for the web with each adapter in turn, in one session.

import { generate, open, run } from "../../examples/web/diablo.js";

/** [{logits: all of the prompt's, flat, tokens: what follows it}] for each name of job.adapters. */
export async function measure(ort, read, job) {
  const model = await open(ort, read, { logSeverityLevel: 3 });
  const found = [];
  for (const adapter of job.adapters) {
    const { logits } = await run(ort, model, adapter, job.ids);
    const tokens = [];
    if (job.steps) for await (const token of generate(ort, model, adapter, job.ids, job.steps)) tokens.push(token);
    found.push({ logits: Array.from(logits.data, Number), tokens });
  }
  return found;
}
