/**
 * Certificates: those in PEM files, and those that a server shows; and what a server's clock says. No client of etcd
 * is needed for it, and none that refuses a certificate is of use, as what is wrong with it is the question.
 */
import { X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import { request as requestHttp } from "node:http";
import { request as requestHttps } from "node:https";
import type { TLSSocket } from "node:tls";

/** How long a certificate is valid, in milliseconds since the epoch, and whose it is. */
export interface Validity {
  readonly subject: string;
  readonly from: number;
  readonly to: number;
}

/** What a server says before it is asked for anything. */
export interface Greeting {
  /** Its clock less ours, in milliseconds, good to a second; undefined if it does not tell. */
  readonly skewMs: number | undefined;
  /** Its own certificate, then its issuers' as far as it sends them; none without TLS. */
  readonly certificates: readonly Validity[];
}

/** The certificates of a PEM file. Throws if the file can't be read or has none. */
export function readCertificates(path: string): Validity[] {
  const text = readFileSync(path, "latin1");
  const blocks = text.match(/-----BEGIN [^-]*CERTIFICATE-----[^-]+-----END [^-]*-----/g) ?? [text];
  return blocks.map((block) => validityOf(new X509Certificate(block)));
}

/**
 * Asks an http or https server for /version, which etcd answers anybody. Whatever it answers will do. Certificates are
 * shown and not judged. Rejects if there is no answer within so many milliseconds.
 */
export function greet(
  endpoint: string,
  files: { readonly keyFile?: string | undefined; readonly certFile?: string | undefined },
  withinMs: number,
): Promise<Greeting> {
  const { keyFile, certFile } = files;
  const secure = endpoint.startsWith("https:");
  const identity =
    keyFile === undefined || certFile === undefined
      ? {}
      : { key: readFileSync(keyFile), cert: readFileSync(certFile) };
  const options = { agent: false, timeout: withinMs, signal: AbortSignal.timeout(withinMs) };
  const url = new URL("/version", endpoint);
  return new Promise((resolve, reject) => {
    const certificates: Validity[] = [];
    const asked = secure
      ? requestHttps(url, { ...options, ...identity, rejectUnauthorized: false })
      : requestHttp(url, options);
    const begun = Date.now();
    asked.on("socket", (socket) =>
      socket.once("secureConnect", () => certificates.push(...shown(socket as TLSSocket))),
    );
    asked.on("response", (response) => {
      response.resume();
      const date = Date.parse(response.headers.date ?? "");
      // The header has whole seconds, and its moment lies between question and answer.
      const own = (begun + Date.now()) / 2;
      resolve({ skewMs: Number.isNaN(date) ? undefined : date + 500 - own, certificates });
    });
    asked.on("error", (error) => {
      // A server that refuses our certificate has shown its own before.
      if (certificates.length > 0) resolve({ skewMs: undefined, certificates });
      else reject(error);
    });
    asked.end();
  });
}

const CHAIN_MAX = 8;

function shown(socket: TLSSocket): Validity[] {
  const found: Validity[] = [];
  let next = socket.getPeerX509Certificate();
  for (; next !== undefined && found.length < CHAIN_MAX; next = next.issuerCertificate) {
    found.push(validityOf(next));
  }
  return found;
}

function validityOf(certificate: X509Certificate): Validity {
  const { subject, validFrom, validTo } = certificate;
  return {
    subject: subject?.replaceAll("\n", ", ") ?? "",
    from: Date.parse(validFrom),
    to: Date.parse(validTo),
  };
}
