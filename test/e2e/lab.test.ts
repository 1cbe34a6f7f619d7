/**
 * The lab itself: what is built on it can only be trusted if a ping counts right, a capture misses nothing and
 * `close` leaves nothing behind.
 */
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, test } from "vitest";
import { createLab, exec, fileAppears, type Lab, Process, repository, runId, until } from "../lab.ts";

let lab: Lab | undefined;
const newLab = async (options = {}) => {
  lab = await createLab(options);
  return lab;
};

afterEach(async () => {
  await lab?.close();
  lab = undefined;
});

async function namespaces(prefix: string): Promise<string[]> {
  const { stdout } = await exec(["ip", "netns", "list"]);
  return stdout.split("\n").filter((line) => line.startsWith(prefix));
}

describe("hosts and pods", () => {
  test("hosts of one network reach each other; no packet of the first ping is lost", async () => {
    const lab = await newLab();
    const h1 = await lab.host("h1", { address: "10.4.7.21/24" });
    await lab.host("h2", { address: "10.4.7.22/24" });
    const ping = await h1.ping("10.4.7.22", { count: 50 });
    expect(ping).toMatchObject({ sent: 50, received: 50, lost: [], duplicates: 0 });
  });

  test("a router joins two networks", async () => {
    const lab = await newLab();
    await lab.router("r", ["10.4.7.1/24", "10.4.8.1/24"]);
    const h1 = await lab.host("h1", { address: "10.4.7.21/24", gateway: "10.4.7.1" });
    await lab.host("h2", { address: "10.4.8.22/24", gateway: "10.4.8.1" });
    const ping = await h1.ping("10.4.8.22", { count: 3 });
    expect(ping.received).toBe(3);
    expect(ping.output).toContain("ttl=63");
  });

  test("pods behind a bridge and behind point-to-point veths reach their host and each other", async () => {
    const lab = await newLab({ rpFilter: 1 });
    const host = await lab.host("h1", { address: "10.4.7.21/24" });
    await host.bridge("docker0", "172.7.21.1/24");
    const a = await host.pod("a", "172.7.21.2/24", { mtu: 1450 });
    const calico = await host.pointToPointPod("c", "172.7.21.5", { style: "calico" });
    const ptp = await host.pointToPointPod("p", "172.7.21.6", { style: "ptp", gateway: "172.7.21.1" });
    expect((await a.ipJson<{ mtu: number }>("link show dev eth0"))[0]?.mtu).toBe(1450);
    for (const pod of [a, calico, ptp]) {
      expect(await pod.ping("10.4.7.21", { count: 2 })).toMatchObject({ received: 2 });
    }
    expect((await calico.ping(ptp.address, { count: 2 })).received).toBe(2);
    expect((await ptp.ping(calico.address, { count: 2 })).received).toBe(2);
    expect((await a.exec(["cat", "/proc/sys/net/ipv4/conf/eth0/rp_filter"])).stdout).toBe("1\n");
  });

  test("pulling the plug shows as loss, by sequence number", async () => {
    const lab = await newLab();
    const h1 = await lab.host("h1", { address: "10.4.7.21/24" });
    const h2 = await lab.host("h2", { address: "10.4.7.22/24" });
    const ping = await h1.startPing("10.4.7.22");
    await ping.replies(3);
    const before = await h2.counters();
    await h2.plug(false);
    // Silence has no event; what is dropped at the switch is counted there.
    await until(
      "packets to be lost",
      async () => (await lab.switch.counters("h1")).rxPackets > before.rxPackets + 20,
    );
    await h2.plug(true);
    await ping.replies(3);
    const result = await ping.stop();
    expect(result.lost.length).toBeGreaterThan(5);
    expect(result.received + result.lost.length).toBe(result.sent);
  });
});

describe("servers", () => {
  test.each(["node", "nginx"] as const)(
    "%s answers with the client's address and logs it",
    async (program) => {
      const lab = await newLab();
      const host = await lab.host("h1", { address: "10.4.7.21/24" });
      await host.bridge("docker0", "172.7.21.1/24");
      const a = await host.pod("a", "172.7.21.2/24");
      const b = await host.pod("b", "172.7.21.3/24");
      const server = await b.httpServer({ program });
      expect(await a.httpGet(`http://${b.address}/some/path`)).toBe("172.7.21.2\n");
      expect(await server.request(0)).toEqual({ source: "172.7.21.2", path: "/some/path" });
      expect((await a.httpGet(`http://${b.address}/large`)).length).toBe(4 * 1024 * 1024);
      await server.stop();
      await expect(a.httpGet(`http://${b.address}/`)).rejects.toThrow(/curl/);
    },
  );

  test("etcd over TLS, three members, turns away a client without a certificate", async () => {
    const lab = await newLab();
    const h1 = await lab.host("h1", { address: "10.4.7.21/24" });
    const etcd = await lab.etcd({ addresses: ["10.4.7.11/24", "10.4.7.12/24", "10.4.7.13/24"], tls: true });
    await etcd.put("/coreos.com/network/config", "{}");
    expect(await etcd.list("/coreos.com/")).toEqual(new Map([["/coreos.com/network/config", "{}"]]));
    const url = `${etcd.endpoints[1]}/health`;
    const { ca, cert, key } = etcd.certificates ?? { ca: "", cert: "", key: "" };
    expect(
      (await h1.exec(["curl", "-sf", "--cacert", ca, "--cert", cert, "--key", key, url])).stdout,
    ).toContain("true");
    await expect(h1.exec(["curl", "-sSf", "--cacert", ca, url])).rejects.toThrow(/exit code/);
    await etcd.stopMember(2);
    await etcd.put("/coreos.com/network/config", "{ }");
    await etcd.startMember(2);
  });
});

