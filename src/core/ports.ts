/**
 * Sets of ports as the kernel writes them in net.ipv4.ip_local_reserved_ports: "8080,61000-65535". The ports of
 * masqueraded connections are added to those that no socket is given by chance, and taken out again at the end;
 * what others have reserved stays as it is.
 */

type Range = readonly [first: number, last: number];

/** Ports of a text, each once. Throws on text that the kernel would not write. */
function portsOf(text: string): Set<number> {
  const ports = new Set<number>();
  for (const part of text.split(",").map((each) => each.trim())) {
    if (part === "") continue;
    const match = /^(\d+)(?:-(\d+))?$/.exec(part);
    if (match === null) throw new RangeError(`"${part}" in "${text}" is no range of ports`);
    const last = Number(match[2] ?? match[1]);
    for (let port = Number(match[1]); port <= last; port++) ports.add(port);
  }
  return ports;
}

function textOf(ports: ReadonlySet<number>): string {
  const ranges: Range[] = [];
  for (const port of [...ports].sort((a, b) => a - b)) {
    const before = ranges.at(-1);
    if (before !== undefined && before[1] === port - 1) ranges[ranges.length - 1] = [before[0], port];
    else ranges.push([port, port]);
  }
  return ranges.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(",");
}

/**
 * The set `reserved` once `ours` of an earlier run are given back and `wanted` are reserved; and which of these are
 * ours then, because nobody had reserved them before.
 */
export function reservePorts(
  reserved: string,
  ours: string,
  wanted: string,
): { readonly reserved: string; readonly ours: string } {
  const mine = portsOf(ours);
  const others = new Set([...portsOf(reserved)].filter((port) => !mine.has(port)));
  const add = [...portsOf(wanted)].filter((port) => !others.has(port));
  return { reserved: textOf(new Set([...others, ...add])), ours: textOf(new Set(add)) };
}
