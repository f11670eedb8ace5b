/** The graphs of one precision: opened when they are needed, one run at a time, closed. */
import { BundleError, EmbedgeError, InferenceError, listed, reasonOf } from "./errors.js";
import { externalFiles } from "./onnx.js";
import { EXACT, saturates } from "./saturation.js";
import { readTaskTensors } from "./task_tensors.js";

const LEAST = 30; // 1.24 gives wrong vectors without an error
const BEYOND = 34;

/**
 * What of ONNX Runtime there is on a platform.
 * @typedef {object} Platform
 * @property {string} name Of the npm package.
 * @property {any} ort Its module.
 * @property {object} options Of every session.
 * @property {(files: import("./files.js").ListedFiles, graph: string, externals: string[], options: object) =>
 *   Promise<any>} create Opens a graph, whose weights lie in some files.
 *
 * @typedef {import("./batches.js").Tensor} Tensor
 * @typedef {{session: any, used: number}} Open
 */

/**
 * Refuses a version of ONNX Runtime that these graphs were not tried with.
 * @param {string} name
 * @param {any} ort
 */
export function checkVersion(name, ort) {
  const versions = ort?.env?.versions ?? {};
  const version = versions[name === "onnxruntime-node" ? "node" : "web"] ?? versions.common;
  const [major, minor] = String(version).split(".").map(Number);
  if (major !== 1 || !(minor >= LEAST && minor < BEYOND)) {
    throw new EmbedgeError(
      `${name}: expected a version from 1.${LEAST} to below 1.${BEYOND}, found ${version}; ` +
        `run: npm install ${name}@1.${LEAST}`,
    );
  }
}

/** Runs the graphs of a precision, and bounds how many stay open. */
export class Sessions {
  /**
   * @param {Platform} platform
   * @param {import("./files.js").ListedFiles} files
   * @param {import("./manifest.js").Precision} precision
   * @param {string[]} inputs Of the tasks' graphs, beside what a task brings.
   * @param {number} maxSessions Most graphs open at once.
   */
  constructor(platform, files, precision, inputs, maxSessions) {
    this.platform = platform;
    this.files = files;
    this.precision = precision;
    this.inputs = inputs;
    this.maxSessions = maxSessions;
    /** @type {Map<string, any>} By path of the graph, the longest unused first. */
    this.open = new Map();
    /** @type {Map<string, Record<string, Tensor>>} */
    this.given = new Map();
    /** @type {Promise<unknown>} */
    this.queue = Promise.resolve();
    /** @type {Promise<object> | null} */
    this.exact = null;
  }

  /**
   * An output of a task's graph for a batch.
   * @param {string} task
   * @param {string} output
   * @param {Record<string, Tensor>} inputs
   * @returns {Promise<{data: Float32Array, dims: readonly number[], file: string}>}
   * @throws {BundleError} If the graph cannot be opened, or is another one than the manifest says.
   * @throws {InferenceError} If the run fails or its result is not finite.
   */
  run(task, output, inputs) {
    return this.inTurn(async () => {
      const path = /** @type {string} */ (this.precision.graphs.get(task));
      const file = this.files.source.place(path);
      const given = await this.tensorsOf(task);
      const session = await this.sessionOf(path, Object.keys(given));
      if (!session.outputNames.includes(output)) {
        throw new BundleError(
          `${file}: expected an output ${output}, found ${listed(session.outputNames)}; ` + "export the bundle again",
        );
      }
      const { Tensor } = this.platform.ort;
      const feeds = Object.fromEntries(
        Object.entries({ ...inputs, ...given }).map(([name, { type, data, dims }]) => [
          name,
          new Tensor(type, data, dims),
        ]),
      );
      let result;
      try {
        result = (await session.run(feeds, [output]))[output];
      } catch (error) {
        throw new InferenceError(
          `${file}: failed on a batch of ${inputs.input_ids.dims.join(" × ")} tokens: ` +
            `${reasonOf(error)}; if memory ran out, lower maxBatchTokens or shorten the text`,
          { cause: error },
        );
      }
      if (result.type !== "float32") {
        throw new BundleError(
          `${file}: expected numbers of float32 as ${output}, found ${result.type}; export the bundle again`,
        );
      }
      const data = /** @type {Float32Array} */ (result.data);
      if (!data.every(Number.isFinite)) {
        throw new InferenceError(
          `${file}: gave values that are not finite; open the bundle with verify: "full" to check ` + "its files",
        );
      }
      return { data, dims: result.dims, file };
    });
  }

