/** The object that turns texts into vectors. */
import { padBatch, planBatches } from "./batches.js";
import { BundleError, EmbedgeValueError, TextTooLongError } from "./errors.js";
import { ListedFiles, readFile, VERIFY } from "./files.js";
import { chooseDim, chooseLength, choosePrecision, choosePrompt, chooseTask, withPrompts } from "./lookup.js";
import { readManifest } from "./manifest.js";
import { asTexts, checkChoice, checkFlag, checkOptions, checkPositive, checkPrompts } from "./options.js";
import { Sessions } from "./sessions.js";
import { inRole, TextTokenizer } from "./tokenizer.js";
import { normalized, similarity, similarityPairwise } from "./vectors.js";

/**
 * @typedef {import("./vectors.js").Vector} Vector
 * @typedef {import("./vectors.js").MultiVector} MultiVector
 * @typedef {import("./tokenizer.js").Tokens} Tokens
 *
 * @typedef {object} OpenOptions
 * @property {string} [task] What calls embed for that name no task; by default the bundle's only one.
 * @property {string} [precision] "int8", "fp32", …; by default the bundle's only one that runs here.
 * @property {Record<string, string>} [prompts] Beside those of every task, in the place of those of the same name.
 * @property {string} [defaultPromptName] The prompt of calls that name none, in the place of the task's default.
 * @property {number} [truncateDim] As for `encode`, of calls that name none.
 * @property {number} [maxSeqLength] Most tokens of a text, fewer than the model takes; by default as many.
 * @property {"full" | "size" | "none"} [verify] "full" compares each file that is used with its SHA-256 in the
 *   manifest, "size" its size alone. "full" by default.
 * @property {number} [maxSessions] Most graphs open at once; the longest unused is closed first. By default all.
 * @property {(message: string) => void} [onWarning] Gets warnings; `console.warn` by default.
 *
 * @typedef {object} EncodeOptions
 * @property {string} [task] May be left out where the bundle has exactly one.
 * @property {string} [promptName] A prompt of the task to put before every text; by default the task's default.
 * @property {string} [prompt] A text to put there instead; `promptName` is then ignored.
 * @property {number} [batchSize] Most texts of a batch; 32 by default.
 * @property {number} [maxBatchTokens] Most padded tokens of a batch; 1024 by default.
 * @property {number} [truncateDim] One of the declared dimensions, or any where none are declared. The vector is cut
 *   and, where the source normalizes, normalized again. By default what the source cuts to, most often nothing.
 * @property {boolean} [normalizeEmbeddings] L2-normalize in any case.
 * @property {"ignore" | "warn" | "error"} [onTruncate] When a text is longer than `maxSeqLength` and gets cut; "warn"
 *   (once per Embedder) by default.
 *
 * @typedef {"query" | "document" | null} Role
 * @typedef {{task: string, prefix: string, dim: number, batchSize: number, maxBatchTokens: number, normalize: boolean,
 *   onTruncate: "ignore" | "warn" | "error", multiVector: boolean, role: Role}} Request
 */

export const OPEN_OPTIONS = [
  "task",
  "precision",
  "prompts",
  "defaultPromptName",
  "truncateDim",
  "maxSeqLength",
  "verify",
  "maxSessions",
  "onWarning",
];
const PROMPT_OPTIONS = ["task", "promptName", "prompt"];
const ENCODE_OPTIONS = [
  ...PROMPT_OPTIONS,
  "batchSize",
  "maxBatchTokens",
  "truncateDim",
  "normalizeEmbeddings",
  "onTruncate",
  "multiVector",
];

/**
 * What a call gives for its texts.
 * @template Inputs
 * @template Options
 * @typedef {Options extends {multiVector: true}
 *   ? (Inputs extends string ? MultiVector : MultiVector[])
 *   : (Inputs extends string ? Vector : Vector[])} Encoded
 */

/**
 * Embeds texts with a bundle.
 *
 * A vector does not depend on the others of its call, but for its last bit. Calls may overlap; runs of graphs follow
 * one another.
 */
