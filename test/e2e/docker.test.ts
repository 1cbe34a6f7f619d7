/**
 * Beside Docker: two hosts, each with a dockerd that took its options from our subnet file and has set up its own
 * rules, MASQUERADE and FORWARD policy DROP among them. Nothing is added to those rules or taken from them.
 *
 * An nginx on the second host must see every container of the first one at the container's own address, from the
 * first packet of a container on. Docker's MASQUERADE rule counts the packets that it changes, so its counter says
 * of all kinds of packets at once that none was.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type Container, Docker, makeImage } from "../docker.ts";
import { createLab, type Host, type Lab } from "../lab.ts";
import { startTwilld } from "../twilld.ts";
import { probe, serve, TCP_PORT, UDP_PORT } from "./cluster.ts";

const NETWORK = "172.7.0.0/16";
const BACKENDS = {
  vxlan: { Type: "vxlan" },
  "vxlan with DirectRouting": { Type: "vxlan", DirectRouting: true },
  "host-gw": { Type: "host-gw" },
};
const SHORT_LIVED = 8;
const GET = "curl -sS --max-time 5";

/** Two hosts of a lab with twilld and then Docker on each, which go to `dockers` as they start. */
async function bring(lab: Lab, backend: object, flags: readonly string[], dockers: Docker[]): Promise<void> {
  const etcd = await lab.etcd({ addresses: ["10.4.7.11/24"] });
  await etcd.put("/coreos.com/network/config", JSON.stringify({ Network: NETWORK, Backend: backend }));
  const hosts = await Promise.all(
    [21, 22].map(async (number) => {
      const host = await lab.host(`h${number - 20}`, { address: `10.4.7.${number}/24` });
      const subnet = `FLANNEL_NETWORK=${NETWORK}\nFLANNEL_SUBNET=172.7.${number}.1/24\n`;
      writeFileSync(join(host.directory, "subnet.env"), subnet);
      return host;
    }),
  );
  await Promise.all(hosts.map((host) => startTwilld(host, { etcd, flags })));
  for (const host of hosts) {
    // Docker closes FORWARD by its policy only where it was Docker that turned forwarding on.
    await host.sysctl({ "net.ipv4.ip_forward": 0 });
    dockers.push(await Docker.start(host));
  }
  const tar = await makeImage(dockers[0]?.host.directory ?? "");
  await Promise.all(dockers.map((docker) => docker.import(tar)));
}

