import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { openRunner } from "../../src/edge/command.ts";
import { until } from "../process.ts";

const runner = openRunner({ PATH: process.env.PATH, KEPT: "kept", FLANNELD_ETCD_PASSWORD: "secret" });
const running = (argv: string[], more: { input?: string; timeoutMs?: number } = {}) =>
  runner.run({
    name: "SubnetAddCommand",
    argv,
    environment: { SUBNET: "10.3.2.0/24" },
    input: "the data\n",
    timeoutMs: 20_000,
    ...more,
  });
const run = (...args: Parameters<typeof running>) => running(...args).ended;
const sh = (text: string) => ["/bin/sh", "-c", text];

/** Whether a process runs, not counting what is left of one that nobody has waited for. */
function runs(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));
  } catch {
    return false;
  }
}

test("a program has its arguments, environment and input, and says what it has to say", async () => {
  const script = `printf '%s|' "$@"; echo "$SUBNET $KEPT [$FLANNELD_ETCD_PASSWORD]"; cat; echo aside >&2`;
  expect(await run([...sh(script), "name", "a b", "$SUBNET; c"])).toEqual({
    stdout: "a b|$SUBNET; c|10.3.2.0/24 kept []\nthe data\n",
    stderr: "aside\n",
    problem: undefined,
  });
  expect(runner.environment.FLANNELD_ETCD_PASSWORD).toBeUndefined();
});

test("how it failed is said in words", async () => {
  expect(await run(sh("echo half; exit 3"))).toMatchObject({ stdout: "half\n", problem: "exit code 3" });
  expect((await run(sh("kill -SEGV $$"))).problem).toBe("it was ended by SIGSEGV");
  expect((await run(["/no/such"])).problem).toBe("/no/such cannot be run: there is no such program");
  expect((await run(["/etc/passwd"])).problem).toMatch(/^\/etc\/passwd cannot be run: .*EACCES/);
});

test("one that reads nothing of a long input is no failure", async () => {
  expect((await run(["/bin/true"], { input: "x".repeat(1_000_000) })).problem).toBeUndefined();
});

test("output without end fills no memory", async () => {
  const { stdout, problem } = await run(sh("head -c 20000000 /dev/zero | tr '\\0' x"));
  expect(problem).toBeUndefined();
  expect(stdout).toBe("x".repeat(65_536));
});

test("one that takes too long is ended, with what it started", async () => {
  const { stdout, problem } = await run(sh("sleep 1000 & echo $!; wait"), { timeoutMs: 300 });
  expect(problem).toBe("it took longer than 0.3 s and was ended");
  await until("the child to be gone", () => !runs(Number(stdout)));
});

test("what it leaves running goes on, and is not waited for", async () => {
  const { stdout, problem } = await run(sh("sleep 1000 & echo $!"));
  expect(problem).toBeUndefined();
  const pid = Number(stdout);
  expect(runs(pid)).toBe(true);
  process.kill(pid);
});

test("stopped, it ends at once", async () => {
  const { ended, stop } = running(["/bin/sleep", "1000"]);
  stop();
  expect((await ended).problem).toBe("it was ended by SIGKILL");
  stop();
});