export class BaseEmbedder {
  /**
   * What is read before there is an object.
   * @param {import("./files.js").Source} source
   * @param {import("./sessions.js").Platform} platform
   * @param {OpenOptions} options
   */
  static async read(source, platform, options) {
    const verify = checkChoice("verify", options.verify ?? "full", VERIFY);
    const warn = options.onWarning ?? ((/** @type {string} */ message) => console.warn(`embedge: ${message}`));
    if (typeof warn !== "function") throw new EmbedgeValueError("onWarning: expected a function of a message");
    const place = source.place("manifest.json");
    const manifest = readManifest(await readFile(source, "manifest.json"), place, warn);
    const [precision, settings] = choosePrecision(manifest, options.precision ?? undefined);
    const { model, tokenizer } = manifest;
    if (options.task !== undefined) chooseTask(manifest, precision, options.task);
    const prompts = checkPrompts(options.prompts);
    manifest.tasks = withPrompts(manifest.tasks, prompts, options.defaultPromptName, options.task);
    const dim = chooseDim(model, options.truncateDim);
    const maxSessions =
      options.maxSessions === undefined ? Infinity : checkPositive("maxSessions", options.maxSessions);
    const files = new ListedFiles(source, manifest.files, verify);
    const late = model.late_interaction;
    const lengths = late === null ? [model.max_length] : [late.query_length, late.document_length, late.text_length];
    const words = new TextTokenizer(await files.read(tokenizer.file), source.place(tokenizer.file), tokenizer, lengths);
    if (options.maxSeqLength !== undefined)
      model.max_length = chooseLength(model, options.maxSeqLength, 1 - words.room(0));
    return {
      manifest,
      precision,
      settings,
      dim,
      warn,
      root: source.root,
      task: options.task,
      tokenizer: words,
      sessions: new Sessions(platform, files, settings, model.inputs, maxSessions),
    };
  }

  /** @type {Awaited<ReturnType<typeof BaseEmbedder.read>>} */
  #parts;
  #warnedOfTruncation = false;

  /** @param {Awaited<ReturnType<typeof BaseEmbedder.read>>} parts As `read` gives them; see `Embedder.open`. */
  constructor(parts) {
    this.#parts = parts;
  }