describe.each(Object.entries(BACKENDS))("%s", (_, backend) => {
  let lab: Lab;
  let h1: Host;
  let h2: Host;
  let docker1: Docker;
  let docker2: Docker;
  let web: Container;
  const dockers: Docker[] = [];

  beforeAll(async () => {
    lab = await createLab();
    await bring(lab, backend, [], dockers);
    [docker1, docker2] = dockers as [Docker, Docker];
    [h1, h2] = dockers.map((docker) => docker.host) as [Host, Host];
  });

  afterAll(async () => {
    for (const docker of dockers) await docker.close();
    await lab?.close();
  });

  it("runs beside Docker's own rules", async () => {
    for (const docker of dockers) {
      expect(await docker.masqueraded()).toBe(0);
      const { stdout } = await docker.host.exec(["iptables", "-S", "FORWARD"]);
      expect(stdout).toContain("-P FORWARD DROP");
    }
    expect(await docker1.once("ip -4 -o address show eth0")).toContain("172.7.21.2/24");
  });

  it("brings the first request to a container that nobody has heard of", async () => {
    web = await docker2.nginx("web", ["--publish=8080:80", "--restart=always"]);
    expect(web.address).toMatch(/^172\.7\.22\./);
    expect(await docker1.once(`${GET} http://${web.address}/`)).toBe("172.7.21.2");
    expect(await docker2.requests("web", 1)).toEqual(["172.7.21.2"]);
  });

  it("shows the server the container's own address, from the first packet of each container on", async () => {
    const before = (await docker2.requests("web", 1)).length;
    const own: string[] = [];
    for (let number = 0; number < SHORT_LIVED; number++) {
      const said = await docker1.once(`ip -4 -o address show eth0; ${GET} http://${web.address}/`);
      const [, address, seen] = /inet (\S+)\/24 .*\n(\S+)$/s.exec(said) ?? [];
      expect(seen).toBe(address);
      own.push(seen ?? "");
    }
    expect((await docker2.requests("web", before + SHORT_LIVED)).slice(before)).toEqual(own);
    expect(await docker1.masqueraded()).toBe(0);
  });

  it("keeps the address of containers that start at once, of long and of broken packets", async () => {
    const client = await docker1.container("client", ["/bin/sleep", "1000"]);
    await Promise.all(
      [1, 2, 3].map(async () => {
        const said = await docker1.once(`ip -4 -o address show eth0; ${GET} http://${web.address}/`);
        const [, address, seen] = /inet (\S+)\/24 .*\n(\S+)$/s.exec(said) ?? [];
        expect(seen).toBe(address);
      }),
    );
    const inside = async (command: string) => docker1.run("exec", client.name, "/bin/sh", "-c", command);
    expect(await inside(`ping -c 3 -i 0.01 ${web.address}`)).toContain(" 0% packet loss");
    expect(await inside(`ping -c 3 -i 0.01 -s 5000 ${web.address}`)).toContain(" 0% packet loss");
    expect(await inside(`${GET} http://${web.address}/large | wc -c`)).toBe(String(4 << 20));
    expect((await docker2.requests("web", 1)).at(-1)).toBe(client.address);
    expect(await docker1.masqueraded()).toBe(0);
    expect(await docker2.masqueraded()).toBe(0);
  });

  it("reaches published ports", async () => {
    const remote = await docker1.inside("client");
    const published = async () => {
      const local = await docker2.inside("neighbour");
      const urls = [`http://${h2.address}:8080/`, "http://172.7.22.1:8080/"];
      for (const url of urls) {
        expect(await remote.httpGet(url)).toMatch(/^\d/);
        expect(await h1.httpGet(url)).toMatch(/^\d/);
        expect(await local.httpGet(url)).toMatch(/^\d/);
        expect(await h2.httpGet(url)).toMatch(/^\d/);
      }
      // The other node's address is outside the cluster network: Docker lends the container its node's.
      const seen = await remote.httpGet(urls[0] ?? "");
      expect(seen.trim()).toBe(h1.address);
      // By its own address the server still sees the container's.
      expect(await remote.httpGet(`http://${web.address}/`)).toMatch(/^172\.7\.21\./);
    };
    await docker2.container("neighbour", ["/bin/sleep", "1000"], ["--restart=always"]);
    await published();
    await docker2.down();
    await docker2.up(["--userland-proxy=false"]);
    web = await docker2.running("web");
    await docker2.running("neighbour");
    await published();
  });

  it("is reached past FORWARD by the other host's processes and by whoever routes to it", async () => {
    const far = await lab.host("h9", { address: "10.4.7.66/24" });
    await far.ip(`route add 172.7.22.0/24 via ${h2.address}`);
    const url = `http://${web.address}/`;
    expect((await far.httpGet(url)).trim()).toBe(far.address);
    expect((await h1.httpGet(url)).trim()).toMatch(/^(10\.4\.7\.21|172\.7\.21\.0)$/);
    expect((await h1.httpGet(url, { source: h1.address })).trim()).toBe(h1.address);
    for (const from of [far, h1]) {
      expect(await from.httpGet(`${url}large`)).toHaveLength(4 << 20);
      expect((await from.ping(web.address, { count: 3 })).lost).toEqual([]);
    }
  });

  it("goes on after a container was restarted", async () => {
    await docker2.run("restart", "--time=0", "web");
    web = await docker2.running("web");
    await docker1.run("restart", "--time=0", "client");
    const client = await docker1.running("client");
    expect(await docker1.run("exec", "client", "/bin/sh", "-c", `${GET} http://${web.address}/`)).toBe(
      client.address,
    );
  });

  it("loses nothing while dockerd is restarted and its containers live on", async () => {
    for (const docker of dockers) {
      await docker.down();
      await docker.up(["--live-restore"]);
    }
    web = await docker2.running("web");
    await docker1.run("start", "client");
    const client = await docker1.inside("client");
    const ping = await client.startPing(web.address);
    for (const docker of dockers) {
      await docker.down();
      await ping.replies(10);
      expect(await client.httpGet(`http://${web.address}/`)).toMatch(/^172\.7\.21\.(?![01]$)/m);
      await docker.up(["--live-restore"]);
    }
    expect((await ping.stop()).lost).toEqual([]);
    const { address } = await docker1.running("client");
    expect(await docker2.requests("web", 1)).toContain(address);
    expect(await docker1.once(`${GET} http://${web.address}/`)).toMatch(/^172\.7\.21\.(?![01]$)/);
  });

  it("changes nothing of Docker's rules", async () => {
    for (const docker of dockers) {
      expect(await docker.masqueraded()).toBeDefined();
      const { stdout } = await docker.host.exec(["iptables-save"]);
      expect(stdout).not.toMatch(/flannel|twill/i);
      expect((await docker.host.exec(["iptables", "-S", "FORWARD"])).stdout).toContain("-P FORWARD DROP");
    }
  });
});

