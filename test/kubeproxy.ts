/**
 * kube-proxy's rules for given services, as one node of a cluster has them: in the iptables form and in the
 * nftables form. Chains, marks and the order of rules are kube-proxy's; names are readable instead of hashed.
 *
 * A service has a cluster IP, and maybe a port on every node. Who reaches a service from outside the cluster, and
 * a pod that reaches itself, is masqueraded; with the external traffic policy Local, who comes by a node's port is
 * not, and gets to pods of that node alone.
 */

export interface Endpoint {
  readonly address: string;
  readonly port: number;
  /** It is a pod of the node whose rules are made. */
  readonly local: boolean;
}

export interface Service {
  readonly name: string;
  readonly protocol: "tcp" | "udp";
  readonly clusterIp: string;
  readonly port: number;
  readonly nodePort?: number;
  /** Seconds for which a client stays with its endpoint. */
  readonly affinity?: number;
  readonly externalTrafficPolicy?: "Cluster" | "Local";
  readonly endpoints: readonly Endpoint[];
}

const MARK = "0x4000";

/** Input for `iptables-restore --noflush`. `pods` are the addresses of all pods of the cluster. */
export function iptablesRules(services: readonly Service[], pods: string): string {
  const nat = [
    "*nat",
    ...["SERVICES", "NODEPORTS", "POSTROUTING", "MARK-MASQ"].map((name) => `:KUBE-${name} - [0:0]`),
    '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
    `-A KUBE-MARK-MASQ -j MARK --or-mark ${MARK}`,
    `-A KUBE-POSTROUTING -m mark ! --mark ${MARK}/${MARK} -j RETURN`,
    `-A KUBE-POSTROUTING -j MARK --xor-mark ${MARK}`,
    "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
  ];
  const filter = [
    "*filter",
    ...["FORWARD", "FIREWALL", "SERVICES", "EXTERNAL-SERVICES", "NODEPORTS", "PROXY-FIREWALL"].map(
      (name) => `:KUBE-${name} - [0:0]`,
    ),
    "-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL",
    "-A INPUT -j KUBE-NODEPORTS",
    "-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES",
    "-A INPUT -j KUBE-FIREWALL",
    // It puts its jumps before all others, the last one first.
    "-I FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES",
    "-I FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES",
    "-I FORWARD -j KUBE-FORWARD",
    "-I FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL",
    "-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES",
    "-A OUTPUT -j KUBE-FIREWALL",
    "-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
    "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    `-A KUBE-FORWARD -m mark --mark ${MARK}/${MARK} -j ACCEPT`,
    "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
  ];
  for (const service of services) {
    const { name, protocol, clusterIp, port, nodePort, affinity, endpoints } = service;
    const comment = `-m comment --comment "default/${name}"`;
    const portal = `-d ${clusterIp}/32 -p ${protocol} -m ${protocol} --dport ${port}`;
    const isLocal = service.externalTrafficPolicy === "Local";
    if (endpoints.length === 0) {
      filter.push(`-A KUBE-SERVICES ${portal} ${comment} -j REJECT --reject-with icmp-port-unreachable`);
      continue;
    }
    nat.push(`:KUBE-SVC-${name} - [0:0]`);
    nat.push(`-A KUBE-SERVICES ${portal} ${comment} -j KUBE-SVC-${name}`);
    nat.push(`-A KUBE-SVC-${name} ! -s ${pods} ${portal} ${comment} -j KUBE-MARK-MASQ`);
    endpoints.forEach(({ address, port: target }, index) => {
      const chain = `KUBE-SEP-${name}-${index}`;
      const remember = affinity === undefined ? "" : ` -m recent --name ${chain} --set --rsource`;
      nat.push(`:${chain} - [0:0]`);
      nat.push(`-A ${chain} -s ${address}/32 ${comment} -j KUBE-MARK-MASQ`);
      nat.push(
        `-A ${chain} -p ${protocol} ${comment}${remember} -m ${protocol} -j DNAT --to-destination ${address}:${target}`,
      );
    });
    const chains = endpoints.map((endpoint, index) => ({ ...endpoint, chain: `KUBE-SEP-${name}-${index}` }));
    nat.push(...choose(`KUBE-SVC-${name}`, chains, service, comment));
    if (nodePort === undefined) continue;
    nat.push(`:KUBE-EXT-${name} - [0:0]`);
    nat.push(
      `-A KUBE-NODEPORTS -p ${protocol} ${comment} -m ${protocol} --dport ${nodePort} -j KUBE-EXT-${name}`,
    );
    if (!isLocal) {
      nat.push(`-A KUBE-EXT-${name} ${comment} -j KUBE-MARK-MASQ`);
      nat.push(`-A KUBE-EXT-${name} -j KUBE-SVC-${name}`);
      continue;
    }
    const near = chains.filter(({ local }) => local);
    nat.push(
      `:KUBE-SVL-${name} - [0:0]`,
      `-A KUBE-EXT-${name} -s ${pods} ${comment} -j KUBE-SVC-${name}`,
      `-A KUBE-EXT-${name} -m addrtype --src-type LOCAL ${comment} -j KUBE-MARK-MASQ`,
      `-A KUBE-EXT-${name} -m addrtype --src-type LOCAL ${comment} -j KUBE-SVC-${name}`,
      `-A KUBE-EXT-${name} -j KUBE-SVL-${name}`,
      ...choose(`KUBE-SVL-${name}`, near, service, comment),
    );
    if (near.length > 0) continue;
    const external = `-p ${protocol} -m addrtype --dst-type LOCAL -m ${protocol} --dport ${nodePort}`;
    filter.push(`-A KUBE-EXTERNAL-SERVICES ${external} ${comment} -j DROP`);
  }
  nat.push("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS", "COMMIT");
  filter.push("COMMIT");
  // Chains are declared before any rule speaks of them.
  return [nat, filter]
    .flatMap((lines) => [...lines].sort((a, b) => rank(a) - rank(b)))
    .join("\n")
    .concat("\n");
}