  /** Names of the tasks that have a graph at this precision. */
  get tasks() {
    return [...this.#parts.settings.graphs.keys()];
  }

  /** What calls embed for that name no task; null: they have to name one. */
  get task() {
    return this.#parts.task ?? (this.tasks.length === 1 ? this.tasks[0] : null);
  }

  /** The prompts of `task` by name. */
  get prompts() {
    return this.getPrompts();
  }

  /**
   * The prompts of a task by name.
   * @param {string} [task]
   * @returns {Record<string, string>}
   */
  getPrompts(task) {
    return { ...this.#taskOf(this.#chosenTask(task)).prompts };
  }

  /** The prompt of `task` where a call names none; null: no prompt. */
  get defaultPromptName() {
    return this.#taskOf(this.#chosenTask()).default_prompt;
  }

  /** Length of a vector where a call names no `truncateDim`. */
  get dim() {
    return this.#parts.dim;
  }

  /** Length of each of a text's vectors with `multiVector`; null: there is no such head. */
  get multiVectorDim() {
    return this.#parts.manifest.model.multi_vector_dim;
  }

  /** How `similarity` compares: "cosine" or "dot"; with late interaction "maxsim" or "meanmaxsim". */
  get similarityFnName() {
    return this.#parts.manifest.model.similarity;
  }

  /** Most tokens of a text, special tokens included. */
  get maxSeqLength() {
    return this.#parts.manifest.model.max_length;
  }

  /** What can be embedded; images need Python. */
  get modalities() {
    return ["text"];
  }

  /** Name of the precision in use. */
  get precision() {
    return this.#parts.precision;
  }

  /**
   * Vectors of some texts, in their order.
   * @overload
   * @param {string} inputs
   * @param {EncodeOptions & {multiVector?: false}} [options]
   * @returns {Promise<Vector>}
   */
  /**
   * @overload
   * @param {string[]} inputs
   * @param {EncodeOptions & {multiVector?: false}} [options]
   * @returns {Promise<Vector[]>}
   */
  /**
   * @overload
   * @param {string} inputs
   * @param {EncodeOptions & {multiVector: true}} options
   * @returns {Promise<MultiVector>}
   */
  /**
   * @overload
   * @param {string[]} inputs
   * @param {EncodeOptions & {multiVector: true}} options
   * @returns {Promise<MultiVector[]>}
   */
  /**
   * Vectors of some texts, in their order.
   *
   * A text without a single token is a zero vector, with a warning. Lone surrogates are read as U+FFFD.
   * @param {string | string[]} inputs Texts, or one.
   * @param {EncodeOptions & {multiVector?: boolean}} [options] `multiVector` gives a vector per token instead, from
   *   models with such a head. Late-interaction models have no other.
   * @returns {Promise<Vector | Vector[] | MultiVector | MultiVector[]>} Float32Array of `dim` for each text.
   * @throws {EmbedgeValueError} For an argument that cannot be used.
   * @throws {TextTooLongError} For a text that would be cut, under "error".
   * @throws {BundleError} If the task's graph cannot be opened.
   */
  async encode(inputs, options) {
    return this.#encode(inputs, checkOptions("encode", options, ENCODE_OPTIONS), null);
  }

  /**
   * `encode` with the task's prompt "query"; without one, its default or none.
   *
   * A late-interaction model cuts queries at their own length, and fills them up where it was trained so.
   * @template {string | string[]} Inputs
   * @template {EncodeOptions & {multiVector?: boolean}} [Options={}]
   * @param {Inputs} inputs
   * @param {Options} [options] As for `encode`; a `promptName` or `prompt` given wins.
   * @returns {Promise<Encoded<Inputs, Options>>} Multi-vectors with `multiVector`.
   */
  async encodeQuery(inputs, options) {
    const given = checkOptions("encodeQuery", options, ENCODE_OPTIONS);
    return /** @type {any} */ (this.#encode(inputs, this.#withRole(given, ["query"]), "query"));
  }

  /**
   * `encode` with the task's prompt "document", "passage" or "corpus"; without one, none.
   *
   * A task for documents alone, such as "retrieval.passage", has the prompt of its own name. A default prompt is left
   * out: it is the queries' where documents have none of their own. A late-interaction model cuts documents at their own
   * length, and leaves out vectors such as those of punctuation.
   * @template {string | string[]} Inputs
   * @template {EncodeOptions & {multiVector?: boolean}} [Options={}]
   * @param {Inputs} inputs
   * @param {Options} [options] As for `encode`; a `promptName` or `prompt` given wins.
   * @returns {Promise<Encoded<Inputs, Options>>} Multi-vectors with `multiVector`.
   */
  async encodeDocument(inputs, options) {
    const given = checkOptions("encodeDocument", options, ENCODE_OPTIONS);
    let named = this.#withRole(given, ["document", "passage", "corpus"]);
    if (named.promptName === undefined && named.prompt === undefined) named = { ...named, prompt: "" };
    return /** @type {any} */ (this.#encode(inputs, named, "document"));
  }

  /**
   * The number of tokens of each text with its prompt, if it were not cut.
   * @template {string | string[]} Inputs
   * @param {Inputs} inputs
   * @param {Pick<EncodeOptions, "task" | "promptName" | "prompt">} [options]
   * @returns {Inputs extends string ? number : number[]}
   */
  countTokens(inputs, options) {
    const given = checkOptions("countTokens", options, PROMPT_OPTIONS);
    const [texts, single] = asTexts(inputs);
    const name = this.#chosenTask(given.task);
    const prefix = choosePrompt(name, this.#taskOf(name), given.promptName, given.prompt);
    const counts = texts.map((text) => this.#parts.tokenizer.count(prefix + text));
    return /** @type {any} */ (single ? counts[0] : counts);
  }

  /**
   * Similarity of each of `a` to each of `b`, as the source model defines it.
   * @param {Vector | Vector[] | MultiVector[] | number[] | number[][]} a
   * @param {Vector | Vector[] | MultiVector[] | number[] | number[][]} b
   * @returns {Float32Array[]} A row of scores for each of `a`.
   * @throws {EmbedgeValueError} If the two differ in kind or in dimension.
   */
  similarity(a, b) {
    return similarity(a, b, this.similarityFnName);
  }

  /**
   * Similarity of each of `a` to that of `b` in the same place, as the source model defines it.
   * @param {Vector | Vector[] | MultiVector[] | number[] | number[][]} a
   * @param {Vector | Vector[] | MultiVector[] | number[] | number[][]} b Like `a`, and as many.
   * @returns {Float32Array}
   * @throws {EmbedgeValueError} If the two differ in kind, number or dimension.
   */
  similarityPairwise(a, b) {
    return similarityPairwise(a, b, this.similarityFnName);
  }

  /** Closes the open graphs; a later call opens them again. */
  async close() {
    await this.#parts.sessions.close();
  }

  /**
   * @param {unknown} inputs
   * @param {Record<string, any>} options
   * @param {Role} role
   * @returns {Promise<any>}
   */
  async #encode(inputs, options, role) {
    const [texts, single] = asTexts(inputs);
    const request = this.#request(options, role);
    const tokens = this.#tokens(texts, request);
    this.#reportTruncation(tokens, request);
    this.#checkTable(tokens);
    const vectors = await this.#vectors(tokens, request);
    return single ? vectors[0] : vectors;
  }

  /**
   * What a call asks of the bundle.
   * @param {Record<string, any>} options
   * @param {Role} role
   * @returns {Request}
   */
  #request(options, role) {
    const { manifest } = this.#parts;
    const { model, name: source } = manifest;
    const task = this.#chosenTask(options.task);
    const multiVector = checkFlag("multiVector", options.multiVector ?? false);
    if (multiVector && options.truncateDim !== undefined) {
      throw new EmbedgeValueError("truncateDim is for single vectors, not multiVector: true");
    }
    if (model.late_interaction !== null && !multiVector) {
      throw new EmbedgeValueError(
        `${source} is a late-interaction model, of a vector a token and none a text: pass ` +
          "multiVector: true to encodeQuery for queries, and to encodeDocument for documents",
      );
    }
    if (multiVector && model.multi_vector_dim === null) {
      throw new EmbedgeValueError(`multiVector: ${source} has no multi-vector head; leave multiVector out`);
    }
    const prefix = choosePrompt(task, this.#taskOf(task), options.promptName, options.prompt);
    if (prefix !== "" && !model.include_prompt && !model.inputs.includes("pool_mask")) {
      throw new EmbedgeValueError(
        `prompt: ${source} leaves the tokens of a prompt out of its pooling, which this ` +
          "bundle's graphs cannot; leave the prompt out, or export the model again",
      );
    }
    const dim = options.truncateDim === undefined ? this.dim : chooseDim(model, options.truncateDim);
    return {
      task,
      prefix,
      multiVector,
      role,
      dim: multiVector ? /** @type {number} */ (model.multi_vector_dim) : dim,
      batchSize: checkPositive("batchSize", options.batchSize ?? 32),
      maxBatchTokens: checkPositive("maxBatchTokens", options.maxBatchTokens ?? 1024),
      normalize: checkFlag("normalizeEmbeddings", options.normalizeEmbeddings ?? false),
      onTruncate: checkChoice(
        "onTruncate",
        options.onTruncate ?? "warn",
        /** @type {const} */ (["ignore", "warn", "error"]),
      ),
    };
  }

  /**
   * @param {string[]} texts
   * @param {Request} request
   * @returns {Tokens[]}
   */
  #tokens(texts, { prefix, role }) {
    const {
      tokenizer,
      manifest: { model },
    } = this.#parts;
    const rules = model.late_interaction;
    if (rules !== null) {
      const length = this.#longest(role);
      return texts.map((text) => inRole(tokenizer.tokens(prefix + text, length), rules, role));
    }
    const skips = model.inputs.includes("pool_mask") && !model.include_prompt;
    const unpooled = skips ? tokenizer.promptTokens(prefix, model.max_length) : 0;
    return texts.map((text) => tokenizer.tokens(prefix + text, model.max_length, unpooled));
  }

  /** @param {Role} role */
  #longest(role) {
    const { max_length: most, late_interaction: late } = this.#parts.manifest.model;
    if (late === null) return most;
    return role === null ? late.text_length : { query: late.query_length, document: late.document_length }[role];
  }

  /**
   * @param {Tokens[]} tokens
   * @param {Request} request
   */
  #reportTruncation(tokens, { onTruncate, role }) {
    if (onTruncate === "ignore" || (onTruncate === "warn" && this.#warnedOfTruncation)) return;
    const first = tokens.findIndex((text) => text.truncated);
    if (first < 0) return;
    const most = this.#longest(role);
    if (onTruncate === "error") throw new TextTooLongError(first, most);
    this.#warnedOfTruncation = true;
    this.#parts.warn(
      `inputs[${first}] is longer than ${most} tokens and was cut; onTruncate: "ignore" cuts in silence, ` +
        'onTruncate: "error" refuses; this is said once',
    );
  }

  /** @param {Tokens[]} tokens */
  #checkTable(tokens) {
    const { tokenizer, manifest } = this.#parts;
    const rows = manifest.tokenizer.table_rows;
    if (rows === null) return;
    tokens.forEach(({ ids }, index) => {
      const beyond = ids.find((id) => id >= rows);
      if (beyond !== undefined) {
        throw new EmbedgeValueError(
          `inputs[${index}] has ${tokenizer.tokenName(beyond)}, a token that the tokenizer knows ` +
            `and the model does not, whose table has ${rows} rows; leave it out of the text, or export a model whose ` +
            "table was resized",
        );
      }
    });
  }

  /**
   * Vectors of some texts; those with the same tokens run once.
   * @param {Tokens[]} tokens
   * @param {Request} request
   * @returns {Promise<(Vector | MultiVector)[]>}
   */
  async #vectors(tokens, request) {
    /** @type {Map<string, number[]>} */
    const places = new Map();
    tokens.forEach(({ ids, attended }, index) => {
      const key = `${ids.join(" ")}/${attended}`;
      const known = places.get(key);
      if (known === undefined) places.set(key, [index]);
      else known.push(index);
    });
    const groups = [...places.values()];
    const empty = groups.filter(([first]) => tokens[first].ids.length === 0).flat();
    const full = groups.filter(([first]) => tokens[first].ids.length > 0);
    /** @type {(Vector | MultiVector)[]} */
    const results = new Array(tokens.length);
    for (const index of empty) results[index] = request.multiVector ? [] : new Float32Array(request.dim);
    if (empty.length > 0) {
      this.#parts.warn(
        `${empty.length} of ${tokens.length} texts have no tokens and become zero vectors; the first is ` +
          `inputs[${empty[0]}]`,
      );
    }
    const lengths = full.map(([first]) => tokens[first].ids.length);
    for (const batch of planBatches(lengths, request.batchSize, request.maxBatchTokens)) {
      const found = await this.#runBatch(
        batch.map((group) => tokens[full[group][0]]),
        request,
      );
      batch.forEach((group, row) => {
        for (const index of full[group]) results[index] = copied(found[row]);
      });
    }
    return results;
  }

  /**
   * @param {Tokens[]} texts
   * @param {Request} request
   * @returns {Promise<(Vector | MultiVector)[]>}
   */
  async #runBatch(texts, request) {
    const {
      manifest: { model, tokenizer },
      settings,
      sessions,
    } = this.#parts;
    const rows = tokenizer.table_rows;
    const padding = rows === null || tokenizer.pad_token_id < rows ? tokenizer.pad_token_id : 0; // masked: any id does
    const inputs = padBatch(texts, model, padding, settings.row_multiple);
    const output = request.multiVector ? "token_embeddings" : "embedding";
    const { data, dims, file } = await sessions.run(request.task, output, inputs);
    const shape = inputs.input_ids.dims;
    const width = request.multiVector ? /** @type {number} */ (model.multi_vector_dim) : model.dim;
    const expected = request.multiVector ? [...shape, width] : [shape[0], width];
    if (expected.join() !== dims.join()) {
      throw new BundleError(
        `${file}: expected ${output} of the shape ${expected.join(" × ")}, found ${dims.join(" × ")}; ` +
          "export the bundle again",
      );
    }
    const again = request.normalize || (request.dim < width && model.normalize);
    /** @param {number} place Of the vector among those of the output. */
    const vectorAt = (place) => {
      const vector = data.slice(place * width, place * width + request.dim);
      return again ? normalized(vector) : vector;
    };
    if (!request.multiVector) return texts.map((_, row) => vectorAt(row));
    return texts.map((text, row) =>
      text.ids.flatMap((_, at) => (text.scored === null || text.scored[at] ? [vectorAt(row * shape[1] + at)] : [])),
    );
  }

  /** @param {string} [task] */
  #chosenTask(task) {
    return chooseTask(this.#parts.manifest, this.#parts.precision, task ?? this.#parts.task);
  }

  /** @param {string} name */
  #taskOf(name) {
    return /** @type {import("./manifest.js").Task} */ (this.#parts.manifest.tasks.get(name));
  }

  /**
   * A call's options with the first of some prompts that its task declares; a task for one role has its own name's.
   * @param {Record<string, any>} options
   * @param {string[]} names
   */
  #withRole(options, names) {
    if (options.promptName !== undefined || options.prompt !== undefined) return options;
    const task = this.#chosenTask(options.task);
    const { prompts } = this.#taskOf(task);
    const known = names.includes(task.slice(task.lastIndexOf(".") + 1)) ? [...names, task] : names;
    return { ...options, promptName: known.find((name) => Object.hasOwn(prompts, name)) };
  }
}

/**
 * @param {Vector | MultiVector} value
 * @returns {Vector | MultiVector}
 */
function copied(value) {
  return Array.isArray(value) ? value.map((vector) => vector.slice()) : value.slice();
}
