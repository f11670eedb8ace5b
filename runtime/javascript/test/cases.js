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

/** @param {number[]} numbers */
const mean = (numbers) => numbers.reduce((sum, one) => sum + one, 0) / numbers.length;

/**
 * Cosines of vectors with others; of multi-vectors, of all their rows.
 * @param {any[]} vectors
 * @param {any[]} others
 */
function cosines(vectors, others) {
  assert.equal(vectors.length, others.length);
  return vectors.flatMap((one, index) => {
    assert.equal(one.length, others[index].length, `${index}`);
    return typeof one[0] === "number" ? [cosine(one, others[index])] : cosines(one, others[index]);
  });
}

/**
 * L2 norms of vectors; of multi-vectors, of all their rows.
 * @param {any[]} vectors
 * @returns {number[]}
 */
const norms = (vectors) => vectors.flatMap((one) => (typeof one[0] === "number" ? [Math.hypot(...one)] : norms(one)));

/**
 * Vectors are Python's and, where torch gave it, torch's.
 *
 * fp32: each. int8 and int4 with the kernels that Python had: each is Python's. With others, as of WebAssembly, a value
 * between two steps of 8 bits falls otherwise here and there: they are as near to torch's as Python's are.
 * @param {any} found As `callsOf` gives it.
 * @param {any[]} given Vectors, as typed arrays or lists.
 * @param {{sameKernels: boolean}} options
 * @returns {string} What was measured.
 */
export function compare(found, given, { sameKernels }) {
  const vectors = given.map((one) =>
    Array.isArray(one) ? one.map((row) => (typeof row === "number" ? row : [...row])) : [...one],
  );
  const toPython = cosines(vectors, found.embedge);
  const least = Math.min(1, ...toPython);
  const exact = [undefined, "fp32"].includes(found.open.precision);
  const bound = exact ? 0.99999 : sameKernels ? 0.9999 : 0.97;
  assert.ok(least >= bound, `a cosine of ${least} to Python's, at least ${bound} expected`);
  const expected = norms(found.embedge);
  norms(vectors).forEach((norm, index) =>
    assert.ok(Math.abs(norm - expected[index]) <= 0.001 * expected[index] + 1e-6),
  );
  if (found.torch === undefined) return `least cosine to Python's ${least}`;
  const toTorch = cosines(vectors, found.torch);
  if (exact) assert.ok(Math.min(1, ...toTorch) >= 0.99999, `a cosine of ${Math.min(...toTorch)} to torch's`);
  const [ours, theirs] = [mean(toTorch), mean(cosines(found.embedge, found.torch))];
  assert.ok(ours >= theirs - 0.002, `a mean cosine of ${ours} to torch's, where Python has ${theirs}`);
  return `least cosine to Python's ${least}; mean to torch's ${ours}, of Python's ${theirs}`;
}

/**
 * @param {Float32Array[]} scores
 * @param {number[][]} expected
 * @param {number} within
 */
export function closeScores(scores, expected, within) {
  assert.equal(scores.length, expected.length);
  expected.forEach((row, i) =>
    row.forEach((score, j) => {
      assert.ok(Math.abs(scores[i][j] - score) <= within, `[${i}][${j}]: ${scores[i][j]}, expected ${score}`);
    }),
  );
}
