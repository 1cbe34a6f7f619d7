/**
 * `twill doctor` from end to end, in short: a sound host, a dead daemon, and who may not ask. `make doctor-test` breaks
 * a host in every way there is a check for.
 */
import { join } from "node:path";
import { expect, test } from "vitest";
import { repository, until } from "../lab.ts";
import { createCluster } from "./cluster.ts";

test("nothing on a sound host; what is wrong with another, and how to mend it", async () => {
  const cluster = await createCluster();
  try {
    const { h1 } = cluster;
    const argv = [join(repository, "bin/twill"), "doctor", `--pin-path=${h1.pinPath}`, "--timeout=10"];
    const ask = (...flags: string[]) => h1.exec([...argv, ...flags], { check: false, timeout: 60_000 });
    const sound = await until("the host to be sound", async () => {
      const answer = await ask();
      return answer.code === 0 && answer;
    });
    expect(sound.stdout).toMatch(/^0 problems, 0 warnings; \d+ checks found nothing\n$/);
    expect((await ask("--verbose")).stdout).toContain("ok  peers: each peer answers");

    await cluster.twilld(h1).stop("SIGKILL");
    const dead = await ask("--json");
    expect(dead.code).toBe(1);
    const { findings } = JSON.parse(dead.stdout) as { findings: { id: string; severity: string }[] };
    expect(findings[0]).toMatchObject({ id: "daemon-running", severity: "problem" });
    expect((await ask()).stdout).toMatch(/^1 problem, /m);

    const limited = ["setpriv", "--bounding-set=-net_admin", "--", ...argv];
    const refused = await h1.exec(limited, { check: false });
    expect([refused.code, refused.stdout]).toEqual([1, ""]);
    expect(refused.stderr).toMatch(/^twill: .*CAP_NET_ADMIN.*\n$/);
    const wrong = await ask("--timeout=soon");
    expect([wrong.code, wrong.stdout]).toEqual([2, ""]);
    expect(wrong.stderr).toContain("--timeout");
  } finally {
    await cluster.close();
  }
});
