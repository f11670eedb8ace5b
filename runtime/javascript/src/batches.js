/**
 * Which texts run together, and how they are padded: the rules of embedge/runtime/encode/batches.py.
 *
 * Longest first, and a batch ends where it would hold more padding than a further run costs. Long texts get none: a
 * graph may take another operator for them where a batch has no padding. Padding is on the right.
 */

/**
 * @typedef {import("./tokenizer.js").Tokens} Tokens
 * @typedef {import("./manifest.js").Model} Model
 *
 * @typedef {object} Tensor
 * @property {"int64" | "int8" | "float32"} type
 * @property {BigInt64Array | Int8Array | Float32Array} data
 * @property {number[]} dims
 */

const LONG_TOKENS = 512;
const MAX_PADDING_TOKENS = 32;

/**
 * Indices of the texts of each batch, the longest first; every index once.
 * @param {number[]} lengths Tokens of each text.
 * @param {number} batchSize Most texts of a batch.
 * @param {number} maxBatchTokens Most padded tokens of a batch of more than one text.
 * @returns {number[][]}
 */
export function planBatches(lengths, batchSize, maxBatchTokens) {
  const order = lengths.map((_, index) => index).sort((a, b) => lengths[b] - lengths[a]); // stable
  const batches = [];
  for (let start = 0; start < order.length;) {
    const longest = lengths[order[start]];
    const most = Math.max(1, Math.min(batchSize, Math.floor(maxBatchTokens / longest)));
    const limit = longest >= LONG_TOKENS ? 0 : MAX_PADDING_TOKENS;
    const batch = [];
    let padding = 0;
    for (const index of order.slice(start, start + most)) {
      padding += longest - lengths[index];
      if (padding > limit) break;
      batch.push(index);
    }
    batches.push(batch);
    start += batch.length;
  }
  return batches;
}

/**
 * The graph's inputs by name for some texts, each of at least one token.
 * @param {Tokens[]} texts
 * @param {Model} model
 * @param {number} padTokenId
 * @param {number} rowMultiple Batch × tokens is a multiple of this.
 * @returns {Record<string, Tensor>}
 */
export function padBatch(texts, model, padTokenId, rowMultiple) {
  const longest = texts.reduce((most, text) => Math.max(most, text.ids.length), 0);
  const [batch, tokens] = paddedShape(texts.length, longest, rowMultiple, model.max_length);
  /** @param {bigint} value */
  const filled = (value) => new BigInt64Array(batch * tokens).fill(value);
  const ids = filled(BigInt(padTokenId)),
    mask = filled(0n),
    types = filled(0n),
    pooled = filled(0n);
  for (let row = 0; row < batch; row++) {
    const text = texts[row];
    const first = row * tokens;
    if (text === undefined) {
      // a row that fills; without a token its pooling would divide by zero
      mask[first] = pooled[first] = 1n;
      continue;
    }
    text.ids.forEach((id, at) => {
      ids[first + at] = BigInt(id);
      types[first + at] = BigInt(text.typeIds[at]);
    });
    mask.fill(1n, first, first + (text.attended ?? text.ids.length));
    pooled.set(mask.subarray(first, first + tokens), first);
    pooled.fill(0n, first, first + text.unpooled);
  }
  const dims = [batch, tokens];
  /** @type {Record<string, () => Tensor>} */
  const made = {
    input_ids: () => ({ type: "int64", data: ids, dims }),
    attention_mask: () => ({ type: "int64", data: mask, dims }),
    token_type_ids: () => ({ type: "int64", data: types, dims }),
    pool_mask: () => ({ type: "int64", data: pooled, dims }),
    position_ids: () => {
      const data = BigInt64Array.from({ length: 3 * batch * tokens }, (_, at) => BigInt(at % tokens));
      return { type: "int64", data, dims: [3, batch, tokens] };
    },
    image_features: () => ({ type: "float32", data: new Float32Array(), dims: [0, model.image_width ?? 0] }),
    image_positions: () => ({ type: "int64", data: new BigInt64Array(), dims: [0, 2] }),
  };
  return Object.fromEntries(model.inputs.map((name) => [name, made[name]()]));
}

/**
 * `[batch, tokens]` of at least the given size whose product is a multiple.
 * @param {number} batch
 * @param {number} tokens
 * @param {number} rowMultiple
 * @param {number} maxLength
 */
function paddedShape(batch, tokens, rowMultiple, maxLength) {
  // The padding of a long text must not depend on how many there are.
  const step = tokens >= LONG_TOKENS ? rowMultiple : rowMultiple / gcd(batch, rowMultiple);
  const padded = roundUp(tokens, step);
  if (padded <= Math.max(maxLength, tokens)) return [batch, padded];
  return [roundUp(batch, rowMultiple / gcd(tokens, rowMultiple)), tokens];
}

/**
 * @param {number} a
 * @param {number} b
 * @returns {number}
 */
const gcd = (a, b) => (b === 0 ? a : gcd(b, a % b));

/**
 * @param {number} value
 * @param {number} multiple
 */
const roundUp = (value, multiple) => Math.ceil(value / multiple) * multiple;
