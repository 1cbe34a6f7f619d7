/**
 * `twill completion`: what bash and zsh need to complete a command line. It is made from the commands themselves, so
 * that it knows exactly what they take, and it starts nothing when a key is pressed.
 */
import { Argument, Command, type Option } from "commander";

/** What a value is, for a shell that can list such things. */
type Kind = { readonly choices: readonly string[] } | "path" | "interface" | "other";

function kindOf(name: string, choices: readonly string[] | undefined): Kind {
  if (choices !== undefined) return { choices };
  if (/path|file|directory/.test(name)) return "path";
  return name === "interface" ? "interface" : "other";
}

interface Flag {
  readonly names: readonly string[];
  readonly description: string;
  /** Undefined for a switch. */
  readonly value: { readonly name: string; readonly kind: Kind; readonly required: boolean } | undefined;
}

interface Described {
  readonly name: string;
  readonly summary: string;
  readonly flags: readonly Flag[];
  /** Positional arguments. */
  readonly words: readonly { readonly name: string; readonly kind: Kind }[];
}

function describe(command: Command): Described {
  const help = command.createHelp();
  return {
    name: command.name(),
    summary: command.summary(),
    flags: help.visibleOptions(command).map(describeFlag),
    words: command.registeredArguments.map((argument) => ({
      name: argument.name(),
      kind: kindOf(argument.name(), argument.argChoices),
    })),
  };
}

function describeFlag(option: Option): Flag {
  const [, value] = /[<[]([^>\]]+)[>\]]/.exec(option.flags) ?? [];
  return {
    names: [option.short, option.long].filter((name) => name !== undefined && name !== null),
    description: option.description,
    value:
      value === undefined
        ? undefined
        : { name: value, kind: kindOf(value, option.argChoices), required: option.required },
  };
}

/** The commands under the program, `help` with the names of all as its choices. */
function describeAll(program: Command): {
  readonly program: Described;
  readonly commands: readonly Described[];
} {
  const commands = program.createHelp().visibleCommands(program).map(describe);
  const choices = commands.map(({ name }) => name);
  return {
    program: describe(program),
    commands: commands.map((command) =>
      command.name === "help"
        ? {
            ...command,
            summary: "display help for a command",
            words: [{ name: "command", kind: { choices } }],
          }
        : command,
    ),
  };
}

const namesOf = (flags: readonly Flag[]): string => flags.flatMap(({ names }) => names).join(" ");

function bashWords(kind: Kind): string {
  if (kind === "path") return "compopt -o filenames; _twill_offer -f";
  if (kind === "interface") return '_twill_offer -W "$(ls /sys/class/net)"';
  return kind === "other" ? ":" : `_twill_offer -W "${kind.choices.join(" ")}"`;
}

/** Plain bash, without the package bash-completion. There, `=` is a word of its own. */
function bash(program: Command): string {
  const all = describeAll(program);
  // A value that may be missing is given by `=` alone; for one that must be there, `=` is the same as a blank.
  const values = new Map<string, string[]>();
  for (const command of all.commands) {
    for (const { names, value } of command.flags) {
      if (value === undefined) continue;
      const words = bashWords(value.kind);
      const patterns = names.flatMap((name) => [
        ...(value.required ? [`${command.name}:${name}`] : []),
        `${command.name}:${name}=`,
      ]);
      values.set(words, [...(values.get(words) ?? []), ...patterns]);
    }
  }
  return `# bash completion for twill; made by 'twill completion bash'
_twill_offer() {
  mapfile -t COMPREPLY < <(compgen "$@" -- "$current")
}
_twill() {
  local current=\${COMP_WORDS[COMP_CWORD]} previous=\${COMP_WORDS[COMP_CWORD-1]} equals= command= index
  if [[ $current == = ]]; then
    current= equals==
  elif [[ $previous == = ]]; then
    previous=\${COMP_WORDS[COMP_CWORD-2]} equals==
  fi
  for ((index = 1; index < COMP_CWORD; index++)); do
    [[ \${COMP_WORDS[index]} == -* ]] || { command=\${COMP_WORDS[index]}; break; }
  done
  COMPREPLY=()
  case $command:$previous$equals in
${[...values].map(([words, patterns]) => `    ${patterns.join("|")}) ${words}; return ;;`).join("\n")}
  esac
  case $command:$current in
    :-*) _twill_offer -W "${namesOf(all.program.flags)}" ;;
    :*) _twill_offer -W "${all.commands.map(({ name }) => name).join(" ")}" ;;
${all.commands
  .flatMap((command) => [
    `    ${command.name}:-*) _twill_offer -W "${namesOf(command.flags)}" ;;`,
    ...command.words
      .slice(0, 1)
      .filter(({ kind }) => kind !== "other")
      .map(({ kind }) => `    ${command.name}:*) ${bashWords(kind)} ;;`),
  ])
  .join("\n")}
  esac
}
complete -F _twill twill
`;
}

/** Text within a description of _arguments, in single quotes. */
const zshText = (text: string): string => text.replace(/[[\]:\\]/g, "\\$&").replaceAll("'", "'\\''");

function zshAction(kind: Kind): string {
  if (kind === "path") return "_files";
  if (kind === "interface") return "_net_interfaces";
  return kind === "other" ? " " : `(${kind.choices.join(" ")})`;
}

function zshFlag({ names, description, value }: Flag): string[] {
  return names.map((name) => {
    const others = names.length > 1 ? `(${names.join(" ")})` : "";
    const text = `[${zshText(description)}]`;
    if (value === undefined) return `'${others}${name}${text}'`;
    // Long ones take their value behind `=`, and a required one as the next word too.
    const equals = name.startsWith("--") ? (value.required ? "=" : "=-") : value.required ? "" : "-";
    const colon = value.required ? ":" : "::";
    return `'${others}${name}${equals}${text}${colon}${zshText(value.name)}:${zshAction(value.kind)}'`;
  });
}

function zsh(program: Command): string {
  const all = describeAll(program);
  const lines = (specs: readonly string[]): string => specs.map((spec) => ` \\\n        ${spec}`).join("");
  return `#compdef twill
# zsh completion for twill; made by 'twill completion zsh'
_twill() {
  local curcontext=$curcontext state line
  local -a commands=(
${all.commands.map(({ name, summary }) => `    '${name}:${zshText(summary)}'`).join("\n")}
  )
  _arguments -C${lines([...all.program.flags.flatMap(zshFlag), "'1:command:->command'", "'*::argument:->argument'"])}
  case $state in
    command) _describe command commands ;;
    argument)
      case $words[1] in
${all.commands
  .map(({ name, flags, words }) => {
    const positional = words.map((word) => `'::${zshText(word.name)}:${zshAction(word.kind)}'`);
    return `      ${name}) _arguments${lines([...flags.flatMap(zshFlag), ...positional])} ;;`;
  })
  .join("\n")}
      esac ;;
  esac
}
if [[ $funcstack[1] == _twill ]]; then _twill "$@"; else compdef _twill twill; fi
`;
}

export function command(): Command {
  const made = new Command("completion")
    .description(
      "Prints what the shell needs to complete the commands of twill and their options. For this shell alone: source <(twill completion bash)",
    )
    .addArgument(new Argument("<shell>", "which shell").choices(["bash", "zsh"]));
  return made.action((shell: "bash" | "zsh") => {
    if (made.parent === null) throw new Error("completion is a command of twill");
    process.stdout.write(shell === "bash" ? bash(made.parent) : zsh(made.parent));
  });
}
