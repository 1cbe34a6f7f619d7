/** What a start took of memory and does not need any more. */
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { openLibrary } from "../../loader/ffi.ts";

/** A heap with more in use than this would hold up the event loop for too long. */
const HEAP_MAX_BYTES = 100e6;

/**
 * Has V8 keep its young generation small from now on: a start copies less in a large one, which takes up to 48 MiB, and what
 * comes after a start needs none. Has it collect its garbage, which it would else do when twice as much has come together,
 * and the C library give freed memory back, which it never does by itself. Holds up the event loop for a millisecond for
 * each megabyte in use. Pages that one collection has emptied, V8 gives back in the next.
 */
export function giveBackMemory(): void {
  setFlagsFromString("--semi-space-growth-factor=1");
  if (process.memoryUsage().heapUsed > HEAP_MAX_BYTES) return;
  setFlagsFromString("--expose-gc");
  const collect = runInNewContext("gc") as () => void;
  setFlagsFromString("--no-expose-gc");
  collect();
  try {
    openLibrary("libc.so.6").prepare("malloc_trim", "int", ["size"])(0);
  } catch {
    // Not every C library has it.
  }
}
