/** What a task brings to a graph that several tasks share: a safetensors file of some of the graph's inputs. */
import { BundleError, reasonOf, shown } from "./errors.js";

const LENGTH_BYTES = 8;
/** @type {Record<string, ["float32" | "int8", typeof Float32Array | typeof Int8Array]>} */
const TYPES = { F32: ["float32", Float32Array], I8: ["int8", Int8Array] };

/**
 * The tensors of a file by name.
 *
 * The format: 8 bytes with the length of the header; JSON with dtype, shape and data_offsets of each tensor; their
 * bytes. Source: https://github.com/huggingface/safetensors.
 * @param {Uint8Array} bytes
 * @param {string} file For messages.
 * @returns {Record<string, import("./batches.js").Tensor>}
 * @throws {BundleError} If it breaks a rule of the format.
 */
export function readTaskTensors(bytes, file) {
  /**
   * @param {string} problem
   * @returns {never}
   */
  const fail = (problem) => {
    throw new BundleError(`${file}: ${problem}; copy or export the bundle again`);
  };
  if (bytes.length < LENGTH_BYTES) fail(`expected a header, found ${bytes.length} bytes`);
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const start = LENGTH_BYTES + length;
  if (start > bytes.length) fail(`expected a header of ${length} bytes, found ${bytes.length - LENGTH_BYTES}`);
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(LENGTH_BYTES, start)));
  } catch (error) {
    fail(`its header is no JSON: ${reasonOf(error)}`);
  }
  /** @type {Record<string, import("./batches.js").Tensor>} */
  const tensors = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const known = TYPES[entry?.dtype];
    if (known === undefined) fail(`${name}: expected ${Object.keys(TYPES).join(" or ")}, found ${shown(entry?.dtype)}`);
    const [type, ArrayOf] = known;
    const [begin, end] = Array.isArray(entry.data_offsets) ? entry.data_offsets : [NaN, NaN];
    const count = Array.isArray(entry.shape)
      ? entry.shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1)
      : NaN;
    if (end - begin !== count * ArrayOf.BYTES_PER_ELEMENT || begin < 0 || start + end > bytes.length) {
      fail(
        `${name}: ${shown(entry.shape)} of ${entry.dtype} does not lie at ${shown(entry.data_offsets)} of ` +
          `${bytes.length - start} bytes`,
      );
    }
    // Copied, so that it is aligned; `slice` of Node's Buffer does not copy.
    const data = new ArrayOf(new Uint8Array(bytes.subarray(start + begin, start + end)).buffer);
    tensors[name] = { type, data, dims: entry.shape };
  }
  return tensors;
}
