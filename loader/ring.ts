// Ring buffers: records that BPF programs send to userspace, delivered on the main thread.
//
// libbpf's epoll descriptor is watched by Node's own event loop, so waiting costs nothing and no thread is
// involved. One turn of the loop delivers a bounded number of records: a flood delays the process, never
// stops it, and what does not fit the ring is the kernel's to count and drop.
import { callback, errno, openLibrary, readMemory, type Watch, watchFd } from "./ffi.ts";
import { check, failure } from "./libbpf.ts";
import type { BpfMap } from "./map.ts";

const library = openLibrary("libbpf.so.1");
const create = library.prepare("ring_buffer__new", "pointer", ["int", "pointer", "pointer", "pointer"]);
const epollFd = library.prepare("ring_buffer__epoll_fd", "int", ["pointer"]);
const consume = library.prepare("ring_buffer__consume", "int", ["pointer"]);
const destroy = library.prepare("ring_buffer__free", "void", ["pointer"]);

const RECORDS_PER_TURN = 256;
// What our callback tells libbpf to end a turn; libbpf counts the record as delivered.
const ENOUGH = -11;

/** The reading end of a ring buffer map. */
export class RingBuffer {
  readonly #handle: number;
  readonly #close: () => void;
  #closed = false;

  /**
   * Delivers each record's bytes to `onRecord`, in order, until `close()`. The map may be closed afterwards, not
   * before. What `onRecord` throws becomes an uncaught exception. With `keepAlive: false` waiting for records
   * does not keep the process running.
   */
  constructor(map: BpfMap, onRecord: (record: Uint8Array) => void, options: { keepAlive?: boolean } = {}) {
    let left = 0;
    const deliver = callback("int", ["pointer", "pointer", "size"], (_context, data = 0, size = 0) => {
      left--;
      onRecord(readMemory(data, size));
      return left > 0 && !this.#closed ? 0 : ENOUGH;
    });
    this.#handle = create(map.fd, deliver, null, null);
    if (this.#handle === 0) {
      const number = errno();
      deliver.release();
      throw failure("ring_buffer__new", number, `read ring buffer ${map.name}`);
    }
    let busy = false;
    const turn = (): void => {
      left = RECORDS_PER_TURN;
      busy = true;
      try {
        const result = consume(this.#handle);
        if (result !== ENOUGH) check(result, "ring_buffer__consume", `read ring buffer ${map.name}`);
      } finally {
        busy = false;
        if (this.#closed) free();
      }
    };
    const free = (): void => {
      destroy(this.#handle);
      deliver.release();
    };
    let watch: Watch;
    try {
      watch = watchFd(epollFd(this.#handle), turn, options);
    } catch (error) {
      free();
      throw error;
    }
    this.#close = () => {
      this.#closed = true;
      watch.close();
      // Called from within onRecord, libbpf is still reading: the turn frees it when it is over.
      if (!busy) free();
    };
  }

  /** Stops delivery, at once. */
  close(): void {
    if (!this.#closed) this.#close();
  }
}
