/** What is refused, with messages that say what to do. */
import assert from "node:assert/strict";
import { cpSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { after, test } from "node:test";
import { pathToFileURL } from "node:url";

import * as embedge from "embedge";

import { CASES } from "./cases.js";

const { Embedder } = embedge;
const scratch = mkdtempSync(path.join(tmpdir(), "embedge-"));
after(() => rmSync(scratch, { recursive: true }));
const encoder = path.join(CASES, "encoder");
const decoder = path.join(CASES, "decoder");
let copies = 0;

/** @param {(folder: string) => void} change @param {string} bundle */
function copy(change, bundle = decoder) {
  const folder = path.join(scratch, `${copies++}`);
  cpSync(bundle, folder, { recursive: true });
  change(folder);
  return folder;
}

/** @param {(manifest: any) => void} change @param {string} [bundle] */
const withManifest = (change, bundle) =>
  copy((folder) => {
    const file = path.join(folder, "manifest.json");
    const manifest = JSON.parse(readFileSync(file, "utf8"));
    change(manifest);
    writeFileSync(file, JSON.stringify(manifest));
  }, bundle);

/** @param {string} kind @param {RegExp} message @param {() => Promise<any>} call */
const refused = (kind, message, call) =>
  assert.rejects(call, (error) => {
    assert.equal(error.name, kind, String(error.stack));
    assert.ok(error instanceof embedge.EmbedgeError);
    assert.match(error.message, message);
    return true;
  });

const OPEN = {
  "no such folder": [
    "BundleError",
    /no-such-bundle.manifest\.json: cannot be read: ENOENT/,
    () => Embedder.open("no-such-bundle"),
  ],
  "an address": [
    "EmbedgeValueError",
    /in Node\.js a bundle lies on disk/,
    () => Embedder.open("https://127.0.0.1/bundle"),
  ],
  "no text": ["EmbedgeValueError", /expected the path of a folder, found null/, () => Embedder.open(null)],
  "several precisions": [
    "EmbedgeValueError",
    /several precisions: fp32, int8, int4, int4-unpacked; choose one, such as precision: "fp32"/,
    () => Embedder.open(encoder),
  ],
  "another precision": [
    "EmbedgeValueError",
    /has no precision "int2"; it has fp32, int8, int4/,
    () => Embedder.open(encoder, { precision: "int2" }),
  ],
  "int4-unpacked": [
    "EmbedgeValueError",
    /int4 holds the same weights/,
    () => Embedder.open(encoder, { precision: "int4-unpacked" }),
  ],
  auto: [
    "EmbedgeValueError",
    /"auto" measures with embedge's kernels/,
    () => Embedder.open(encoder, { precision: "auto" }),
  ],
  "another task": [
    "EmbedgeValueError",
    /no task "cod"; it has retrieval, code/,
    () => Embedder.open(encoder, { precision: "fp32", task: "cod" }),
  ],
  "another dimension": [
    "EmbedgeValueError",
    /truncateDim is 100; the bundle has one of 64, 128, 256, 384/,
    () => Embedder.open(encoder, { precision: "fp32", truncateDim: 100 }),
  ],
  "an option in Python's way": [
    "EmbedgeValueError",
    /has no option "truncate_dim"; it is called truncateDim here/,
    () => Embedder.open(encoder, { truncate_dim: 64 }),
  ],
  "an option that there is none of": [
    "EmbedgeValueError",
    /has no option "device"; there are task, precision/,
    () => Embedder.open(encoder, { device: "cuda" }),
  ],
  "a default prompt": [
    "EmbedgeValueError",
    /has no prompt "passage"; it has query, document/,
    () => Embedder.open(decoder, { precision: "fp32", defaultPromptName: "passage" }),
  ],
  "more tokens than the model takes": [
    "EmbedgeValueError",
    /maxSeqLength is 129; expected 2 to 128/,
    () => Embedder.open(decoder, { precision: "fp32", maxSeqLength: 129 }),
  ],
  "no room for a text": [
    "EmbedgeValueError",
    /maxSeqLength is 2; expected 3 to 256/,
    () => Embedder.open(encoder, { precision: "fp32", maxSeqLength: 2 }),
  ],
  "a length of late interaction": [
    "EmbedgeValueError",
    /has a length of queries, 12, and one of documents, 30/,
    () => Embedder.open(path.join(CASES, "late"), { maxSeqLength: 8 }),
  ],
  verify: [
    "EmbedgeValueError",
    /verify is "some"; expected one of full, size, none/,
    () => Embedder.open(decoder, { precision: "fp32", verify: "some" }),
  ],
  threads: [
    "EmbedgeValueError",
    /threads is 0; expected a whole number of at least 1/,
    () => Embedder.open(decoder, { threads: 0 }),
  ],
  "a bundle of another major version": [
    "ManifestError",
    /manifest\.json: format_version: .* reads version 1\.x, the bundle is 2\.0; upgrade the package/,
    () => Embedder.open(withManifest((manifest) => (manifest.format_version = "2.0"))),
  ],
  "a manifest without a key": [
    "ManifestError",
    /model\.dim: missing/,
    () => Embedder.open(withManifest((manifest) => delete manifest.model.dim)),
  ],
  "a manifest with a wrong key": [
    "ManifestError",
    /model\.max_length: expected a whole number ≥ 1, found "many"/,
    () => Embedder.open(withManifest((manifest) => (manifest.model.max_length = "many"))),
  ],
  "a path that leaves the bundle": [
    "ManifestError",
    /precisions\.fp32\.graphs\.search: "\.\.\/x\.onnx" is not a path inside the bundle/,
    () => Embedder.open(withManifest((manifest) => (manifest.precisions.fp32.graphs.search = "../x.onnx"))),
  ],
  "a graph that is not listed": [
    "ManifestError",
    /precisions\.fp32\.graphs\.search: "fp32\/other\.onnx" is not listed in files/,
    () => Embedder.open(withManifest((manifest) => (manifest.precisions.fp32.graphs.search = "fp32/other.onnx"))),
  ],
  "no JSON": [
    "ManifestError",
    /not valid JSON/,
    () => Embedder.open(copy((folder) => writeFileSync(path.join(folder, "manifest.json"), "{"))),
  ],
  "a precision of GPUs": [
    "EmbedgeValueError",
    /has kernels on cuda alone/,
    () =>
      Embedder.open(
        withManifest((manifest) => (manifest.precisions.fp32.devices = ["cuda"])),
        { precision: "fp32" },
      ),
  ],
  "a damaged tokenizer": [
    "BundleError",
    /tokenizer\.json: expected SHA-256/,
    () =>
      Embedder.open(
        copy((folder) => {
          const file = path.join(folder, "tokenizer.json");
          const bytes = readFileSync(file);
          bytes[100] ^= 1;
          writeFileSync(file, bytes);
        }),
        { precision: "fp32" },
      ),
  ],
};
for (const [what, [kind, message, call]] of Object.entries(OPEN)) {
  test(`open refuses ${what}`, () => refused(kind, message, call));
}

/** @param {string} bundle @param {object} options */
const opened = (bundle, options) => Embedder.open(path.join(CASES, bundle), { onWarning: () => {}, ...options });

const ENCODE = {
  "no task": [
    "EmbedgeValueError",
    /several tasks: retrieval, code; choose one, such as task: "retrieval"/,
    "encoder",
    "a",
  ],
  "another prompt": [
    "EmbedgeValueError",
    /task "search" has no prompt "passage"; it has query, document/,
    "decoder",
    "a",
    { promptName: "passage" },
  ],
  "a prompt where there is none": [
    "EmbedgeValueError",
    /no prompt "query"; it declares none; leave promptName out/,
    "encoder",
    "a",
    { task: "code", promptName: "query" },
  ],
  "a prompt that is no text": [
    "EmbedgeValueError",
    /prompt: expected a string, found 7/,
    "decoder",
    "a",
    { prompt: 7 },
  ],
  "a number": ["EmbedgeValueError", /inputs: expected a string or an array of strings, found 7/, "decoder", 7],
  "a list with a gap": [
    "EmbedgeValueError",
    /inputs\[1\]: expected a string, found null, a missing value/,
    "decoder",
    ["a", null],
  ],
  "a dimension above": [
    "EmbedgeValueError",
    /truncateDim is 97; the bundle has 1 to 96/,
    "decoder",
    "a",
    { truncateDim: 97 },
  ],
  "no dimension": ["EmbedgeValueError", /truncateDim is 0; the bundle has 1 to 96/, "decoder", "a", { truncateDim: 0 }],
  "a batch of none": ["EmbedgeValueError", /batchSize is 0; expected a whole number/, "decoder", "a", { batchSize: 0 }],
  "a flag that is none": [
    "EmbedgeValueError",
    /normalizeEmbeddings is 1; expected true or false/,
    "decoder",
    "a",
    { normalizeEmbeddings: 1 },
  ],
  "Python's name": [
    "EmbedgeValueError",
    /encode has no option "batch_size"; it is called batchSize here/,
    "decoder",
    "a",
    { batch_size: 1 },
  ],
  "a text that is too long": [
    "TextTooLongError",
    /inputs\[1\] is longer than 128 tokens; shorten it, or pass onTruncate: "ignore"/,
    "decoder",
    ["a", "a ".repeat(200)],
    { onTruncate: "error" },
  ],
  "multi-vectors where there are none": [
    "EmbedgeValueError",
    /has no multi-vector head; leave multiVector out/,
    "decoder",
    "a",
    { multiVector: true },
  ],
  "one vector of late interaction": ["EmbedgeValueError", /pass multiVector: true to encodeQuery/, "late", "a"],
};
for (const [what, [kind, message, bundle, inputs, options]] of Object.entries(ENCODE)) {
  test(`encode refuses ${what}`, async () => {
    const model = await opened(bundle, { precision: "fp32" });
    await refused(kind, message, () => model.encode(inputs, options));
    await model.close();
  });
}

test("weights are compared with the manifest when they are used", async () => {
  const flipped = copy((folder) => {
    const file = path.join(folder, "fp32/shared.bin");
    const bytes = readFileSync(file);
    bytes[5000] ^= 1;
    writeFileSync(file, bytes);
  });
  const model = await Embedder.open(flipped, { precision: "fp32" });
  await refused(
    "BundleError",
    /shared\.bin: expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}; copy or export the bundle again/,
    () => model.encode("a"),
  );
  const trusting = await Embedder.open(flipped, { precision: "fp32", verify: "size" });
  await trusting.encode("a");
  await trusting.close();
  const short = await Embedder.open(
    copy((folder) => truncateSync(path.join(folder, "fp32/search.bin"), 4096)),
    { precision: "fp32", verify: "size" },
  );
  await refused("BundleError", /search\.bin: expected \d+ bytes, found 4096/, () => short.encode("a"));
});

