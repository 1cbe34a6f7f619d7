/**
 * What the programs expect of the kernel between them: that skb->tc_index, in which they leave word for each other,
 * comes through its stack, its reassembly and its tunnel device. A packet from a pod goes the whole way here.
 */
import { mkdirSync, rmSync } from "node:fs";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { createLab, type Host, type Lab, type Pod } from "../lab.ts";
import { until } from "../process.ts";
import { frame, ip4, vxlan4 } from "./packets.ts";
import { Node, TUNNEL, VTEP, VTEP_MAC } from "./programs.ts";

let lab: Lab;
let host: Host;
let pod: Pod;
let node: Node;

beforeAll(async () => {
  lab = await createLab();
  host = await lab.host("node", { address: `${VTEP}/24` });
  const peer = await lab.host("peer", { address: `${TUNNEL.address}/24` });
  const sides = [
    [host, "172.7.21", VTEP_MAC, "172.7.22", TUNNEL.mac, TUNNEL.address],
    [peer, "172.7.22", TUNNEL.mac, "172.7.21", VTEP_MAC, VTEP],
  ] as const;
  for (const [on, own, mac, far, farMac, farAddress] of sides) {
    await on.bridge("docker0", `${own}.1/24`);
    await on.ipBatch([
      `link add flannel.1 address ${mac} mtu 1450 type vxlan id 1 dstport 8472 local ${on.address} dev eth0 nolearning`,
      "link set flannel.1 up",
      `address add ${own}.0/32 dev flannel.1`,
      `route add ${far}.0/24 via ${far}.0 dev flannel.1 onlink`,
      `neighbour replace ${far}.0 lladdr ${farMac} dev flannel.1 nud permanent`,
    ]);
    await on.exec(["bridge", "fdb", "append", farMac, "dev", "flannel.1", "dst", farAddress]);
  }
  pod = await host.pod("pod", "172.7.21.2/24");
  await peer.pod("far", "172.7.22.2/24");

  node = Node.load({}, "shipped");
  node.peer(TUNNEL, "REACH_DEVICE");
  const [bridge] = await host.ipJson<{ ifindex: number; address: string }>("link show dev docker0");
  if (bridge === undefined) throw new Error("docker0 is gone");
  node.interface(bridge.ifindex, bridge.address, 1);
  // Docker and Kubernetes turn it on: the bridge then translates between its port and itself.
  const setting = "/proc/sys/net/bridge/bridge-nf-call-iptables";
  await host.exec(["sh", "-c", `[ ! -e ${setting} ] || echo 1 > ${setting}`]);
  const [port] = await host.ipJson<{ ifindex: number }>(`link show dev ${pod.port}`);
  if (port === undefined) throw new Error(`${pod.port} is gone`);
  node.interface(port.ifindex, bridge.address);
  node.endpoint(
    { address: pod.address, mac: await pod.mac(), ifindex: port.ifindex },
    "DELIVERY_PEER",
    bridge.address,
  );
  mkdirSync(host.pinPath, { recursive: true });
  const attachments = [
    ["from_pod", pod.port, "ingress"],
    ["from_pod", "docker0", "ingress"],
    ["to_pod", "docker0", "egress"],
    ["to_overlay", "flannel.1", "egress"],
    ["from_overlay", "flannel.1", "ingress"],
    ["from_net", "eth0", "ingress"],
  ] as const;
  for (const device of [pod.port, "docker0", "flannel.1", "eth0"])
    await host.exec(["tc", "qdisc", "add", "dev", device, "clsact"]);
  for (const [index, [hook, device, direction]] of attachments.entries()) {
    const path = `${host.pinPath}/${hook}-${index}`;
    node.pin(hook, path);
    await host.exec(["tc", "filter", "add", "dev", device, direction, "bpf", "da", "object-pinned", path]);
  }
});
afterAll(async () => {
  node?.close();
  if (host !== undefined) rmSync(host.pinPath, { recursive: true, force: true });
  await lab?.close();
});
beforeEach(() => node.forgetFlows());

const count = (name: string): number => node.totals().get(name) ?? 0;

describe("a tunnel packet that a pod sends past the checks", () => {
  const inner = (data: number): Buffer =>
    frame(
      VTEP_MAC,
      TUNNEL.mac,
      ip4({
        source: TUNNEL.pod,
        destination: "172.7.21.2",
        body: { udp: [1, 2], data: new Uint8Array(data) },
      }),
    );
  /** The UDP payload of a tunnel packet: all after its IP and UDP header. */
  const payload = (data: number): string =>
    vxlan4({ source: "0.0.0.0", destination: "0.0.0.0", frame: inner(data) })
      .subarray(28)
      .toString("hex");

  test.each([
    ["to the gateway", "172.7.21.1", 20],
    ["to the tunnel device's address", "172.7.21.0", 20],
    ["to all of the subnet", "172.7.21.255", 20],
    ["to all hosts", "224.0.0.1", 20],
    ["in fragments", "172.7.21.1", 4000],
  ])("is opened by the kernel, known by its mark, and dropped: %s", async (_, destination, data) => {
    const before = count("from_overlay DROP_FORGED");
    const script = `const socket = require("dgram").createSocket("udp4");
      socket.bind(() => {
        socket.setBroadcast(true);
        socket.send(Buffer.from("${payload(data)}", "hex"), 8472, "${destination}", (error) => {
          socket.close();
          if (error) throw error;
        });
      });`;
    await pod.exec([process.execPath, "-e", script]);
    await until("from_overlay drops it", () => count("from_overlay DROP_FORGED") === before + 1);
  });
});

describe("a flow that the stack must see", () => {
  // A timestamp option is the stack's business.
  const ping = (destination: string, ...words: string[]): Promise<unknown> =>
    pod.exec(["ping", "-n", "-c", "2", "-i", "0.01", "-W", "5", ...words, destination]);

  test("keeps its stamp through the stack and is not held there", async () => {
    const before = count("from_pod STACK_OPTIONS");
    await ping(TUNNEL.pod, "-T", "tsonly");
    expect(count("from_pod STACK_OPTIONS")).toBe(before + 2);
    expect(count("from_overlay DROP_FORGED")).toBe(5);
    expect(node.flows()).toEqual([]);
  });

  test("keeps it through connection tracking, which puts its fragments together", async () => {
    await host.exec([
      "iptables",
      "-t",
      "nat",
      "-A",
      "PREROUTING",
      "-d",
      "10.96.0.10",
      "-j",
      "DNAT",
      "--to-destination",
      TUNNEL.pod,
    ]);
    await ping(TUNNEL.pod, "-T", "tsonly", "-s", "4000");
    expect(node.flows()).toEqual([]);
  });

  test("is held there once the stack has translated it", async () => {
    await ping("10.96.0.10", "-e", "77");
    expect(node.flows()).toEqual(["172.7.21.2:0 172.7.22.2:0 1", "172.7.21.2:77 172.7.22.2:77 1"]);
    const before = count("from_overlay STACK_FLOW");
    await ping("10.96.0.10", "-e", "77");
    expect(count("from_overlay STACK_FLOW")).toBe(before + 2);
    node.forgetFlows();
    await ping("10.96.0.10", "-e", "78", "-s", "4000");
    expect(node.flows()).toEqual(["172.7.21.2:0 172.7.22.2:0 1", "172.7.21.2:78 172.7.22.2:78 1"]);
  });
});
