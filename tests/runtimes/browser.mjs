// node browser.mjs ROOT FOLDER JOB, where the packages are: measure FOLDER in a headless Chromium, print JSON.
//
// ROOT is the repository. With job.page the example page is used as a person would, and what its columns then hold is
// printed; with job.screenshots, a folder, pictures of it are left there. CHROME names the browser; without it the one
// of @sparticuz/chromium runs.

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import process from "node:process";

const [root, folder, text] = process.argv.slice(2);
const job = JSON.parse(text);
const require = createRequire(`${process.cwd()}/`);
const KINDS = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".css": "text/css",
  ".json": "application/json",
  ".wasm": "application/wasm",
};
const PLACES = {
  "/examples/web/model/": folder,
  "/examples/web/node_modules/": path.join(process.cwd(), "node_modules"),
  "/": root,
};

const server = createServer((request, response) => {
  const asked = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
  const prefix = Object.keys(PLACES).find((each) => asked.startsWith(each));
  const file = path.join(PLACES[prefix], asked.slice(prefix.length));
  if (!existsSync(file) || !statSync(file).isFile()) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": KINDS[path.extname(file)] ?? "application/octet-stream" });
  createReadStream(file).pipe(response);
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const home = `http://127.0.0.1:${server.address().port}/examples/web`;

async function launch() {
  const puppeteer = require("puppeteer-core");
  if (process.env.CHROME) {
    const args = ["--no-sandbox", "--disable-gpu"];
    return puppeteer.launch({ executablePath: process.env.CHROME, headless: true, args });
  }
  const chromium = require("@sparticuz/chromium");
  return puppeteer.launch({ executablePath: await chromium.executablePath(), headless: "shell", args: chromium.args });
}

/** The numbers of measure.mjs, from a page that has nothing else on it. */
async function numbers(page) {
  await page.goto(`${home}/index.html?model=none`); // any page of this origin
  return page.evaluate(async (given) => {
    const ort = await import("/examples/web/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs");
    const { measure } = await import("/tests/runtimes/measure.mjs");
    ort.env.wasm.numThreads = 1;
    const read = async (file) => new Uint8Array(await (await fetch(`/examples/web/model/${file}`)).arrayBuffer());
    return measure(ort, read, given);
  }, job);
}

/** The example page, filled in and sent: {adapter: {tokens, given, same, changed}}. */
async function columns(page) {
  await page.goto(`${home}/index.html`);
  await page.waitForSelector("body[data-state]");
  const status = await page.$eval(".status", (element) => element.textContent);
  if (await page.$("body[data-state=fault]")) return { status };
  await page.$eval("textarea", (element, prompt) => (element.value = prompt), job.page.prompt);
  await page.$eval("input", (element, count) => (element.value = count), job.page.count);
  await page.click("button");
  await page.waitForFunction(() => ["done", "fault"].includes(document.body.dataset.state), { timeout: 60_000 });
  for (const [name, width, height] of job.screenshots ? [["desktop", 1200, 700], ["phone", 390, 844]] : []) {
    for (const scheme of ["light", "dark"]) {
      await page.setViewport({ width, height, deviceScaleFactor: 2 });
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await page.screenshot({ path: path.join(job.screenshots, `${name}-${scheme}.png`), fullPage: true });
    }
  }
  return page.evaluate(() => {
    const text = (column, part) => column.querySelector(part).textContent;
    const status = document.querySelector(".status").textContent;
    const found = { status, columns: {}, wide: document.documentElement.scrollWidth > innerWidth };
    for (const column of document.querySelectorAll("article")) {
      found.columns[column.dataset.adapter] = {
        tokens: (column.dataset.tokens ?? "").split(" ").filter(Boolean).map(Number),
        title: text(column, "h2"),
        given: text(column, ".given"),
        same: text(column, ".same"),
        changed: text(column, "mark"),
      };
    }
    return found;
  });
}

const browser = await launch();
const errors = [];
try {
  const page = await browser.newPage();
  page.on("pageerror", (error) => errors.push(String(error)));
  const found = await (job.page ? columns(page) : numbers(page));
  process.stdout.write(JSON.stringify({ browser: await browser.version(), found, errors }));
} finally {
  await browser.close();
  server.close();
  server.closeAllConnections();
}
