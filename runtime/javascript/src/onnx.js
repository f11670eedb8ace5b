/** What of a graph's file is read here: where its weights lie. ONNX is written in protobuf. */

/**
 * The fields of a message: number, and bytes (or the value of a varint).
 * @param {Uint8Array} bytes
 * @returns {Generator<[number, Uint8Array | number]>}
 */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= bytes.length) throw new Error("truncated");
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const kind = key % 8;
    if (kind === 0) {
      yield [Math.floor(key / 8), varint()];
      continue;
    }
    const size = kind === 2 ? varint() : kind === 1 ? 8 : kind === 5 ? 4 : NaN;
    if (!(at + size <= bytes.length)) throw new Error("not a protobuf message");
    yield [Math.floor(key / 8), bytes.subarray(at, at + size)];
    at += size;
  }
}

/**
 * The messages under a field.
 * @param {Uint8Array} bytes
 * @param {number} number
 */
function messages(bytes, number) {
  return [...fields(bytes)].flatMap(([found, value]) => (found === number && typeof value !== "number" ? [value] : []));
}

const [GRAPH, INITIALIZER, EXTERNAL_DATA, KEY, VALUE] = [7, 5, 13, 1, 2]; // of onnx.proto3

/**
 * The files that a graph's initializers lie in, relative to its folder.
 * @param {Uint8Array} model
 * @returns {string[]}
 * @throws {Error} If it is no ONNX model.
 */
export function externalFiles(model) {
  const found = new Set();
  const decoder = new TextDecoder();
  for (const graph of messages(model, GRAPH)) {
    for (const tensor of messages(graph, INITIALIZER)) {
      for (const entry of messages(tensor, EXTERNAL_DATA)) {
        const [key] = messages(entry, KEY);
        const [value] = messages(entry, VALUE);
        if (key && value && decoder.decode(key) === "location") found.add(decoder.decode(value));
      }
    }
  }
  return [...found];
}
