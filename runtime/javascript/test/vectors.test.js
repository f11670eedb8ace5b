/** Vectors on onnxruntime-node are Python's and torch's. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import path from "node:path";
import { test } from "node:test";

import { Embedder } from "embedge";

import { BUNDLES, callsOf, CASES, closeScores, compare, cosine, PACKAGE, ROOT } from "./cases.js";

const quiet = { onWarning: () => {} };

for (const bundle of BUNDLES) {
  for (const found of callsOf(bundle)) {
    test(found.title, async (t) => {
      const model = await Embedder.open(path.join(CASES, bundle), { ...quiet, ...found.open });
      t.after(() => model.close());
      const vectors = await model[found.method](found.texts, { onTruncate: "ignore", ...found.call });
      t.diagnostic(compare(found, vectors, { sameKernels: true }));
      closeScores(
        model.similarity(vectors.slice(0, 3), vectors.slice(0, 7)),
        found.similarity,
        bundle === "late" ? 0.01 : 0.06,
      );
    });
  }
}

for (const precision of ["fp32", "int8", "int4"]) {
  test(`padding and neighbours change no vector, ${precision}`, async (t) => {
    const { texts } = callsOf("encoder")[0];
    const model = await Embedder.open(path.join(CASES, "encoder"), { ...quiet, precision, task: "code" });
    t.after(() => model.close());
    const together = await model.encode(texts, { batchSize: 64, maxBatchTokens: 8192 });
    const reversed = (await model.encode([...texts].reverse(), { batchSize: 7 })).reverse();
    for (const [index, text] of texts.entries()) {
      const alone = await model.encode(text);
      for (const other of [together[index], reversed[index]]) {
        alone.forEach((value, i) => assert.ok(Math.abs(value - other[i]) < 2e-6, `${index}: ${value} and ${other[i]}`));
      }
    }
  });
}

test("calls that overlap do not mix", async (t) => {
  const model = await Embedder.open(path.join(CASES, "encoder"), { ...quiet, precision: "fp32", maxSessions: 1 });
  t.after(() => model.close());
  const texts = ["one", "two words", "three more words", "four"];
  const tasks = ["code", "retrieval"];
  const found = await Promise.all(texts.flatMap((text) => tasks.map((task) => model.encode(text, { task }))));
  for (const [index, text] of texts.entries()) {
    for (const [at, task] of tasks.entries()) {
      assert.ok(cosine(found[2 * index + at], await model.encode(text, { task })) > 0.999999);
    }
  }
});

test("copies of a text have vectors of their own, an empty list none", async (t) => {
  const model = await Embedder.open(path.join(CASES, "decoder"), { ...quiet, precision: "fp32" });
  t.after(() => model.close());
  const [a, b, c] = await model.encode(["same", "same", "other"]);
  assert.deepEqual(a, b);
  assert.notDeepEqual(a, c);
  b.fill(0);
  assert.notDeepEqual(a, b);
  assert.deepEqual(await model.encode([]), []);
  assert.deepEqual(model.similarity([], a), []);
});

test("null is not given, as Python's None", async (t) => {
  const model = await Embedder.open(path.join(CASES, "decoder"), { ...quiet, precision: "fp32", task: null });
  t.after(() => model.close());
  const nothing = { task: null, promptName: null, prompt: null, truncateDim: null };
  for (const method of ["encode", "encodeQuery", "encodeDocument"]) {
    assert.deepEqual(await model[method]("a text", nothing), await model[method]("a text"), method);
  }
  assert.notDeepEqual(await model.encodeDocument("a text", nothing), await model.encodeQuery("a text"));
});

test("it closes and opens again", async () => {
  const model = await Embedder.open(path.join(CASES, "decoder"), { ...quiet, precision: "fp32" });
  const first = await model.encode("text");
  await model.close();
  assert.deepEqual(await model.encode("text"), first);
  await model.close();
});

test("a cut vector has length 1 again", async (t) => {
  const model = await Embedder.open(path.join(CASES, "encoder"), {
    ...quiet,
    precision: "fp32",
    task: "code",
    truncateDim: 128,
  });
  t.after(() => model.close());
  assert.equal(model.dim, 128);
  const vector = await model.encode("a text");
  assert.equal(vector.length, 128);
  assert.ok(Math.abs(Math.hypot(...vector) - 1) < 1e-6);
  assert.equal((await model.encode("a text", { truncateDim: 64 })).length, 64);
});

test("texts are cut at fewer tokens where that is asked", async (t) => {
  const open = (options) =>
    Embedder.open(path.join(CASES, "encoder"), { ...quiet, precision: "fp32", task: "code", ...options });
  const [model, short] = [await open(), await open({ maxSeqLength: 4 })];
  t.after(() => Promise.all([model.close(), short.close()]));
  assert.equal(short.maxSeqLength, 4);
  assert.ok(cosine(await short.encode("one two three four"), await model.encode("one two")) > 0.999999);
});

test("what an Embedder says of itself", async () => {
  const model = await Embedder.open(path.join(CASES, "decoder"), { precision: "int8" });
  assert.deepEqual(model.tasks, ["search"]);
  assert.equal(model.task, "search");
  assert.equal(model.precision, "int8");
  assert.equal(model.defaultPromptName, "query");
  assert.deepEqual(Object.keys(model.prompts), ["query", "document"]);
  assert.equal(model.similarityFnName, "cosine");
  assert.equal(model.maxSeqLength, 128);
  assert.equal(model.multiVectorDim, null);
  assert.deepEqual(model.modalities, ["text"]);
  assert.equal(model.countTokens("", { prompt: "" }), 1);
  assert.deepEqual(model.countTokens(["a", "a b"], { prompt: "" }).length, 2);
});

// tests/processors/cpuid_mask.c says where it works.
const mask = path.join(ROOT, "build/cpuid_mask.so");
const masked =
  process.platform === "linux" && existsSync(mask) && readFileSync("/proc/cpuinfo", "utf8").includes("cpuid_fault");

test(
  "8-bit products are exact on a processor without VNNI too",
  { skip: !masked && "this processor cannot be masked" },
  () => {
    const code = `
    import * as node from "onnxruntime-node";
    import { Embedder } from "embedge";
    import { saturates } from "./src/saturation.js";
    const model = await Embedder.open(${JSON.stringify(path.join(CASES, "decoder"))}, { precision: "int8" });
    const vector = await model.encode("a text", { prompt: "" });
    console.log(JSON.stringify([await saturates(node.default, { executionProviders: ["cpu"] }), [...vector]]));`;
    const [[plain, expected], [saturated, found]] = [{}, { CPUID_MASK: "avx2", LD_PRELOAD: mask }].map(
      (environment) => {
        const done = spawnSync(process.execPath, ["--input-type=module", "-e", code], {
          cwd: PACKAGE,
          encoding: "utf8",
          env: { ...process.env, ...environment },
        });
        assert.equal(done.status, 0, done.stderr);
        return JSON.parse(done.stdout);
      },
    );
    assert.equal(saturated, true);
    assert.ok(cosine(expected, found) > 0.9999, `${cosine(expected, found)}; saturates unmasked: ${plain}`);
  },
);
