/** Writes the measured rows into test/README.md, between two markers that it finds there, or adds at the end. */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { arch, cpus, release } from "node:os";
import { join } from "node:path";
import { repository } from "../lab.ts";
import { CONNECTIONS, type Loss, type Row } from "./world.ts";

const README = join(repository, "test/README.md");
const BEGIN = "<!-- faults: written by make fault -->";
const END = "<!-- faults: end -->";

const HEAD = `# Tests

| command | what it runs |
|---|---|
| \`make test\` | all tests, and the quick faults of the table below |
| \`make fault\` | every fault of the table below, and writes the table |
| \`make soak\` | ten minutes of churn, and counts what is left over |

## Faults

Three nodes, a pod on each, etcd. A fault is done to the first node or to etcd. Untouched is the way between pods of
the other two nodes, touched that between pods of the first and the second; each has a ping of at least 100 packets a second,
and ${CONNECTIONS} TCP connections share them, whose every byte is compared. The time is from the end of the cause until the
touched way carried packets again, or until the kernel's state was mended. The last column is what flanneld does, by
its source; it was not run here.
`;

export function writeTable(rows: readonly Row[]): void {
  const columns = ["fault", "untouched", "touched", "TCP broken", "back", "flanneld, by its source"];
  const lines = rows.map((row) => {
    const { fault, untouched, touched, broken, brokenUntouched } = row;
    const count = `${broken.length + brokenUntouched.length} of ${CONNECTIONS}`;
    return [fault.name, loss(untouched), loss(touched), count, timeOf(row), fault.flanneld];
  });
  const table = [columns, columns.map(() => "---"), ...lines].map((cells) => `| ${cells.join(" | ")} |`);
  const machine = `Linux ${release()}, ${arch()}, ${cpus().length} processors shared with other work.`;
  const block = [BEGIN, "", ...table, "", machine, "", END].join("\n");
  const text = existsSync(README) ? readFileSync(README, "utf8") : `${HEAD}\n${BEGIN}\n${END}\n`;
  const [from, to] = [text.indexOf(BEGIN), text.indexOf(END)];
  const next =
    from < 0 || to < from
      ? `${text.trimEnd()}\n\n## Faults\n\n${block}\n`
      : text.slice(0, from) + block + text.slice(to + END.length);
  writeFileSync(README, next);
}

const loss = ({ lost, sent }: Loss): string => `${lost} of ${sent}`;

function timeOf({ fault, touched, back, mended, remark }: Row): string {
  const words: string[] = fault.everywhere === true ? ["done to all nodes"] : [];
  if (fault.spoils !== true) words.push(touched.lost === 0 ? "never away" : `${Math.round(back ?? 0)} ms`);
  if (mended !== undefined)
    words.push(`mended in ${mended < 1000 ? `${Math.ceil(mended)} ms` : `${(mended / 1000).toFixed(1)} s`}`);
  if (remark !== undefined) words.push(remark);
  return words.join("; ");
}
