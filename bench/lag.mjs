// Loaded into twilld by bench/scale.ts: says at the end, and at SIGUSR2 since the last time, how long the event loop was
// held up at most, in milliseconds.
import { monitorEventLoopDelay } from "node:perf_hooks";

const delay = monitorEventLoopDelay({ resolution: 1 });
delay.enable();
const say = () => {
  process.stderr.write(`event loop: at most ${(delay.max / 1e6).toFixed(1)} ms\n`);
  delay.reset();
};
process.on("SIGUSR2", say);
process.on("exit", say);
