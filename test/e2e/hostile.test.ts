/**
 * Tunnel packets that nobody of the cluster sent, or that lie: from a stranger on the hosts' network, from a peer
 * under a forged name, from a pod. Whatever comes, the pods see none of it, the counters name it, and a ping at
 * 100 a second between pods loses nothing meanwhile.
 *
 * What must not arrive carries a token in its payload; the captures in the pods are searched for it, and for any
 * packet that is not part of the ping.
 */
import { afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { frame, ip4, type Tunnel4, vxlan4 } from "../bpf/packets.ts";
import type { Capture, Host, Ping, Pod } from "../lab.ts";
import { type Cluster, createCluster, inject } from "./cluster.ts";

const TOKEN = Buffer.from("forged-by-a-test");
const STRANGER = "10.4.7.66";
const BOTH = ["vxlan", "vxlan with DirectRouting"] as const;

describe.each(BOTH)("%s", (backend) => {
  let cluster: Cluster;
  let stranger: Host;
  /** MACs that frames need: the uplinks' and the tunnel devices'. */
  let uplinks: readonly [string, string];
  let vteps: readonly [string, string];
  let strangerMac: string;

  let ping: Ping;
  let captures: Capture[];

  beforeAll(async () => {
    cluster = await createCluster({ backend });
    stranger = await cluster.lab.host("h9", { address: `${STRANGER}/24` });
    const { h1, h2 } = cluster;
    uplinks = [await h1.mac(), await h2.mac()];
    vteps = [await h1.mac("flannel.1"), await h2.mac("flannel.1")];
    strangerMac = await stranger.mac();
    return () => cluster.close();
  });

  beforeEach(async () => {
    const { a, b, c } = cluster;
    captures = await Promise.all([a, b, c].map((pod) => pod.capture("eth0", "ip")));
    ping = await a.startPing(b.address);
  });

  /** Ends ping and captures: nothing was lost, and nothing else was seen in any pod but what `sender` sent itself. */
  async function expectPeace(sender?: Pod): Promise<void> {
    await ping.replies(5);
    expect((await ping.stop()).lost).toEqual([]);
    const own = sender === undefined ? undefined : macBytes(await sender.mac());
    for (const capture of captures) {
      await capture.stop();
      const others = capture.frames().filter(({ bytes }) => {
        if (own?.equals(bytes.subarray(6, 12))) return false;
        const isPing = bytes[23] === 1 && (bytes[34] === 0 || bytes[34] === 8);
        return bytes.includes(TOKEN) || !isPing;
      });
      expect(others.map(({ bytes }) => bytes.toString("hex"))).toEqual([]);
    }
  }

  afterEach(async () => {
    if (ping.process.running) await ping.stop();
    for (const capture of captures) await capture.stop();
  });

  /** An inner frame to pod b, as from pod a unless told. */
  function inner(source = "172.7.21.2", destination = "172.7.22.2", to = vteps[1], from = vteps[0]): Buffer {
    return frame(to, from, ip4({ source, destination, body: { udp: [5000, 7001], data: TOKEN } }));
  }

  /** The frame of a tunnel packet to h2, as the stranger would send it. */
  function tunnel(change: Partial<Tunnel4> = {}): Buffer {
    const packet = { source: STRANGER, destination: "10.4.7.22", frame: inner(), ...change };
    return frame(uplinks[1], strangerMac, vxlan4(packet));
  }

  const fromNet = async (work: () => Promise<unknown>, host = cluster.h2) =>
    (await cluster.counted(host, work)).from_net ?? {};

  test("what a peer may send arrives, so that the rest of these tests can fail", async () => {
    const counts = await fromNet(() => inject(stranger, "eth0", [tunnel({ source: "10.4.7.21" })]));
    expect(counts.decapsulated).toBeGreaterThanOrEqual(1);
    const [, seenByB] = captures;
    await seenByB?.stop();
    expect(seenByB?.frames().filter(({ bytes }) => bytes.includes(TOKEN)).length).toBeGreaterThan(0);
  });

  test("from a stranger, for all inner sources", async () => {
    const frames = [
      "172.7.21.2",
      "172.7.21.0",
      STRANGER,
      "172.7.99.9",
      "172.7.22.3",
      "8.8.8.8",
      "127.0.0.1",
    ].map((source) => tunnel({ frame: inner(source) }));
    const counts = await fromNet(() => inject(stranger, "eth0", frames));
    expect(counts.drop_unknown_peer).toBe(frames.length);
    await expectPeace();
  });

  test("with a peer's outer address, but an inner source that is not the peer's", async () => {
    const sources = [
      "172.7.22.3",
      "172.7.22.1",
      "172.7.23.1",
      "10.4.7.22",
      STRANGER,
      "8.8.8.8",
      "127.0.0.1",
      "0.0.0.0",
    ];
    const frames = sources.map((source) => tunnel({ source: "10.4.7.21", frame: inner(source) }));
    // Sent by the peer itself too, in whose name it is.
    const own = frames.map((bytes) =>
      Buffer.concat([bytes.subarray(0, 6), macBytes(uplinks[0]), bytes.subarray(12)]),
    );
    const counts = await fromNet(async () => {
      await inject(stranger, "eth0", frames);
      await inject(cluster.h1, "eth0", own);
    });
    expect(counts.drop_forged).toBe(2 * frames.length);
    await expectPeace();
  });

  test("cut short at every length", async () => {
    const whole = tunnel({ source: "10.4.7.21", frame: inner() });
    const pieces = Array.from({ length: whole.length - 14 }, (_, length) => whole.subarray(0, 14 + length));
    await inject(stranger, "eth0", pieces);
    // The same lengths, with an outer header that fits what is there.
    const inside = inner();
    const fitting = Array.from({ length: inside.length }, (_, length) =>
      tunnel({ source: "10.4.7.21", frame: inside.subarray(0, length) }),
    );
    const counts = await fromNet(() => inject(stranger, "eth0", fitting));
    // Too short for Ethernet is the kernel's matter; from there to the last byte but one it is ours.
    expect(counts.drop_malformed).toBeGreaterThan(inside.length - 20);
    await expectPeace();
  });

  test("with other flags, another VNI, another port", async () => {
    const words = [0, 0x08000001, 0x88000000, 0xffffffff, 0x00000001, 0x0c000000, 0x08ff0000];
    const frames = [
      ...words.map((flags) => tunnel({ flags })),
      ...words.map((flags) => tunnel({ source: "10.4.7.21", flags, frame: inner("172.7.23.1") })),
      ...[0, 2, 0xffffff].map((vni) => tunnel({ source: "10.4.7.21", vni })),
      ...[4789, 8473, 0].map((port) => tunnel({ source: "10.4.7.21", port })),
    ];
    await inject(stranger, "eth0", frames);
    await expectPeace();
  });

  test("frames inside that are no IPv4 packet, or one that does not add up", async () => {
    const good = inner();
    const at = (offset: number, value: number) => {
      const changed = Buffer.from(good);
      changed[14 + offset] = value;
      return changed;
    };
    const frames = [
      at(0, 0x65),
      at(0, 0x44),
      at(0, 0x4f),
      at(2, 0xff),
      at(3, 0),
      at(3, 19),
      frame(vteps[1], vteps[0], good.subarray(14), 0x86dd),
      frame(vteps[1], vteps[0], good.subarray(14), 0x8100),
      frame("ff:ff:ff:ff:ff:ff", vteps[0], good.subarray(14), 0x0806),
      frame("02:00:00:00:00:01", vteps[0], good.subarray(14)),
    ].map((bytes) => tunnel({ source: "10.4.7.21", frame: bytes }));
    await inject(stranger, "eth0", frames);
    await expectPeace();
  });

  test("random bytes to the tunnel's port", async () => {
    let state = 12345;
    const random = (length: number) =>
      Buffer.from(
        Array.from({ length }, () => {
          state = (Math.imul(state, 1103515245) + 12345) >>> 0;
          return state >>> 24;
        }),
      );
    const frames = Array.from({ length: 300 }, (_, index) => {
      const source = index % 2 === 0 ? STRANGER : "10.4.7.21";
      const udp = [4000 + index, 8472] as const;
      const body = { udp, data: random(1 + ((index * 37) % 1400)) };
      return frame(uplinks[1], strangerMac, ip4({ source, destination: "10.4.7.22", body }));
    });
    await inject(stranger, "eth0", frames);
    await expectPeace();
  });

  test("in fragments, and with IP options", async () => {
    const cases = [
      { source: STRANGER, inside: inner() },
      { source: "10.4.7.21", inside: inner("172.7.22.3") },
      { source: "10.4.7.21", inside: inner("8.8.8.8") },
    ];
    const frames: Buffer[] = [];
    let id = 1;
    for (const { source, inside } of cases) {
      const options = Buffer.from([1, 1, 1, 0]);
      frames.push(tunnel({ source, frame: inside, options }));
      const datagram = tunnel({ source, frame: inside }).subarray(34);
      for (const first of [8, 16, 24, 32, 48, 64]) {
        for (const order of [false, true]) {
          const pieces = [
            { moreFragments: true, fragmentOffset: 0, data: datagram.subarray(0, first) },
            { moreFragments: false, fragmentOffset: first / 8, data: datagram.subarray(first) },
          ].map(({ data, ...fragment }) => {
            const packet = {
              source,
              destination: "10.4.7.22",
              id,
              ...fragment,
              body: { protocol: 17, data },
            };
            return frame(uplinks[1], strangerMac, ip4(packet));
          });
          frames.push(...(order ? pieces.reverse() : pieces));
          id++;
        }
      }
    }
    await inject(stranger, "eth0", frames);
    // An answer of the stack's own would betray what was put together.
    await expectPeace();
  });

  describe("by a pod of the node", () => {
    /** A tunnel packet as a pod would send it, through its gateway. */
    async function send(pod: Pod, gateway: Host, source: string, destination: string, inside: Buffer) {
      const [to, from] = [await gateway.mac("docker0"), await pod.mac()];
      await inject(pod, "eth0", [frame(to, from, vxlan4({ source, destination, frame: inside }))]);
    }

    test.each([
      ["to its own node", "10.4.7.21"],
      ["to the other node", "10.4.7.22"],
    ])("%s", async (_, destination) => {
      const { c, h1, h2 } = cluster;
      const own = destination === h1.address;
      const inside = own
        ? inner("172.7.22.2", "172.7.21.2", vteps[0], vteps[1])
        : inner("172.7.21.2", "172.7.22.2");
      const counts = await cluster.counted(h1, () => send(c, h1, c.address, destination, inside));
      expect(counts.from_pod?.drop_pod_tunnel).toBe(1);
      // In the node's own name, it is no better.
      await send(c, h1, own ? h2.address : h1.address, destination, inside);
      await expectPeace(c);
    });

    test("to its gateway, to the tunnel device's address, and to all", async () => {
      const { c, h1 } = cluster;
      const inside = inner("172.7.22.2", "172.7.21.2", vteps[0], vteps[1]);
      const counts = await cluster.counted(h1, async () => {
        for (const destination of ["172.7.21.1", "172.7.21.0", "172.7.22.0", "172.7.22.1", "172.7.21.255"])
          await send(c, h1, c.address, destination, inside);
      });
      const dropped = (counts.from_pod?.drop_pod_tunnel ?? 0) + (counts.from_overlay?.drop_forged ?? 0);
      expect(dropped).toBeGreaterThanOrEqual(2);
      await expectPeace(c);
    });
  });
});

function macBytes(text: string): Buffer {
  return Buffer.from(text.replaceAll(":", ""), "hex");
}
