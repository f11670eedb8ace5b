/**
 * Does ONNX Runtime multiply uint8 by int8 exactly here? A matmul with a known result is asked.
 *
 * Without VNNI, x86-64 kernels add pairs of products in 16 bits, and vectors are spoiled in silence. ONNX Runtime's
 * option `session.x64quantprecision` makes them exact; onnxruntime-web has no such kernels.
 */
export const EXACT = { session: { x64quantprecision: "1" } };

const [ROWS, DEPTH, LEFT, RIGHT] = [5, 64, 255, 127];
// embedge.runtime.host.saturation.probe_model(), compressed by zlib
export const PROBE =
  "eNrj4LB6IsAlxcWYyMVYLsRYqcTrm1jiW5rjmVeSmp5aZMUgxFpQlJ+UqtUjwOHAoSDA7MRY7tUgUD8KRsEoGAWjYBSMghEH" +
  "osSBLQYhIS4BDiYhHi42IZai/PJiLiYOhySgRCVYgg1FQsGJhYtBgBcA9WcNLQ==";

/**
 * @param {any} ort ONNX Runtime's module.
 * @param {object} options Of the session.
 * @returns {Promise<boolean>}
 */
export async function saturates(ort, options) {
  const packed = Uint8Array.from(atob(PROBE), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const model = new Uint8Array(await new Response(stream).arrayBuffer());
  const session = await ort.InferenceSession.create(model, options);
  try {
    for (const rows of [1, ROWS]) {
      // one row may take a kernel of its own
      const left = new ort.Tensor("uint8", new Uint8Array(rows * DEPTH).fill(LEFT), [rows, DEPTH]);
      const { y } = await session.run({ a: left });
      if (y.data.some((/** @type {number} */ value) => value !== DEPTH * LEFT * RIGHT)) return true;
    }
    return false;
  } finally {
    await session.release();
  }
}
