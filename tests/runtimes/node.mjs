// node node.mjs PACKAGE FOLDER JOB, where PACKAGE is installed: measure the folder, print JSON.

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import process from "node:process";

import { measure } from "./measure.mjs";

const [name, folder, job] = process.argv.slice(2);
const ort = createRequire(`${process.cwd()}/`)(name);
if (ort.env.wasm) ort.env.wasm.numThreads = 1;
const read = async (file) => new Uint8Array(await readFile(path.join(folder, file)));
const found = await measure(ort, read, JSON.parse(job));
process.stdout.write(JSON.stringify(found), () => process.exit()); // wasm keeps node alive
