/** `twill uninstall`: takes Twill off this node. */
import { Command } from "commander";
import { isTunnelDevice } from "../core/backends.ts";
import { destinationOf } from "../core/host.ts";
import { ROUTE_PROTOCOL } from "../core/image.ts";
import { contains, formatCidr, type Prefix } from "../core/ipv4.ts";
import { reservePorts } from "../core/ports.ts";
import { readConfig, removeDataplane } from "../edge/dataplane.ts";
import { RESERVED_PORTS, readSysctl, writeSysctl } from "../edge/host.ts";
import { readMasqueradeNote, removeRundir, runningDaemon } from "../edge/rundir.ts";
import { pinPathOption, Refusal, readDaemon, requirePrivilege, withNetlink } from "./common.ts";

/**
 * Takes everything out of the kernel that is there because of a pin path; with `keepRoutes` only what the kernel
 * can do without: the tunnel device and the routes by it are as flanneld makes them, and traffic goes on. The
 * lease in etcd is left to end by itself, and subnet.env to whoever reads it.
 */
function uninstall(pinPath: string, keepRoutes: boolean): string[] {
  requirePrivilege();
  const pid = runningDaemon(pinPath);
  if (pid !== undefined) throw new Refusal(`twilld still runs on ${pinPath} (process ${pid}): stop it first`);
  const config = readConfig(pinPath);
  const daemon = readDaemon(pinPath);
  const removed = withNetlink((netlink) => {
    const links = netlink.links();
    const gone = removeDataplane(
      pinPath,
      links.map(({ index }) => index),
    );
    const network =
      daemon?.network?.network ??
      (config === undefined
        ? undefined
        : { address: config.network4, length: lengthOf(config.network4_mask) });
    const overlay = config?.overlay_ifindex ?? 0;
    const isInNetwork = ({ address }: Prefix): boolean => network !== undefined && contains(network, address);
    for (const route of netlink.routes({ table: 254 })) {
      const isOurs = route.protocol === ROUTE_PROTOCOL || (overlay !== 0 && route.outIndex === overlay);
      if (!isOurs || !isInNetwork(route.destination)) continue;
      const { destination, gateway, outIndex, onlink, mtu, protocol, type, nexthopId } = route;
      if (keepRoutes) {
        if (nexthopId !== undefined)
          netlink.replaceRoute({ destination, gateway, outIndex, onlink, mtu, protocol });
        continue;
      }
      const by = nexthopId === undefined ? { gateway, outIndex } : { nexthopId };
      if (netlink.deleteRoute({ destination, type, ...by })) gone.push(`route ${formatCidr(destination)}`);
    }
    // flanneld, which has plain routes, leaves them when it puts its own in the place of ours.
    for (const { id, protocol } of netlink.nexthops())
      if (protocol === ROUTE_PROTOCOL && isInNetwork(destinationOf(id))) netlink.deleteNexthop(id);
    if (keepRoutes) return gone;
    const device = links.find((link) => isTunnelDevice(link) && link.index === overlay);
    const named = links.find((link) => isTunnelDevice(link) && link.name === daemon?.device);
    for (const link of new Set([device, named])) {
      if (link !== undefined && netlink.deleteLink(link.index)) gone.push(`device ${link.name}`);
    }
    return gone;
  });
  const note = readMasqueradeNote(pinPath);
  if (note !== undefined && note.reserved !== "") {
    const { reserved } = reservePorts(readSysctl(RESERVED_PORTS) ?? "", note.reserved, "");
    writeSysctl(RESERVED_PORTS, `${reserved}\n`);
    removed.push(`the reservation of ports ${note.reserved}`);
  }
  removeRundir(pinPath);
  return removed;
}

function lengthOf(mask: number): number {
  return 32 - Math.log2(0x100000000 - (mask >>> 0));
}

export function command(): Command {
  return new Command("uninstall")
    .description("Removes everything that Twill has in the kernel of this node. The daemon must have ended.")
    .addOption(pinPathOption())
    .option(
      "--keep-routes",
      "leave the tunnel device and the routes, for flanneld to take over without a gap",
    )
    .action((options: { pinPath: string; keepRoutes?: boolean }) => {
      const removed = uninstall(options.pinPath, options.keepRoutes === true);
      for (const what of removed) process.stdout.write(`removed ${what}\n`);
      process.stdout.write(
        removed.length === 0
          ? "nothing of Twill was there\n"
          : options.keepRoutes
            ? "nothing of Twill is left but the routes\n"
            : "nothing of Twill is left\n",
      );
    });
}