describe("captures", () => {
  test("a capture holds every packet from its start to its stop", async () => {
    const lab = await newLab();
    const h1 = await lab.host("h1", { address: "10.4.7.21/24" });
    const h2 = await lab.host("h2", { address: "10.4.7.22/24" });
    const capture = await h2.capture("eth0", "icmp");
    await h1.ping("10.4.7.22", { count: 100, interval: 0.002 });
    await capture.stop();
    const frames = capture.frames();
    expect(frames).toHaveLength(200);
    expect(frames[0]?.bytes.subarray(12, 14).toString("hex")).toBe("0800");
    const fields = await capture.fields(["ip.src", "icmp.seq"], "icmp.type == 8");
    expect(fields.map((packet) => packet["icmp.seq"])).toEqual(
      Array.from({ length: 100 }, (_, i) => String(i + 1)),
    );
    expect(new Set(fields.map((packet) => packet["ip.src"]))).toEqual(new Set(["10.4.7.21"]));
  });
});

describe("waiting", () => {
  test("until wakes at a change the kernel announces", async () => {
    const lab = await newLab();
    const host = await lab.host("h1", { address: "10.4.7.21/24" });
    const waiting = host.until("a new bridge", async () => (await host.ip("-o link show")).includes("br7"));
    await host.ip("link add br7 type bridge");
    expect(await waiting).toBe(true);
    await expect(host.until("nothing", () => false, { timeout: 200 })).rejects.toThrow(
      "waited 200 ms in vain for nothing",
    );
  });

  test("fileAppears and line wait for content; the end of a program ends the wait", async () => {
    const lab = await newLab();
    const host = await lab.host("h1", { address: "10.4.7.21/24" });
    const path = join(host.directory, "subnet.env");
    const waiting = fileAppears(path, (content) => content.includes("MTU"));
    writeFileSync(path, "FLANNEL_MTU=1450\n");
    expect(await waiting).toBe("FLANNEL_MTU=1450\n");
    const child = host.spawn(["sh", "-c", "echo one; echo two >&2; exit 3"]);
    expect((await child.line(/^tw(o)$/))[1]).toBe("o");
    await expect(child.line(/three/)).rejects.toThrow(/ended before it wrote/);
    expect((await child.exited).code).toBe(3);
  });
});

describe("nothing is left", () => {
  test("close ends processes, also those that ignore SIGTERM, and removes namespaces and files", async () => {
    const lab = await newLab();
    const host = await lab.host("h1", { address: "10.4.7.21/24" });
    const stubborn = host.spawn(["sh", "-c", "trap '' TERM; echo ready; sleep 1000 & wait; sleep 1000"]);
    await stubborn.line(/ready/);
    expect(await namespaces(lab.prefix)).toHaveLength(2);
    await stubborn.stop("SIGTERM", 100);
    await lab.close();
    await lab.close();
    expect(stubborn.running).toBe(false);
    expect(await namespaces(lab.prefix)).toEqual([]);
    expect(existsSync(host.directory)).toBe(false);
  });

  test("sweep removes what a killed run left, and only that", async () => {
    const run = `${runId}x`;
    const directory = join(process.env.TMPDIR ?? "/tmp", `twill-${run}`);
    await exec(["ip", "netns", "add", `twl${run}-a-h1`]);
    await exec(["mkdir", "-p", directory]);
    const inside = new Process(["nsenter", `--net=/run/netns/twl${run}-a-h1`, "sleep", "1000"]);
    const recorded = new Process(["sleep", "1000"]);
    const innocent = new Process(["sleep", "1000"]);
    try {
      const stat =
        (await exec(["cat", `/proc/${recorded.pid}/stat`])).stdout.split(") ")[1]?.split(" ") ?? [];
      // The second line names a process of the same number that started at another time.
      writeFileSync(join(directory, "pids"), `${recorded.pid} ${stat[19]}\n${innocent.pid} 1\n`);
      const check = await exec([join(repository, "test/sweep"), "--check", run], { check: false });
      expect(check.code).toBe(1);
      expect(check.stdout).toContain(`twl${run}-a-h1`);
      expect(check.stdout).toContain(`process ${recorded.pid}: sleep 1000`);
      await exec([join(repository, "test/sweep"), run]);
      expect((await inside.exited).signal).toBe("SIGKILL");
      expect((await recorded.exited).signal).toBe("SIGKILL");
      expect(innocent.running).toBe(true);
      expect((await exec([join(repository, "test/sweep"), "--check", run])).stdout).toBe("");
      expect(existsSync(directory)).toBe(false);
      expect(await namespaces(`twl${run}-`)).toEqual([]);
    } finally {
      await innocent.stop();
      await exec([join(repository, "test/sweep"), run]);
    }
  });
});