function rank(line: string): number {
  return line.startsWith("*") ? 0 : line.startsWith(":") ? 1 : line === "COMMIT" ? 3 : 2;
}

/** The rules of a chain that picks one of several endpoints. */
function choose(
  chain: string,
  endpoints: readonly { readonly chain: string }[],
  { affinity }: Service,
  comment: string,
): string[] {
  const rules: string[] = [];
  if (affinity !== undefined) {
    for (const { chain: to } of endpoints) {
      const recent = `-m recent --name ${to} --rcheck --seconds ${affinity} --reap --rsource`;
      rules.push(`-A ${chain} ${comment} ${recent} -j ${to}`);
    }
  }
  endpoints.forEach(({ chain: to }, index) => {
    const left = endpoints.length - index;
    const chance = left === 1 ? "" : ` -m statistic --mode random --probability ${(1 / left).toFixed(11)}`;
    rules.push(`-A ${chain} ${comment}${chance} -j ${to}`);
  });
  return rules;
}

/** Input for `nft -f`. */
export function nftRules(services: readonly Service[], pods: string): string {
  const chains: string[] = [];
  const sets: string[] = [];
  const portals: string[] = [];
  const nodePorts: string[] = [];
  const refused: string[] = [];
  const chain = (name: string, ...rules: readonly string[]): void => {
    chains.push(`chain ${name} {\n${rules.map((rule) => `  ${rule}`).join("\n")}\n}`);
  };
  for (const service of services) {
    const { name, protocol, clusterIp, port, nodePort, affinity, endpoints } = service;
    const isLocal = service.externalTrafficPolicy === "Local";
    if (endpoints.length === 0) {
      refused.push(`${clusterIp} . ${protocol} . ${port} : goto reject-chain`);
      continue;
    }
    const targets = endpoints.map((endpoint, index) => ({
      ...endpoint,
      chain: `endpoint-${name}-${index}`,
      clients: `affinity-${name}-${index}`,
    }));
    for (const { address, port: target, chain: to, clients } of targets) {
      if (affinity !== undefined) {
        sets.push(`set ${clients} { type ipv4_addr; flags dynamic,timeout; timeout ${affinity}s; }`);
      }
      chain(
        to,
        `ip saddr ${address} jump mark-for-masquerade`,
        ...(affinity === undefined ? [] : [`update @${clients} { ip saddr }`]),
        `meta l4proto ${protocol} dnat to ${address}:${target}`,
      );
    }
    const pick = (from: typeof targets): string[] => [
      ...(affinity === undefined
        ? []
        : from.map(({ chain: to, clients }) => `ip saddr @${clients} goto ${to}`)),
      `numgen random mod ${from.length} vmap { ${from.map(({ chain: to }, i) => `${i} : goto ${to}`).join(", ")} }`,
    ];
    chain(
      `service-${name}`,
      `ip daddr ${clusterIp} ${protocol} dport ${port} ip saddr != ${pods} jump mark-for-masquerade`,
      ...pick(targets),
    );
    portals.push(`${clusterIp} . ${protocol} . ${port} : goto service-${name}`);
    if (nodePort === undefined) continue;
    nodePorts.push(`${protocol} . ${nodePort} : goto external-${name}`);
    const near = targets.filter(({ local }) => local);
    if (isLocal) {
      chain(
        `external-${name}`,
        `ip saddr ${pods} goto service-${name}`,
        "fib saddr type local jump mark-for-masquerade",
        `fib saddr type local goto service-${name}`,
        ...(near.length > 0 ? pick(near) : []),
      );
    } else {
      chain(`external-${name}`, "jump mark-for-masquerade", `goto service-${name}`);
    }
  }
  const map = (name: string, type: string, elements: readonly string[]): string => {
    const content = elements.length === 0 ? "" : ` elements = { ${elements.join(", ")} }`;
    return `map ${name} { type ${type} : verdict;${content} }`;
  };
  const portal = "ipv4_addr . inet_proto . inet_service";
  return `table ip kube-proxy {
${[
  ...sets,
  map("no-endpoint-services", portal, refused),
  "chain reject-chain { reject; }",
  `chain mark-for-masquerade { meta mark set mark or ${MARK}; }`,
  ...chains,
  map("service-ips", portal, portals),
  map("service-nodeports", "inet_proto . inet_service", nodePorts),
].join("\n")}
chain masquerading {
  mark and ${MARK} == 0 return
  meta mark set mark xor ${MARK}
  masquerade fully-random
}
chain services {
  ip daddr . meta l4proto . th dport vmap @service-ips
  ip daddr != 127.0.0.0/8 fib daddr type local meta l4proto . th dport vmap @service-nodeports
}
chain service-endpoints-check {
  ip daddr . meta l4proto . th dport vmap @no-endpoint-services
}
chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
chain nat-output { type nat hook output priority -100; jump services; }
chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
chain filter-prerouting { type filter hook prerouting priority -110; ct state new jump service-endpoints-check; }
chain filter-forward {
  type filter hook forward priority -110;
  ct state invalid drop
  ct state new jump service-endpoints-check
}
chain filter-output { type filter hook output priority -110; ct state new jump service-endpoints-check; }
}
`;
}