describe("with --ip-masq", () => {
  let lab: Lab;
  let far: Host;
  const dockers: Docker[] = [];
  const rules = async (host: Host) => {
    const saved = await host.exec(["iptables-save"]);
    const listed = await host.exec(["nft", "list", "ruleset"], { check: false });
    return `${saved.stdout}${listed.stdout}`.replaceAll(
      /^#.*$|\[\d+:\d+\]|counter packets \d+ bytes \d+/gm,
      "",
    );
  };

  beforeAll(async () => {
    lab = await createLab();
    await bring(lab, BACKENDS.vxlan, ["--ip-masq"], dockers);
    far = await lab.host("h9", { address: "10.4.7.66/24" });
    await serve(far);
  });

  afterAll(async () => {
    for (const docker of dockers) await docker.close();
    await lab?.close();
  });

  it("lends containers the node's address, and changes no rule for it", async () => {
    const [docker1, docker2] = dockers as [Docker, Docker];
    const web = await docker2.nginx("web", ["--publish=8080:80", "--restart=always"]);
    await docker1.container("client", ["/bin/sleep", "1000"], ["--restart=always"]);
    for (const options of [[], ["--userland-proxy=false"]]) {
      if (options.length > 0) {
        for (const docker of dockers) {
          await docker.down();
          await docker.up(options);
        }
      }
      const { address } = await docker2.running(web.name);
      const own = (await docker1.running("client")).address;
      const client = await docker1.inside("client");
      const before = await Promise.all(dockers.map(({ host }) => rules(host)));
      for (const docker of dockers) expect(await docker.masqueraded()).toBeUndefined();

      const seen = { intact: true, seen: docker1.host.address };
      expect(await probe(client, `tcp ${far.address} ${TCP_PORT} 1000000 1000000`)).toMatchObject(seen);
      expect(await probe(client, `udp ${far.address} ${UDP_PORT} 1000 --count 5`)).toMatchObject(seen);
      expect((await client.ping(far.address, { count: 5 })).lost).toEqual([]);
      expect((await client.httpGet(`http://${address}/`)).trim()).toBe(own);
      const published = `http://${docker2.host.address}:8080/`;
      for (const from of [client, far, docker1.host, docker2.host])
        expect(await from.httpGet(published)).toMatch(/^\d/);
      expect(await Promise.all(dockers.map(({ host }) => rules(host)))).toEqual(before);
      expect(before.join()).not.toMatch(/twill|flannel/i);
    }
  });
});
