// Loaded into twilld by bench/scale.ts: watches how long the event loop is held up, in milliseconds, once the program has
// been read and run; before that, there is nothing else to be done. SIGUSR2 has it say how long that was at most, and when
// it began, and stop, as watching takes processor time by itself; the next one has it begin anew.
import { monitorEventLoopDelay } from "node:perf_hooks";

const delay = monitorEventLoopDelay({ resolution: 1 });
let beganMs;
let isOn = false;
const watch = () => {
  delay.reset();
  isOn = delay.enable();
};
// What has been run listens for this signal.
const begin = setInterval(() => {
  if (process.listenerCount("SIGTERM") === 0) return;
  clearInterval(begin);
  beganMs = performance.now();
  watch();
}, 1);
process.on("SIGUSR2", () => {
  if (!isOn) {
    process.stderr.write("event loop: watched\n");
    watch();
    return;
  }
  const most = (delay.max / 1e6).toFixed(1);
  process.stderr.write(`event loop: at most ${most} ms, from ${beganMs.toFixed(1)} ms on\n`);
  isOn = !delay.disable();
});
