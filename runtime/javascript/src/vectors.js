/** Vectors: cut, normalized, compared. */
import { EmbedgeValueError } from "./errors.js";

/**
 * @typedef {Float32Array} Vector
 * @typedef {Float32Array[]} MultiVector A vector for each token.
 */

/**
 * A vector with L2 norm 1; a zero vector stays zero.
 * @param {Vector} vector
 * @returns {Vector}
 */
export function normalized(vector) {
  let sum = 0; // of 64 bits, so that no square leaves the range
  for (const value of vector) sum += value * value;
  const norm = Math.sqrt(sum);
  return norm === 0 ? vector.slice() : vector.map((value) => value / norm);
}

/**
 * @param {ArrayLike<number>} a
 * @param {ArrayLike<number>} b
 */
function dot(a, b) {
  let sum = 0;
  for (let index = 0; index < a.length; index++) sum += a[index] * b[index];
  return sum;
}

/**
 * @typedef {"cosine" | "dot" | "maxsim" | "meanmaxsim"} Kind
 */

/**
 * Similarity of each of `a` to each of `b`: a row of scores for each of `a`.
 * @param {unknown} a A vector, an array of vectors, or an array of multi-vectors.
 * @param {unknown} b Like `a`.
 * @param {Kind} kind
 * @returns {Float32Array[]}
 */
export function similarity(a, b, kind) {
  const { left, right, score } = operands(a, b, kind);
  return left.map((one) => Float32Array.from(right, (other) => score(one, other)));
}

/**
 * Similarity of each of `a` to that of `b` in the same place.
 * @param {unknown} a As for `similarity`.
 * @param {unknown} b Like `a`, and as many.
 * @param {Kind} kind
 */
export function similarityPairwise(a, b, kind) {
  const { left, right, score } = operands(a, b, kind);
  if (left.length !== right.length) {
    throw new EmbedgeValueError(
      `vectors in pairs: found ${left.length} and ${right.length}; pass as many of one as of the ` +
        "other, or take similarity for all with all",
    );
  }
  return Float32Array.from(left, (one, index) => score(one, right[index]));
}

/**
 * Two arrays of one kind, and how one of each is compared.
 * @param {unknown} a
 * @param {unknown} b
 * @param {Kind} kind
 * @returns {{left: any[], right: any[], score: (one: any, other: any) => number}}
 */
function operands(a, b, kind) {
  const [left, right] = [asOperand(a, "a", kind), asOperand(b, "b", kind)];
  const multi = Array.isArray(left[0] ?? right[0]);
  if ([...left, ...right].some((one) => Array.isArray(one) !== multi)) {
    throw new EmbedgeValueError("similarity of multi-vectors with single vectors; expected two arrays of one kind");
  }
  const dims = new Set(
    [...left, ...right].flatMap((one) => (Array.isArray(one) ? one.map((row) => row.length) : one.length)),
  );
  if (dims.size > 1) {
    throw new EmbedgeValueError(
      `vectors of different dimensions: ${[...dims].join(" and ")}; encode both with the same ` + "truncateDim",
    );
  }
  if (multi) return { left, right, score: (one, other) => maxSim(one, other, kind) };
  if (kind !== "cosine") return { left, right, score: dot };
  const [ofLeft, ofRight] = /** @type {[Vector[], Vector[]]} */ ([left, right]);
  return { left: ofLeft.map(normalized), right: ofRight.map(normalized), score: dot };
}

/**
 * Late interaction (ColBERT, arXiv 2004.12832); 0 where either has no token.
 * @param {MultiVector} query
 * @param {MultiVector} document
 * @param {string} kind
 */
function maxSim(query, document, kind) {
  if (query.length === 0 || document.length === 0) return 0;
  let sum = 0;
  for (const token of query) sum += Math.max(...document.map((other) => dot(token, other)));
  return kind === "meanmaxsim" ? sum / query.length : sum;
}

/**
 * @param {unknown} value
 * @param {string} name
 * @param {string} kind
 * @returns {Vector[] | MultiVector[]}
 */
function asOperand(value, name, kind) {
  if (isNumbers(value)) return [asVector(value)];
  if (!Array.isArray(value)) {
    throw new EmbedgeValueError(`${name}: expected a vector or an array of them, found ${typeof value}`);
  }
  if (value.every(isNumbers)) {
    const vectors = value.map(asVector);
    return kind.endsWith("maxsim") && vectors.length ? [vectors] : vectors; // one text's, of late interaction
  }
  if (value.every((part) => Array.isArray(part) && part.every(isNumbers)))
    return value.map((part) => part.map(asVector));
  throw new EmbedgeValueError(`${name}: expected vectors, or multi-vectors, and not both; of numbers alone`);
}

/**
 * @param {unknown} value
 * @returns {value is ArrayLike<number>}
 */
function isNumbers(value) {
  if (value instanceof Float32Array || value instanceof Float64Array) return true;
  return Array.isArray(value) && value.length > 0 && value.every((item) => typeof item === "number");
}

/**
 * @param {ArrayLike<number>} value
 * @returns {Vector}
 */
function asVector(value) {
  return value instanceof Float32Array ? value : Float32Array.from(value);
}