test("prompts in a Map are refused", () =>
  refused("EmbedgeValueError", /prompts: expected texts by name/, () =>
    Embedder.open(decoder, { precision: "fp32", prompts: new Map([["query", "q: "]]) }),
  ));

test("weights are compared again when a graph opens again", async () => {
  const folder = copy(() => {});
  const model = await Embedder.open(folder, { precision: "fp32" });
  await model.encode("a");
  await model.close();
  const file = path.join(folder, "fp32/shared.bin");
  const bytes = readFileSync(file);
  const flipped = Buffer.from(bytes);
  flipped[5000] ^= 1;
  writeFileSync(file, flipped);
  await refused("BundleError", /shared\.bin: expected SHA-256/, () => model.encode("a"));
  writeFileSync(file, bytes);
  assert.equal((await model.encode("a")).length, 96);
  await model.close();
});

test("a graph that is none is refused", async () => {
  const broken = copy((folder) => writeFileSync(path.join(folder, "fp32/search.onnx"), "not a graph"));
  const model = await Embedder.open(broken, { precision: "fp32", verify: "none" });
  await refused("BundleError", /search\.onnx: no ONNX graph/, () => model.encode("a"));
});

test("a graph of other inputs is refused", async () => {
  const model = await Embedder.open(
    withManifest((manifest) => manifest.model.inputs.push("token_type_ids")),
    { precision: "fp32" },
  );
  await refused(
    "BundleError",
    /expected inputs attention_mask, input_ids, token_type_ids, found attention_mask, input_ids/,
    () => model.encode("a"),
  );
  await model.close();
});

