/** What may happen to the backends whose tunnel the programs alone open and close: nothing of the kernel is beneath. */
import { announced, CUT_MS, detachUplink, EVENT_MS } from "./drift.ts";
import { killOften } from "./life.ts";
import type { Fault } from "./world.ts";

function faultsOf(backend: "ipip" | "udp"): Fault[] {
  const [device, route, carrier] =
    backend === "ipip"
      ? ["flannel.ipip", "172.7.22.0/24 via 10.4.7.22", "the kernel carries the packets: nothing is lost"]
      : ["flannel0", "172.7.0.0/16", "its process carries the packets: none until it is back"];
  const [subnet = ""] = route.split(" ");
  const there = new RegExp(`${`${route} dev ${device} `.replaceAll(".", "\\.")}`);
  const world = { backend };
  return [
    {
      name: `${backend}: \`${device}\` deleted`,
      flanneld: "not known",
      quick: true,
      world,
      cuts: CUT_MS,
      mend: CUT_MS,
      run: async (now) => {
        const link = new RegExp(`\\d+: ${device.replaceAll(".", "\\.")}: `);
        const told = await announced(now, `ip link del ${device}`, link, there);
        await now.settled();
        return told;
      },
    },
    {
      name: `${backend}: the route by \`${device}\` deleted`,
      flanneld:
        backend === "ipip" ? "added again by a check each 10 s" : "not noticed: no pod reaches another node",
      quick: true,
      world,
      mend: EVENT_MS,
      run: (now) => announced(now, `ip route del ${subnet}`, there),
    },
    {
      name: `${backend}: a TCX link detached`,
      flanneld: "has no programs",
      quick: true,
      world,
      cuts: CUT_MS,
      mend: CUT_MS,
      run: detachUplink,
    },
    {
      name: `${backend}: the clsact qdisc deleted`,
      flanneld: "has no programs",
      quick: false,
      world: { backend, flags: ["--attach=clsact"] },
      cuts: CUT_MS,
      mend: EVENT_MS,
      run: (now) =>
        announced(
          now,
          "tc qdisc del dev eth0 clsact",
          /qdisc clsact ffff: dev eth0/,
          /filter dev eth0 ingress .* from_net/,
        ),
    },
    {
      name: `${backend}: \`twilld\` SIGKILLed every 2 s for 10 s`,
      flanneld: carrier,
      quick: false,
      world,
      run: (now) => killOften(now, 10_000),
    },
  ];
}

export const plain: readonly Fault[] = [...faultsOf("ipip"), ...faultsOf("udp")];
