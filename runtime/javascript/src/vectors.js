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
 * Similarity of each of `a` to each of `b`: a row of scores for each of `a`.
 * @param {unknown} a A vector, an array of vectors, or an array of multi-vectors.
 * @param {unknown} b Like `a`.
 * @param {"cosine" | "dot" | "maxsim" | "meanmaxsim"} kind
 * @returns {Float32Array[]}
 */
export function similarity(a, b, kind) {
  const [left, right] = [asOperand(a, "a", kind), asOperand(b, "b", kind)];
  if (left.length === 0 || right.length === 0) return left.map(() => new Float32Array());
  if (Array.isArray(left[0]) !== Array.isArray(right[0])) {
    throw new EmbedgeValueError("similarity of multi-vectors with single vectors; expected two arrays of one kind");
  }
  const dims = new Set([...left, ...right].flatMap((part) => Array.isArray(part) ? part.map((one) => one.length) : part.length));
  if (dims.size > 1) {
    throw new EmbedgeValueError(`vectors of different dimensions: ${[...dims].join(" and ")}; encode both with the same ` +
      "truncateDim");
  }
  if (Array.isArray(left[0])) {
    const [queries, documents] = /** @type {[MultiVector[], MultiVector[]]} */ ([left, right]);
    return queries.map((query) => Float32Array.from(documents, (document) => maxSim(query, document, kind)));
  }
  let [rows, columns] = /** @type {[Vector[], Vector[]]} */ ([left, right]);
  if (kind === "cosine") [rows, columns] = [rows.map(normalized), columns.map(normalized)];
  return rows.map((row) => Float32Array.from(columns, (column) => dot(row, column)));
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
  if (value.every((part) => Array.isArray(part) && part.every(isNumbers))) return value.map((part) => part.map(asVector));
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
