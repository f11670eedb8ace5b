/** What `python -m tests.javascript.make_cases` wrote, and how vectors are compared with it. */
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";

export const PACKAGE = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "..");
export const ROOT = path.resolve(PACKAGE, "../..");
export const CASES = path.join(ROOT, "build/javascript");
export const BUNDLES = ["encoder", "decoder", "shared", "late", "unpooled", "images"];

if (!existsSync(path.join(CASES, "images.json"))) {
  throw new Error(`${CASES}: no cases; make them with \`make test-node\``);
}

/** @param {string} name */
export const read = (name) => JSON.parse(readFileSync(path.join(CASES, name), "utf8"));

const METHODS = { encode: "encode", encode_query: "encodeQuery", encode_document: "encodeDocument" };
/** @param {string} name */
const camel = (name) => name.replace(/_([a-z])/g, (_, letter) => letter.toUpperCase());
/** @param {object} options */
const options = (options) => Object.fromEntries(Object.entries(options).map(([name, value]) => [camel(name), value]));

/**
 * A case as JavaScript calls it.
 * @param {string} bundle
 */
export function callsOf(bundle) {
  return read(`${bundle}.json`).map((found, index) => ({
    ...found,
    title: `${bundle} ${index}: ${found.method} ${JSON.stringify({ ...found.open, ...found.call })}`,
    method: METHODS[found.method],
    open: options(found.open),
    call: options(found.call),
  }));
}

/** @param {ArrayLike<number>} a @param {ArrayLike<number>} b */
export function cosine(a, b) {
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) [ab, aa, bb] = [ab + a[i] * b[i], aa + a[i] ** 2, bb + b[i] ** 2];
  return aa === 0 && bb === 0 ? 1 : ab / Math.sqrt(aa * bb);
}

// int8 and int4: embedge's kernels in Python and ONNX Runtime's here are two classes of arithmetic
// (docs/reference/fingerprints.md), as far from one another as the least of these.
const LEAST = { fp32: 0.99999, int8: 0.998, int4: 0.985 };

/**
 * Every vector is Python's and, where torch gave it, torch's.
 * @param {any} found As `callsOf` gives it.
 * @param {ArrayLike<number>[] | ArrayLike<number>[][]} vectors
 * @param {number} [precision] Least cosine; by default that of the precision.
 */
export function compare(found, vectors) {
  const least = LEAST[found.open.precision ?? (found.title.startsWith("shared") ? "int8" : "fp32")];
  let lowest = 1;
  for (const source of ["embedge", "torch"]) {
    if (found[source] === undefined) continue;
    assert.equal(vectors.length, found[source].length);
    found[source].forEach((expected, index) => {
      const rows = found.call.multiVector ? [...vectors[index].keys()].map((i) => [vectors[index][i], expected[i]]) : [[vectors[index], expected]];
      assert.equal(vectors[index].length, expected.length, `${source} ${index}`);
      for (const [one, other] of rows) {
        assert.equal(one.length, other.length);
        const found = cosine(one, other);
        lowest = Math.min(lowest, found);
        assert.ok(found >= least, `${source} ${index}: a cosine of ${found}, at least ${least} expected`);
      }
    });
  }
  return lowest;
}

/**
 * @param {Float32Array[]} scores
 * @param {number[][]} expected
 * @param {number} within
 */
export function closeScores(scores, expected, within) {
  assert.equal(scores.length, expected.length);
  expected.forEach((row, i) => row.forEach((score, j) => {
    assert.ok(Math.abs(scores[i][j] - score) <= within, `[${i}][${j}]: ${scores[i][j]}, expected ${score}`);
  }));
}
