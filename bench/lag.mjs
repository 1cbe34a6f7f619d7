// Loaded into twilld by bench/scale.ts: watches from the start how long the event loop is held up, in milliseconds. SIGUSR2
// has it say how long that was at most and stop, as watching takes processor time by itself, and the next one begin anew.
import { monitorEventLoopDelay } from "node:perf_hooks";

const delay = monitorEventLoopDelay({ resolution: 1 });
let isOn = delay.enable();
process.on("SIGUSR2", () => {
  if (isOn) process.stderr.write(`event loop: at most ${(delay.max / 1e6).toFixed(1)} ms\n`);
  else process.stderr.write("event loop: watched\n");
  isOn = !isOn;
  if (isOn) delay.enable();
  else delay.disable();
  delay.reset();
});