  /** Closes all graphs; a later run opens them again. */
  close() {
    return this.inTurn(async () => {
      for (const path of [...this.open.keys()]) await this.release(path);
      this.given.clear();
    });
  }

  /**
   * @template Result
   * @param {() => Promise<Result>} work
   * @returns {Promise<Result>}
   */
  inTurn(work) {
    const done = this.queue.then(work);
    this.queue = done.catch(() => {});
    return done;
  }

  /** @param {string} path */
  async release(path) {
    const session = this.open.get(path);
    this.open.delete(path);
    this.files.forget();
    await session.release();
  }

  /**
   * @param {string} task
   * @returns {Promise<Record<string, Tensor>>} What it brings to the graph that it shares.
   */
  async tensorsOf(task) {
    let tensors = this.given.get(task);
    if (tensors === undefined) {
      const path = this.precision.task_tensors.get(task);
      tensors = path === undefined ? {} : readTaskTensors(await this.files.read(path), this.files.source.place(path));
      this.given.set(task, tensors);
    }
    return tensors;
  }

  /**
   * @param {string} path Of a graph.
   * @param {string[]} given Inputs that a task brings.
   */
  async sessionOf(path, given) {
    let session = this.open.get(path);
    if (session === undefined) {
      for (const unused of [...this.open.keys()].slice(0, Math.max(0, this.open.size + 1 - this.maxSessions))) {
        await this.release(unused);
      }
      session = await this.create(path);
    }
    this.open.delete(path);
    this.open.set(path, session); // the latest in use is the last
    const file = this.files.source.place(path);
    const expected = [...this.inputs, ...given].sort();
    const found = [...session.inputNames].sort();
    if (expected.join() !== found.join()) {
      throw new BundleError(
        `${file}: expected inputs ${listed(expected)}, found ${listed(found)}; export the bundle again`,
      );
    }
    return session;
  }

  /** @param {string} path */
  async create(path) {
    const { platform, files } = this;
    const file = files.source.place(path);
    const options = { ...platform.options, ...(this.precision.saturates ? await this.exactOptions() : {}) };
    const graph = await files.read(path);
    const folder = path.slice(0, path.lastIndexOf("/") + 1);
    let externals;
    try {
      externals = externalFiles(graph);
    } catch (error) {
      throw new BundleError(`${file}: no ONNX graph (${reasonOf(error)}); copy or export the bundle again`);
    }
    const odd = externals.find((name) => !files.entries.has(folder + name));
    if (odd !== undefined) files.fail(path, `its weights lie in ${odd}, which manifest.json does not list under files`);
    try {
      return await platform.create(files, path, externals, options);
    } catch (error) {
      if (error instanceof EmbedgeError) throw error;
      throw new BundleError(
        `${file}: ${platform.name} cannot open it: ${reasonOf(error)}; open the bundle with ` +
          'verify: "full" to check its files',
        { cause: error },
      );
    }
  }

  /** What a session needs for exact 8-bit products; asked once. */
  exactOptions() {
    this.exact ??= this.findExactOptions();
    return this.exact;
  }

  async findExactOptions() {
    const { ort, options, name } = this.platform;
    if (!(await saturates(ort, options))) return {};
    const asked = { ...options, extra: EXACT };
    if (!(await saturates(ort, asked))) return { extra: EXACT };
    throw new InferenceError(
      `8-bit products saturate on this processor with ${name}, also where exact ones are asked for, ` +
        "and vectors would be wrong; export the bundle with --portable, or open another precision, such as fp32",
    );
  }
}