test("a graph whose vectors have another length is refused", async () => {
  const model = await Embedder.open(
    withManifest((manifest) => (manifest.model.dim = 95)),
    { precision: "fp32" },
  );
  await refused("BundleError", /expected embedding of the shape 1 × 95, found 1 × 96/, () => model.encode("a"));
  await model.close();
});

test("a token beyond the model's table is refused", async () => {
  const model = await Embedder.open(
    withManifest((manifest) => (manifest.tokenizer.table_rows = 10)),
    { precision: "fp32" },
  );
  await refused(
    "EmbedgeValueError",
    /inputs\[0\] has ".+", a token that the tokenizer knows and the model does not, whose table has 10 rows/,
    () => model.encode("a"),
  );
});

test("a newer minor version warns, a cut text once, a text without tokens", async () => {
  const said = [];
  const newer = withManifest((manifest) => (manifest.format_version = "1.99"));
  const model = await Embedder.open(newer, { precision: "fp32", onWarning: (message) => said.push(message) });
  assert.match(said.pop(), /format_version 1\.99 is newer than 1\.\d/);
  await model.encode("a ".repeat(200));
  assert.match(said.pop(), /inputs\[0\] is longer than 128 tokens and was cut/);
  await model.encode("a ".repeat(200));
  assert.equal(said.length, 0);
  await model.close();
  const plain = copy((folder) => {
    const file = path.join(folder, "tokenizer.json");
    const config = JSON.parse(readFileSync(file, "utf8"));
    config.post_processor = null;
    writeFileSync(file, JSON.stringify(config));
  });
  const bare = await Embedder.open(plain, {
    precision: "fp32",
    verify: "none",
    onWarning: (message) => said.push(message),
  });
  const [zero, other] = await bare.encode(["", "a"], { prompt: "" });
  assert.ok(zero.every((value) => value === 0) && zero.length === 96);
  assert.ok(other.some((value) => value !== 0));
  assert.match(said.pop(), /1 of 2 texts have no tokens and become zero vectors; the first is inputs\[0\]/);
  await bare.close();
});

