/** Vectors on onnxruntime-web in headless Chromium are Python's and torch's; the demo page finds what is meant. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdirSync } from "node:fs";
import { readFile } from "node:fs/promises";
import path from "node:path";
import { after, before, test } from "node:test";

import { chromium } from "playwright-core";

import { BUNDLES, callsOf, CASES, compare, read, ROOT } from "./cases.js";

const CHROMIUM =
  process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
if (CHROMIUM === undefined)
  throw new Error("no Chromium; install one (apt-get install chromium), or set CHROMIUM to its path");

const DEMO = "runtime/javascript/demo/";
const SHOTS = path.join(ROOT, "build/javascript-demo");
let browser, server, origin;
const elsewhere = [];

before(async () => {
  // The server that the guide names.
  const options = ["-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", ROOT, "0"];
  server = spawn(process.env.PYTHON ?? "python3", options, { stdio: ["ignore", "pipe", "ignore"] });
  const [line] = await once(server.stdout, "data");
  origin = /http:\/\/127\.0\.0\.1:\d+\//.exec(String(line))[0];
  browser = await chromium.launch({ executablePath: CHROMIUM, args: ["--no-sandbox"] });
});

after(async () => {
  await browser?.close();
  server?.kill();
});

/** A page of the demo, which fails where anything is asked of another origin. */
async function pageOf(query, options) {
  const page = await browser.newPage(options);
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(origin) && !url.startsWith("data:") && !url.startsWith("blob:")) elsewhere.push(url);
  });
  await page.goto(origin + DEMO + query);
  return page;
}

const demo = `?bundle=/build/javascript/encoder/&precision=`;
const finished = (page) =>
  page.waitForFunction(
    () =>
      document.querySelector("#status.failed") ??
      document.querySelector("#status").textContent.includes("sentences at"),
  );

for (const bundle of BUNDLES) {
  test(`${bundle}: vectors`, async (t) => {
    const page = await pageOf("?bundle=/none/");
    for (const found of callsOf(bundle)) {
      const vectors = await page.evaluate(
        async ({ bundle, method, texts, open, call }) => {
          const { Embedder } = await import("embedge/web");
          const model = await Embedder.open(bundle, { ...open, onWarning: () => {} });
          const vectors = await model[method](texts, { onTruncate: "ignore", ...call });
          await model.close();
          return vectors.map((vector) => (call.multiVector ? vector.map((row) => [...row]) : [...vector]));
        },
        { ...found, bundle: `/build/javascript/${bundle}/` },
      );
      t.diagnostic(`${found.title}: ${compare(found, vectors, { sameKernels: false })}`);
    }
    await page.close();
  });
}

test("token ids in the browser", async () => {
  const { texts, tokenizers } = read("tokens.json");
  const page = await pageOf("?bundle=/none/");
  for (const [name, { ids }] of Object.entries(tokenizers)) {
    const different = await page.evaluate(
      async ({ name, texts, ids }) => {
        const { TextTokenizer } = await import("../src/tokenizer.js");
        const bytes = new Uint8Array(await (await fetch(`/build/javascript/tokenizers/${name}.json`)).arrayBuffer());
        const settings = { append_eos_token_id: null, truncation_side: "right", special_token_ids: [] };
        const tokenizer = new TextTokenizer(bytes, name, settings, [100000]);
        return texts.filter((text, index) => tokenizer.tokens(text, 100000).ids.join() !== ids[index].join());
      },
      { name, texts, ids },
    );
    assert.deepEqual(different, [], name);
  }
  await page.close();
});

test("8-bit products are exact in WebAssembly", async () => {
  const page = await pageOf("?bundle=/none/");
  assert.equal(
    await page.evaluate(async () => {
      const ort = await import("onnxruntime-web/wasm");
      const { saturates } = await import("../src/saturation.js");
      return saturates(ort, { executionProviders: ["wasm"] });
    }),
    false,
  );
  await page.close();
});

for (const [name, options] of Object.entries({
  light: { viewport: { width: 1000, height: 900 }, colorScheme: "light" },
  dark: { viewport: { width: 1000, height: 900 }, colorScheme: "dark" },
  phone: { viewport: { width: 360, height: 740 }, colorScheme: "light" },
})) {
  test(`the demo finds what is meant, ${name}`, async () => {
    const page = await pageOf(`${demo}int8`, options);
    await finished(page);
    assert.match(await page.locator("#status").textContent(), /^20 sentences at int8/);
    const best = () => page.locator("#results li").first().textContent();
    assert.match(await best(), /Porridge|bread/);
    await page.getByLabel("Query").fill("keep an account safe");
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => /password/.test(document.querySelector("#results li").textContent));
    assert.equal(await page.locator("#results li").count(), 20);
    const [content, width] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    assert.ok(content <= width, `${content} pixels wide on a screen of ${width}`);
    mkdirSync(SHOTS, { recursive: true });
    await page.screenshot({ path: path.join(SHOTS, `${name}.png`) });
    await page.close();
  });
}

const REFUSED = {
  "?bundle=/none/": /none\/manifest\.json: cannot be read: HTTP 404/,
  [`${demo}int2`]: /has no precision "int2"; it has fp32, int8, int4/,
  [`${demo}fp32&task=cod`]: /no task "cod"; it has retrieval, code/,
};
for (const [query, message] of Object.entries(REFUSED)) {
  test(`the demo says what is wrong: ${query}`, async () => {
    const page = await pageOf(query);
    await finished(page);
    assert.match(await page.locator("#status.failed").textContent(), message);
    await page.close();
  });
}

test("a flipped byte is found", async () => {
  const page = await pageOf("?bundle=/none/");
  await page.route("**/fp32/shared.bin", async (route) => {
    const bytes = await readFile(path.join(CASES, "decoder/fp32/shared.bin"));
    bytes[5000] ^= 1;
    await route.fulfill({ body: bytes });
  });
  const said = await page.evaluate(async () => {
    const { Embedder } = await import("embedge/web");
    const model = await Embedder.open("/build/javascript/decoder/", { precision: "fp32" });
    return model.encode("a").then(
      () => "nothing",
      (error) => `${error.name}: ${error.message}`,
    );
  });
  assert.match(said, /^BundleError: .*fp32\/shared\.bin: expected SHA-256/);
  await page.close();
});

test("nothing was asked of another origin", () => {
  assert.deepEqual(elsewhere, []);
});
