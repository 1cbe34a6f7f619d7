/**
 * The command for people. It reads the pinned maps and the kernel itself, so that it works whether or not the
 * daemon runs; only what the daemon alone knows (the lease, etcd, refused records) comes from its status file.
 *
 * Exit codes: 0 all is well, 1 a failure or something that is not as it should be, 2 a command line that can't be
 * obeyed. docs/twill.md says which command means what by 1.
 */
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { Command, CommanderError } from "commander";

const ROOT = join(dirname(fileURLToPath(import.meta.url)), "..", "..");

/** The commands, in the order in which help lists them. Only the one that is asked for is loaded: most need libbpf. */
const COMMANDS: Readonly<
  Record<string, { readonly summary: string; load(): Promise<{ command(): Command }> }>
> = {
  status: {
    summary: "the node, its subnet, peers, programs and what became of packets",
    load: () => import("./cli/status.ts"),
  },
  peers: {
    summary: "the nodes this one forwards to, and how they are reached",
    load: () => import("./cli/peers.ts"),
  },
  endpoints: {
    summary: "the pods of this node",
    load: () => import("./cli/endpoints.ts"),
  },
  connections: {
    summary: "what pods have open to the outside (masquerade)",
    load: () => import("./cli/connections.ts"),
  },
  flows: {
    summary: "the flows that stay on the stack, which translates them",
    load: () => import("./cli/flows.ts"),
  },
  routes: {
    summary: "the kernel's own way to each peer, beneath the programs",
    load: () => import("./cli/routes.ts"),
  },
  drops: {
    summary: "what the programs dropped, and why",
    load: () => import("./cli/drops.ts"),
  },
  programs: {
    summary: "the programs, where they are attached, and what a run costs",
    load: () => import("./cli/programs.ts"),
  },
  trace: {
    summary: "what would become of a packet, hop by hop, by the programs in force",
    load: () => import("./cli/trace.ts"),
  },
  doctor: {
    summary: "what is wrong with this host, and what mends it",
    load: () => import("./cli/doctor.ts"),
  },
  monitor: {
    summary: "packets dropped, flows on the slow path, peers and programs that come and go, as it happens",
    load: () => import("./cli/monitor.ts"),
  },
  completion: {
    summary: "what bash or zsh needs to complete command lines",
    load: () => import("./cli/completion.ts"),
  },
  uninstall: {
    summary: "remove everything that Twill has in the kernel of this node",
    load: () => import("./cli/uninstall.ts"),
  },
};

/** The tree of commands, complete in those of `names`; of the others only what the list of commands says. */
async function build(names: readonly string[]): Promise<Command> {
  const { version } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as { version: string };
  const program = new Command("twill")
    .description("Shows what this node forwards, and takes Twill off it.")
    .version(version)
    .addHelpText(
      "after",
      "\nExit codes: 0 all is well, 1 a failure or something that is not as it should be, 2 a wrong command line.",
    );
  for (const [name, { summary, load }] of Object.entries(COMMANDS)) {
    const command = names.includes(name) ? (await load()).command() : new Command(name);
    program.addCommand(command.summary(summary));
  }
  for (const command of [program, ...program.commands]) {
    command
      .exitOverride()
      .showHelpAfterError(`('twill ${command === program ? "" : `${command.name()} `}--help' says more)`);
  }
  return program;
}

process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  // `twill status | head` is no failure.
  if (error.code === "EPIPE") process.exit(0);
  throw error;
});

try {
  // `twill help NAME` is that command's too, and completion knows them all.
  const [, , first = "", second = ""] = process.argv;
  const program = await build(first === "completion" ? Object.keys(COMMANDS) : [first, second]);
  await program.parseAsync();
} catch (error) {
  if (error instanceof CommanderError) {
    // Commander has said what is wrong, or printed the help that was asked for.
    process.exitCode = error.exitCode === 0 ? 0 : 2;
  } else {
    process.stderr.write(`twill: ${error instanceof Error ? error.message : String(error)}\n`);
    process.exitCode = 1;
  }
}
// A connection that is still being tried is no reason to stay; what a pipe has not taken yet is.
for (const stream of [process.stdout, process.stderr]) {
  await new Promise((resolve) => stream.write("", resolve));
}
process.exit();
