import { describe, expect, test } from "vitest";
import { kindOf } from "../../src/core/backends.ts";
import { splitWords } from "../../src/core/command.ts";
import { parseCidr, parseIpv4 } from "../../src/core/ipv4.ts";
import type { Lease } from "../../src/core/model.ts";
import { parseNetwork } from "../../src/core/network.ts";

const VALUES: Record<string, string> = { SUBNET: "10.3.2.0/24", TWO: "a b; c", EMPTY: "" };
const split = (text: string): string[] => splitWords(text, (name) => VALUES[name] ?? "");

describe("a command becomes a program and its arguments", () => {
  test.each<[string, string[]]>([
    ["", []],
    ["  \t\n", []],
    ["ip route add $SUBNET  via\t$NONE", ["ip", "route", "add", "10.3.2.0/24", "via", ""]],
    [`a\${SUBNET}b $SUBNETS $1 $ 100%`, ["a10.3.2.0/24b", "", "$1", "$", "100%"]],
    // A value stays one argument, and what is in it is not read again.
    ["run $TWO '$TWO' \"$TWO\" $EMPTY", ["run", "a b; c", "$TWO", "a b; c", ""]],
    [`sh -c 'echo "$SUBNET" | cat; date > x'`, ["sh", "-c", `echo "$SUBNET" | cat; date > x`]],
    [`a"b c"d'e f' "" ''`, ["ab cde f", "", ""]],
    [String.raw`a\ b \$SUBNET "\$SUBNET \" \\ \n" 'a\b'`, ["a b", "$SUBNET", `$SUBNET " \\ \\n`, "a\\b"]],
    [String.raw`end\ `.trim(), ["end\\"]],
    ["*.txt ~ #x a=b", ["*.txt", "~", "#x", "a=b"]],
  ])("%j", (text, words) => {
    expect(split(text)).toEqual(words);
  });

  test.each([
    ["a; b", '";" is for a shell to understand'],
    ["a && b", '"&" is for a shell to understand'],
    ["a | b", '"|" is for a shell to understand'],
    ["a > b", '">" is for a shell to understand'],
    ["a `b`", '"`" is for a shell to understand'],
    ['a "$(b)"', '"$(" is for a shell to understand'],
    ["a 'b", "a quote (') has no end"],
    ['a "b', 'a quote (") has no end'],
  ])("%j does not", (text, message) => {
    expect(() => split(text)).toThrow(message);
  });
});

describe("the config", () => {
  const parse = (options: object) =>
    parseNetwork(JSON.stringify({ Network: "10.3.0.0/16", Backend: { Type: "extension", ...options } }));
  const lease: Lease = {
    subnet: parseCidr("10.3.2.0/24") ?? fail(),
    publicIp: parseIpv4("192.168.0.2") ?? fail(),
    backendType: "extension",
    vtepMac: undefined,
    vni: undefined,
    data: "0a:00:00:00:00:01",
  };

  test("each command has its environment and its input", () => {
    const result = parse({
      prestartupcommand: "cat /sys/class/net/x/address",
      PostStartupCommand: "setup $NETWORK $SUBNET $PUBLIC_IP $HOME",
      SubnetAddCommand: " ip route add $SUBNET via $PUBLIC_IP ",
      SubnetRemoveCommand: "",
      Timeout: 5,
    });
    if ("error" in result) throw new Error(result.error);
    const { commands } = kindOf(result.network.backend);
    const inherited = { HOME: "/root", SUBNET: "of the daemon" };
    const common = { timeoutMs: 5000 };
    expect(commands?.preStartup(inherited)).toEqual({
      ...common,
      name: "PreStartupCommand",
      argv: ["cat", "/sys/class/net/x/address"],
      environment: {},
      input: "\n",
    });
    const node = { network: result.network.network, subnet: lease.subnet, publicIp: lease.publicIp };
    expect(commands?.postStartup(node, inherited)).toEqual({
      ...common,
      name: "PostStartupCommand",
      argv: ["setup", "10.3.0.0/16", "10.3.2.0/24", "192.168.0.2", "/root"],
      environment: { NETWORK: "10.3.0.0/16", SUBNET: "10.3.2.0/24", PUBLIC_IP: "192.168.0.2" },
      input: "\n",
    });
    expect(commands?.subnetAdd(lease, inherited)).toEqual({
      ...common,
      name: "SubnetAddCommand",
      argv: ["ip", "route", "add", "10.3.2.0/24", "via", "192.168.0.2"],
      environment: { SUBNET: "10.3.2.0/24", PUBLIC_IP: "192.168.0.2" },
      input: "0a:00:00:00:00:01\n",
    });
    expect(commands?.subnetRemove(lease, inherited)).toBeUndefined();
  });

  test("a shell only when asked", () => {
    const SubnetAddCommand = "read mac; arp -s $SUBNET $mac && true";
    const asked = parse({ SubnetAddCommand, Shell: true });
    if ("error" in asked) throw new Error(asked.error);
    expect(kindOf(asked.network.backend).commands?.subnetAdd(lease, {})?.argv).toEqual([
      "/bin/sh",
      "-c",
      SubnetAddCommand,
    ]);
    expect(parse({ SubnetAddCommand })).toEqual({
      error: expect.stringMatching(
        /^Backend.SubnetAddCommand is run without a shell, and ";" .*: quote it, or set Backend.Shell to true$/,
      ),
    });
  });

  test.each<[object, RegExp]>([
    [{ SubnetAddCommand: 5 }, /^Backend.SubnetAddCommand must be text, not 5/],
    [{ PostStartupCommand: "a\0b" }, /^Backend.PostStartupCommand has a zero byte in it/],
    [{ Timeout: 0 }, /^Backend.Timeout must be 1 to 3600 seconds: it is 0/],
    [{ Timeout: 3601 }, /^Backend.Timeout must be 1 to 3600 seconds/],
    [{ Shell: "yes" }, /^Backend.Shell must be true or false/],
  ])("%j is refused", (options, reason) => {
    expect(parse(options)).toEqual({ error: expect.stringMatching(reason) });
  });
});

function fail(): never {
  throw new Error("unreachable");
}