test("a folder may be a file: URL", async () => {
  const model = await Embedder.open(pathToFileURL(decoder), { precision: "fp32" });
  assert.equal((await model.encode("a")).length, 96);
  await model.close();
});

test("similarity refuses what does not go together", async () => {
  const model = await opened("decoder", { precision: "fp32" });
  const [a, b] = [new Float32Array(3), new Float32Array(4)];
  assert.throws(() => model.similarity(a, b), /different dimensions: 3 and 4; encode both with the same truncateDim/);
  assert.throws(() => model.similarity([a], [[a]]), /multi-vectors with single vectors/);
  assert.throws(() => model.similarityPairwise([a], [a, a]), /vectors in pairs: found 1 and 2; pass as many/);
  assert.deepEqual(
    [
      ...model.similarityPairwise(
        [
          [1, 0],
          [1, 1],
        ],
        [
          [2, 0],
          [1, -1],
        ],
      ),
    ],
    [1, 0],
  );
  assert.throws(() => model.similarity("a", b), /a: expected a vector or an array of them, found string/);
  assert.throws(() => model.similarity([a, "b"], b), /a: expected vectors/);
  assert.deepEqual(
    model
      .similarity(
        [1, 0],
        [
          [2, 0],
          [0, 1],
          [0, 0],
        ],
      )
      .map((row) => [...row]),
    [[1, 0, 0]],
  );
});
