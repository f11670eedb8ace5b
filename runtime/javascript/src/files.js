/** The files of a bundle: where they are read from, and whether they are the ones that the manifest lists. */
import { BundleError, EmbedgeValueError, reasonOf, shown } from "./errors.js";

const AGAIN = "copy or export the bundle again";
export const VERIFY = /** @type {const} */ (["full", "size", "none"]);

/**
 * Where a bundle's files are.
 * @typedef {object} Source
 * @property {string} root Folder or address, for messages.
 * @property {(name: string) => Promise<Uint8Array>} read Throws what the system says.
 * @property {(name: string) => string} place Path or address of a file.
 * @property {(name: string) => Promise<{size: number, sha256: () => Promise<string>}>} [look] What a file is, without
 *   holding it in memory; only where files have paths.
 */

/** The files that a manifest lists. Each is compared with it when it is read. */
export class ListedFiles {
  /**
   * @param {Source} source
   * @param {Map<string, {size: number, sha256: string}>} entries
   * @param {typeof VERIFY[number]} verify
   */
  constructor(source, entries, verify) {
    this.source = source;
    this.entries = entries;
    this.verify = verify;
    /** @type {Map<string, Promise<void>>} */
    this.checked = new Map();
  }

  /**
   * The bytes of a file.
   * @param {string} name
   * @throws {BundleError} If it is not what the manifest says.
   */
  async read(name) {
    const bytes = await readFile(this.source, name);
    await this.compare(name, bytes.length, () => sha256(bytes));
    return bytes;
  }

  /**
   * The path of a file, which is compared once.
   * @param {string} name
   * @throws {BundleError} If it is not what the manifest says.
   */
  async path(name) {
    const { look } = this.source;
    if (look === undefined) throw new Error("files of this source have no path");
    let check = this.checked.get(name);
    if (check === undefined) {
      check = (async () => {
        const found = await look(name).catch((error) => this.fail(name, `cannot be read: ${reasonOf(error)}`));
        await this.compare(name, found.size, found.sha256);
      })();
      this.checked.set(name, check);
      check.catch(() => this.checked.delete(name)); // a later call tries again
    }
    await check;
    return this.source.place(name);
  }

  /** Forgets what was compared: a graph that opens again compares its files again. */
  forget() {
    this.checked.clear();
  }

  /**
   * @param {string} name
   * @param {number} size
   * @param {() => Promise<string>} hash
   */
  async compare(name, size, hash) {
    const expected = this.entries.get(name);
    if (expected === undefined) return this.fail(name, "not listed in manifest.json under files");
    if (this.verify === "none") return;
    if (size !== expected.size) this.fail(name, `expected ${expected.size} bytes, found ${size}`);
    if (this.verify === "size") return;
    const found = await hash();
    if (found !== expected.sha256) this.fail(name, `expected SHA-256 ${expected.sha256}, found ${found}`);
  }

  /**
   * @param {string} name
   * @param {string} problem
   * @returns {never}
   */
  fail(name, problem) {
    throw new BundleError(`${this.source.place(name)}: ${problem}; ${AGAIN}`);
  }
}

/**
 * The bytes of a file, whatever the manifest says of it.
 * @param {Source} source
 * @param {string} name
 * @throws {BundleError}
 */
export async function readFile(source, name) {
  try {
    return await source.read(name);
  } catch (error) {
    throw new BundleError(`${source.place(name)}: cannot be read: ${reasonOf(error)}`, { cause: error });
  }
}

/**
 * @param {Uint8Array} bytes
 * @returns {Promise<string>} In lower-case hexadecimal.
 */
async function sha256(bytes) {
  const subtle = globalThis.crypto?.subtle;
  if (subtle === undefined) {
    throw new EmbedgeValueError(
      'verify: "full" needs crypto.subtle, which browsers give to pages of https or ' +
        'localhost alone; serve the page so, or pass verify: "size"',
    );
  }
  const digest = await subtle.digest("SHA-256", /** @type {Uint8Array<ArrayBuffer>} */ (bytes));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Files over HTTP.
 * @param {URL} address Of the bundle's folder.
 * @returns {Source}
 */
export function urlSource(address) {
  if (!/^https?:$/.test(address.protocol)) {
    throw new EmbedgeValueError(`bundle: expected an http or https address, found ${shown(String(address))}`);
  }
  const folder = new URL(address);
  if (!folder.pathname.endsWith("/")) folder.pathname += "/";
  /** @param {string} name */
  const place = (name) => {
    const file = new URL(folder); // keeps a query, such as that of a signed address
    file.pathname += name;
    return file.href;
  };
  return {
    root: folder.href,
    place,
    async read(name) {
      const answer = await fetch(place(name));
      if (!answer.ok) throw new Error(`HTTP ${answer.status} ${answer.statusText}`.trim());
      return new Uint8Array(await answer.arrayBuffer());
    },
  };
}
