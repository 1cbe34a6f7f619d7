/**
 * `extension`: packets travel as commands of the network config have it. They are run when a node starts, when it has
 * its subnet, and for each peer that comes or goes; between nodes the kernel forwards by what they set up.
 */
import {
  type BackendCommands,
  type BackendKind,
  NO_ROWS,
  NO_TUNNEL,
  refusesOthers,
  wayTo,
} from "../backend.ts";
import { type Command, CommandError, splitWords } from "../command.ts";
import { formatCidr, formatIpv4 } from "../ipv4.ts";
import { JsonError, JsonObject } from "../json.ts";

const NAMES = ["PreStartupCommand", "PostStartupCommand", "SubnetAddCommand", "SubnetRemoveCommand"] as const;
type Name = (typeof NAMES)[number];

const TIMEOUT_DEFAULT = 30;
const TIMEOUT_MAX = 3600;

export interface ExtensionBackend {
  readonly type: "extension";
  /** The commands that there are, as text. */
  readonly commands: Readonly<Partial<Record<Name, string>>>;
  /** They are run by `sh -c`. */
  readonly shell: boolean;
  /** How long each may take. */
  readonly timeoutSeconds: number;
}

/** Reads the options; `Shell` and `Timeout` are ours, and flannel ignores them. Throws JsonError. */
export function readExtension(options: JsonObject): ExtensionBackend {
  const shell = options.boolean("Shell") ?? false;
  const timeoutSeconds = options.integer("Timeout") ?? TIMEOUT_DEFAULT;
  if (timeoutSeconds < 1 || timeoutSeconds > TIMEOUT_MAX)
    throw new JsonError(`Backend.Timeout must be 1 to ${TIMEOUT_MAX} seconds: it is ${timeoutSeconds}`);
  const commands: Partial<Record<Name, string>> = {};
  for (const name of NAMES) {
    const text = (options.text(name) ?? "").trim();
    if (text === "") continue;
    if (text.includes("\0")) throw new JsonError(`Backend.${name} has a zero byte in it`);
    if (!shell) checkWords(name, text);
    commands[name] = text;
  }
  return { type: "extension", commands, shell, timeoutSeconds };
}

function checkWords(name: Name, text: string): void {
  try {
    splitWords(text, () => "");
  } catch (error) {
    if (!(error instanceof CommandError)) throw error;
    throw new JsonError(
      `Backend.${name} is run without a shell, and ${error.message}: quote it, or set Backend.Shell to true`,
    );
  }
}

export function extension(backend: ExtensionBackend): BackendKind {
  return {
    mtu: (uplinkMtu) => uplinkMtu,
    // Pods of one node, and what leaves for the outside.
    forwards: true,
    direct: false,
    device: undefined,
    commands: commandsOf(backend),
    attributes: ({ publicIp, data }) => ({
      ...{ publicIp, backendType: "extension", vtepMac: undefined, vni: undefined },
      ...(data === undefined ? {} : { data }),
    }),
    refuses: refusesOthers("extension"),
    rows(lease, path, facts) {
      const { subnet, prefixLength, publicIp } = wayTo(lease, path, facts);
      return { ...NO_ROWS, peer: { publicIp, subnet, prefixLength } };
    },
    programs: NO_TUNNEL,
  };
}

/** The commands that have this `text`. Throws JsonError. */
export function commandsFrom(text: string): BackendCommands {
  return commandsOf(readExtension(JsonObject.parse(text, "the backend")));
}

function commandsOf({ commands, shell, timeoutSeconds }: ExtensionBackend): BackendCommands {
  const commandOf = (
    name: Name,
    own: Readonly<Record<string, string>>,
    inherited: Readonly<Record<string, string>>,
    input = "",
  ): Command | undefined => {
    const text = commands[name];
    if (text === undefined) return undefined;
    const argv = shell
      ? ["/bin/sh", "-c", text]
      : splitWords(text, (variable) => own[variable] ?? inherited[variable] ?? "");
    // flannel ends the input with a newline, so that `read` in a shell succeeds.
    return { name, argv, environment: own, input: `${input}\n`, timeoutMs: timeoutSeconds * 1000 };
  };
  return {
    text: JSON.stringify({ Type: "extension", ...commands, Shell: shell, Timeout: timeoutSeconds }),
    preStartup: (inherited) => commandOf("PreStartupCommand", {}, inherited),
    postStartup: ({ network, subnet, publicIp }, inherited) =>
      commandOf(
        "PostStartupCommand",
        { NETWORK: formatCidr(network), SUBNET: formatCidr(subnet), PUBLIC_IP: formatIpv4(publicIp) },
        inherited,
      ),
    subnetAdd: ({ subnet, publicIp, data }, inherited) =>
      commandOf(
        "SubnetAddCommand",
        { SUBNET: formatCidr(subnet), PUBLIC_IP: formatIpv4(publicIp) },
        inherited,
        data,
      ),
    subnetRemove: ({ subnet, publicIp, data }, inherited) =>
      commandOf(
        "SubnetRemoveCommand",
        { SUBNET: formatCidr(subnet), PUBLIC_IP: formatIpv4(publicIp) },
        inherited,
        data,
      ),
  };
}
